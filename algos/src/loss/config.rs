//! Settings of the policy losses, with verl's names and defaults.

use super::{LossAggMode, TrlConfig};
use crate::kl::KlType;
use crate::rollout_correction::RolloutCorrectionConfig;
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
    /// One ratio per sequence (GSPO).
    Gspo,
    /// Detached clipped ratio (CISPO).
    Cispo,
    /// Sigmoid gate (SAPO).
    Sapo,
    /// Geometric mean of ratios clipped per token (GMPO).
    GeoMean,
    /// Plain policy gradient for gpg's advantages.
    Gpg,
    /// Plain policy gradient.
    Reinforce,
    /// PPO that drops some of the tokens with high covariance.
    ClipCov,
    /// Policy gradient with a KL penalty on the tokens with the highest covariance.
    KlCov,
    /// Trust region by total variation (DPPO).
    DppoTv,
    /// Trust region by binary KL (DPPO).
    DppoKl,
    /// Policy gradient with a quadratic pull towards the old policy.
    Dro,
    /// TRL's losses: see `trl.loss_type`.
    Trl,
    /// PPO on whole sequences.
    SequencePpo,
    /// Correction inside the loss, against the engine's log-probs.
    BypassMode,
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
    /// Give that penalty the gradient of the reverse KL under the policy now, `min(e^(lp - old), 10) (lp - ref)`; its
    /// value stays.
    pub unbiased_kl: bool,
    /// Steepness of sapo's gate where the advantage is positive.
    pub tau_pos: f64,
    /// Steepness of sapo's gate elsewhere.
    pub tau_neg: f64,
    /// Share of the tokens that clip_cov drops.
    pub clip_cov_ratio: f64,
    /// Candidates of clip_cov have a covariance above this.
    pub clip_cov_lb: f64,
    /// Candidates of clip_cov have a covariance below this.
    pub clip_cov_ub: f64,
    /// Share of the tokens that kl_cov penalises.
    pub kl_cov_ratio: f64,
    /// Weight of kl_cov's penalty.
    pub ppo_kl_coef: f64,
    /// Weight of dro's pull; dro needs a number above 0.
    pub dro_beta: f64,
    /// Leave out tokens of negative advantage in rows whose mean `old - lp` is above this; absent: none.
    pub opsm_delta: Option<f64>,
    /// Correction of the gap between engine and trainer: applied once a step, or inside the loss in bypass mode.
    pub rollout_correction: RolloutCorrectionConfig,
    /// Settings of TRL's losses.
    pub trl: TrlConfig,
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
            unbiased_kl: false,
            tau_pos: 1.0,
            tau_neg: 1.05,
            clip_cov_ratio: 2e-4,
            clip_cov_lb: 1.0,
            clip_cov_ub: 5.0,
            kl_cov_ratio: 2e-4,
            ppo_kl_coef: 0.1,
            dro_beta: 0.0,
            opsm_delta: None,
            rollout_correction: RolloutCorrectionConfig::default(),
            trl: TrlConfig::default(),
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

    pub(crate) fn taus(&self) -> (f64, f64) {
        (self.tau_pos, self.tau_neg)
    }

    /// True where entropies enter the loss.
    pub fn needs_entropies(&self) -> bool {
        let masks = self.loss_mode == LossMode::Trl && self.trl.top_entropy_quantile < 1.0;
        self.entropy_coeff > 0.0 || masks
    }

    /// What the loss has to see at once.
    pub fn scope(&self) -> Scope {
        let scope = match self.loss_mode {
            LossMode::Vanilla
            | LossMode::Cispo
            | LossMode::Sapo
            | LossMode::Gpg
            | LossMode::Reinforce
            | LossMode::DppoTv
            | LossMode::DppoKl
            | LossMode::Dro => Scope::Token,
            LossMode::Gspo | LossMode::GeoMean | LossMode::SequencePpo => Scope::Sequence,
            LossMode::Trl if self.trl.top_entropy_quantile < 1.0 => Scope::MiniBatch,
            LossMode::Trl => Scope::Sequence,
            LossMode::ClipCov | LossMode::KlCov | LossMode::BypassMode => Scope::MiniBatch,
        };
        if self.opsm_delta.is_some() { scope.max(Scope::Sequence) } else { scope }
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
        from_zero("ppo_kl_coef", self.ppo_kl_coef)?;
        from_zero("dro_beta", self.dro_beta)?;
        let above_zero = |name, v: f64| {
            if v > 0.0 && v.is_finite() { Ok(()) } else { Err(Error::setting(name, v, "a number above 0")) }
        };
        above_zero("tau_pos", self.tau_pos)?;
        above_zero("tau_neg", self.tau_neg)?;
        let share = |name, v: f64| {
            if v > 0.0 && v <= 1.0 { Ok(()) } else { Err(Error::setting(name, v, "a share above 0, at most 1")) }
        };
        share("clip_cov_ratio", self.clip_cov_ratio)?;
        share("kl_cov_ratio", self.kl_cov_ratio)?;
        self.rollout_correction.validate()?;
        self.check_opsm()?;
        self.trl.validate()?;
        if self.loss_mode == LossMode::Dro {
            above_zero("dro_beta", self.dro_beta)?;
        }
        let c = self.clip_ratio_c;
        if !(c == 0.0 || (c > 1.0 && c.is_finite())) {
            return Err(Error::setting("clip_ratio_c", c, "a number above 1, or 0 for no dual clip"));
        }
        Ok(())
    }

    fn check_opsm(&self) -> Result<(), Error> {
        match self.opsm_delta {
            Some(delta) if self.loss_mode == LossMode::Trl => {
                Err(Error::setting("opsm_delta", delta, "trl.off_policy_mask_threshold, where loss_mode is trl"))
            }
            Some(delta) if !(delta >= 0.0 && delta.is_finite()) => {
                Err(Error::setting("opsm_delta", delta, "a number from 0: rows on-policy have a drift of 0"))
            }
            _ if self.unbiased_kl && self.loss_mode == LossMode::Trl => {
                Err(Error::setting("unbiased_kl", true, "trl.use_bias_correction_kl, where loss_mode is trl"))
            }
            _ => Ok(()),
        }
    }
}
