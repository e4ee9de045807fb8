//! Generation: continuous batching over a paged K/V pool, the pure sampler, and the rollout service.
//!
//! ```text
//! SyncedRolloutService  weights from a trainer: pause, drain, refit, bump, resume (Refit: pure)
//! LocalRolloutService   one mutex, one step at a time; the contract of temper_proto::RolloutService
//!   Engine              tokens of every sample: schedule -> copy -> forward -> draw -> append or finish
//!     Scheduler         order, budget, admission, sharing, preemption: pure, over lengths
//!       BlockManager    which block belongs to whom, and which prefix a full one holds
//!     Speculation       drafts, and how many of them a step verifies
//!     Model             rows in, drawn tokens out: PolicyModel over a packed policy, or a fake in tests
//!       RankGroup       the other tensor-parallel ranks of the model, where it is divided
//! ```
//! Owns: when a row is computed and where its K/V lie. Knows token ids, not text (stop strings are matched over bytes
//! that the caller supplies); weights only through the policy it is given; no algorithm and no transport.
//!
//! # Invariants
//! - A response is a function of (weights, prompt, parameters, seed). No limit in [`EngineConfig`], no batch mate, no
//!   arrival order, no preemption, no cached prefix and no drafter changes a bit of it; what a request reuses or keeps
//!   of earlier weights ([`temper_proto::Reuse`], [`temper_proto::GroupRequest::keep_kv`]) does.
//! - `log_probs` are the bits that the training forward computes for the same tokens under the same weights.
//! - Every accepted group ends with exactly one result, and every block of the pool has a known owner.

mod beam;
mod block_manager;
mod clock;
mod config;
mod engine;
mod error;
mod model;
mod nearby_weights;
mod policy_model;
pub mod refit;
pub mod scheduler;
mod service;
pub mod speculation;
mod stop;
mod synced;
mod tensor_parallel;
mod weight_receiver;

pub use beam::{BeamHypothesis, BeamSpec};
pub use block_manager::{BlockCopy, BlockHash, BlockManager, BlockTable, OutOfBlocks};
pub use clock::{Clock, SystemClock};
pub use config::{EngineConfig, SchedulerLimits};
pub use engine::{Engine, EngineOptions};
pub use error::Error;
pub use model::{Model, ModelLimits, StepBatch, StepOutput};
pub use nearby_weights::{WeightBytes, WeightTransport};
pub use policy_model::PolicyModel;
pub use scheduler::GroupShape;
pub use service::LocalRolloutService;
pub use speculation::{ModelDrafter, Replay, Speculation, SpeculationConfig, Speculative};
pub use stop::{StopMatcher, StopState, TokenByteTable, TokenBytes};
pub use synced::{Drain, SyncedRolloutService};
pub use tensor_parallel::{RankGroup, follow};
pub use weight_receiver::{Sources, WeightReceiver};
