//! How a run goes on when a worker is lost: from the memory of its trainer ranks where they mirror their state, else
//! from its last checkpoint.

use crate::workers::{Cluster, FailedService, MirroredRanks};
use std::sync::Arc;
use std::time::Instant;
use temper_controller::{
    CheckpointInfo, Controller, Error, KeptStep, Recovery, RunDir, RunOutcome, last_checkpoint_step, latest_checkpoint,
};
use temper_proto::TrainerService;

/// Where a run begins.
pub enum Start {
    /// At a checkpoint, or afresh where there is none.
    Checkpoint(Option<Box<CheckpointInfo>>),
    /// There too, although ranks mirror their state: why that was of no use.
    Unmirrored(Option<Box<CheckpointInfo>>, String),
    /// In memory.
    Memory(Box<Recovery>),
}

impl Start {
    /// Run from there to the end.
    ///
    /// # Errors
    /// As [`Controller::run`] and [`Controller::recover`].
    pub fn run(self, controller: &mut Controller) -> Result<RunOutcome, Error> {
        match self {
            Start::Checkpoint(checkpoint) => controller.run(checkpoint.as_deref()),
            Start::Unmirrored(checkpoint, why) => {
                controller.note_unmirrored(&why)?;
                controller.run(checkpoint.as_deref())
            }
            Start::Memory(recovery) => controller.recover(*recovery),
        }
    }
}

/// Wait for the workers of a run that failed with `error`; `kept` is what it remembers of its last steps.
///
/// # Errors
/// A worker that does not come back, a checkpoint that cannot be read.
pub fn after_loss(
    cluster: &Cluster,
    (error, kept): (&Error, Vec<KeptStep>),
    dir: &RunDir,
) -> anyhow::Result<(Start, Arc<dyn TrainerService>)> {
    let begin = Instant::now();
    let mut why = None;
    if cluster.keeps_mirrors() {
        eprintln!("{error}\nwaiting for the trainer ranks, to go on from what they hold");
        match from_memory(cluster, (error, kept), dir)? {
            Ok((ranks, kept)) => {
                let MirroredRanks { trainer, plan, lost, kept_workers } = ranks;
                let recovery = Recovery { kept, plan, lost, kept_workers, waited: begin.elapsed() };
                return Ok((Start::Memory(Box::new(recovery)), trainer));
            }
            Err(problem) => {
                eprintln!("what the trainer ranks hold is of no use: {problem}");
                tracing::warn!(problem, "going back to the last checkpoint");
                why = Some(problem);
            }
        }
    } else {
        eprintln!("{error}");
    }
    eprintln!("waiting for the worker, to go on from the last checkpoint");
    let trainer = cluster.recover()?;
    let checkpoint = latest_checkpoint(&dir.checkpoints())?.map(Box::new);
    let start = match why {
        Some(why) => Start::Unmirrored(checkpoint, why),
        None => Start::Checkpoint(checkpoint),
    };
    Ok((start, trainer))
}

/// The ranks, and the loop's state of the step that they go back to; or why not.
fn from_memory(
    cluster: &Cluster,
    (error, mut kept): (&Error, Vec<KeptStep>),
    dir: &RunDir,
) -> anyhow::Result<Result<(MirroredRanks, KeptStep), String>> {
    if error.is_failed_recovery() && !error.is_lost_worker() {
        return Ok(Err(error.to_string()));
    }
    // Rows of the run's tables belong to a checkpoint from then on: none is taken back.
    let saved = last_checkpoint_step(&dir.checkpoints())?.unwrap_or(0);
    let is_known = |step: u64| step >= saved && kept.iter().any(|kept| kept.step() == step);
    let is_trainers = error.failed_service().is_some_and(|service| service.starts_with("trainer"));
    let failed = if is_trainers { FailedService::Trainer } else { FailedService::Other };
    let ranks = match cluster.recover_mirrored(failed, is_known) {
        Ok(ranks) => ranks,
        Err(why) => return Ok(Err(why)),
    };
    let index = kept.iter().position(|kept| kept.step() == ranks.plan.step);
    Ok(index
        .map(|index| (ranks, kept.swap_remove(index)))
        .ok_or_else(|| "the run does not remember the step".to_owned()))
}
