//! Masks and weights of tokens and rows that TRL's losses share with its helpers.

use crate::TokenBatch;
use crate::math::Cut;

/// Keep the unmasked tokens whose entropy is at or above the `quantile` of all unmasked entropies; `[T]`. Needs the
/// whole mini-batch. A token may lie on the threshold, so that its rounding decides: see [`quantile_f32`].
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
    let threshold = f64::from(quantile_f32(&sorted, quantile.cut(0.0, 1.0)));
    (0..batch.num_slots()).map(|t| u8::from(batch.is_active(t) && entropies[t] >= threshold)).collect()
}

/// A quantile of ascending values with linear interpolation, to the last bit that of `torch.quantile` on f32: the
/// quantile is an f32, the rank an f64, and the interpolation one fused multiply-add in f32 from the nearer value.
fn quantile_f32(sorted: &[f32], quantile: f64) -> f32 {
    let rank = f64::from(quantile as f32) * (sorted.len() - 1) as f64;
    let weight = (rank - rank.floor()) as f32;
    let (low, high) = (sorted[rank.floor() as usize], sorted[rank.ceil() as usize]);
    if weight < 0.5 { weight.mul_add(high - low, low) } else { (weight - 1.0).mul_add(high - low, high) }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_threshold_beside_a_token_is_rounded_as_torch_does() {
        let six = [0.18, 0.54, 0.6, 0.69, 0.73, 1.39];
        let four = [0.14, 0.43, 3.24, 3.8];
        for (values, quantile, expected) in
            [(&six[..], 1.0 - 0.2, 0.730_000_1), (&six, 1.0 - 0.3, 0.71), (&four, 1.0 - 0.7, 0.401_000_02)]
        {
            assert_eq!(quantile_f32(values, quantile), expected, "{quantile} of {values:?}");
        }
        assert_eq!([0.0, 1.0].map(|q| quantile_f32(&six, q)), [0.18, 1.39]);
    }

    #[test]
    fn the_token_at_rank_four_of_six_falls_below_the_threshold() {
        let entropies = [0.18, 0.54, 0.6, 0.69, 0.73, 1.39];
        let batch = TokenBatch::new(&[0, 6], &[1; 6]).expect("six tokens");
        assert_eq!(high_entropy(&batch, &entropies, 1.0 - 0.2), [0, 0, 0, 0, 0, 1]);
    }
}
