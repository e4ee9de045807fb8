//! One step of policy optimisation. It follows the algorithm's plan and names no algorithm.
//!
//! consumes: prompts of the stage's dataset, in the order of its cursor
//! produces: one optimizer step per mini-batch, a new policy version, a shard of trajectories, a row of metrics
//! waits for: the batch of the step; before the weights are published, the one under way (see `pipeline`)

use crate::batch::Batch;
use crate::collect::reward_of;
use crate::components::reward_components;
use crate::packed::Packed;
use crate::record_row::{Columns, StepNumbers};
use crate::{Controller, Error, Phase, PolicyStage};
use std::collections::BTreeSet;
use temper_algos::{AdvantageInput, Plan, Rewards, TokenBatch, apply_kl_penalty, compute_advantages, filters, widen};
use temper_proto::{LogProbs, MiniBatch, PolicyRole, TokenSequence, UpdateReport};
use temper_telemetry::MetricsRow;
use temper_types::{Sample, derive_seed};

/// Keeps the noise of drawing rows apart from that of sampling.
const DRAW_EPOCH: u64 = u64::MAX - 1;

/// What a batch did.
struct Learned {
    /// Indices of the samples that were trained on.
    rows: Vec<usize>,
    reports: Vec<UpdateReport>,
    columns: Columns,
}

impl Controller {
    /// Generate, score, weigh, update, publish, record.
    pub(crate) fn policy_step(&mut self, stage: &PolicyStage) -> Result<MetricsRow, Error> {
        let plan = stage.algorithm.plan();
        let mut numbers = StepNumbers::start(self.clock.elapsed());
        let mut columns = self.validation_at_start(stage)?;
        self.publish(self.state.step)?;
        let mut batch = self.take_batch(stage, &mut numbers)?;
        let ahead = self.begin_batch(stage, &mut numbers)?;
        self.rest_engines()?;
        let begin = self.clock.elapsed();
        let stage = &batch.stage_of(stage);
        let learned = self.learn(stage, &plan, &mut batch);
        numbers.train_seconds = (self.clock.elapsed() - begin).as_secs_f64();
        let learned = self.finish_batch(ahead, learned, &mut numbers)?;
        self.publish(self.state.step + 1)?;
        numbers.finish(self.clock.elapsed());
        columns.append(&mut batch.columns);
        columns.extend(learned.columns);
        self.record_step(stage, batch, &learned.rows, (numbers, learned.reports, columns))
    }

    /// Weigh a batch and update on it.
    fn learn(&mut self, stage: &PolicyStage, plan: &Plan, batch: &mut Batch) -> Result<Learned, Error> {
        let samples = &mut batch.samples;
        let mut packed = Packed::new(stage, plan, samples, self.state.step + 1)?;
        packed.add_baselines(samples, &batch.baselines);
        self.log_probs_before_update(stage, plan, &mut packed, samples)?;
        self.penalise_kl(stage, &mut packed, samples)?;
        let mut columns = self.correct_rollouts(stage, plan, &mut packed, samples)?;
        if plan.values {
            self.values(&packed, samples)?;
        }
        self.advantages(stage, plan, &packed, samples)?;
        columns.extend(self.draw_rows(stage, &mut packed, samples)?);
        columns.extend(self.update_critic(stage, &packed, samples)?);
        let reports = self.update(stage, &packed, samples)?;
        self.settle(samples, &packed.trained())?;
        self.sync_reference(stage)?;
        Ok(Learned { rows: packed.samples, reports, columns })
    }

    /// Seed of the current stage: the run's own for the first, derived for the others.
    pub(crate) fn stage_seed(&self) -> u64 {
        match self.state.stage {
            0 => self.spec.seed,
            stage => derive_seed(self.spec.seed, stage as u64, u32::MAX, u64::MAX),
        }
    }

