//! Bypass mode: the rollout log-probs stand in for the old ones, and correction happens inside the loss.
//!
//! Weights and rejection are computed from the detached gap between the policy now and the engine. `ppo_clip`: PPO's
//! surrogate against the rollout log-probs, rejection applied, weights not (the ratio is the weight). `reinforce`: the
//! plain policy gradient times the weights. Rejected tokens leave the denominators too, so the loss needs the whole
//! mini-batch and counts it itself. It reports the correction under `rollout_corr/`.
//!
//! # Source
//! verl's `compute_policy_loss_bypass_mode`.

use super::{GlobalCounts, LossMode, LossOutput, PolicyLossConfig, PolicyLossInput, pg_part};
use crate::rollout_correction::{BypassLoss, rollout_correction};
use crate::{Error, TokenBatch};

/// The policy-gradient part; `input.old_log_probs` are the engine's.
pub(super) fn loss(
    config: &PolicyLossConfig,
    input: &PolicyLossInput<'_>,
    counts: &GlobalCounts,
) -> Result<LossOutput, Error> {
    let settings = &config.rollout_correction;
    let correction = rollout_correction(settings, &input.batch, input.log_probs, input.old_log_probs)?;
    let kept: TokenBatch = input.batch.with_mask(&correction.response_mask)?;
    let (loss_mode, weights) = match settings.loss_type {
        BypassLoss::PpoClip => (LossMode::Vanilla, None),
        BypassLoss::Reinforce => (LossMode::Reinforce, correction.weights.as_deref()),
    };
    let inner = PolicyLossConfig { loss_mode, ..config.clone() };
    let input = PolicyLossInput { batch: kept, rollout_is_weights: weights, ..*input };
    let out = pg_part(&inner, &input, &GlobalCounts::of(&kept, counts.loss_scale_factor))?;
    Ok(LossOutput { reports: correction.columns(), ..out })
}
