//! Masters, gradients and moments of one model on this rank: what a backward adds to, and what a step does.

use crate::optimizer::{self, Moments, StepSize};
use crate::published::Published;
use crate::sequence::check_exchange;
use crate::shared_masters::SharedMasters;
use crate::store::{BegunUnit, Store, UnitRef};
use crate::trainer::SharedPolicy;
use crate::{Error, Ranks};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use temper_actor::{BackwardUnits, CheckpointReader, ModelConfig, PackedPolicy, Unit, UnitShapes, WeightHasher};
use temper_collective::SHARD_ALIGNMENT;
use temper_proto::OptimizerConfig;
use temper_tensor::{DType, Device};
use temper_types::ContentHash;

/// One model's state on this rank.
#[derive(Debug)]
pub(crate) struct Weights {
    pub(crate) masters: Store,
    pub(crate) moments: Option<Moments>,
    /// Where the masters lie for other processes.
    pub(crate) shared: Option<SharedMasters>,
    /// What was published, where engines are sent changes.
    pub(crate) published: Option<Published>,
    grads: Option<Store>,
}

/// Ranks where masters are sharded, none where they are whole.
pub(crate) fn master_ranks(ranks: Option<&Ranks>) -> Option<&Ranks> {
    ranks.filter(|ranks| ranks.sharding().shards_masters())
}

fn gradient_ranks(ranks: Option<&Ranks>) -> Option<&Ranks> {
    ranks.filter(|ranks| ranks.sharding().shards_gradients())
}

/// Read a model directory unit by unit, keeping what is this rank's where `keeps` says that it is sharded; with its
/// hash.
pub(crate) fn load_store(
    dev: &dyn Device,
    config: &ModelConfig,
    dir: &Path,
    keeps: Option<&Ranks>,
) -> Result<(Store, ContentHash), Error> {
    let reader = CheckpointReader::open(dir)?;
    reader.validate(config)?;
    let shapes = UnitShapes::new(config);
    let mut hasher = WeightHasher::default();
    let units = (0..shapes.num_units()).map(|index| {
        let unit = shapes.load(dev, &reader, index)?;
        hasher.add(dev, &unit);
        Ok(unit)
    });
    let store = Store::from_units(dev, &shapes, keeps, units)?;
    Ok((store, hasher.finish()))
}

/// The hash of masters, on every rank.
pub(crate) fn content_hash(dev: &dyn Device, ranks: Option<&Ranks>, masters: &Store) -> Result<ContentHash, Error> {
    let mut hasher = WeightHasher::default();
    let is_first = ranks.is_none_or(|ranks| ranks.rank() == 0);
    for unit in masters.units(dev, ranks) {
        let unit = unit?;
        if is_first {
            hasher.add(dev, &unit);
        }
    }
    let mut hash = hasher.finish();
    if let Some(ranks) = ranks {
        ranks.tell_from_first(&mut hash.0)?;
    }
    Ok(hash)
}

/// Pack masters, once per process.
pub(crate) fn pack(
    (dev, ranks): (&Arc<dyn Device>, Option<&Ranks>),
    masters: &Store,
    (config, dtype): (&ModelConfig, DType),
    masked_ids: &[u32],
) -> Result<SharedPolicy, Error> {
    let leads = ranks.is_none_or(Ranks::leads);
    let packed = match masters {
        Store::Whole(store) => leads.then(|| PackedPolicy::new(dev, store, config, dtype)),
        Store::Shards(_) => {
            let gathered = |unit| match unit? {
                UnitRef::Gathered(unit) => Ok(unit),
                UnitRef::Held(_) => Err(Error::invalid("a shard", "is whole")),
            };
            let mut units = masters.units(&**dev, ranks).map(gathered);
            if leads {
                Some(PackedPolicy::from_units(dev, config, dtype, units)?)
            } else {
                units.try_for_each(|unit| unit.map(drop))?;
                None
            }
        }
    };
    let packed = packed.map(|mut packed| {
        packed.set_masked_ids(masked_ids.to_vec());
        packed
    });
    match (ranks, packed) {
        (Some(ranks), packed) => ranks.hand_on(packed),
        (None, Some(packed)) => Ok(Arc::new(RwLock::new(packed))),
        (None, None) => Err(Error::invalid("a trainer without ranks", "leads its process")),
    }
}

/// Give packed weights the values of their masters, once per process.
pub(crate) fn repack(
    dev: &dyn Device,
    ranks: Option<&Ranks>,
    masters: &Store,
    packed: &SharedPolicy,
) -> Result<(), Error> {
    let leads = ranks.is_none_or(Ranks::leads);
    let mut packed = leads.then(|| packed.write().unwrap_or_else(PoisonError::into_inner));
    for unit in masters.units(dev, ranks) {
        let unit = unit?;
        if let Some(packed) = &mut packed {
            packed.repack_unit(&unit);
        }
    }
    drop(packed);
    ranks.map_or(Ok(()), Ranks::fence)
}

