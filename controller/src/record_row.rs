//! The row of metrics of a policy step, and what goes to disk with it.

use crate::collect::{Collected, reward_of};
use crate::{Controller, Error, Phase, PolicyStage};
use std::collections::BTreeMap;
use std::time::Duration;
use temper_proto::UpdateReport;
use temper_telemetry::MetricsRow;
use temper_types::{FinishReason, RewardOutcome, Sample};

/// Counts and times gathered during a step.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct StepNumbers {
    begin: Duration,
    pub(crate) rollout_seconds: f64,
    pub(crate) reward_seconds: f64,
    pub(crate) train_seconds: f64,
    step_seconds: f64,
    pub(crate) num_gen_batches: u64,
    pub(crate) num_filtered_groups: u64,
    /// Number of scored samples before groups were filtered, and the sum of their rewards.
    pub(crate) generated: (u64, f64),
    /// Groups that dynamic sampling did not find.
    pub(crate) num_missing_groups: u64,
    /// Greedy responses that could not be scored.
    pub(crate) num_baseline_errors: u64,
    /// Prompts that the curriculum passed over.
    pub(crate) num_passed_over: u64,
}

impl StepNumbers {
    pub(crate) fn start(now: Duration) -> Self {
        StepNumbers { begin: now, ..StepNumbers::default() }
    }

    /// Count samples before any group is filtered out.
    pub(crate) fn count_generated(&mut self, samples: &[Sample]) {
        for reward in samples.iter().filter_map(reward_of) {
            self.generated = (self.generated.0 + 1, self.generated.1 + reward);
        }
    }

    /// Times of a step, and its rate over `num_tokens` generated ones.
    pub(crate) fn times(&self, num_tokens: usize, row: &mut MetricsRow) {
        row.set("tokens_per_second", num_tokens as f64 / self.step_seconds.max(1e-9));
        row.set("rollout_seconds", self.rollout_seconds).set("reward_seconds", self.reward_seconds);
        row.set("train_seconds", self.train_seconds).set("step_seconds", self.step_seconds);
    }

    pub(crate) fn finish(&mut self, now: Duration) {
        self.step_seconds = now.saturating_sub(self.begin).as_secs_f64();
    }
}

/// Sums of one kind of number over samples.
fn mean(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let count = values.clone().count();
    if count == 0 { 0.0 } else { values.sum::<f64>() / count as f64 }
}

fn std(values: &[f64]) -> f64 {
    if values.len() < 2 {
        return 0.0;
    }
    let center = mean(values.iter().copied());
    (values.iter().map(|v| (v - center).powi(2)).sum::<f64>() / (values.len() - 1) as f64).sqrt()
}

/// Metrics by name.
pub(crate) type Columns = Vec<(String, f64)>;

impl Controller {
    /// Write the step's trajectories and metrics, validate where it is due, and count the step as done.
    pub(crate) fn record_step(
        &mut self,
        stage: &PolicyStage,
        collected: Collected,
        trained: &[usize],
        (numbers, reports, columns): (StepNumbers, Vec<UpdateReport>, Columns),
    ) -> Result<MetricsRow, Error> {
        let samples = &collected.samples[..];
        let mut row = MetricsRow::new(self.state.step + 1, &stage.name);
        row.set("lr", stage.optimizer.learning_rate * stage.schedule.multiplier(self.state.stage_step, stage.steps));
        if let (true, Some(coef)) = (stage.algorithm.kl_in_reward.use_kl_in_reward, self.state.kl_coef) {
            row.set("kl_coef", coef);
        }
        sample_columns(samples, &mut row);
        update_columns(&reports, &mut row);
        time_columns(samples, &numbers, &mut row);
        row.set("rollout_train_log_prob_diff_max", log_prob_gap(samples, trained));
        row.set("staleness_mean", mean(samples.iter().map(|s| f64::from(s.staleness))));
        row.set_count("num_trained_samples", trained.len() as u64);
        baseline_columns(&collected.baselines, &numbers, &mut row);
        if stage.algorithm.filter_groups.enable {
            row.set("generated_reward_mean", numbers.generated.1 / numbers.generated.0.max(1) as f64);
        }
        let after = self.validation_after_step(stage)?;
        columns.iter().chain(&after).for_each(|(name, value)| {
            row.set(name, *value);
        });
        self.enter(Phase::Record);
        self.record.samples(self.state.step + 1, &collected.into_record())?;
        self.finish_step(&mut row)?;
        Ok(row)
    }
}

