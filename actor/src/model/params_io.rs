//! Masters from checkpoints and into them.

use super::params::{ParamStore, Unit};
use crate::init::fill_tensor;
use crate::weights_io::{TensorData, TensorSpec, WriteOptions, tensor_specs, write_checkpoint};
use crate::{CheckpointReader, Error, ModelConfig, Result};
use std::path::Path;
use temper_tensor::Device;

impl ParamStore {
    /// Read every tensor of a checkpoint.
    ///
    /// # Errors
    /// A tensor is missing, of another shape, or stored in a format that is not read: the error names file and tensor.
    pub fn load(dev: &dyn Device, config: &ModelConfig, reader: &CheckpointReader) -> Result<Self> {
        let mut store = ParamStore::zeros(dev, config);
        for unit in &mut store.units {
            read_unit(dev, reader, unit)?;
        }
        Ok(store)
    }

    /// Fresh weights: a function of the seed and each tensor's name, see [`fill_tensor`].
    pub fn init(dev: &dyn Device, config: &ModelConfig, seed: u64) -> Self {
        Self::init_around(dev, config, seed, |_| None)
    }

    /// The tensors of `body`, and fresh ones where it has none or one of another shape: a value or reward model made
    /// from a policy by [`ModelConfig::with_head`].
    pub fn init_on(dev: &dyn Device, config: &ModelConfig, body: &ParamStore, seed: u64) -> Self {
        Self::init_around(dev, config, seed, |spec| {
            let (_, slot) = body.find(&spec.name).filter(|(_, slot)| slot.shape == spec.shape)?;
            body.read_tensor(dev, &slot.name)
        })
    }

    fn init_around(
        dev: &dyn Device,
        config: &ModelConfig,
        seed: u64,
        given: impl Fn(&TensorSpec) -> Option<Vec<f32>>,
    ) -> Self {
        let mut store = ParamStore::zeros(dev, config);
        for spec in tensor_specs(config) {
            let values = given(&spec).unwrap_or_else(|| {
                let mut fresh = vec![0.0; spec.num_elements()];
                fill_tensor(&spec, config.initializer_range, seed, &mut fresh);
                fresh
            });
            store.write_tensor(dev, &spec.name, &values).expect("a store has every canonical tensor of its model");
        }
        store
    }

    /// Write a Hugging Face model directory that transformers loads; `config` is this store's model.
    ///
    /// # Errors
    /// A file cannot be written, or `config` has a tensor that this store lacks.
    pub fn save(&self, dev: &dyn Device, dir: &Path, config: &ModelConfig, options: &WriteOptions<'_>) -> Result<()> {
        write_checkpoint(dir, config, options, |spec| match self.read_tensor(dev, &spec.name) {
            Some(values) => Ok(TensorData::F32(values.into())),
            None => Err(Error::tensor(dir, &spec.name, "a tensor of the model in memory", "none of this name")),
        })
    }
}

/// Elements that are decoded at once: on their way to the device they stay in the second cache level.
const STAGED_ELEMENTS: usize = 32 << 10;

/// Fill a unit from a checkpoint.
pub(super) fn read_unit(dev: &dyn Device, reader: &CheckpointReader, unit: &mut Unit) -> Result<()> {
    let layout = unit.layout.clone();
    let mut staged = vec![0.0; STAGED_ELEMENTS];
    for slot in &layout.units[unit.index].slots {
        let stored = reader.tensor(&slot.name)?;
        if stored.shape != slot.shape {
            let (expected, got) = (format!("shape {:?}", slot.shape), format!("shape {:?}", stored.shape));
            return Err(Error::tensor(reader.dir(), &slot.name, expected, got));
        }
        for start in slot.range.clone().step_by(STAGED_ELEMENTS) {
            let part = start..(start + STAGED_ELEMENTS).min(slot.range.end);
            let staged = &mut staged[..part.len()];
            reader.read_f32_range(&slot.name, start - slot.range.start, staged)?;
            dev.write(unit.view_mut(&part), staged);
        }
    }
    Ok(())
}
