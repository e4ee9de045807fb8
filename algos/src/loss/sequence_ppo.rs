//! PPO on whole sequences: the ratio is the product of all tokens' ratios.
//!
//! `R_i = exp(sum_t (log_prob - old))`, `loss = mean_i max(-A_i R_i, -A_i clamp(R_i, 1 - low, 1 + high))` over all
//! rows.
//! Importance weights enter by their mean over the row. `loss_agg_mode` has no effect; the advantage is that of the
//! row's first token.
//!
//! # Source
//! TRL's RLOOTrainer.

use super::config::ClipRange;
use super::{PolicyLossInput, terms::Terms, vanilla};
use crate::kl::Dual;

/// Row losses, spread evenly over each row's tokens; the weight of every row is `1 / num_rows`.
pub(crate) fn terms(input: &PolicyLossInput<'_>, range: ClipRange) -> Terms {
    let batch = &input.batch;
    let mut terms = Terms::zeros(batch);
    for row in 0..batch.num_rows() {
        let Some(first) = batch.active(row).next() else { continue };
        let sum: f64 = batch.active(row).map(|t| input.log_probs[t] - input.old_log_probs[t]).sum();
        let ratio = Dual { value: sum.exp(), d: sum.exp() };
        let term = vanilla::clipped_surrogate(ratio, input.advantages[first], range, 0.0);
        let len = batch.row_len(row) as f64;
        let weight = input.rollout_is_weights.map_or(1.0, |w| batch.active(row).map(|t| w[t]).sum::<f64>() / len);
        for t in batch.active(row) {
            terms.losses[t] = weight * term.loss / len;
            terms.d_log_probs[t] = weight * term.d;
            terms.num_clipped += usize::from(term.clipped);
        }
    }
    terms
}
