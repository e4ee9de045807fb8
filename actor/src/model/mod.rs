//! The policy: one definition of a decoder-only transformer, forward and backward, for generation and training.
//!
//! Owns: the f32 masters ([`ParamStore`]), the weights as kernels read them ([`PackedPolicy`]), and the order of
//! kernels in a layer. Knows nothing of schedules, losses, optimizers or sampling rules.
//!
//! # Invariants
//! - One function per half of a layer serves generation, scoring, training and the recomputation in the backward, so
//!   a row has the same bits in all of them. What differs is only where buffers live and how long they are kept.
//! - Training writes keys and values into a cache of its own, rounded as in generation, and reads them from there.
//! - Every row (token) is named by its slot in a sequence (tiles, cache) and its position (RoPE); they may differ.
//!
//! # Layer
//! ```text
//! x -> rms_norm -> q|k|v (+ bias) -> head_norm (Qwen3) -> rope -> cache -> attention -> o_proj -> x += .
//! x -> rms_norm -> gate|up -> silu(gate) * up -> down_proj -> x += .
//! ```
//!
//! Called by the rollout engine ([`PackedPolicy::forward`], [`PackedPolicy::sample`]) and by the trainer
//! ([`PackedPolicy::train_forward`], [`PackedPolicy::backward`], [`PackedPolicy::score_only`]).

mod arena;
mod arriving;
mod backward;
mod batch;
mod distill;
mod generate;
mod hash;
mod layer;
mod layer_grad;
mod layout;
mod packed;
mod params;
mod params_io;
mod part_forward;
mod scratch;
mod sequence;
mod tensor_part;
mod train;
mod units;

pub use arena::{Recompute, TrainArena};
pub use arriving::ArrivingHash;
pub use backward::OutputGrads;
pub use batch::TrainBatch;
pub use distill::{Distillation, TeacherRows};
pub use generate::{Batch, Workspace};
pub use hash::WeightHasher;
pub use layout::TensorSlot;
pub use packed::{PackedPolicy, PolicyFormat};
pub use params::{ParamStore, Unit};
pub use part_forward::PartialSums;
pub use sequence::{SequenceExchange, sequence_parallel_problem};
pub use tensor_part::TensorPart;
pub use train::Tape;
pub use units::{BackwardUnits, UnitShapes, WholeUnits};
