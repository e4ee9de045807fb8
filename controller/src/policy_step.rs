//! One step of policy optimisation. It follows the algorithm's plan and names no algorithm.
//!
//! consumes: prompts of the stage's dataset, in the order of its cursor
//! produces: one optimizer step per mini-batch, a new policy version, a shard of trajectories, a row of metrics
//! waits for: every group of the step (staleness 0)

use crate::packed::Packed;
use crate::record_row::StepNumbers;
use crate::{Controller, Error, Phase, PolicyStage};
use temper_algos::{AdvantageInput, Plan, Rewards, TokenBatch, apply_kl_penalty, compute_advantages, filters, widen};
use temper_proto::{MiniBatch, PolicyRole, ScoreRequest, TokenSequence, UpdateReport};
use temper_telemetry::MetricsRow;
use temper_types::{RewardComponent, RewardOutcome, Sample, SampleKey, derive_seed};

impl Controller {
    /// Generate, score, weigh, update, publish, record.
    pub(crate) fn policy_step(&mut self, stage: &PolicyStage) -> Result<MetricsRow, Error> {
        let plan = stage.algorithm.plan();
        let mut numbers = StepNumbers::start(self.clock.elapsed());
        let before = self.validation_at_start(stage)?;
        self.publish(self.state.step)?;
        let mut samples = self.collect(stage, &plan, &mut numbers)?;
        let packed = Packed::new(stage, &plan, &samples, self.state.step + 1)?;
        let begin = self.clock.elapsed();
        self.log_probs_before_update(stage, &plan, &packed, &mut samples)?;
        self.advantages(stage, &plan, &packed, &mut samples)?;
        let reports = self.update(stage, &packed, &mut samples)?;
        self.publish(self.state.step + 1)?;
        numbers.train_seconds = (self.clock.elapsed() - begin).as_secs_f64();
        numbers.finish(self.clock.elapsed());
        self.record_step(stage, &samples, &packed.samples, (numbers, reports, before))
    }

    /// Seed of the current stage: the run's own for the first, derived for the others.
    pub(crate) fn stage_seed(&self) -> u64 {
        match self.state.stage {
            0 => self.spec.seed,
            stage => derive_seed(self.spec.seed, stage as u64, u32::MAX, u64::MAX),
        }
    }

    /// Scored samples of `prompts_per_step` groups; with dynamic sampling, groups without spread are drawn anew.
    fn collect(&mut self, stage: &PolicyStage, plan: &Plan, numbers: &mut StepNumbers) -> Result<Vec<Sample>, Error> {
        let filter = &stage.algorithm.filter_groups;
        let mut kept: Vec<Sample> = Vec::new();
        let mut num_groups = 0;
        while num_groups < stage.prompts_per_step {
            let groups = self.generate(stage, stage.prompts_per_step - num_groups, numbers)?;
            let groups = self.score(stage, groups, numbers)?;
            numbers.num_gen_batches += 1;
            for group in groups {
                if plan.filter_groups && !filters::keep_group(&metric_values(&group, &filter.metric)) {
                    numbers.num_filtered_groups += 1;
                    continue;
                }
                num_groups += 1;
                kept.extend(group);
            }
            if filter.max_num_gen_batches > 0 && numbers.num_gen_batches >= u64::from(filter.max_num_gen_batches) {
                break;
            }
        }
        Ok(kept)
    }

    fn score(
        &mut self,
        stage: &PolicyStage,
        mut groups: Vec<Vec<Sample>>,
        numbers: &mut StepNumbers,
    ) -> Result<Vec<Vec<Sample>>, Error> {
        self.enter(Phase::Reward);
        let begin = self.clock.elapsed();
        let requests: Vec<ScoreRequest> = groups.iter().flatten().map(score_request).collect();
        let outcomes = self.attribute(self.services.reward.score(&requests))?;
        let seconds = (self.clock.elapsed() - begin).as_secs_f64();
        numbers.reward_seconds += seconds;
        let share = seconds / requests.len().max(1) as f64;
        for (sample, outcome) in groups.iter_mut().flatten().zip(outcomes) {
            let length = sample.response_token_ids.len() as u64;
            sample.outcome = Some(with_penalty(outcome, stage.algorithm.overlong.penalty(length)));
            sample.timings.reward_seconds = share;
        }
        Ok(groups)
    }

