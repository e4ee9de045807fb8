//! The f32 masters of a model, and everything that has their shape: gradients, moments, reference copies.

use super::layout::{Layout, TensorSlot, UnitLayout};
use crate::ModelConfig;
use std::ops::Range;
use std::sync::Arc;
use temper_tensor::{Buffer, Device, View, ViewMut};

/// One flat buffer and the tensors in it.
#[derive(Debug)]
pub struct Unit {
    pub(super) layout: Arc<Layout>,
    pub(super) index: usize,
    pub(super) buffer: Buffer,
}

impl Unit {
    /// The values. Elements between tensors are padding, always 0.
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// The values, to write. Padding must stay 0.
    pub fn buffer_mut(&mut self) -> &mut Buffer {
        &mut self.buffer
    }

    /// The tensors, in ascending order of their ranges.
    pub fn slots(&self) -> &[TensorSlot] {
        &self.layout.units[self.index].slots
    }

    pub(super) fn view(&self, range: &Range<usize>) -> View<'_> {
        self.buffer.view(range.clone())
    }

    pub(super) fn view_mut(&mut self, range: &Range<usize>) -> ViewMut<'_> {
        self.buffer.view_mut(range.clone())
    }

    /// Unit `index` in this one's memory, with this one's values; `None` where its tensors lie elsewhere.
    pub(super) fn in_place_of(self, index: usize) -> Option<Unit> {
        let [own, other] = [self.index, index].map(|index| &self.layout.units[index]);
        let ranges = |unit: &UnitLayout| unit.slots.iter().map(|slot| slot.range.clone()).collect::<Vec<_>>();
        (own.len == other.len && ranges(own) == ranges(other)).then_some(Unit { index, ..self })
    }
}

/// f32 values of every tensor of a model in flat units: unit 0 holds the embedding table, unit `1 + l` layer `l`, the
/// last unit the final norm and the head (nothing for a tied head).
///
/// Masters, gradients and optimizer moments are all of this type, so that a step is one kernel per unit.
#[derive(Debug)]
pub struct ParamStore {
    pub(super) layout: Arc<Layout>,
    pub(super) units: Vec<Unit>,
}

impl ParamStore {
    /// A store of zeros for a model.
    pub fn zeros(dev: &dyn Device, config: &ModelConfig) -> Self {
        Self::from_layout(dev, Arc::new(Layout::new(config)))
    }

    /// A store of zeros with the same tensors, for gradients and moments.
    pub fn zeros_like(&self, dev: &dyn Device) -> Self {
        Self::from_layout(dev, Arc::clone(&self.layout))
    }

    /// A store with the same tensors and values, as for a reference policy.
    pub fn duplicate(&self, dev: &dyn Device) -> Self {
        let mut copy = self.zeros_like(dev);
        copy.copy_from(dev, self);
        copy
    }

    fn from_layout(dev: &dyn Device, layout: Arc<Layout>) -> Self {
        let unit = |index| new_unit(dev, &layout, index);
        let units = (0..layout.units.len()).map(unit).collect();
        ParamStore { layout, units }
    }

    /// Number of units: layers + 2.
    pub fn num_units(&self) -> usize {
        self.units.len()
    }

    /// Unit `index`.
    ///
    /// # Panics
    /// If there is no such unit.
    pub fn unit(&self, index: usize) -> &Unit {
        &self.units[index]
    }

    /// Unit `index`, to write.
    ///
    /// # Panics
    /// If there is no such unit.
    pub fn unit_mut(&mut self, index: usize) -> &mut Unit {
        &mut self.units[index]
    }

    /// All units.
    pub fn units(&self) -> &[Unit] {
        &self.units
    }

    /// All units, to write.
    pub fn units_mut(&mut self) -> &mut [Unit] {
        &mut self.units
    }

    /// Every tensor with the number of its unit, in the order of units and ranges.
    pub fn tensors(&self) -> impl Iterator<Item = (usize, &TensorSlot)> {
        self.units.iter().enumerate().flat_map(|(index, unit)| unit.slots().iter().map(move |slot| (index, slot)))
    }

    /// Number of parameters; padding is not counted.
    pub fn num_parameters(&self) -> usize {
        self.tensors().map(|(_, slot)| slot.range.len()).sum()
    }

    /// Unit and slot of the tensor `name`.
    pub fn find(&self, name: &str) -> Option<(usize, &TensorSlot)> {
        self.tensors().find(|(_, slot)| slot.name == name)
    }

    /// Values of the tensor `name`, or `None` where the model has no such tensor.
    pub fn read_tensor(&self, dev: &dyn Device, name: &str) -> Option<Vec<f32>> {
        let (index, slot) = self.find(name)?;
        let mut values = vec![0.0; slot.range.len()];
        dev.read(self.units[index].view(&slot.range), &mut values);
        Some(values)
    }

    /// Replace the values of the tensor `name`; `None` where the model has no such tensor.
    ///
    /// # Panics
    /// If `values` has another length than the tensor.
    pub fn write_tensor(&mut self, dev: &dyn Device, name: &str, values: &[f32]) -> Option<()> {
        let (index, slot) = self.find(name)?;
        let range = slot.range.clone();
        dev.write(self.units[index].view_mut(&range), values);
        Some(())
    }

    /// Set every value to 0.
    pub fn clear(&mut self, dev: &dyn Device) {
        for unit in &mut self.units {
            dev.fill(unit.buffer.all_mut(), 0.0);
        }
    }

    /// Take the values of a store of the same model.
    ///
    /// # Panics
    /// If the stores have different tensors.
    pub fn copy_from(&mut self, dev: &dyn Device, other: &ParamStore) {
        self.zip(other, |to, from| dev.copy(from, to));
    }

    /// `self = decay * self + (1 - decay) * other`: a reference policy by moving average.
    ///
    /// # Panics
    /// If the stores have different tensors.
    pub fn lerp_from(&mut self, dev: &dyn Device, other: &ParamStore, decay: f32) {
        self.zip(other, |to, from| dev.lerp(from, decay, to));
    }

    /// Sum of squares of all values, in f64, in one fixed order.
    pub fn sum_squares(&self, dev: &dyn Device) -> f64 {
        self.units.iter().map(|unit| dev.sum_squares(unit.buffer.all())).sum()
    }

    fn zip(&mut self, other: &ParamStore, f: impl Fn(ViewMut<'_>, View<'_>)) {
        assert_eq!(self.layout.units, other.layout.units, "stores of different models");
        for (to, from) in self.units.iter_mut().zip(&other.units) {
            f(to.buffer.all_mut(), from.buffer.all());
        }
    }
}

/// A unit of zeros.
pub(super) fn new_unit(dev: &dyn Device, layout: &Arc<Layout>, index: usize) -> Unit {
    Unit { layout: Arc::clone(layout), index, buffer: dev.zeros(layout.units[index].len) }
}
