//! Settings of TRL's GRPO losses beyond those that verl's names cover.

use crate::Error;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which of TRL's loss types; each is a surrogate with its normaliser.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TrlLossType {
    /// Clipped surrogate, mean over rows of the mean over tokens.
    Grpo,
    /// Clipped surrogate, sum over tokens / tokens of the mini-batch.
    Bnpo,
    /// Clipped surrogate, sum over tokens / (rows * longest completion).
    DrGrpo,
    /// Clipped surrogate, sum over tokens / tokens of the global batch.
    #[default]
    Dapo,
    /// Clipped surrogate, mean over rows of the sum over tokens.
    Luspo,
    /// Detached ratio under an absolute bound, normalised as dapo.
    Cispo,
    /// Sigmoid gate, normalised as grpo.
    Sapo,
    /// Gamma-weighted sequences, normalised as dapo.
    Vespo,
}

/// Level of TRL's importance ratio.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ImportanceLevel {
    /// One ratio per token.
    #[default]
    Token,
    /// One ratio per row: the exponential of the mean log-ratio, differentiable in every token.
    Sequence,
}

/// Settings that only TRL's losses read. Clip bounds, KL weight (`use_kl_loss`, `kl_loss_coef`), `entropy_coeff` and
/// the
/// gate's `tau_pos`, `tau_neg` are those of the policy loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TrlConfig {
    /// The loss.
    pub loss_type: TrlLossType,
    /// Level of the ratio.
    pub importance_sampling_level: ImportanceLevel,
    /// Upper bound of the unclipped branch's ratio (two-sided clipping); 0 is off.
    pub delta: f64,
    /// Multiply the KL by the ratio.
    pub use_bias_correction_kl: bool,
    /// Share of the tokens, those with the highest entropy, that take part; needs the whole mini-batch below 1.
    pub top_entropy_quantile: f64,
    /// Drop rows with a negative advantage whose mean gap to the engine is above this; absent: none.
    pub off_policy_mask_threshold: Option<f64>,
    /// Shape of vespo's weight for advantages from 0.
    pub vespo_k_pos: f64,
    /// Rate of vespo's weight for advantages from 0.
    pub vespo_lambda_pos: f64,
    /// Shape of vespo's weight for negative advantages.
    pub vespo_k_neg: f64,
    /// Rate of vespo's weight for negative advantages.
    pub vespo_lambda_neg: f64,
}

impl Default for TrlConfig {
    fn default() -> Self {
        TrlConfig {
            loss_type: TrlLossType::Dapo,
            importance_sampling_level: ImportanceLevel::Token,
            delta: 0.0,
            use_bias_correction_kl: true,
            top_entropy_quantile: 1.0,
            off_policy_mask_threshold: None,
            vespo_k_pos: 2.0,
            vespo_lambda_pos: 3.0,
            vespo_k_neg: 3.0,
            vespo_lambda_neg: 2.0,
        }
    }
}

impl TrlConfig {
    /// Check every range.
    ///
    /// # Errors
    /// The first setting out of range, by name.
    pub fn validate(&self) -> Result<(), Error> {
        let rho = self.top_entropy_quantile;
        if !(0.0..=1.0).contains(&rho) {
            return Err(Error::setting("top_entropy_quantile", rho, "a number from 0 to 1"));
        }
        if !(self.delta >= 0.0 && self.delta.is_finite()) {
            return Err(Error::setting("delta", self.delta, "a number above 0, or 0 for none"));
        }
        Ok(())
    }
}
