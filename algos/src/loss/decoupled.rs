//! Decoupled PPO and the masks of asynchronous training: the clip is against a proximal policy, the weight against the
//! behaviour policy.
//!
//! `L = surrogate(pi / pi_prox) * w`, `w = pi_prox / pi_behave` (detached), divided by the number of tokens of the
//! original
//! mask whatever is rejected. M2PO keeps the tokens whose second moment stays under a bound; OPSM drops rows with a
//! negative advantage that drifted too far; proximal log-probs can be interpolated between behaviour and policy.
//!
//! # Source
//! AReaL, arXiv 2505.24298; M2PO 2510.01161; OPSM as in slime.

use super::{GlobalCounts, LossAggMode, PolicyLossInput, vanilla};
use crate::kl::Dual;
use crate::math::Cut;
use crate::{Error, TokenBatch};

/// Keep what the second moment allows: with values sorted in descending order, drop from the front until the mean of
/// the rest is at most `threshold`; the last value always stays.
pub fn m2po_mask(sorted: &[f64], threshold: f64) -> Vec<bool> {
    let mut mask = vec![true; sorted.len()];
    let mut rest: f64 = sorted.iter().sum();
    for (i, value) in sorted.iter().enumerate() {
        let left = (sorted.len() - i) as f64;
        if left <= 1.0 || rest / left <= threshold {
            break;
        }
        mask[i] = false;
        rest -= value;
    }
    mask
}

/// How proximal log-probs are estimated without a forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProximalMethod {
    /// A straight line between the log-probs.
    Loglinear,
    /// A straight line between the probabilities.
    Linear,
    /// The behaviour policy's.
    Rollout,
}

/// Proximal log-prob of a token that version `version` sampled, for an update from version `current` (the proximal
/// policy is version `current - 1`); a negative version is a token that was not generated.
pub fn proximal_log_prob(method: ProximalMethod, old: f64, now: f64, version: i64, current: i64) -> f64 {
    let alpha = if version >= 0 && current > version {
        let behind = (current - version) as f64;
        ((behind - 1.0) / behind).cut(0.0, 1.0)
    } else {
        0.0
    };
    match method {
        ProximalMethod::Rollout => old,
        ProximalMethod::Loglinear => old + alpha * (now - old),
        ProximalMethod::Linear if alpha == 0.0 => old,
        ProximalMethod::Linear => ((1.0 - alpha) * old.exp() + alpha * now.exp()).ln(),
    }
}

/// Mean of `old - log_prob` over a row's unmasked tokens.
fn row_kl(batch: &TokenBatch, log_probs: &[f64], old: &[f64], row: usize) -> f64 {
    let sum: f64 = batch.active(row).map(|t| old[t] - log_probs[t]).sum();
    sum / batch.row_len(row).max(1) as f64
}

/// Mean `old - log_prob` of each row, `[B]`: GSPO's KL.
pub fn sequence_kl(batch: &TokenBatch, log_probs: &[f64], old: &[f64]) -> Vec<f64> {
    (0..batch.num_rows()).map(|row| row_kl(batch, log_probs, old, row)).collect()
}

/// AReaL's actor loss on one batch, with every intermediate that it reports.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoupledOutput {
    /// The loss.
    pub loss: f64,
    /// `[T]`: d loss / d log_prob.
    pub d_log_probs: Vec<f64>,
    /// `[T]`: 1 where a clip bound holds.
    pub clipped: Vec<u8>,
    /// `[T]`: 1 where the dual clip holds.
    pub dual_clipped: Vec<u8>,
}

/// Level of AReaL's ratio and clip settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DecoupledOptions {
    /// Distance of the lower bound from 1.
    pub clip_low: f64,
    /// Distance of the upper bound from 1.
    pub clip_high: f64,
    /// Dual clip; 0 for none.
    pub dual_clip: f64,
    /// One ratio and one advantage per row (their means), or one per token.
    pub level: super::ImportanceLevel,
}

/// Decoupled PPO with given behaviour weights; `counts.num_tokens` is the number of tokens before any rejection.
///
/// # Errors
/// An array of the wrong length or not finite.
pub fn decoupled_loss(
    options: &DecoupledOptions,
    input: &PolicyLossInput<'_>,
    counts: &GlobalCounts,
) -> Result<DecoupledOutput, Error> {
    let batch = &input.batch;
    batch.expect_finite("decoupled", "log_probs", input.log_probs)?;
    batch.expect_finite("decoupled", "old_log_probs", input.old_log_probs)?;
    batch.expect_finite("decoupled", "advantages", input.advantages)?;
    let range = super::config::ClipRange { low: options.clip_low, high: options.clip_high };
    let scale = LossAggMode::TokenMean.row_weights(batch, counts)?;
    let zeros = || vec![0.0; batch.num_slots()];
    let mut out = DecoupledOutput {
        loss: 0.0,
        d_log_probs: zeros(),
        clipped: vec![0; batch.num_slots()],
        dual_clipped: vec![0; batch.num_slots()],
    };
    for (row, row_weight) in scale.iter().enumerate() {
        let len = batch.row_len(row).max(1) as f64;
        let mean = |values: &dyn Fn(usize) -> f64| batch.active(row).map(values).sum::<f64>() / len;
        let shared = (options.level == super::ImportanceLevel::Sequence)
            .then(|| (mean(&|t| input.log_probs[t] - input.old_log_probs[t]), mean(&|t| input.advantages[t])));
        let mut through_shared = 0.0;
        for t in batch.active(row) {
            let own = (input.log_probs[t] - input.old_log_probs[t], input.advantages[t]);
            let (log_ratio, advantage) = shared.unwrap_or(own);
            let ratio = Dual { value: log_ratio.exp(), d: log_ratio.exp() };
            let term = vanilla::clipped_surrogate(ratio, advantage, range, options.dual_clip);
            let weight = row_weight * input.rollout_is_weights.map_or(1.0, |w| w[t]);
            out.loss += weight * term.loss;
            out.clipped[t] = u8::from(term.clipped);
            out.dual_clipped[t] = u8::from(term.clipped_lower);
            match shared {
                None => out.d_log_probs[t] += weight * term.d,
                Some(_) => through_shared += weight * term.d / len,
            }
        }
        batch.active(row).for_each(|t| out.d_log_probs[t] += through_shared);
    }
    Ok(out)
}
