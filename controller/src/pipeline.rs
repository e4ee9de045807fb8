//! Batches generated ahead of their step: the one loop, of which synchronous training is the case of staleness 0.
//!
//! The batch of step k is generated with the weights after step `max(start of the stage, k - 1 - staleness)`. At the
//! beginning of a step the batches of this step and of the `staleness - 1` next ones are there; the one after them is
//! generated while the step trains, or just before it where engine and trainer share their weights. It is whole before
//! the step's weights are published, so that no engine changes weights in the middle of a batch.
//!
//! consumes: prompts of the stage's dataset, in the order of its cursor
//! produces: the batch of every step, in order; never one that no step trains on
//! waits for: the step's own batch before it begins, the batch under way before weights are published
//! is unblocked by: the trainer's last update of the step

use crate::batch::Batch;
use crate::carried;
use crate::collect::{Collected, Collector};
use crate::place::Place;
use crate::record_row::StepNumbers;
use crate::{Controller, Error, Generation, PolicyStage};
use serde_json::json;
use std::thread::JoinHandle;
use temper_proto::ServiceError;
use temper_types::ErrorCode;

/// A batch that is generated beside the step under way.
pub(crate) enum InFlight {
    /// It is there.
    Whole(Box<Batch>),
    /// A thread waits for it.
    Running(JoinHandle<Result<Collected, Error>>),
}

impl Controller {
    /// Batches that may wait when the step after the next `done` ones of the stage begins to train.
    pub(crate) fn lead(&self, steps: u64, done: u64) -> usize {
        let rest = steps.saturating_sub(self.state.stage_step + done + 1);
        usize::try_from(rest).unwrap_or(usize::MAX).min(self.spec.staleness as usize)
    }

    /// The batch of the step under way; at the start of a stage, with those that have to be there besides.
    pub(crate) fn take_batch(&mut self, stage: &PolicyStage, numbers: &mut StepNumbers) -> Result<Batch, Error> {
        let wanted = self.lead(stage.steps, 0).max(1);
        while self.queue.len() < wanted {
            let step = self.state.step + 1 + self.queue.len() as u64;
            let batch = self.generate_now(stage, step, numbers)?;
            self.queue.push_back(batch);
        }
        let mut batch = self.queue.pop_front().unwrap_or_default();
        batch.measure_staleness(self.state.version);
        numbers.version = self.state.version.number;
        numbers.batch = batch.numbers;
        self.say_what_is_missing(stage, &batch)?;
        Ok(batch)
    }

    /// Begin the last batch that may be generated with the weights of now, where there is one.
    pub(crate) fn begin_batch(
        &mut self,
        stage: &PolicyStage,
        numbers: &mut StepNumbers,
    ) -> Result<Option<InFlight>, Error> {
        if self.queue.len() >= self.lead(stage.steps, 0) {
            return Ok(None);
        }
        let step = self.state.step + 2 + self.queue.len() as u64;
        if self.spec.generation == Generation::BeforeTraining {
            let batch = self.generate_now(stage, step, numbers)?;
            return Ok(Some(InFlight::Whole(Box::new(batch))));
        }
        let collector = self.collector(stage, step, self.place.beside())?;
        let thread = std::thread::Builder::new().name("rollouts".to_owned()).spawn(move || collector.run());
        let refused = |e| ServiceError::new(ErrorCode::ResourceExhausted, "controller", "begin_batch", e);
        Ok(Some(InFlight::Running(self.attribute(thread.map_err(refused))?)))
    }

    /// Let the engines sleep until the next batch, where the run asks for it.
    pub(crate) fn rest_engines(&self) -> Result<(), Error> {
        if self.spec.sleep {
            let num_bytes = self.attribute(self.services.rollout.sleep())?;
            tracing::debug!(step = self.place.step, num_bytes, "the engines sleep");
        }
        Ok(())
    }

