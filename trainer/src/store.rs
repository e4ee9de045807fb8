//! f32 values with the shape of a model, of which a rank holds all or a shard of every unit.

use crate::{Error, Ranks};
use std::ops::Range;
use temper_actor::{ParamStore, Unit, UnitShapes};
use temper_collective::Gathering;
use temper_tensor::{Buffer, Device, View, ViewMut};

/// Masters, gradients or moments.
#[derive(Debug)]
pub(crate) enum Store {
    /// Every unit in full.
    Whole(ParamStore),
    /// This rank's range of every unit.
    Shards(Shards),
}

/// This rank's range of every unit.
#[derive(Debug)]
pub(crate) struct Shards {
    shapes: UnitShapes,
    parts: Vec<(Range<usize>, Buffer)>,
}

/// A unit that is there, or was gathered.
#[derive(Debug)]
pub(crate) enum UnitRef<'a> {
    Held(&'a Unit),
    Gathered(Unit),
}

impl std::ops::Deref for UnitRef<'_> {
    type Target = Unit;

    fn deref(&self) -> &Unit {
        match self {
            UnitRef::Held(unit) => unit,
            UnitRef::Gathered(unit) => unit,
        }
    }
}

/// A unit that is being gathered, or was there.
#[derive(Debug)]
pub(crate) struct BegunUnit {
    index: usize,
    /// With the unit's values, of which this rank's part is there.
    gathering: Option<(Gathering, Vec<f32>)>,
}

impl BegunUnit {
    /// Which one it is.
    pub(crate) fn index(&self) -> usize {
        self.index
    }
}

/// See [`Store::units`].
#[derive(Debug)]
pub(crate) struct Units<'a> {
    store: &'a Store,
    on: (&'a dyn Device, Option<&'a Ranks>),
    next: usize,
    begun: Option<BegunUnit>,
}

impl<'a> Iterator for Units<'a> {
    type Item = Result<UnitRef<'a>, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let (index, num_units, (dev, ranks)) = (self.next, self.store.num_units(), self.on);
        self.next += 1;
        let begin = |index| self.store.begin_unit(dev, ranks, index);
        let begun = match self.begun.take() {
            None if index < num_units => begin(index),
            begun => Ok(begun?),
        };
        let gathered = begun.and_then(|begun| {
            if self.next < num_units {
                self.begun = Some(begin(self.next)?);
            }
            self.store.end_unit(dev, ranks, begun)
        });
        if gathered.is_err() {
            self.next = num_units;
        }
        Some(gathered)
    }
}

fn unsharded() -> Error {
    Error::invalid("a shard", "is held by a trainer without ranks")
}

impl Store {
    /// Zeros: this rank's shards where there are ranks.
    pub(crate) fn zeros(dev: &dyn Device, shapes: &UnitShapes, ranks: Option<&Ranks>) -> Self {
        match ranks {
            None => Store::Whole(shapes.store((0..shapes.num_units()).map(|i| shapes.zeros(dev, i)).collect())),
            Some(ranks) => {
                let part = |index| {
                    let range = ranks.own(shapes.unit_len(index));
                    let buffer = dev.zeros(range.len());
                    (range, buffer)
                };
                let parts = (0..shapes.num_units()).map(part).collect();
                Store::Shards(Shards { shapes: shapes.clone(), parts })
            }
        }
    }

    /// Units that come one by one, in order; of each a shard is kept where there are ranks.
    pub(crate) fn from_units(
        dev: &dyn Device,
        shapes: &UnitShapes,
        ranks: Option<&Ranks>,
        units: impl Iterator<Item = Result<Unit, Error>>,
    ) -> Result<Self, Error> {
        let Some(ranks) = ranks else {
            return Ok(Store::Whole(shapes.store(units.collect::<Result<_, _>>()?)));
        };
        let mut parts = Vec::with_capacity(shapes.num_units());
        for unit in units {
            let unit = unit?;
            let range = ranks.own(unit.buffer().len());
            let mut buffer = dev.zeros(range.len());
            dev.copy(unit.buffer().view(range.clone()), buffer.all_mut());
            parts.push((range, buffer));
        }
        Ok(Store::Shards(Shards { shapes: shapes.clone(), parts }))
    }

