//! GMPO (geo_mean): a sequence's ratio is the geometric mean of ratios clipped on one side, token by token.
//!
//! `x = log_prob - old`; `y = sign(A) min(sign(A) x, sign(A) clamp(x, -low, high))`; `R_i = exp(mean_t y)`,
//! `A_i = mean_t A`; `loss = mean_i(-A_i R_i)` over all rows, those without tokens counting as 0. `loss_agg_mode` has
//! no
//! effect. Importance weights enter by their geometric mean over the row, `exp(mean_t ln(w + 1e-10))`.
//!
//! # Source
//! arXiv 2507.20673, as in verl.

use super::PolicyLossInput;
use super::config::ClipRange;
use super::terms::{Terms, smaller};
use crate::kl::Dual;
use crate::math::{Cut, cut_passes};

/// Row losses, spread evenly over each row's tokens; the weight of every row is `1 / num_rows`.
pub(crate) fn terms(input: &PolicyLossInput<'_>, range: ClipRange) -> Terms {
    let batch = &input.batch;
    let mut terms = Terms::zeros(batch);
    for row in 0..batch.num_rows() {
        let len = batch.row_len(row) as f64;
        let (mut exponent, mut advantage, mut log_weight) = (0.0, 0.0, 0.0);
        for t in batch.active(row) {
            let token = clipped(input, t, range);
            exponent += token.value / len;
            terms.d_log_probs[t] = token.d / len;
            terms.num_clipped += usize::from(token.outside && input.advantages[t] > 0.0);
            terms.num_clipped_lower += usize::from(token.outside && input.advantages[t] < 0.0);
            advantage += input.advantages[t] / len;
            log_weight += input.rollout_is_weights.map_or(0.0, |w| (w[t] + 1e-10).ln()) / len;
        }
        let loss = -advantage * (exponent + log_weight).exp();
        for t in batch.active(row) {
            terms.losses[t] = loss / len;
            terms.d_log_probs[t] *= loss;
        }
    }
    terms
}

struct Clipped {
    value: f64,
    d: f64,
    outside: bool,
}

fn clipped(input: &PolicyLossInput<'_>, t: usize, range: ClipRange) -> Clipped {
    let x = input.log_probs[t] - input.old_log_probs[t];
    let bounded = x.cut(-range.low, range.high);
    let advantage = input.advantages[t];
    let outside = bounded != x;
    if advantage == 0.0 {
        return Clipped { value: 0.0, d: 0.0, outside };
    }
    let sign = advantage.signum();
    let plain = Dual { value: sign * x, d: sign };
    let passes = cut_passes(x, -range.low, range.high);
    let least = smaller(plain, Dual { value: sign * bounded, d: if passes { sign } else { 0.0 } });
    Clipped { value: sign * least.value, d: sign * least.d, outside }
}
