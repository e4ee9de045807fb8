//! How far the engine that sampled and the trainer are apart.

use super::SAFETY_BOUND;
use crate::masked::masked_mean;
use crate::math::Cut;
use crate::{Error, TokenBatch};

/// Diagnostics of the gap, in verl's terms. Means over rows are over all rows; an empty row counts with log-probs
/// of 0, as in verl.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct OffPolicyMetrics {
    /// Mean over rows of the perplexity under the trainer.
    pub training_ppl: f64,
    /// Mean over rows of its logarithm.
    pub training_log_ppl: f64,
    /// Mean over tokens of `rollout - old`: KL(rollout || trainer) by k1.
    pub kl: f64,
    /// The same by k3.
    pub k3_kl: f64,
    /// Mean over rows of the perplexity under the engine.
    pub rollout_ppl: f64,
    /// Mean over rows of its logarithm.
    pub rollout_log_ppl: f64,
    /// Mean over rows of the difference of the log-perplexities, trainer less engine.
    pub log_ppl_diff: f64,
    /// Mean of its absolute value.
    pub log_ppl_abs_diff: f64,
    /// Its largest value.
    pub log_ppl_diff_max: f64,
    /// Its smallest value.
    pub log_ppl_diff_min: f64,
    /// Mean over rows of its exponential.
    pub ppl_ratio: f64,
    /// Mean over tokens of the squared ratio, less 1.
    pub chi2_token: f64,
    /// Mean over rows of the squared ratio of whole sequences, less 1.
    pub chi2_seq: f64,
}

/// Compute the diagnostics; all 0 for a batch without tokens.
///
/// # Errors
/// An array of the wrong length, or a log-prob that is not finite.
pub fn off_policy_metrics(
    batch: &TokenBatch,
    old_log_probs: &[f64],
    rollout_log_probs: &[f64],
) -> Result<OffPolicyMetrics, Error> {
    batch.expect_finite("off_policy_metrics", "old_log_probs", old_log_probs)?;
    batch.expect_finite("off_policy_metrics", "rollout_log_probs", rollout_log_probs)?;
    if batch.num_tokens() == 0 {
        return Ok(OffPolicyMetrics::default());
    }
    let mask = batch.response_mask();
    let rows: Vec<_> = batch.rows().collect();
    let row_mean = |values: &[f64]| -> Vec<f64> {
        rows.iter().map(|row| masked_mean(&values[row.clone()], &mask[row.clone()])).collect()
    };
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let exp = |values: &[f64]| -> Vec<f64> { values.iter().map(|v| v.exp()).collect() };
    let (training, rollout) = (row_mean(old_log_probs), row_mean(rollout_log_probs));
    let negated = |values: &[f64]| -> Vec<f64> { values.iter().map(|v| -v).collect() };
    let difference: Vec<f64> = rollout.iter().zip(&training).map(|(r, o)| r - o).collect();
    let log_ratio: Vec<f64> = old_log_probs.iter().zip(rollout_log_probs).map(|(o, r)| o - r).collect();
    let bounded = |x: f64| x.cut(-SAFETY_BOUND, SAFETY_BOUND);
    let sums = rows.iter().map(|row| crate::masked::masked_sum(&log_ratio[row.clone()], &mask[row.clone()]));
    let tokens = |f: &dyn Fn(f64) -> f64| masked_mean(&log_ratio.iter().map(|x| f(*x)).collect::<Vec<_>>(), mask);
    Ok(OffPolicyMetrics {
        training_ppl: mean(&exp(&negated(&training))),
        training_log_ppl: mean(&negated(&training)),
        kl: tokens(&|x| -x),
        k3_kl: tokens(&|x| x.exp() - x - 1.0),
        rollout_ppl: mean(&exp(&negated(&rollout))),
        rollout_log_ppl: mean(&negated(&rollout)),
        log_ppl_diff: mean(&difference),
        log_ppl_abs_diff: mean(&difference.iter().map(|d| d.abs()).collect::<Vec<_>>()),
        log_ppl_diff_max: difference.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        log_ppl_diff_min: difference.iter().copied().fold(f64::INFINITY, f64::min),
        ppl_ratio: mean(&exp(&difference)),
        chi2_token: tokens(&|x| (2.0 * bounded(x)).exp()) - 1.0,
        chi2_seq: mean(&sums.map(|s| (2.0 * bounded(s)).exp()).collect::<Vec<_>>()) - 1.0,
    })
}
