//! Training: mini-batches in, updated weights out.
//!
//! Owns: the f32 masters, gradients and optimizer moments of the policy and of the models with a scalar head (critic,
//! reward model), the split of a mini-batch into micro-batches, the reference weights, the teacher of a distillation,
//! and their part of a checkpoint. Takes losses from `temper-algos` only; knows nothing of prompts, rewards or the
//! loop.
//!
//! A trainer may be one of several ranks ([`Ranks`], [`TrainerGroup`]): each works on its own rows and holds its
//! shards. What every rank computes whole, with identical bits: an objective over a whole mini-batch, once the rows'
//! log-probs are shared. The state after a step may be kept in the memory of two ranks each shard ([`agree_on_mirrors`]
//! says which state survivors go back to).
//!
//! Invariants: only this crate changes weights · an update happens whole or not at all: a loss or gradient that is not
//! finite stops before the first parameter moves, with the mini-batch saved · the packed weights that engines read are
//! swapped at the end of an update, under a write lock.

mod distill;
mod division;
mod error;
mod exchange;
mod group;
mod loss;
mod memory;
mod micro_batch;
mod mirror;
mod non_finite;
mod optimizer;
mod published;
mod ranks;
mod reference;
mod scalar_model;
mod scalar_service;
mod scalar_state;
mod sequence;
mod service;
mod shared_head;
mod shared_masters;
mod state_io;
mod store;
mod trainer;
mod weight_service;
mod weights;

pub use error::Error;
pub use group::{TrainerGroup, load_local_ranks};
pub use memory::{Memory, Passes, exchange_bytes_sent, update_bytes_sent};
pub use mirror::agree_on_mirrors;
pub use ranks::{ProcessRole, ProcessShare, Ranks, Sharding};
pub use service::{LocalTrainerService, Meeting};
pub use trainer::{SharedPolicy, Trainer};
