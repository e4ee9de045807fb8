//! GSPO: one ratio for the whole sequence, the geometric mean of its tokens' ratios, clipped as in PPO.
//!
//! `log s = mean_t(log_prob - old)` over unmasked tokens, bounded above by 10; every token has the value of the
//! surrogate at `s` and the gradient of its own log-prob, `d log s_t / d log_prob_t = 1` (the token form of the paper,
//! whose sum over a sequence equals the gradient of the sequence form). No dual clip.
//!
//! # Source
//! arXiv 2507.18071; the bound is verl's.

use super::config::ClipRange;
use super::terms::{Terms, clamped_exp};
use super::{PolicyLossInput, vanilla};

/// Token losses.
pub(crate) fn terms(input: &PolicyLossInput<'_>, range: ClipRange) -> Terms {
    let batch = &input.batch;
    let mut log_ratio = vec![0.0; batch.num_slots()];
    for row in 0..batch.num_rows() {
        let sum: f64 = batch.active(row).map(|t| input.log_probs[t] - input.old_log_probs[t]).sum();
        let mean = sum / batch.row_len(row).max(1) as f64;
        batch.active(row).for_each(|t| log_ratio[t] = mean);
    }
    Terms::per_token(batch, |t| {
        let ratio = clamped_exp(log_ratio[t], f64::NEG_INFINITY, 10.0);
        vanilla::clipped_surrogate(ratio, input.advantages[t], range, 0.0)
    })
}
