//! Masters from checkpoints and into them.

use super::params::{ParamStore, Unit};
use crate::weights_io::{TensorData, WriteOptions, write_checkpoint};
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

/// Fill a unit from a checkpoint.
pub(super) fn read_unit(dev: &dyn Device, reader: &CheckpointReader, unit: &mut Unit) -> Result<()> {
    let layout = unit.layout.clone();
    for slot in &layout.units[unit.index].slots {
        let stored = reader.tensor(&slot.name)?;
        if stored.shape != slot.shape {
            let (expected, got) = (format!("shape {:?}", slot.shape), format!("shape {:?}", stored.shape));
            return Err(Error::tensor(reader.dir(), &slot.name, expected, got));
        }
        dev.write(unit.view_mut(&slot.range), &reader.read_f32(&slot.name)?);
    }
    Ok(())
}