impl Weights {
    pub(crate) fn new(masters: Store) -> Self {
        Weights { masters, moments: None, shared: None, published: None, grads: None }
    }

    /// Gradients and moments are of no use after a stage.
    pub(crate) fn end_stage(&mut self) {
        self.moments = None;
        self.grads = None;
    }

    /// Gradients of zero, to be given back to [`Weights::keep_grads`].
    pub(crate) fn take_grads(&mut self, dev: &dyn Device, ranks: Option<&Ranks>) -> Store {
        let shapes = self.masters.shapes();
        let mut grads = self.grads.take().unwrap_or_else(|| Store::zeros(dev, &shapes, gradient_ranks(ranks)));
        grads.clear(dev);
        grads
    }

    pub(crate) fn keep_grads(&mut self, grads: Store) {
        self.grads = Some(grads);
    }

    /// Global norm of the gradient, in f64, the same on every rank and for every sharding of a world.
    ///
    /// # Errors
    /// A gradient that is not finite, by the name of its tensor.
    pub(crate) fn grad_norm(dev: &dyn Device, ranks: Option<&Ranks>, grads: &Store) -> Result<f64, Error> {
        match (ranks, grads) {
            (None, Store::Whole(grads)) => optimizer::finite_norm(dev, grads),
            (None, Store::Shards(_)) => Err(Error::invalid("a shard", "is held by a trainer without ranks")),
            (Some(ranks), grads) => sharded_norm(dev, ranks, grads),
        }
    }

    /// Clip and step what is this rank's, and let every rank have what it holds.
    pub(crate) fn step(
        &mut self,
        (dev, ranks): (&dyn Device, Option<&Ranks>),
        (optimizer, size): (&OptimizerConfig, StepSize),
        grads: &Store,
    ) -> Result<(), Error> {
        let shapes = self.masters.shapes();
        let moments = self.moments.get_or_insert_with(|| Moments {
            first: Store::zeros(dev, &shapes, ranks),
            second: Store::zeros(dev, &shapes, ranks),
            num_updates: 0,
        });
        moments.num_updates += 1;
        let step = optimizer::adamw_step(optimizer, size, moments.num_updates);
        for index in 0..shapes.num_units() {
            let own = moments.first.held(index);
            let pair = (moments.first.view_mut(index, own.clone()), moments.second.view_mut(index, own.clone()));
            dev.adamw(step, grads.view(index, own.clone()), self.masters.view_mut(index, own), pair);
        }
        ranks.map_or(Ok(()), |ranks| self.masters.gather_in_place(dev, ranks))
    }

    /// Bytes of masters, gradients and moments that are allocated.
    pub(crate) fn memory(&self) -> crate::Memory {
        let bytes = |store: &Store| store.num_bytes() as u64;
        let moments = self.moments.as_ref();
        crate::Memory {
            masters: bytes(&self.masters),
            gradients: self.grads.as_ref().map_or(0, bytes),
            moments: moments.map_or(0, |m| bytes(&m.first) + bytes(&m.second)),
        }
    }
}

/// Squares of blocks of [`SHARD_ALIGNMENT`] elements, added up in the order of units and blocks.
fn sharded_norm(dev: &dyn Device, ranks: &Ranks, grads: &Store) -> Result<f64, Error> {
    let shapes = grads.shapes();
    let mut own = Vec::new();
    for index in 0..shapes.num_units() {
        let range = ranks.own(shapes.unit_len(index));
        for start in range.clone().step_by(SHARD_ALIGNMENT) {
            let block = start..(start + SHARD_ALIGNMENT).min(range.end);
            own.push(dev.sum_squares(grads.view(index, block)));
        }
    }
    let lists = ranks.shard_lists(&own)?;
    let mut rest: Vec<_> = lists.iter().map(|list| list.iter()).collect();
    let (mut total, mut first_bad) = (0.0, None);
    for index in 0..shapes.num_units() {
        let shards = temper_collective::shard_ranges(shapes.unit_len(index), lists.len());
        for (blocks, shard) in rest.iter_mut().zip(shards) {
            for start in shard.step_by(SHARD_ALIGNMENT) {
                let Some(sum) = blocks.next() else { continue };
                total += sum;
                if !sum.is_finite() {
                    first_bad.get_or_insert((index, start, *sum));
                }
            }
        }
    }
    if total.is_finite() {
        return Ok(f64::sqrt(total));
    }
    let named = first_bad.and_then(|(index, start, sum_squares)| {
        let slot = shapes.slots(index).iter().find(|slot| slot.range.end > start)?;
        Some(Error::NonFiniteGradient { tensor: slot.name.clone(), sum_squares })
    });
    let all = || Error::NonFiniteGradient { tensor: "all tensors together".to_owned(), sum_squares: total };
    Err(named.unwrap_or_else(all))
}