    /// This rank's part of a whole store.
    pub(crate) fn of(dev: &dyn Device, whole: ParamStore, ranks: Option<&Ranks>) -> Result<Self, Error> {
        let shapes = whole.shapes();
        let unit = |index| {
            let mut unit = shapes.zeros(dev, index);
            dev.copy(whole.unit(index).buffer().all(), unit.buffer_mut().all_mut());
            Ok(unit)
        };
        Store::from_units(dev, &shapes, ranks, (0..shapes.num_units()).map(unit))
    }

    /// The same values again.
    pub(crate) fn duplicate(&self, dev: &dyn Device) -> Self {
        match self {
            Store::Whole(store) => Store::Whole(store.duplicate(dev)),
            Store::Shards(shards) => {
                let copy = |(range, from): &(Range<usize>, Buffer)| {
                    let mut buffer = dev.zeros(from.len());
                    dev.copy(from.all(), buffer.all_mut());
                    (range.clone(), buffer)
                };
                let parts = shards.parts.iter().map(copy).collect();
                Store::Shards(Shards { shapes: shards.shapes.clone(), parts })
            }
        }
    }

    pub(crate) fn shapes(&self) -> UnitShapes {
        match self {
            Store::Whole(store) => store.shapes(),
            Store::Shards(shards) => shards.shapes.clone(),
        }
    }

    pub(crate) fn num_units(&self) -> usize {
        match self {
            Store::Whole(store) => store.num_units(),
            Store::Shards(shards) => shards.parts.len(),
        }
    }

    /// Bytes that this rank holds.
    pub(crate) fn num_bytes(&self) -> usize {
        (0..self.num_units()).map(|index| self.held(index).len() * size_of::<f32>()).sum()
    }

    /// The range of unit `index` that is here.
    pub(crate) fn held(&self, index: usize) -> Range<usize> {
        match self {
            Store::Whole(store) => 0..store.unit(index).buffer().len(),
            Store::Shards(shards) => shards.parts[index].0.clone(),
        }
    }