    /// Wait for the batch under way, and put it behind those that wait. Where the step failed it is given up: `learned`
    /// is what the step gave.
    pub(crate) fn finish_batch<T>(
        &mut self,
        in_flight: Option<InFlight>,
        learned: Result<T, Error>,
        numbers: &mut StepNumbers,
    ) -> Result<T, Error> {
        let thread = match in_flight {
            None => return learned,
            Some(InFlight::Whole(batch)) => {
                self.queue.push_back(*batch);
                return learned;
            }
            Some(InFlight::Running(thread)) => thread,
        };
        if learned.is_err() {
            // What is reported is why the step failed; a thread that is not told ends at its own deadline.
            let _ = self.services.rollout.abort_all();
            let _ = thread.join();
            return learned;
        }
        let begin = self.clock.elapsed();
        let panicked = |_| ServiceError::new(ErrorCode::Internal, "controller", "finish_batch", "generation panicked");
        let collected = self.attribute(thread.join().map_err(panicked))??;
        let waited = (self.clock.elapsed() - begin).as_secs_f64();
        numbers.rollout_wait_seconds += waited;
        let generating = collected.batch.numbers.rollout_seconds + collected.batch.numbers.reward_seconds;
        numbers.rollout_overlap_seconds += (generating - waited).max(0.0);
        let batch = self.keep(collected)?;
        self.queue.push_back(batch);
        learned
    }

    /// Generate a batch while nothing else happens.
    fn generate_now(&mut self, stage: &PolicyStage, step: u64, numbers: &mut StepNumbers) -> Result<Batch, Error> {
        let begin = self.clock.elapsed();
        let collector = self.collector(stage, step, self.place.clone())?;
        let collected = collector.run()?;
        numbers.rollout_wait_seconds += (self.clock.elapsed() - begin).as_secs_f64();
        self.keep(collected)
    }

    fn collector(&mut self, stage: &PolicyStage, step: u64, place: Place) -> Result<Collector, Error> {
        let offers = self.offers()?;
        // No group is begun that no step of the stage would train on.
        let begin = self.state.step - self.state.stage_step;
        let left = (stage.steps + begin + 1).saturating_sub(step) * stage.prompts_per_step as u64;
        let wanted = stage.partial_rollouts.as_ref().map_or(0, |p| p.num_groups(stage.prompts_per_step));
        Ok(Collector {
            carried: std::mem::take(&mut self.carried),
            num_groups: wanted.min(usize::try_from(left).unwrap_or(usize::MAX)),
            rollouts: self.rollouts(place),
            stage: stage.clone(),
            seed: self.stage_seed(),
            rows: self.data.get(&stage.data).cloned().unwrap_or_default(),
            draws: self.state.draws(),
            batch: Batch { step, temperature: stage.sampling.temperature, ..Batch::default() },
            offers,
            reward_overlap_seconds: 0.0,
        })
    }

    /// The prompts of a batch are drawn; the next one goes on behind them, and with the groups that are left over.
    fn keep(&mut self, collected: Collected) -> Result<Batch, Error> {
        self.state.set_draws(collected.draws);
        self.carried = collected.carried;
        let kept = self.accounts.keep(carried::begun(&self.carried));
        self.attribute(kept)?;
        Ok(collected.batch)
    }

    /// A smaller batch is announced; an empty one was an error.
    fn say_what_is_missing(&self, stage: &PolicyStage, batch: &Batch) -> Result<(), Error> {
        let missing = batch.numbers.num_missing_groups;
        if missing == 0 {
            return Ok(());
        }
        let (step, wanted) = (batch.step, stage.prompts_per_step as u64);
        let found = wanted.saturating_sub(missing);
        let batches = batch.numbers.num_gen_batches;
        tracing::warn!(step, batches, found, wanted, "dynamic sampling ran out of batches: the step is smaller");
        let fields = [("step", json!(step)), ("groups", json!(found)), ("wanted", json!(wanted))];
        self.record.event("dynamic_sampling_ran_out", &fields)
    }
}
