//! Kernels: the operations a policy is made of, forward and backward, behind one trait per device.
//!
//! Owns: device memory ([`Buffer`]), packed weights, the paged key/value cache, and every kernel ([`Device`]).
//! Knows nothing of models, checkpoints, algorithms or schedules.
//!
//! # The row contract
//! A *row* is one token of one sequence. The bits of a row's output depend only on the weights, that row's input and
//! the stored K/V of its own sequence at slots `0..=t`: not on batch mates, batch size, chunking, block size, padding
//! or threads. Every reduction runs in one order that is fixed by the shape of the operand, never by the batch.
//!
//! # Conventions
//! Activations are flat row-major f32. With [`DType::Bf16`] the operands of matrix products (weights and inputs) and
//! the cached K/V are rounded to bf16, products accumulate in f32, and everything else stays f32. A wrong shape is a
//! bug of the caller and panics with the shapes; running out of memory is the only failure at run time.
//! Operations are asynchronous in spirit: results are read through [`Device::read`] or a returned host vector only.

mod args;
pub mod bench;
mod buffer;
pub mod cpu;
mod device;
mod incoming;
mod kv;
mod linear;
mod shared;

pub use args::{
    AdamWStep, AttentionGrad, AttnShape, DeviceInfo, DistillHead, DistillStats, Divergence, HeadNorm, HeadNormGrad,
    LmHead, LmHeadGrad, LmHeadTrain, NormGrad, NormShape, RowGrads, RowLoss, SampleRow, Sampled, SeqSpan, TokenStats,
};
pub use buffer::{Buffer, View, ViewMut};
pub use cpu::{CpuConfig, CpuDevice, Isa, ValueHasher};
pub use device::Device;
pub use incoming::Incoming;
pub use kv::{KvCache, KvCacheSpec, RopeTable};
pub use linear::{LinearShape, PackedLinear, Reduction, Store};
pub use shared::{SharedBuffers, SharedPlace, SharedReader};
pub use temper_types::{DType, WeightFormat};