    /// Log-probs that are needed before the first update: the reference's, and the old ones of every row that an
    /// update comes before. (Those of the first mini-batch come out of its own forward pass, computed, not copied.)
    fn log_probs_before_update(
        &mut self,
        stage: &PolicyStage,
        plan: &Plan,
        packed: &mut Packed,
        samples: &mut [Sample],
    ) -> Result<(), Error> {
        self.enter(Phase::LogProbs);
        let temperature = stage.sampling.log_prob_temperature();
        let late = rows_before_update(stage, plan, packed, samples);
        let old = self.service_log_probs(PolicyRole::Policy, (packed, &late), samples, temperature)?;
        for (row, log_probs) in late.iter().zip(old.log_probs) {
            samples[packed.samples[*row]].old_log_probs = log_probs;
        }
        if plan.sum_pi_squared {
            packed.sum_pi_squared = widen(&old.sum_pi_squared.concat());
        }
        if plan.ref_log_probs {
            let all: Vec<usize> = (0..packed.samples.len()).collect();
            let reference = self.service_log_probs(PolicyRole::Reference, (packed, &all), samples, temperature)?;
            for (row, log_probs) in all.iter().zip(reference.log_probs) {
                samples[packed.samples[*row]].ref_log_probs = log_probs;
            }
        }
        Ok(())
    }

    fn service_log_probs(
        &self,
        role: PolicyRole,
        (packed, rows): (&Packed, &[usize]),
        samples: &[Sample],
        temperature: f32,
    ) -> Result<LogProbs, Error> {
        if rows.is_empty() {
            return Ok(LogProbs::default());
        }
        let sequences: Vec<TokenSequence> = rows.iter().map(|row| packed.sequence(*row, samples)).collect();
        self.attribute(self.services.trainer.log_probs(role, &sequences, temperature))
    }

    fn advantages(
        &mut self,
        stage: &PolicyStage,
        plan: &Plan,
        packed: &Packed,
        samples: &mut [Sample],
    ) -> Result<(), Error> {
        self.enter(Phase::Advantages);
        let step = self.state.step + 1;
        let failed = |source| Error::Algorithm { step, source };
        let batch = TokenBatch::new(&packed.offsets, &packed.response_mask).map_err(failed)?;
        let scores: Vec<f64> = packed.samples.iter().map(|i| reward(&samples[*i])).collect();
        let rewards = match &packed.token_rewards[..] {
            [] => Rewards::Sequence(&scores),
            token_rewards => Rewards::Token(token_rewards),
        };
        let old_log_probs = packed.gather(samples, |s| &s.old_log_probs);
        let components = reward_components(stage, plan, &packed.samples, samples)?;
        let component_slices: Vec<&[f64]> = components.iter().map(Vec::as_slice).collect();
        let values: Vec<f64> = packed.samples.iter().flat_map(|i| widen(&samples[*i].values)).collect();
        let input = AdvantageInput {
            batch,
            values: plan.values.then_some(&values[..]),
            group_ids: &packed.group_ids,
            rewards,
            old_log_probs: plan.sum_pi_squared.then_some(&old_log_probs[..]),
            sum_pi_squared: plan.sum_pi_squared.then_some(&packed.sum_pi_squared[..]),
            rollout_is_weights: Some(&packed.rollout_weights[..]).filter(|weights| !weights.is_empty()),
            reward_baselines: plan.greedy_baseline.then_some(&packed.reward_baselines[..]),
            reward_components: plan.reward_components.then_some(&component_slices[..]),
        };
        let out = compute_advantages(&stage.algorithm.advantage, &input).map_err(failed)?;
        for (row, index) in packed.samples.iter().enumerate() {
            let range = packed.offsets[row]..packed.offsets[row + 1];
            samples[*index].response_mask = packed.response_mask[range.clone()].to_vec();
            samples[*index].advantages = narrow(&out.advantages[range.clone()]);
            samples[*index].returns = narrow(&out.returns[range]);
        }
        Ok(())
    }

