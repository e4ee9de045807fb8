//! Where a run stood after its last steps, in memory: what a checkpoint holds of the loop, for a run that goes on from
//! the memory of its trainer ranks (docs/adr/0018).
//!
//! consumes: the state after a step
//! produces: the same state again, with the trainer's of that step, when a rank was lost since
//! waits for: the ranks' copies of the step, not for their mirrors
//! is unblocked by: ranks that have met again and agreed on a step

use crate::batch::Batch;
use crate::carried;
use crate::checkpoint;
use crate::rollouts::Group;
use crate::{Controller, Error, Phase, RunState};
use serde_json::json;
use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::Duration;
use temper_proto::{MirrorPlan, ServiceError};
use temper_telemetry::MetricsRow;
use temper_types::ErrorCode;

/// So many steps are remembered. Ranks hold two: the last one whose mirrors all have, and the one under way.
const NUM_KEPT: usize = 3;

/// The loop's state after a step.
#[derive(Debug, Clone)]
pub struct KeptStep {
    state: RunState,
    queue: VecDeque<Batch>,
    carried: Vec<Group>,
    last_row: Option<MetricsRow>,
    unpublished: bool,
    is_checkpoint_due: bool,
}

impl KeptStep {
    /// Global steps completed.
    pub fn step(&self) -> u64 {
        self.state.step
    }
}

/// How a run goes on after the loss of trainer ranks, without a return to a checkpoint.
#[derive(Debug, Clone)]
pub struct Recovery {
    /// The loop's state, of the step of the plan.
    pub kept: KeptStep,
    /// The trainer's state, and who gets it from whom.
    pub plan: MirrorPlan,
    /// Who was lost and why, a line each.
    pub lost: Vec<String>,
    /// Engines and reward workers that kept their processes and what they hold, by name.
    pub kept_workers: Vec<String>,
    /// From the failure to the moment when all ranks had met again, and all other workers served.
    pub waited: Duration,
}

impl Controller {
    /// What is remembered of the last steps, the oldest first. It is forgotten here.
    pub fn take_kept(&mut self) -> Vec<KeptStep> {
        std::mem::take(&mut self.kept).into()
    }

    /// Note in the run's events that ranks were lost and their memory does not help: the run goes back to a checkpoint.
    ///
    /// # Errors
    /// A log that cannot be written.
    pub fn note_unmirrored(&self, why: &str) -> Result<(), Error> {
        self.record.event("mirrors_unusable", &[("why", json!(why))])
    }

    /// Remember the state after a step, and let the trainer keep and mirror its own, where the run asks for it.
    pub(crate) fn keep_step(&mut self, is_checkpoint_due: bool) -> Result<(), Error> {
        self.enter(Phase::Mirror);
        if !self.spec.mirror_shards {
            return Ok(());
        }
        let kept = KeptStep {
            state: self.state.clone(),
            queue: self.queue.clone(),
            carried: self.carried.clone(),
            last_row: self.last_row.clone(),
            unpublished: self.unpublished,
            is_checkpoint_due,
        };
        self.kept.retain(|before| before.step() != kept.step());
        self.kept.push_back(kept);
        self.kept.drain(..self.kept.len().saturating_sub(NUM_KEPT));
        let mirrored = self.services.trainer.mirror(self.state.step);
        self.mirrored = self.attribute(mirrored)?;
        Ok(())
    }

    /// What mirrors cost, as columns of a row.
    pub(crate) fn mirror_columns(&self, row: &mut MetricsRow) {
        if self.spec.mirror_shards {
            row.set_count("mirror_bytes", self.mirrored.bytes_sent);
            row.set("mirror_wait_seconds", self.mirrored.wait_seconds);
            row.set("mirror_transfer_seconds", self.mirrored.transfer_seconds);
        }
    }

    /// Go on from the memory of the loop and of the ranks. Gives the checkpoint that the step was to end with, written
    /// now.
    pub(crate) fn recover_from(&mut self, recovery: Recovery) -> Result<Option<PathBuf>, Error> {
        let step = recovery.kept.step();
        // Whatever fails from here on, the state is there for another attempt.
        self.kept = VecDeque::from([recovery.kept.clone()]);
        let failed = |source| Error::Recovery { step, source: Box::new(source) };
        let is_checkpoint_due = recovery.kept.is_checkpoint_due;
        self.go_back(recovery).map_err(failed)?;
        self.keep_step(is_checkpoint_due).map_err(failed)?;
        if is_checkpoint_due { self.checkpoint().map(Some) } else { Ok(None) }
    }

    fn go_back(&mut self, recovery: Recovery) -> Result<(), Error> {
        let Recovery { kept, plan, lost, kept_workers, waited } = recovery;
        let begin = self.clock.elapsed();
        checkpoint::remove_temporaries(&self.dir.checkpoints())?;
        self.state = kept.state;
        self.place.step = self.state.step;
        (self.queue, self.carried, self.last_row) = (kept.queue, kept.carried, kept.last_row);
        let waiting = self.queue.iter().flat_map(|batch| &batch.samples);
        self.accounts.restore(waiting.chain(carried::begun(&self.carried)));
        self.control.resume_after(self.state.step);
        if !self.is_complete() {
            self.begin_stage()?;
        }
        self.enter(Phase::Mirror);
        let restored = self.services.trainer.restore_mirrored(&plan);
        self.attribute(restored)?;
        let restored = self.clock.elapsed().saturating_sub(begin);
        self.unpublished = kept.unpublished;
        if !self.unpublished {
            self.prove()?;
        }
        let proved = self.clock.elapsed().saturating_sub(begin).saturating_sub(restored);
        self.record.truncate_after(self.state.step)?;
        let sources: Vec<_> = plan.sources.iter().map(|s| json!({"rank": s.rank, "from": s.from})).collect();
        let seconds = waited + self.clock.elapsed().saturating_sub(begin);
        let fields = [
            ("step", json!(self.state.step)),
            ("lost", json!(lost)),
            ("shards", json!(sources)),
            ("kept_workers", json!(kept_workers)),
            ("wait_seconds", json!(waited.as_secs_f64())),
            ("restore_seconds", json!(restored.as_secs_f64())),
            ("prove_seconds", json!(proved.as_secs_f64())),
            ("seconds", json!(seconds.as_secs_f64())),
        ];
        self.record.event("recovered", &fields)
    }

    /// The trainer's weights are those of the version last published, by their hash; the engines get them.
    fn prove(&mut self) -> Result<(), Error> {
        let expected = self.state.version;
        let got = self.attribute(self.services.trainer.publish(expected.number))?;
        if got != expected {
            let message = format!("the weights that came back are {got}: expected {expected}");
            let error = ServiceError::new(ErrorCode::DataLoss, "trainer", "restore_mirrored", message);
            return self.attribute(Err(error));
        }
        self.attribute(self.services.rollout.set_version(expected))
    }
}
