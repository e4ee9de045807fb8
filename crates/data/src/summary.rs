//! What `temper inspect` says of a dataset: figures per step, and single groups. Pure.

use serde::Serialize;
use std::collections::BTreeMap;
use temper_types::{GroupId, RewardOutcome, Sample, Step};

/// Figures of one step's samples.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepSummary {
    /// The step.
    pub step: Step,
    /// Number of samples.
    pub num_samples: usize,
    /// Number of groups.
    pub num_groups: usize,
    /// Number of samples whose scoring failed; they take no part in the reward figures.
    pub num_failed: usize,
    /// Number of samples that are not scored yet.
    pub num_unscored: usize,
    /// Mean reward of the scored samples; `None` where there is none.
    pub reward_mean: Option<f64>,
    /// Their standard deviation (over the samples, no correction); `None` where there is none.
    pub reward_std: Option<f64>,
    /// Mean of each reward component over the scored samples that have it.
    pub component_means: BTreeMap<String, f64>,
    /// Mean number of response tokens.
    pub response_length_mean: f64,
    /// Largest number of response tokens.
    pub response_length_max: usize,
    /// Number of samples by finish reason.
    pub finish_reasons: BTreeMap<&'static str, usize>,
    /// Mean number of versions between sampling and training.
    pub staleness_mean: f64,
    /// Largest |rollout - old log-prob| over tokens that are trained on; `None` where old log-probs are not known. A
    /// difference that is no number counts as infinite.
    pub log_prob_diff_max: Option<f64>,
    /// Number of samples by the cause that their scoring failed for.
    pub failures: BTreeMap<String, usize>,
}

/// Figures of every step, ascending.
pub fn summarize(samples: &[Sample]) -> Vec<StepSummary> {
    let mut steps: BTreeMap<Step, Vec<&Sample>> = BTreeMap::new();
    for sample in samples {
        steps.entry(sample.step).or_default().push(sample);
    }
    steps.into_iter().map(|(step, samples)| summarize_step(step, &samples)).collect()
}

fn summarize_step(step: Step, samples: &[&Sample]) -> StepSummary {
    let rewards: Vec<f64> = samples.iter().filter_map(|s| s.outcome.as_ref()?.reward()).collect();
    let reward_mean = mean(&rewards);
    let squares: Vec<f64> = rewards.iter().map(|r| (r - reward_mean.unwrap_or_default()).powi(2)).collect();
    let lengths: Vec<usize> = samples.iter().map(|s| s.response_token_ids.len()).collect();
    let failed = samples.iter().filter_map(|s| match &s.outcome {
        Some(RewardOutcome::Failed(failure)) => Some(failure.to_string()),
        _ => None,
    });
    let failures = count_by(failed);
    let groups = count_by(samples.iter().map(|s| s.group_id));
    let staleness: Vec<f64> = samples.iter().map(|s| f64::from(s.staleness)).collect();
    let token_counts: Vec<f64> = lengths.iter().map(|length| *length as f64).collect();
    StepSummary {
        step,
        num_samples: samples.len(),
        num_groups: groups.len(),
        num_failed: failures.values().sum(),
        num_unscored: samples.iter().filter(|s| s.outcome.is_none()).count(),
        reward_mean,
        reward_std: mean(&squares).map(f64::sqrt),
        component_means: component_means(samples),
        response_length_mean: mean(&token_counts).unwrap_or_default(),
        response_length_max: lengths.into_iter().max().unwrap_or_default(),
        finish_reasons: count_by(samples.iter().map(|s| s.finish_reason.name())),
        staleness_mean: mean(&staleness).unwrap_or_default(),
        log_prob_diff_max: samples.iter().filter_map(|s| log_prob_diff_max(s)).reduce(f64::max),
        failures,
    }
}

fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

fn count_by<K: Ord>(keys: impl Iterator<Item = K>) -> BTreeMap<K, usize> {
    let mut counts = BTreeMap::new();
    for key in keys {
        *counts.entry(key).or_insert(0) += 1;
    }
    counts
}

fn component_means(samples: &[&Sample]) -> BTreeMap<String, f64> {
    let mut values: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for sample in samples {
        let Some(RewardOutcome::Scored { components, .. }) = &sample.outcome else { continue };
        for component in components {
            values.entry(component.name.clone()).or_default().push(component.value);
        }
    }
    values.into_iter().filter_map(|(name, values)| Some((name, mean(&values)?))).collect()
}

