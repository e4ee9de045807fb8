//! The policy: model families, Hugging Face weights in and out, tokenizer and chat template.
//!
//! Knows model directories and token ids; knows nothing of services, recipes or training loops.

pub mod config;
mod error;
mod exact_math;
pub mod init;
pub mod model;
pub mod tokenizer;
pub mod weights_io;

pub use config::{Family, Head, ModelConfig, RopeConfig, RopeScaling};
pub use error::{Error, Result};
pub use init::{InitConfig, init_model};
pub use model::{
    ArrivingHash, BackwardUnits, Batch, Distillation, OutputGrads, PackedPolicy, ParamStore, PartialSums, PolicyFormat,
    Recompute, SequenceExchange, Tape, TeacherRows, TensorPart, TensorSlot, TrainArena, TrainBatch, Unit, UnitShapes,
    WeightHasher, WholeUnits, Workspace, sequence_parallel_problem,
};
pub use tokenizer::{ChatTemplate, GenerationPrompt, SpecialTokens, Tokenizer};
pub use weights_io::{CheckpointReader, TensorKind, TensorSpec, tensor_specs, write_checkpoint};