fn sample_columns(samples: &[Sample], row: &mut MetricsRow) {
    let rewards: Vec<f64> = samples.iter().filter_map(|s| s.outcome.as_ref()?.reward()).collect();
    let lengths = samples.iter().map(|s| s.response_token_ids.len() as f64);
    let failed = samples.iter().filter(|s| matches!(s.outcome, Some(RewardOutcome::Failed(_)))).count();
    let cut = samples.iter().filter(|s| s.finish_reason == FinishReason::Length).count();
    row.set("reward_mean", mean(rewards.iter().copied())).set("reward_std", std(&rewards));
    row.set_count("num_samples", samples.len() as u64).set_count("num_reward_errors", failed as u64);
    row.set("response_length_mean", mean(lengths.clone())).set("response_length_max", lengths.fold(0.0, f64::max));
    if samples.iter().any(|s| !s.response_reused.is_empty()) {
        let num_reused = samples.iter().flat_map(|s| &s.response_reused).map(|flag| u64::from(*flag)).sum();
        row.set_count("num_reused_tokens", num_reused);
    }
    row.set("truncated_ratio", cut as f64 / samples.len().max(1) as f64);
    for (name, values) in component_values(samples) {
        row.set(&format!("reward/{name}"), mean(values.iter().copied()));
    }
}

/// What the greedy responses got, where there are any.
fn baseline_columns(baselines: &[Sample], numbers: &StepNumbers, row: &mut MetricsRow) {
    if baselines.is_empty() {
        return;
    }
    let rewards: Vec<f64> = baselines.iter().filter_map(reward_of).collect();
    row.set("baseline_reward_mean", mean(rewards.iter().copied()));
    row.set_count("num_baseline_errors", numbers.num_baseline_errors);
}

fn component_values(samples: &[Sample]) -> BTreeMap<&str, Vec<f64>> {
    let mut values: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for sample in samples {
        let Some(RewardOutcome::Scored { components, .. }) = &sample.outcome else { continue };
        for component in components {
            values.entry(&component.name).or_default().push(component.value);
        }
    }
    values
}

/// Means over the step's optimizer updates; nothing where only the critic learned. `kl` is against the reference where
/// the loss has that part, else between the policies before and after.
fn update_columns(reports: &[UpdateReport], row: &mut MetricsRow) {
    let Some(first) = reports.first() else { return };
    row.set("loss", mean(reports.iter().map(|r| r.loss)));
    row.set("entropy", mean(reports.iter().map(|r| r.entropy)));
    row.set("grad_norm", mean(reports.iter().map(|r| r.grad_norm)));
    let metric = |name: &str| mean(reports.iter().filter_map(|r| r.metrics.get(name).copied()));
    for name in first.metrics.keys() {
        row.set(name, metric(name));
    }
    let kl_loss = metric("kl_loss");
    row.set("kl", if kl_loss == 0.0 { metric("ppo_kl") } else { kl_loss });
}

fn time_columns(samples: &[Sample], numbers: &StepNumbers, row: &mut MetricsRow) {
    let generated: usize = samples.iter().map(|s| s.response_token_ids.len()).sum();
    row.set_count("num_gen_batches", numbers.num_gen_batches);
    row.set_count("num_filtered_groups", numbers.num_filtered_groups);
    row.set_count("num_missing_groups", numbers.num_missing_groups);
    numbers.times(generated, row);
}

/// Largest difference between what the engine and the trainer say of the same token under the same weights. Both
/// sides are computed; a kernel that is off by one unit in the last place shows here.
pub(crate) fn log_prob_gap(samples: &[Sample], trained: &[usize]) -> f64 {
    let gap = |sample: &Sample| {
        let pairs = sample.rollout_log_probs.iter().zip(&sample.old_log_probs).enumerate();
        // A reused token has the log-prob of the weights that drew it.
        let own = pairs.filter(|(index, _)| sample.response_reused.get(*index) != Some(&1));
        own.map(|(_, (rollout, old))| (f64::from(*rollout) - f64::from(*old)).abs()).fold(0.0, f64::max)
    };
    trained.iter().map(|index| gap(&samples[*index])).fold(0.0, f64::max)
}
