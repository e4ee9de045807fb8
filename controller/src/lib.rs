//! The loop: prompts to samples to rewards to advantages to updates to a new policy version, and again.
//!
//! Owns: the order of a run's stages and steps, the run directory, checkpoints and resume, validation, and what is
//! recorded. Knows workers only by the service traits of `temper-proto`; holds no tensor; names no algorithm (it
//! follows a [`temper_algos::Plan`]); reads no flag and no environment variable.
//!
//! Invariants: every number of a lockstep run is a function of the resolved recipe, its seed, its data and the
//! weights: no clock, arrival order or thread reaches one · a checkpoint is complete or absent · resuming from one
//! gives the run that was not interrupted.

mod accounts;
mod batch;
mod beliefs;
mod carried;
mod checkpoint;
mod clock;
mod collect;
mod components;
mod config;
mod control;
mod control_journal;
mod controller;
mod correction;
mod critic_step;
mod curriculum;
mod dataset;
mod distill_config;
mod distill_step;
mod error;
pub mod fleet;
mod gate;
mod kept;
mod online_preference_step;
mod packed;
mod partial;
mod partial_config;
mod phase;
mod pipeline;
mod place;
mod policy_step;
mod preference_config;
mod preference_data;
mod preference_step;
mod record;
mod record_row;
mod reference;
mod reuse;
mod reward_model_step;
mod rollouts;
mod run_dir;
mod scalar_config;
mod scoring;
mod sft_step;
mod state;
mod validation;

pub use batch::QueuedBatch;
pub use carried::CarriedGroup;
pub use checkpoint::{CheckpointInfo, last_checkpoint_step, latest_checkpoint, list_checkpoints, verify_checkpoint};
pub use clock::{Clock, SystemClock};
pub use config::{
    CheckpointConfig, DatasetConfig, Generation, MAX_STALENESS, MemoryConfig, PolicyStage, ReplaySpec, RunSpec,
    SftStage, Stage, ValidationConfig,
};
pub use control::RunControl;
pub use controller::{Controller, RunOutcome, Services};
pub use dataset::{LoadedDataset, load_dataset};
pub use distill_config::{DistillStage, TeacherConfig};
pub use error::Error;
pub use kept::{KeptStep, Recovery};
pub use partial_config::{PartialPolicy, PartialRollouts};
pub use phase::{Phase, PhaseObserver};
pub use preference_config::{OnlinePreferenceStage, PreferenceStage};
pub use preference_data::check_preferences;
pub use reference::ReferenceConfig;
pub use run_dir::RunDir;
pub use scalar_config::{CriticConfig, RewardModelStage};
pub use scoring::Scoring;
pub use state::RunState;
