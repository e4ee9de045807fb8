//! The row of metrics of a policy step, and what goes to disk with it.

use crate::batch::{Batch, BatchNumbers};
use crate::collect::reward_of;
use crate::{Controller, Error, Phase, PolicyStage};
use std::collections::BTreeMap;
use std::time::Duration;
use temper_proto::UpdateReport;
use temper_telemetry::MetricsRow;
use temper_types::{FinishReason, PolicyVersion, RewardOutcome, Sample};

/// Counts and times gathered during a step.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct StepNumbers {
    begin: Duration,
    /// Of the batch that the step trains on.
    pub(crate) batch: BatchNumbers,
    /// Number of the version that the step begins with.
    pub(crate) version: u64,
    pub(crate) train_seconds: f64,
    /// Time in which the trainer waited for a batch, its own or one ahead.
    pub(crate) rollout_wait_seconds: f64,
    /// Time in which a batch was generated while the trainer trained.
    pub(crate) rollout_overlap_seconds: f64,
    step_seconds: f64,
}

impl StepNumbers {
    pub(crate) fn start(now: Duration) -> Self {
        StepNumbers { begin: now, ..StepNumbers::default() }
    }

    /// Times of a step, and its rate over `num_tokens` generated ones.
    pub(crate) fn times(&self, num_tokens: usize, row: &mut MetricsRow) {
        row.set("tokens_per_second", num_tokens as f64 / self.step_seconds.max(1e-9));
        row.set("rollout_seconds", self.batch.rollout_seconds).set("reward_seconds", self.batch.reward_seconds);
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
        batch: Batch,
        trained: &[usize],
        (numbers, reports, columns): (StepNumbers, Vec<UpdateReport>, Columns),
    ) -> Result<MetricsRow, Error> {
        let samples = &batch.samples[..];
        let mut row = MetricsRow::new(self.state.step + 1, &stage.name);
        row.set("lr", stage.optimizer.learning_rate * stage.schedule.multiplier(self.state.stage_step, stage.steps));
        if let (true, Some(coef)) = (stage.algorithm.kl_in_reward.use_kl_in_reward, self.state.kl_coef) {
            row.set("kl_coef", coef);
        }
        sample_columns(samples, &mut row);
        update_columns(&reports, &mut row);
        time_columns(samples, &numbers, &mut row);
        let own: Vec<usize> =
            trained.iter().copied().filter(|index| stage.is_of_its_versions(&samples[*index])).collect();
        if let Some(gap) = log_prob_gap(samples, &own, |version| version.number == numbers.version) {
            row.set("rollout_train_log_prob_diff_max", gap);
        }
        let staleness = samples.iter().map(|s| f64::from(s.staleness));
        row.set("staleness_mean", mean(staleness.clone())).set("staleness_max", staleness.fold(0.0, f64::max));
        row.set("rollout_wait_seconds", numbers.rollout_wait_seconds);
        row.set("rollout_overlap_seconds", numbers.rollout_overlap_seconds);
        row.set_count("num_trained_samples", trained.len() as u64);
        baseline_columns(&batch.baselines, &numbers.batch, &mut row);
        if stage.algorithm.filter_groups.enable {
            row.set("generated_reward_mean", numbers.batch.generated.1 / numbers.batch.generated.0.max(1) as f64);
        }
        let after = self.validation_after_step(stage)?;
        columns.iter().chain(&after).for_each(|(name, value)| {
            row.set(name, *value);
        });
        self.enter(Phase::Record);
        self.record.samples(self.state.step + 1, &batch.into_record())?;
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
fn baseline_columns(baselines: &[Sample], numbers: &BatchNumbers, row: &mut MetricsRow) {
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
    row.set_count("num_gen_batches", numbers.batch.num_gen_batches);
    row.set_count("num_filtered_groups", numbers.batch.num_filtered_groups);
    row.set_count("num_missing_groups", numbers.batch.num_missing_groups);
    numbers.times(generated, row);
}

/// Largest difference between what the engine and the trainer say of the same token under the same weights: over the
/// trained samples' tokens whose version `is_current`, the one that the trainer's log-probs are of; `None` where there
/// is no such token. Both sides are computed; a kernel that is off by one unit in the last place shows here.
pub(crate) fn log_prob_gap(
    samples: &[Sample],
    trained: &[usize],
    is_current: impl Fn(PolicyVersion) -> bool,
) -> Option<f64> {
    let gap = |sample: &Sample| {
        let versions = sample.policy_versions.iter().flat_map(|(v, n)| std::iter::repeat_n(*v, *n as usize));
        let pairs = sample.rollout_log_probs.iter().zip(&sample.old_log_probs).zip(versions).enumerate();
        // A reused token has the log-prob of the weights that drew it.
        let is_own = |index: usize| sample.response_reused.get(index) != Some(&1);
        let current = pairs.filter(|(index, (_, version))| is_own(*index) && is_current(*version));
        current.map(|(_, ((rollout, old), _))| (f64::from(*rollout) - f64::from(*old)).abs()).reduce(f64::max)
    };
    trained.iter().filter_map(|index| gap(&samples[*index])).reduce(f64::max)
}
