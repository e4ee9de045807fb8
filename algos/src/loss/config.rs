//! Settings of the policy losses, with verl's names and defaults.

use super::LossAggMode;
use crate::kl::KlType;
use crate::{Error, Scope};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which surrogate is minimised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LossMode {
    /// PPO's clipped surrogate with clip-higher and dual clip.
    #[default]
    Vanilla,
}

/// Settings of a policy loss; each mode reads those it names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyLossConfig {
    /// The surrogate.
    pub loss_mode: LossMode,
    /// How token losses become one number.
    pub loss_agg_mode: LossAggMode,
    /// Half-width of the clip range around 1.
    pub clip_ratio: f64,
    /// Distance of the lower bound from 1; absent: `clip_ratio`.
    pub clip_ratio_low: Option<f64>,
    /// Distance of the upper bound from 1; absent: `clip_ratio`.
    pub clip_ratio_high: Option<f64>,
    /// Dual clip: bound of the ratio where the advantage is negative; above 1, or 0 for none.
    pub clip_ratio_c: f64,
    /// Weight of the entropy bonus, aggregated as the loss is.
    pub entropy_coeff: f64,
    /// Add a KL penalty against the reference to the loss.
    pub use_kl_loss: bool,
    /// Its weight.
    pub kl_loss_coef: f64,
    /// Its estimator.
    pub kl_loss_type: KlType,
}

impl Default for PolicyLossConfig {
    fn default() -> Self {
        PolicyLossConfig {
            loss_mode: LossMode::Vanilla,
            loss_agg_mode: LossAggMode::TokenMean,
            clip_ratio: 0.2,
            clip_ratio_low: None,
            clip_ratio_high: None,
            clip_ratio_c: 3.0,
            entropy_coeff: 0.0,
            use_kl_loss: false,
            kl_loss_coef: 0.001,
            kl_loss_type: KlType::K3,
        }
    }
}

/// A range `[1 - low, 1 + high]`, or `[-low, high]` where a mode clips log-ratios.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct ClipRange {
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl PolicyLossConfig {
    pub(crate) fn clip_range(&self) -> ClipRange {
        ClipRange {
            low: self.clip_ratio_low.unwrap_or(self.clip_ratio),
            high: self.clip_ratio_high.unwrap_or(self.clip_ratio),
        }
    }

    /// What the loss has to see at once.
    pub fn scope(&self) -> Scope {
        match self.loss_mode {
            LossMode::Vanilla => Scope::Token,
        }
    }

    /// Check every range.
    ///
    /// # Errors
    /// The first setting out of range, by name.
    pub fn validate(&self) -> Result<(), Error> {
        let from_zero = |name, v: f64| {
            if v >= 0.0 && v.is_finite() { Ok(()) } else { Err(Error::setting(name, v, "a number from 0")) }
        };
        from_zero("clip_ratio", self.clip_ratio)?;
        from_zero("clip_ratio_low", self.clip_range().low)?;
        from_zero("clip_ratio_high", self.clip_range().high)?;
        from_zero("entropy_coeff", self.entropy_coeff)?;
        from_zero("kl_loss_coef", self.kl_loss_coef)?;
        let c = self.clip_ratio_c;
        if !(c == 0.0 || (c > 1.0 && c.is_finite())) {
            return Err(Error::setting("clip_ratio_c", c, "a number above 1, or 0 for no dual clip"));
        }
        Ok(())
    }
}