/// What a backward reads and adds to: whole stores in place, or units that are gathered before use and reduced after.
/// While a unit is used the parts of the one that comes next are on their way.
pub(crate) struct Pass<'a> {
    dev: &'a dyn Device,
    ranks: Option<&'a Ranks>,
    shapes: UnitShapes,
    masters: &'a Store,
    grads: &'a mut Store,
    gathered: BTreeMap<usize, Unit>,
    begun: Option<BegunUnit>,
    scratch: BTreeMap<usize, Unit>,
    error: Option<Error>,
}

impl<'a> Pass<'a> {
    pub(crate) fn new(
        (dev, ranks): (&'a dyn Device, Option<&'a Ranks>),
        masters: &'a Store,
        grads: &'a mut Store,
    ) -> Self {
        let (gathered, scratch) = Default::default();
        Pass { dev, ranks, shapes: masters.shapes(), masters, grads, gathered, begun: None, scratch, error: None }
    }

    /// Whether every unit was shared, and all that was told on the way came.
    pub(crate) fn finish(self) -> Result<(), Error> {
        check_exchange(self.ranks)?;
        self.error.map_or(Ok(()), Err)
    }

    fn reserve(&mut self, index: usize) {
        let is_direct = self.ranks.is_none();
        if !is_direct && !self.scratch.contains_key(&index) {
            self.scratch.insert(index, self.shapes.zeros(self.dev, index));
        }
    }

    fn gather(&mut self, index: usize) {
        if matches!(self.masters, Store::Whole(_)) || self.gathered.contains_key(&index) {
            return;
        }
        let unit = match self.error {
            None => self.gather_ahead(index),
            Some(_) => Ok(UnitRef::Gathered(self.shapes.zeros(self.dev, index))),
        };
        let unit = match unit {
            Ok(UnitRef::Gathered(unit)) => unit,
            Ok(UnitRef::Held(_)) => return,
            Err(error) => {
                self.error = Some(error);
                self.shapes.zeros(self.dev, index)
            }
        };
        self.gathered.insert(index, unit);
    }

    /// Unit `index`, and the beginning of the next one: from the head's, layers follow from the last to the first.
    fn gather_ahead(&mut self, index: usize) -> Result<UnitRef<'a>, Error> {
        let (masters, dev, ranks) = (self.masters, self.dev, self.ranks);
        let begun = match self.begun.take().filter(|begun| begun.index() == index) {
            Some(begun) => begun,
            None => masters.begin_unit(dev, ranks, index)?,
        };
        let last_layer = self.shapes.num_units() - 2;
        let is_head = index == 0 || index > last_layer;
        let next = if is_head { last_layer } else { index - 1 };
        if next > 0 {
            self.begun = Some(masters.begin_unit(dev, ranks, next)?);
        }
        masters.end_unit(dev, ranks, begun)
    }

    fn share(&mut self, ranks: &Ranks, index: usize) -> Result<(), Error> {
        let Some(unit) = self.scratch.remove(&index) else { return Ok(()) };
        let mut values = vec![0.0; unit.buffer().len()];
        self.dev.read(unit.buffer().all(), &mut values);
        drop(unit);
        ranks.reduce(&mut values)?;
        let held = self.grads.held(index);
        let sum = self.dev.upload(&values[held.clone()]);
        self.dev.add(sum.all(), self.grads.view_mut(index, held));
        Ok(())
    }
}

impl BackwardUnits for Pass<'_> {
    fn open(&mut self, index: usize) -> (&Unit, &mut Unit) {
        self.reserve(index);
        self.gather(index);
        let masters = match self.masters {
            Store::Whole(store) => store.unit(index),
            Store::Shards(_) => &self.gathered[&index],
        };
        let grads = match (self.scratch.get_mut(&index), &mut *self.grads) {
            (Some(scratch), _) => scratch,
            (None, Store::Whole(grads)) => grads.unit_mut(index),
            (None, Store::Shards(_)) => unreachable!("shards have ranks, and ranks a scratch unit"),
        };
        (masters, grads)
    }

    fn grad(&mut self, index: usize) -> &mut Unit {
        self.reserve(index);
        match (self.scratch.get_mut(&index), &mut *self.grads) {
            (Some(scratch), _) => scratch,
            (None, Store::Whole(grads)) => grads.unit_mut(index),
            (None, Store::Shards(_)) => unreachable!("shards have ranks, and ranks a scratch unit"),
        }
    }

    fn close(&mut self, index: usize) {
        let Some(ranks) = self.ranks else { return };
        self.gathered.remove(&index);
        if self.error.is_none() {
            self.error = self.share(ranks, index).err();
        }
        if index == 0 {
            ranks.count_pass();
        }
    }
}