fn log_prob_diff_max(sample: &Sample) -> Option<f64> {
    let pairs = sample.rollout_log_probs.iter().zip(&sample.old_log_probs);
    pairs
        .zip(&sample.response_mask)
        .filter(|(_, mask)| **mask == 1)
        .map(|((rollout, old), _)| (f64::from(*rollout) - f64::from(*old)).abs())
        .map(|difference| if difference.is_nan() { f64::INFINITY } else { difference })
        .reduce(f64::max)
}

/// The samples of one group, by sample index.
pub fn group(samples: &[Sample], group_id: GroupId) -> Vec<&Sample> {
    let mut members: Vec<&Sample> = samples.iter().filter(|s| s.group_id == group_id).collect();
    members.sort_by_key(|s| (s.step, s.sample_index));
    members
}

/// The groups of a step, ascending.
pub fn group_ids(samples: &[Sample], step: Step) -> Vec<GroupId> {
    count_by(samples.iter().filter(|s| s.step == step).map(|s| s.group_id)).into_keys().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trajectories::fixtures::{at_step, failed, full, minimal};
    use temper_types::SampleIndex;

    fn scored(reward: f64, group_id: u64, sample_index: u32) -> Sample {
        let outcome = Some(RewardOutcome::Scored { reward, components: Vec::new() });
        Sample { outcome, group_id: GroupId(group_id), sample_index: SampleIndex(sample_index), ..at_step(1) }
    }

    #[test]
    fn figures_of_a_step_are_those_of_its_samples() {
        let mut samples = vec![scored(1.0, 1, 0), scored(0.0, 1, 1), scored(2.0, 2, 0), full()];
        samples.push(Sample { step: Step(1), group_id: GroupId(2), ..failed() });
        samples.push(Sample { step: Step(1), group_id: GroupId(2), ..minimal() });
        let summaries = summarize(&samples);
        assert_eq!(summaries.iter().map(|s| s.step).collect::<Vec<_>>(), [Step(1), Step(3)]);
        let first = &summaries[0];
        assert_eq!((first.num_samples, first.num_groups, first.num_failed, first.num_unscored), (5, 2, 1, 1));
        assert_eq!(first.reward_mean, Some(1.0));
        assert!((first.reward_std.expect("three are scored") - (2.0f64 / 3.0).sqrt()).abs() < 1e-15);
        assert_eq!((first.response_length_mean, first.response_length_max), (12.0 / 5.0, 3));
        assert_eq!(first.finish_reasons, BTreeMap::from([("abort", 1), ("length", 1), ("stop_string", 3)]));
        assert_eq!(first.failures.keys().collect::<Vec<_>>(), ["reward `math` failed: deadline of 5 s exceeded"]);
        let expected = BTreeMap::from([("exact".to_owned(), 1.0), ("length".to_owned(), -0.25)]);
        assert_eq!(summaries[1].component_means, expected);
    }

    #[test]
    fn a_step_without_rewards_has_no_mean() {
        let summary = summarize(&[minimal()]).remove(0);
        assert_eq!((summary.reward_mean, summary.reward_std, summary.log_prob_diff_max), (None, None, None));
        assert_eq!(summarize(&[]), []);
    }

    /// Tokens that are not trained on do not count, and a difference that is no number is never hidden.
    #[test]
    fn the_log_prob_difference_is_that_of_trained_tokens() {
        let mut sample = full();
        sample.rollout_log_probs = vec![-1.0, -9.0, -2.0];
        sample.old_log_probs = vec![-1.0, -1.0, -2.5];
        sample.response_mask = vec![1, 0, 1];
        assert_eq!(summarize(std::slice::from_ref(&sample))[0].log_prob_diff_max, Some(0.5));
        sample.old_log_probs[0] = f32::NAN;
        assert_eq!(summarize(&[sample])[0].log_prob_diff_max, Some(f64::INFINITY));
    }

    #[test]
    fn a_group_comes_in_sample_order() {
        let samples = [scored(0.0, 2, 1), scored(0.0, 1, 0), scored(0.0, 2, 0)];
        let indices: Vec<_> = group(&samples, GroupId(2)).iter().map(|s| s.sample_index.0).collect();
        assert_eq!(indices, [0, 1]);
        assert_eq!(group_ids(&samples, Step(1)), [GroupId(1), GroupId(2)]);
        assert_eq!(group_ids(&samples, Step(2)), []);
    }
}
