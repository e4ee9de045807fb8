//! Masks and weights of tokens and rows that TRL's losses share with its helpers.

use crate::TokenBatch;
use crate::math::Cut;

/// Keep the unmasked tokens whose entropy is at or above the `quantile` of all unmasked entropies (linear
/// interpolation, in f32 as TRL does); `[T]`. Needs the whole mini-batch.
///
/// # Source
/// arXiv 2506.01939.
pub(crate) fn high_entropy(batch: &TokenBatch, entropies: &[f64], quantile: f64) -> Vec<u8> {
    let mut sorted: Vec<f32> =
        (0..batch.num_slots()).filter(|t| batch.is_active(*t)).map(|t| entropies[t] as f32).collect();
    if sorted.is_empty() {
        return vec![0; batch.num_slots()];
    }
    sorted.sort_by(f32::total_cmp);
    let position = quantile.cut(0.0, 1.0) * (sorted.len() - 1) as f64;
    let (below, above) = (position.floor() as usize, position.ceil() as usize);
    let (low, high) = (f64::from(sorted[below]), f64::from(sorted[above]));
    let threshold = f64::from((low + (high - low) * (position - below as f64)) as f32);
    (0..batch.num_slots()).map(|t| u8::from(batch.is_active(t) && entropies[t] >= threshold)).collect()
}

/// Rows that stay: those with an advantage from 0, or whose mean `sampling - log_prob` is at most `threshold`; `[B]`.
///
/// # Source
/// DeepSeek-V3.2's off-policy sequence mask, as in TRL.
pub(crate) fn off_policy_rows(
    batch: &TokenBatch,
    advantages: &[f64],
    log_probs: &[f64],
    sampling: &[f64],
    threshold: f64,
) -> Vec<bool> {
    let keep = |row: usize| {
        let gap: f64 = batch.active(row).map(|t| sampling[t] - log_probs[t]).sum();
        let advantage = batch.row(row).next().map_or(0.0, |t| advantages[t]);
        advantage >= 0.0 || gap / batch.row_len(row).max(1) as f64 <= threshold
    };
    (0..batch.num_rows()).map(keep).collect()
}

/// vespo's weight `exp(lambda + k W - lambda e^W)` of a sequence with log-ratio `W`, cut to `[ln 1e-8, 20]`,
/// `lambda` at least 1e-4.
///
/// # Source
/// arXiv 2602.10693.
pub(crate) fn gamma_weight(log_ratio: f64, k: f64, lambda: f64) -> f64 {
    let w = log_ratio.cut((1e-8_f64).ln(), 20.0);
    let lambda = lambda.max(1e-4);
    (lambda + k * w - lambda * w.exp()).exp()
}
