//! The service contracts between the controller and its workers.
//!
//! Owns: the traits [`RolloutService`], [`RewardService`], [`TrainerService`] (with
//! [`ScalarModelService`], [`DistillService`] and [`MirrorService`]), [`TextService`] and [`TableService`], their
//! messages, and the one error type that crosses them. Knows nothing of how a service is reached: in embedded mode the
//! traits are implemented by objects in the same process, and a transport implements them on the caller's side.
//!
//! Invariants: token ids in, token ids out (only [`TextService`] sees text) · every wait has a deadline · batches are
//! named by ids, never by arrival · no message holds a tensor, only per-token numbers.

mod control;
mod distill;
mod error;
mod fate;
pub mod grpc;
mod mirror;
mod reward;
mod rollout;
mod scalar;
mod tables;
mod text;
mod trainer;
mod weights;
mod worker;

pub use control::{Changed, ControlService, RunEvent, RunPhase, RunStatus, Snapshot, WorkerStatus};
pub use distill::{DistillService, DistillSpec};
pub use error::{ServiceError, ServiceResult};
pub use fate::{Fate, FleetCounts, Settled, Unused};
pub use mirror::{HeldShard, MirrorPlan, MirrorReport, MirrorService, ShardSource};
pub use reward::{RewardService, ScoreRequest};
pub use rollout::{
    BegunResponse, DraftCounts, EarlierResponse, GeneratedSample, GroupRequest, GroupResult, NUM_MATCH_BUCKETS, Reuse,
    RolloutService, RolloutStats, SpeculationStats,
};
pub use scalar::{Backbone, PreferencePair, ScalarModelService, ScalarModelSpec, ScalarReport, ScalarRole};
pub use tables::{TableBatches, TableInfo, TableReader, TableRequest, TableService};
pub use text::TextService;
pub use trainer::{
    GlobalCounts, LogProbs, MiniBatch, OptimizerConfig, PolicyRole, StageSpec, TokenSequence, TrainRow, TrainerService,
    UpdateReport,
};
pub use weights::{
    SharedUnit, SharedWeights, WEIGHT_PIECE, WeightManifest, WeightRange, WeightService, WeightSink, exclusive_or,
};
pub use worker::{Assignment, WorkerHello, WorkerId, WorkerRegistry, WorkerRole};
