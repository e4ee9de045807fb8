//! Correction of the gap between the engine that sampled and the trainer that learns.
//!
//! With `lr = old_log_prob - rollout_log_prob`: importance weights `e^lr`, truncated or cut to a range (`weights`);
//! and rejection, which clears the mask where a statistic of `lr` is too large (`rejection`). Nothing here is
//! differentiated. On-policy tokens (`lr = 0`) have a weight of exactly 1, and no statistic rejects them.
//!
//! # Source
//! verl's `rollout_corr_helper`: truncated importance sampling, IcePop (masked ranges), geometric rejection.

mod engine_ratio;
mod named;
mod off_policy;
mod rejection;
mod second_moment;
mod weights;

pub use engine_ratio::{EngineRange, OutOfRange, engine_ratio};
pub use off_policy::{OffPolicyMetrics, off_policy_metrics};
pub use rejection::{
    Level, OptionReport, RejectionOption, RejectionOutput, RejectionReport, Statistic, rejection_mask,
};
pub use weights::{IsLevel, WeightMetrics, WeightOutput, importance_weights};

use crate::{Error, TokenBatch};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Log-ratios are cut to this before they are exponentiated.
pub(crate) const SAFETY_BOUND: f64 = 20.0;

/// A bound: one number, or a text of bounds (`"0.5_2.0"` for a range, `"0.7_1.4,0.05"` for one bound per option).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Threshold {
    /// An upper bound.
    Upper(f64),
    /// One or several bounds, or ranges `lower_upper`.
    Text(String),
}

impl std::fmt::Display for Threshold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Threshold::Upper(bound) => write!(f, "{bound}"),
            Threshold::Text(text) => f.write_str(text),
        }
    }
}

/// What bypass mode does with the corrected log-probs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BypassLoss {
    /// PPO's clipped surrogate against the rollout log-probs; the ratio is the correction.
    #[default]
    PpoClip,
    /// Plain policy gradient times the importance weights.
    Reinforce,
}

/// Settings of the rollout correction.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RolloutCorrectionConfig {
    /// Level of the importance weights.
    pub rollout_is: IsLevel,
    /// Their upper bound, or the range outside which they are 0.
    pub rollout_is_threshold: Threshold,
    /// Divide the weights by their mean.
    pub rollout_is_batch_normalize: bool,
    /// Rejection options, joined by commas: `token_k1..3`, `seq_sum_k1..3`, `seq_mean_k1..3`, `seq_max_k2..3`.
    pub rollout_rs: String,
    /// One bound for all options, or one per option.
    pub rollout_rs_threshold: Option<Threshold>,
    /// Rejects the tokens with the largest squared log-ratios until the mean of the rest is at most this (M2PO);
    /// absent: none.
    pub m2_threshold: Option<f64>,
    /// The loss of bypass mode.
    pub loss_type: BypassLoss,
}

impl Default for RolloutCorrectionConfig {
    fn default() -> Self {
        RolloutCorrectionConfig {
            rollout_is: IsLevel::None,
            rollout_is_threshold: Threshold::Upper(2.0),
            rollout_is_batch_normalize: false,
            rollout_rs: String::new(),
            rollout_rs_threshold: None,
            m2_threshold: None,
            loss_type: BypassLoss::PpoClip,
        }
    }
}

/// Weights, the mask that is left, and what there is to report.
#[derive(Debug, Clone, PartialEq)]
pub struct CorrectionOutput {
    /// `[T]`, 0 where the mask is 0; absent where `rollout_is` is none.
    pub weights: Option<Vec<f64>>,
    /// `[T]`: the mask after rejection.
    pub response_mask: Vec<u8>,
    /// Report of the weights, where there are any.
    pub weight_metrics: Option<WeightMetrics>,
    /// Report of the rejection, where there is one.
    pub rejection: Option<RejectionReport>,
    /// Share of the tokens that M2PO's rejection leaves out, of those that the other one kept; absent without it.
    pub m2_masked_fraction: Option<f64>,
    /// How far trainer and engine are apart.
    pub off_policy: OffPolicyMetrics,
}

impl RolloutCorrectionConfig {
    /// True where weights or rejection are asked for.
    pub fn is_active(&self) -> bool {
        self.rollout_is != IsLevel::None || !self.rollout_rs.is_empty() || self.m2_threshold.is_some()
    }

    /// Check every range and text.
    ///
    /// # Errors
    /// The first setting that cannot be used, by name.
    pub fn validate(&self) -> Result<(), Error> {
        if self.rollout_is != IsLevel::None {
            let range = weights::parse_range(&self.rollout_is_threshold)?;
            if range.apply(1.0) != 1.0 {
                let expected = "bounds around 1: a token on-policy has the weight 1 and keeps it";
                return Err(Error::setting("rollout_is_threshold", self.rollout_is_threshold.to_string(), expected));
            }
        }
        if let Some(bound) = self.m2_threshold.filter(|bound| !(*bound >= 0.0 && bound.is_finite())) {
            return Err(Error::setting("m2_threshold", bound, "a number from 0"));
        }
        if self.rollout_rs.is_empty() {
            return Ok(());
        }
        let options = rejection::parse_options(&self.rollout_rs, self.rollout_rs_threshold.as_ref())?;
        match options.iter().find(|o| o.rejects(0.0)) {
            None => Ok(()),
            Some(option) => {
                let expected = "bounds around 1: a token on-policy is never rejected";
                Err(Error::setting("rollout_rs_threshold", &option.name, expected))
            }
        }
    }
}

/// Compute weights and mask of a batch.
///
/// The weights see the mask before rejection, as in verl. Batch normalisation needs the whole mini-batch.
///
/// # Errors
/// A setting that cannot be used; an array of the wrong length; a log-prob that is not finite.
pub fn rollout_correction(
    config: &RolloutCorrectionConfig,
    batch: &TokenBatch,
    old_log_probs: &[f64],
    rollout_log_probs: &[f64],
) -> Result<CorrectionOutput, Error> {
    batch.expect_finite("rollout_correction", "old_log_probs", old_log_probs)?;
    batch.expect_finite("rollout_correction", "rollout_log_probs", rollout_log_probs)?;
    let log_ratio: Vec<f64> = old_log_probs.iter().zip(rollout_log_probs).map(|(o, r)| o - r).collect();
    let weights = importance_weights(config, batch, &log_ratio)?;
    let rejected = if config.rollout_rs.is_empty() {
        None
    } else {
        Some(rejection_mask(&config.rollout_rs, config.rollout_rs_threshold.as_ref(), batch, &log_ratio)?)
    };
    let (mut response_mask, rejection) = match rejected {
        Some(RejectionOutput { response_mask, report }) => (response_mask, Some(report)),
        None => (batch.response_mask().to_vec(), None),
    };
    let mut m2_masked_fraction = None;
    if let Some(threshold) = config.m2_threshold {
        let (left, share) = second_moment::reject(&batch.with_mask(&response_mask)?, &log_ratio, threshold);
        (response_mask, m2_masked_fraction) = (left, Some(share));
    }
    let (weights, weight_metrics) = weights.map_or((None, None), |w| (Some(w.weights), Some(w.metrics)));
    let off_policy = off_policy_metrics(batch, old_log_probs, rollout_log_probs)?;
    Ok(CorrectionOutput { weights, response_mask, weight_metrics, rejection, m2_masked_fraction, off_policy })
}