    /// Elements `range` of unit `index`, which are here.
    pub(crate) fn view(&self, index: usize, range: Range<usize>) -> View<'_> {
        match self {
            Store::Whole(store) => store.unit(index).buffer().view(range),
            Store::Shards(shards) => {
                let (held, buffer) = &shards.parts[index];
                buffer.view(range.start - held.start..range.end - held.start)
            }
        }
    }

    /// As [`Store::view`], to write.
    pub(crate) fn view_mut(&mut self, index: usize, range: Range<usize>) -> ViewMut<'_> {
        match self {
            Store::Whole(store) => store.unit_mut(index).buffer_mut().view_mut(range),
            Store::Shards(shards) => {
                let (held, buffer) = &mut shards.parts[index];
                buffer.view_mut(range.start - held.start..range.end - held.start)
            }
        }
    }

    /// Keep what is here of unit `index` in other memory, which has the values and the length.
    pub(crate) fn replace(&mut self, index: usize, buffer: Buffer) {
        assert_eq!(buffer.len(), self.held(index).len(), "the part of unit {index} in other memory");
        match self {
            Store::Whole(store) => *store.unit_mut(index).buffer_mut() = buffer,
            Store::Shards(shards) => shards.parts[index].1 = buffer,
        }
    }

    pub(crate) fn clear(&mut self, dev: &dyn Device) {
        for index in 0..self.num_units() {
            let held = self.held(index);
            dev.fill(self.view_mut(index, held), 0.0);
        }
    }

    /// `self = other`, over what is here.
    pub(crate) fn copy_from(&mut self, dev: &dyn Device, other: &Store) {
        for index in 0..self.num_units() {
            let held = self.held(index);
            dev.copy(other.view(index, held.clone()), self.view_mut(index, held));
        }
    }

    /// `self = decay * self + (1 - decay) * other`, over what is here.
    pub(crate) fn lerp_from(&mut self, dev: &dyn Device, other: &Store, decay: f32) {
        for index in 0..self.num_units() {
            let held = self.held(index);
            dev.lerp(other.view(index, held.clone()), decay, self.view_mut(index, held));
        }
    }

    /// Begin to have unit `index` in full: where it is sharded, this rank's part goes to the others. All ranks begin
    /// the same units in the same order, and end them in that order.
    pub(crate) fn begin_unit(&self, dev: &dyn Device, ranks: Option<&Ranks>, index: usize) -> Result<BegunUnit, Error> {
        let gathering = match (self, ranks) {
            (Store::Whole(_), _) => None,
            (Store::Shards(_), None) => return Err(unsharded()),
            (Store::Shards(shards), Some(ranks)) => {
                let (range, buffer) = &shards.parts[index];
                let mut values = vec![0.0; shards.shapes.unit_len(index)];
                let own = &mut values[range.clone()];
                dev.read(buffer.all(), own);
                Some((ranks.begin_gather(own)?, values))
            }
        };
        Ok(BegunUnit { index, gathering })
    }

    /// A unit in full that was begun.
    pub(crate) fn end_unit(
        &self,
        dev: &dyn Device,
        ranks: Option<&Ranks>,
        begun: BegunUnit,
    ) -> Result<UnitRef<'_>, Error> {
        let index = begun.index;
        match (self, ranks, begun.gathering) {
            (Store::Whole(store), ..) => Ok(UnitRef::Held(store.unit(index))),
            (Store::Shards(shards), Some(ranks), Some((gathering, mut values))) => {
                ranks.end_gather(gathering, &mut values)?;
                let mut unit = shards.shapes.zeros(dev, index);
                dev.write(unit.buffer_mut().all_mut(), &values);
                Ok(UnitRef::Gathered(unit))
            }
            (Store::Shards(_), ..) => Err(unsharded()),
        }
    }

    /// All units in full, in order; while one is used the parts of the next are on their way. All ranks go through all
    /// of them.
    pub(crate) fn units<'a>(&'a self, dev: &'a dyn Device, ranks: Option<&'a Ranks>) -> Units<'a> {
        Units { store: self, on: (dev, ranks), next: 0, begun: None }
    }

    /// Make the other ranks' parts of every unit those that they hold.
    pub(crate) fn gather_in_place(&mut self, dev: &dyn Device, ranks: &Ranks) -> Result<(), Error> {
        let Store::Whole(store) = self else { return Ok(()) };
        for unit in store.units_mut() {
            let mut values = vec![0.0; unit.buffer().len()];
            let own = ranks.own(values.len());
            dev.read(unit.buffer().view(own.clone()), &mut values[own]);
            ranks.gather(&mut values)?;
            dev.write(unit.buffer_mut().all_mut(), &values);
        }
        Ok(())
    }

    /// Do something with the whole store; it is gathered for that where it is sharded. All ranks ask together.
    pub(crate) fn with_whole<R>(
        &self,
        dev: &dyn Device,
        ranks: Option<&Ranks>,
        then: impl FnOnce(&ParamStore) -> Result<R, Error>,
    ) -> Result<R, Error> {
        if let Store::Whole(store) = self {
            return then(store);
        }
        let shapes = self.shapes();
        let mut units = Vec::with_capacity(shapes.num_units());
        for unit in self.units(dev, ranks) {
            if let UnitRef::Gathered(unit) = unit? {
                units.push(unit);
            }
        }
        then(&shapes.store(units))
    }

    /// As [`Store::with_whole`], on the world's first rank alone; the others only take part in the gathering.
    pub(crate) fn on_first<R>(
        &self,
        dev: &dyn Device,
        ranks: Option<&Ranks>,
        then: impl FnOnce(&ParamStore) -> Result<R, Error>,
    ) -> Result<Option<R>, Error> {
        match ranks {
            Some(others) if others.rank() > 0 => {
                self.units(dev, ranks).try_for_each(|unit| unit.map(drop))?;
                Ok(None)
            }
            _ => self.with_whole(dev, ranks, then).map(Some),
        }
    }
}
