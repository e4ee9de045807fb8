//! Generation: continuous batching over a paged K/V pool, and the rollout service.
//!
//! Knows token ids, not text; weights only through the policy it is given; and no algorithm.

mod block_manager;
mod clock;
mod config;
mod engine;
mod error;
mod model;
pub mod scheduler;
mod stop;

pub use block_manager::{BlockCopy, BlockManager, BlockTable, OutOfBlocks};
pub use clock::{Clock, SystemClock};
pub use config::{EngineConfig, SchedulerLimits};
pub use engine::{Engine, EngineOptions};
pub use error::Error;
pub use model::{Model, ModelLimits, StepBatch, StepOutput};
pub use scheduler::GroupShape;
pub use stop::{StopMatcher, StopState, TokenByteTable, TokenBytes};