    /// Put the KL against the reference into the rewards where the algorithm asks for it, and move the coefficient.
    fn penalise_kl(&mut self, stage: &PolicyStage, packed: &mut Packed, samples: &[Sample]) -> Result<(), Error> {
        let config = &stage.algorithm.kl_in_reward;
        if !config.use_kl_in_reward {
            return Ok(());
        }
        self.enter(Phase::Advantages);
        let step = self.state.step + 1;
        let failed = |source| Error::Algorithm { step, source };
        let batch = TokenBatch::new(&packed.offsets, &packed.response_mask).map_err(failed)?;
        let mut controller = temper_algos::KlController::new(&config.kl_ctrl).map_err(failed)?;
        controller.set_coef(self.state.kl_coef.unwrap_or(config.kl_ctrl.kl_coef));
        let mut token_scores = vec![0.0; packed.response_mask.len()];
        for (row, index) in packed.samples.iter().enumerate() {
            if let Some(last) = batch.active(row).next_back() {
                token_scores[last] = reward(&samples[*index]);
            }
        }
        let old = packed.gather(samples, |s| &s.old_log_probs);
        let reference = packed.gather(samples, |s| &s.ref_log_probs);
        let penalised = apply_kl_penalty(config.kl_penalty, controller.coef(), &batch, &token_scores, &old, &reference)
            .map_err(failed)?;
        controller.update(penalised.current_kl, packed.samples.len() as u64);
        self.state.kl_coef = Some(controller.coef());
        packed.token_rewards = penalised.token_level_rewards;
        Ok(())
    }

    /// Draw the rows of the update by their scores, where the algorithm asks for it.
    fn draw_rows(&self, stage: &PolicyStage, packed: &mut Packed, samples: &[Sample]) -> Result<Columns, Error> {
        let config = &stage.algorithm.pf_ppo;
        if !config.enable {
            return Ok(Columns::new());
        }
        let step = self.state.step + 1;
        let scores: Vec<f64> = packed.samples.iter().map(|i| reward(&samples[*i])).collect();
        let weights = filters::pf_ppo_weights(config.reweight_method, &scores, config.weight_pow);
        let seed = derive_seed(self.stage_seed(), step, u32::MAX, DRAW_EPOCH);
        let rows =
            filters::resample(&weights, scores.len(), seed).map_err(|source| Error::Algorithm { step, source })?;
        let distinct: BTreeSet<usize> = rows.iter().copied().collect();
        packed.drawn_rows = Some(rows);
        Ok(vec![("pf_ppo/num_distinct_rows".to_owned(), distinct.len() as f64)])
    }

    fn update(
        &mut self,
        stage: &PolicyStage,
        packed: &Packed,
        samples: &mut [Sample],
    ) -> Result<Vec<UpdateReport>, Error> {
        let batches = packed.mini_batches(stage.mini_batches, samples);
        let epochs = if self.is_critic_warmup(stage) { 0 } else { stage.epochs };
        let learning_rate =
            stage.optimizer.learning_rate * stage.schedule.multiplier(self.state.stage_step, stage.steps);
        let mut reports = Vec::new();
        for _epoch in 0..epochs {
            for rows in &batches {
                self.enter(Phase::Update);
                self.unpublished = true;
                let batch = MiniBatch {
                    rows: rows.iter().map(|row| packed.train_row(*row, samples)).collect(),
                    global: packed.counts(rows, stage.sampling.max_new_tokens),
                    temperature: stage.sampling.log_prob_temperature(),
                    learning_rate,
                };
                let updated = self.services.trainer.update(batch);
                let report = self.attribute(updated)?;
                for (row, log_probs) in rows.iter().zip(&report.log_probs) {
                    let sample = &mut samples[packed.samples[*row]];
                    if reports.is_empty() && sample.old_log_probs.is_empty() {
                        sample.old_log_probs.clone_from(log_probs);
                    }
                }
                reports.push(report);
            }
        }
        Ok(reports)
    }
}

/// Rows whose old log-probs are computed before the first update: all where something is computed from them, none
/// where the algorithm does without them, else those of the later mini-batches.
fn rows_before_update(stage: &PolicyStage, plan: &Plan, packed: &Packed, samples: &[Sample]) -> Vec<usize> {
    let all = 0..packed.samples.len();
    if plan.old_log_probs_first {
        return all.collect();
    }
    if !plan.old_log_probs {
        return Vec::new();
    }
    let first = packed.mini_batches(stage.mini_batches, samples).into_iter().next().unwrap_or_default();
    all.filter(|row| !first.contains(row)).collect()
}

/// Reward of a packed sample.
fn reward(sample: &Sample) -> f64 {
    reward_of(sample).expect("only scored samples are packed")
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|v| *v as f32).collect()
}
