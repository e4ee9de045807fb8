//! One step of distillation: the policy answers prompts, or the dataset's completions stand, and an update moves its
//! distributions towards the teacher's.
//!
//! consumes: prompts of the stage's dataset, in the order of its cursor
//! produces: one optimizer step, a new policy version, a shard of trajectories, a row of metrics
//! waits for: every group of the step (staleness 0)

use crate::record_row::{StepNumbers, log_prob_gap};
use crate::{Controller, DistillStage, Error, Phase};
use temper_proto::{GlobalCounts, MiniBatch, TokenSequence, TrainRow, UpdateReport};
use temper_telemetry::MetricsRow;
use temper_types::{FinishReason, PromptRow, Sample, derive_seed, uniform53};

/// Keeps the noise of who answers apart from that of sampling.
const WHO_ANSWERS: u32 = u32::MAX - 1;

/// What a step learns from.
#[derive(Default)]
struct Lesson {
    /// Responses of the policy.
    samples: Vec<Sample>,
    /// Completions of the dataset.
    completions: Vec<TokenSequence>,
}

impl Controller {
    /// Generate, update, publish, record.
    pub(crate) fn distill_step(&mut self, stage: &DistillStage) -> Result<MetricsRow, Error> {
        let rollout = stage.rollout();
        let mut numbers = StepNumbers::start(self.clock.elapsed());
        let before = self.validation_at_start(&rollout)?;
        self.publish(self.state.step)?;
        let mut lesson = self.lesson(stage, &mut numbers)?;
        self.rest_engines()?;
        let begin = self.clock.elapsed();
        let learning_rate =
            stage.optimizer.learning_rate * stage.schedule.multiplier(self.state.stage_step, stage.steps);
        self.enter(Phase::Update);
        self.unpublished = true;
        let updated = self.services.trainer.update_distilled(lesson.batch(stage, learning_rate));
        let report = self.attribute(updated)?;
        for (sample, log_probs) in lesson.samples.iter_mut().zip(&report.log_probs) {
            sample.old_log_probs.clone_from(log_probs);
        }
        self.settle(&lesson.samples, &(0..lesson.samples.len()).collect())?;
        self.publish(self.state.step + 1)?;
        numbers.train_seconds = (self.clock.elapsed() - begin).as_secs_f64();
        numbers.finish(self.clock.elapsed());
        let mut row = MetricsRow::new(self.state.step + 1, &stage.name);
        row.set("lr", learning_rate);
        lesson.columns(&report, &mut row);
        numbers.times(lesson.num_response_tokens(), &mut row);
        let after = self.validation_after_step(&rollout)?;
        before.iter().chain(&after).for_each(|(name, value)| {
            row.set(name, *value);
        });
        self.enter(Phase::Record);
        if !lesson.samples.is_empty() {
            self.record.samples(self.state.step + 1, &lesson.samples)?;
        }
        self.finish_step(&mut row)?;
        Ok(row)
    }

    /// The next prompts, each with the policy's responses or its completion. Who answers is noise of the prompt and
    /// the pass over the data.
    fn lesson(&mut self, stage: &DistillStage, numbers: &mut StepNumbers) -> Result<Lesson, Error> {
        let seed = self.stage_seed();
        let num_rows = self.data.get(&stage.data).map_or(0, |rows| rows.len()) as u64;
        let draws = self.state.cursor.next_batch(seed, num_rows, stage.prompts_per_step);
        let rows = draws.iter().map(|d| (self.data[&stage.data][d.index as usize].clone(), d.epoch));
        let (asked, given): (Vec<_>, Vec<_>) = rows.partition(|(row, epoch)| {
            let noise = uniform53(derive_seed(seed, row.prompt_id.0, WHO_ANSWERS, *epoch), 0);
            noise < stage.on_policy_fraction
        });
        let completions = given.iter().map(|(row, _)| self.completion(stage, row)).collect::<Result<_, Error>>()?;
        let samples = if asked.is_empty() { Vec::new() } else { self.answers(stage, &asked, numbers)? };
        Ok(Lesson { samples, completions })
    }

