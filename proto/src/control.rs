//! Control of a run while it is under way.

use crate::ServiceResult;
use std::sync::mpsc::Receiver;
use std::time::Duration;
use temper_types::PolicyVersion;

/// What a run is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RunPhase {
    /// Nothing has begun.
    #[default]
    Starting,
    /// Steps go on.
    Running,
    /// It waits before the next step.
    Paused,
    /// It ends after the step under way.
    Draining,
    /// Every stage is done, or it was drained.
    Completed,
    /// It failed.
    Failed,
}

impl RunPhase {
    /// Name in commands and logs.
    pub const fn name(self) -> &'static str {
        match self {
            RunPhase::Starting => "starting",
            RunPhase::Running => "running",
            RunPhase::Paused => "paused",
            RunPhase::Draining => "draining",
            RunPhase::Completed => "completed",
            RunPhase::Failed => "failed",
        }
    }
}

/// Where a run stands.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize)]
pub struct RunStatus {
    /// Name of the run.
    pub run: String,
    /// What it is doing.
    pub state: RunPhase,
    /// Name of the stage under way.
    pub stage: String,
    /// Steps done, over all stages.
    pub step: u64,
    /// Steps of all stages.
    pub num_steps: u64,
    /// The weights last published.
    pub version: PolicyVersion,
    /// Phase of the step under way.
    pub phase: String,
    /// The last row of metrics, as JSON.
    pub metrics_json: String,
    /// Why it failed.
    pub error: String,
}

/// Something that happened: an event, or a row of metrics (`metrics`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunEvent {
    /// Name.
    pub name: String,
    /// JSON.
    pub json: String,
}

/// A worker as the run sees it.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize)]
pub struct WorkerStatus {
    /// Its name.
    pub name: String,
    /// What it does.
    pub role: String,
    /// HOST:PORT.
    pub address: String,
    /// Number of its life.
    pub incarnation: u64,
    /// How it stands.
    pub state: String,
    /// Its process.
    pub process_id: u32,
    /// Why it was lost.
    pub last_error: String,
}

/// A checkpoint that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Its directory.
    pub path: String,
    /// The step after which it was written.
    pub step: u64,
}

/// A setting that was changed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Changed {
    /// What it was.
    pub previous: f64,
    /// First step that uses the new value.
    pub from_step: u64,
}

/// Served by a run to whoever controls it.
pub trait ControlService: Send + Sync {
    /// Where the run stands.
    fn status(&self) -> RunStatus;
    /// Events from now on. A receiver that lags by more than a few hundred events is dropped.
    fn watch(&self) -> Receiver<RunEvent>;
    /// Wait before the next step until resumed. Returns when the step under way is done.
    ///
    /// # Errors
    /// `DeadlineExceeded` where that takes longer than `timeout`: it will pause all the same.
    fn pause(&self, timeout: Duration) -> ServiceResult<RunStatus>;
    /// Go on.
    fn resume(&self) -> RunStatus;
    /// End the run after the step under way, with a checkpoint.
    fn drain(&self) -> RunStatus;
    /// Write a checkpoint after the step under way, or now where the run is paused.
    ///
    /// # Errors
    /// `DeadlineExceeded` where that takes longer than `timeout`, `Cancelled` where the run has ended.
    fn snapshot(&self, timeout: Duration) -> ServiceResult<Snapshot>;
    /// Change a setting of the stage under way from its next step on. The change is part of checkpoints.
    ///
    /// # Errors
    /// `InvalidArgument` for a key that cannot be changed in this stage, or a value out of range.
    fn set(&self, key: &str, value: f64) -> ServiceResult<Changed>;
    /// The workers; none in embedded mode.
    fn workers(&self) -> Vec<WorkerStatus>;
}
