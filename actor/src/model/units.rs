//! Units one at a time: for whoever holds only parts of a model.

use super::backward::{Below, OutputGrads};
use super::layout::{HeadRanges, Layout, TensorSlot};
use super::packed::PackedPolicy;
use super::params::{ParamStore, Unit, new_unit};
use super::params_io::read_unit;
use super::train::Tape;
use crate::{CheckpointReader, ModelConfig, Result};
use std::sync::Arc;
use temper_tensor::{DType, Device};

/// The tensors of a model and how they lie in units, without their values.
#[derive(Debug, Clone)]
pub struct UnitShapes(Arc<Layout>);

impl UnitShapes {
    /// Those of a model.
    pub fn new(config: &ModelConfig) -> Self {
        UnitShapes(Arc::new(Layout::new(config)))
    }

    /// Number of units: layers + 2.
    pub fn num_units(&self) -> usize {
        self.0.units.len()
    }

    /// Elements of unit `index`, padding included.
    ///
    /// # Panics
    /// If there is no such unit.
    pub fn unit_len(&self, index: usize) -> usize {
        self.0.units[index].len
    }

    /// The tensors of unit `index`, in ascending order of their ranges.
    ///
    /// # Panics
    /// If there is no such unit.
    pub fn slots(&self, index: usize) -> &[TensorSlot] {
        &self.0.units[index].slots
    }

    /// Unit `index`, of zeros.
    ///
    /// # Panics
    /// If there is no such unit.
    pub fn zeros(&self, dev: &dyn Device, index: usize) -> Unit {
        new_unit(dev, &self.0, index)
    }

    /// Unit `index` of a checkpoint.
    ///
    /// # Errors
    /// A tensor that is missing, of another shape, or cannot be read, by file and name.
    ///
    /// # Panics
    /// If there is no such unit.
    pub fn load(&self, dev: &dyn Device, reader: &CheckpointReader, index: usize) -> Result<Unit> {
        let mut unit = self.zeros(dev, index);
        read_unit(dev, reader, &mut unit)?;
        Ok(unit)
    }

    /// A store of these units, in order.
    ///
    /// # Panics
    /// If they are not the units of this model.
    pub fn store(&self, units: Vec<Unit>) -> ParamStore {
        let in_order = units.iter().enumerate().all(|(index, unit)| unit.index == index);
        assert!(in_order && units.len() == self.num_units(), "the units of a model, in order");
        assert!(units.iter().all(|unit| unit.layout.units == self.0.units), "units of another model");
        ParamStore { layout: Arc::clone(&self.0), units }
    }
}

impl ParamStore {
    /// The tensors of this store.
    pub fn shapes(&self) -> UnitShapes {
        UnitShapes(Arc::clone(&self.layout))
    }
}

/// Masters and gradients of a backward, unit by unit: whoever holds shards gathers a unit before it is used and gives
/// its gradient away when it is complete.
pub trait BackwardUnits {
    /// Masters of unit `index`, and its gradient, to be added to.
    fn open(&mut self, index: usize) -> (&Unit, &mut Unit);
    /// The gradient of unit `index` alone.
    fn grad(&mut self, index: usize) -> &mut Unit;
    /// This backward does nothing more with unit `index`.
    fn close(&mut self, index: usize);
}

/// Masters and gradients that are all there.
#[derive(Debug)]
pub struct WholeUnits<'a> {
    /// The values that the policy was packed from.
    pub masters: &'a ParamStore,
    /// Gradients, added to.
    pub grads: &'a mut ParamStore,
}

impl BackwardUnits for WholeUnits<'_> {
    fn open(&mut self, index: usize) -> (&Unit, &mut Unit) {
        (&self.masters.units[index], &mut self.grads.units[index])
    }

    fn grad(&mut self, index: usize) -> &mut Unit {
        &mut self.grads.units[index]
    }

    fn close(&mut self, _: usize) {}
}

impl PackedPolicy {
    /// As [`PackedPolicy::backward`], unit by unit. Every unit is opened and closed, in an order that is the model's:
    /// gradients of the outputs that are all zero compute nothing, and go through the units all the same.
    ///
    /// # Panics
    /// As [`PackedPolicy::backward`].
    pub fn backward_units(&self, tape: Tape<'_>, outputs: OutputGrads<'_>, units: &mut dyn BackwardUnits) {
        if outputs.are_zero() {
            return self.visit_units(units);
        }
        self.backward_through(tape, units, |part, arena, units| {
            self.head_backward((part, arena), outputs, units);
            Below::Gradients
        });
    }

    /// Open and close every unit as a backward does, and compute nothing: for a rank that has no work when others do.
    pub fn visit_units(&self, units: &mut dyn BackwardUnits) {
        match &self.layout.head {
            HeadRanges::Tied => drop(units.open(0)),
            HeadRanges::Untied(_) | HeadRanges::Scalar(_) => drop(units.open(self.layout.final_unit())),
        }
        self.visit_below_head(units);
    }

    /// [`PackedPolicy::visit_units`] from behind the head on.
    pub(super) fn visit_below_head(&self, units: &mut dyn BackwardUnits) {
        units.grad(self.layout.final_unit());
        units.close(self.layout.final_unit());
        for index in (1..=self.layers.len()).rev() {
            units.open(index);
            units.close(index);
        }
        units.grad(0);
        units.close(0);
    }

    /// Pack units that come one by one, in order.
    ///
    /// # Errors
    /// The first that could not be had.
    ///
    /// # Panics
    /// If there are too few.
    pub fn from_units<E>(
        dev: &Arc<dyn Device>,
        config: &ModelConfig,
        dtype: DType,
        units: impl Iterator<Item = std::result::Result<Unit, E>>,
    ) -> std::result::Result<Self, E> {
        Self::assemble(dev, config, dtype.into(), (Arc::new(Layout::new(config)), units))
    }
}