    fn answers(
        &mut self,
        stage: &DistillStage,
        asked: &[(PromptRow, u64)],
        numbers: &mut StepNumbers,
    ) -> Result<Vec<Sample>, Error> {
        self.enter(Phase::Rollout);
        let begin = self.clock.elapsed();
        let rollouts = self.rollouts(self.place.clone());
        let requests = rollouts.requests(asked, (self.state.next_group_id, self.stage_seed()), &stage.rollout())?;
        self.state.next_group_id += requests.len() as u64;
        let results = rollouts.run_groups(requests.clone())?;
        numbers.batch.rollout_seconds += (self.clock.elapsed() - begin).as_secs_f64();
        let groups = asked.iter().zip(&requests).zip(results);
        let step = self.state.step + 1;
        Ok(groups.flat_map(|(((row, _), request), result)| rollouts.to_samples((row, step), request, result)).collect())
    }

    fn completion(&self, stage: &DistillStage, row: &PromptRow) -> Result<TokenSequence, Error> {
        let Some(completion) = &row.completion else {
            let problem = format!(
                "row {} has no `completion`: expected one in every row, or on_policy_fraction = 1",
                row.prompt_id
            );
            return Err(Error::config(format!("data.{}", stage.data), problem));
        };
        let prompt_token_ids = self.attribute(self.services.text.encode_prompt(&row.prompt))?;
        let response_token_ids = self.attribute(self.services.text.encode_response(completion))?;
        let response_mask = vec![1; response_token_ids.len()];
        Ok(TokenSequence { prompt_token_ids, response_token_ids, response_mask })
    }
}

impl Lesson {
    fn num_response_tokens(&self) -> usize {
        self.samples.iter().map(|s| s.response_token_ids.len()).sum()
    }

    /// Samples, then completions.
    fn batch(&self, stage: &DistillStage, learning_rate: f64) -> MiniBatch {
        let sampled = self.samples.iter().map(|sample| TokenSequence {
            prompt_token_ids: sample.prompt_token_ids.clone(),
            response_token_ids: sample.response_token_ids.clone(),
            response_mask: sample.response_mask.clone(),
        });
        let rows: Vec<TrainRow> =
            sampled.chain(self.completions.iter().cloned()).map(TrainRow::demonstration).collect();
        let num_rows = rows.len() as u64;
        let num_tokens = rows.iter().map(|r| r.sequence.response_token_ids.len() as u64).sum();
        MiniBatch {
            rows,
            global: GlobalCounts { num_tokens, num_sequences: num_rows, num_rows, loss_scale_factor: 1.0 },
            temperature: stage.sampling.log_prob_temperature(),
            learning_rate,
        }
    }

    fn columns(&self, report: &UpdateReport, row: &mut MetricsRow) {
        row.set("loss", report.loss).set("entropy", report.entropy).set("grad_norm", report.grad_norm);
        report.metrics.iter().for_each(|(name, value)| {
            row.set(name, *value);
        });
        let count = self.samples.len();
        row.set_count("num_samples", count as u64).set_count("num_completions", self.completions.len() as u64);
        if count == 0 {
            return;
        }
        let lengths = self.samples.iter().map(|s| s.response_token_ids.len() as f64);
        let cut = self.samples.iter().filter(|s| s.finish_reason == FinishReason::Length).count();
        row.set("response_length_mean", lengths.clone().sum::<f64>() / count as f64);
        row.set("response_length_max", lengths.fold(0.0, f64::max));
        row.set("truncated_ratio", cut as f64 / count as f64);
        let all: Vec<usize> = (0..count).collect();
        row.set("rollout_train_log_prob_diff_max", log_prob_gap(&self.samples, &all, |_| true).unwrap_or_default());
    }
}
