//! Device, number format and model files, as flags name them.

use anyhow::Result;
use clap::ValueEnum;
use std::path::Path;
use std::sync::Arc;
use temper_actor::{CheckpointReader, ModelConfig};
use temper_tensor::Device;
use temper_types::{DType, DTypeChoice, WeightFormat};

/// A number format on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DTypeArg {
    /// IEEE 754 binary32.
    F32,
    /// bfloat16, accumulated in f32.
    Bf16,
    /// bf16 where the CPU multiplies it natively, else f32.
    Auto,
}

/// A number format of files on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FileDTypeArg {
    /// IEEE 754 binary32.
    F32,
    /// bfloat16.
    Bf16,
}

impl From<FileDTypeArg> for DType {
    fn from(arg: FileDTypeArg) -> DType {
        match arg {
            FileDTypeArg::F32 => DType::F32,
            FileDTypeArg::Bf16 => DType::Bf16,
        }
    }
}

/// A form of weights on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WeightsArg {
    /// The model's numbers, in --dtype.
    Exact,
    /// Signed bytes with a scale for every 64 inputs of an output, multiplied in f32.
    Int8,
}

/// In which form the matrices of a model are held.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct WeightsArgs {
    /// Form of the matrices; int8 is another model, of less precision, and faster where memory is the limit.
    #[arg(long, value_enum, default_value_t = WeightsArg::Exact)]
    weights: WeightsArg,
}

impl WeightsArgs {
    /// The form that was asked for.
    pub fn format(self) -> WeightFormat {
        match self.weights {
            WeightsArg::Exact => WeightFormat::Exact,
            WeightsArg::Int8 => WeightFormat::Int8,
        }
    }
}

/// What computes, and in which number format.
#[derive(Debug, Clone, clap::Args)]
pub struct ComputeArgs {
    /// Number format of matrix products and of the K/V cache.
    #[arg(long, value_enum, default_value_t = DTypeArg::F32)]
    pub dtype: DTypeArg,
    /// Threads that compute; 0 takes one per core. Results do not depend on it.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: usize,
}

impl ComputeArgs {
    /// The device, and the number format that was asked for or that `auto` becomes on it.
    pub fn resolve(&self) -> (Arc<dyn Device>, DType) {
        let device = crate::runtime::device(self.threads);
        let choice = match self.dtype {
            DTypeArg::F32 => DTypeChoice::F32,
            DTypeArg::Bf16 => DTypeChoice::Bf16,
            DTypeArg::Auto => DTypeChoice::Auto,
        };
        let dtype = choice.resolve(device.info().native_bf16);
        (device, dtype)
    }
}

/// Configuration and weights of a model directory, checked to be whole.
///
/// # Errors
/// The file, key or tensor that is missing or wrong.
pub fn open_model(dir: &Path) -> Result<(ModelConfig, CheckpointReader)> {
    let config = ModelConfig::load(dir)?;
    let reader = CheckpointReader::open(dir)?;
    for name in reader.validate(&config)? {
        tracing::warn!(tensor = name, model = %dir.display(), "the model has no use for a tensor of the checkpoint");
    }
    Ok((config, reader))
}

/// Largest resident memory of this process so far in bytes, where the system tells (`VmHWM`).
pub fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}