    /// Log-probs that are needed before the first update: the reference's, and the old ones of every row that an
    /// update comes before. (Those of the first mini-batch come out of its own forward pass, computed, not copied.)
    fn log_probs_before_update(
        &mut self,
        stage: &PolicyStage,
        plan: &Plan,
        packed: &Packed,
        samples: &mut [Sample],
    ) -> Result<(), Error> {
        self.enter(Phase::LogProbs);
        let temperature = stage.sampling.log_prob_temperature();
        let all_at_once = stage.algorithm.kl_in_reward.use_kl_in_reward || plan.sum_pi_squared || plan.values;
        let first = packed.mini_batches(stage.mini_batches, samples).into_iter().next().unwrap_or_default();
        let is_late = |row: &usize| all_at_once || !first.contains(row);
        let late: Vec<usize> = (0..packed.samples.len()).filter(is_late).collect();
        let old = self.service_log_probs(PolicyRole::Policy, (packed, &late), samples, temperature)?;
        for (row, log_probs) in late.iter().zip(old) {
            samples[packed.samples[*row]].old_log_probs = log_probs;
        }
        if plan.ref_log_probs {
            let all: Vec<usize> = (0..packed.samples.len()).collect();
            let reference = self.service_log_probs(PolicyRole::Reference, (packed, &all), samples, temperature)?;
            for (row, log_probs) in all.iter().zip(reference) {
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
    ) -> Result<Vec<Vec<f32>>, Error> {
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let sequences: Vec<TokenSequence> = rows.iter().map(|row| packed.sequence(*row, samples)).collect();
        Ok(self.attribute(self.services.trainer.log_probs(role, &sequences, temperature))?.log_probs)
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
        let scores: Vec<f64> = packed.samples.iter().map(|i| reward_of(&samples[*i])).collect();
        let mut token_rewards = Vec::new();
        if stage.algorithm.kl_in_reward.use_kl_in_reward {
            token_rewards = self.penalised(stage, packed, samples, &scores)?;
        }
        let rewards =
            if token_rewards.is_empty() { Rewards::Sequence(&scores) } else { Rewards::Token(&token_rewards) };
        let components = reward_components(plan, packed, samples);
        let component_slices: Vec<&[f64]> = components.iter().map(Vec::as_slice).collect();
        let input = AdvantageInput {
            batch,
            group_ids: &packed.group_ids,
            rewards,
            reward_components: plan.reward_components.then_some(&component_slices[..]),
            ..AdvantageInput::default()
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

    /// Rewards per token with the KL against the reference inside; moves the coefficient.
    fn penalised(
        &mut self,
        stage: &PolicyStage,
        packed: &Packed,
        samples: &[Sample],
        scores: &[f64],
    ) -> Result<Vec<f64>, Error> {
        let step = self.state.step + 1;
        let failed = |source| Error::Algorithm { step, source };
        let config = &stage.algorithm.kl_in_reward;
        let batch = TokenBatch::new(&packed.offsets, &packed.response_mask).map_err(failed)?;
        let mut controller = temper_algos::KlController::new(&config.kl_ctrl).map_err(failed)?;
        controller.set_coef(self.state.kl_coef.unwrap_or(config.kl_ctrl.kl_coef));
        let mut token_scores = vec![0.0; packed.response_mask.len()];
        for (row, score) in scores.iter().enumerate() {
            if let Some(last) = batch.active(row).next_back() {
                token_scores[last] = *score;
            }
        }
        let gather = |f: fn(&Sample) -> &Vec<f32>| -> Vec<f64> {
            packed.samples.iter().flat_map(|i| widen(f(&samples[*i]))).collect()
        };
        let (old, reference) = (gather(|s| &s.old_log_probs), gather(|s| &s.ref_log_probs));
        let penalised = apply_kl_penalty(config.kl_penalty, controller.coef(), &batch, &token_scores, &old, &reference)
            .map_err(failed)?;
        controller.update(penalised.current_kl, packed.samples.len() as u64);
        self.state.kl_coef = Some(controller.coef());
        Ok(penalised.token_level_rewards)
    }

    fn update(
        &mut self,
        stage: &PolicyStage,
        packed: &Packed,
        samples: &mut [Sample],
    ) -> Result<Vec<UpdateReport>, Error> {
        let batches = packed.mini_batches(stage.mini_batches, samples);
        let learning_rate =
            stage.optimizer.learning_rate * stage.schedule.multiplier(self.state.stage_step, stage.steps);
        let mut reports = Vec::new();
        for _epoch in 0..stage.epochs {
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
                    if sample.old_log_probs.is_empty() {
                        sample.old_log_probs.clone_from(log_probs);
                    }
                }
                reports.push(report);
            }
        }
        Ok(reports)
    }
}

fn score_request(sample: &Sample) -> ScoreRequest {
    ScoreRequest {
        key: SampleKey {
            prompt_id: sample.prompt_id,
            group_id: sample.group_id,
            sample_index: sample.sample_index,
            epoch: sample.epoch,
        },
        data_source: sample.data_source.clone(),
        response: sample.response.clone(),
        num_response_tokens: sample.response_token_ids.len(),
        finish_reason: sample.finish_reason,
        ground_truth: sample.ground_truth.clone(),
        extra_info: sample.extra_info.clone(),
    }
}

fn with_penalty(outcome: RewardOutcome, penalty: f64) -> RewardOutcome {
    match outcome {
        RewardOutcome::Scored { reward, mut components } if penalty != 0.0 => {
            components.push(RewardComponent { name: "overlong_penalty".to_owned(), value: penalty });
            RewardOutcome::Scored { reward: reward + penalty, components }
        }
        other => other,
    }
}

fn reward_of(sample: &Sample) -> f64 {
    sample.outcome.as_ref().and_then(RewardOutcome::reward).expect("only scored samples are packed")
}

/// Values of the metric that dynamic sampling looks at; samples whose reward failed have none.
fn metric_values(group: &[Sample], metric: &str) -> Vec<f64> {
    let value = |sample: &Sample| match sample.outcome.as_ref()? {
        RewardOutcome::Scored { reward, .. } if metric == "reward" => Some(*reward),
        RewardOutcome::Scored { components, .. } => components.iter().find(|c| c.name == metric).map(|c| c.value),
        RewardOutcome::Failed(_) => None,
    };
    group.iter().filter_map(value).collect()
}

/// One array per component, in the order of the first row's; empty where the plan does not ask for them.
fn reward_components(plan: &Plan, packed: &Packed, samples: &[Sample]) -> Vec<Vec<f64>> {
    let components = |index: &usize| match &samples[*index].outcome {
        Some(RewardOutcome::Scored { components, .. }) => components.iter().map(|c| c.value).collect::<Vec<f64>>(),
        _ => Vec::new(),
    };
    if !plan.reward_components {
        return Vec::new();
    }
    let rows: Vec<Vec<f64>> = packed.samples.iter().map(components).collect();
    let num_components = rows.first().map_or(0, Vec::len);
    (0..num_components).map(|k| rows.iter().map(|row| row.get(k).copied().unwrap_or(f64::NAN)).collect()).collect()
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|v| *v as f32).collect()
}
