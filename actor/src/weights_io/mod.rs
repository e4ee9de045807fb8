//! Weights on disk: safetensors in and out, GGUF in.
//!
//! Owns the canonical names and order of tensors, the checks that a checkpoint is whole before a number of it is used,
//! and atomic writing. Knows nothing of devices: tensors leave as f32 slices and come in as f32 or bf16.

pub mod gguf;
mod mmap;
mod names;
mod reader;
mod safetensors;
pub(crate) mod writer;

pub use names::{TensorKind, TensorSpec, tensor_specs};
pub use reader::{CheckpointReader, StoredDType, StoredTensor};
pub use writer::{SIDE_FILES, TensorData, WriteOptions, write_checkpoint};

/// File name of a checkpoint in one piece.
pub const SINGLE_FILE: &str = "model.safetensors";
/// File name of the index of a sharded checkpoint.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

#[cfg(test)]
mod tests;
