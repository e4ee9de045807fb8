//! Estimates of KL(policy || reference) from the log-probs of the sampled tokens, and KL as a part of the reward.
//!
//! With `d = log_prob - ref_log_prob`: k1 = `d`; abs = `|d|`; k2 = `d^2 / 2`; k3 = `e^-d + d - 1`, its exponent clamped
//! to +-20 and its value to +-10 (gradient 0 outside, as torch's clamp). The `+` forms have the value of the estimator
//! and the gradient of k2, which is the gradient of the true KL.
//!
//! # Source
//! Schulman, "Approximating KL divergence"; clamps and names are verl's.

use crate::math::{Cut, cut_passes};
use crate::{Error, TokenBatch};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Estimator of the KL divergence. verl's second names are accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
pub enum KlType {
    /// `d`: unbiased, may be negative.
    #[serde(rename = "kl", alias = "k1")]
    K1,
    /// Value of k1, gradient of k2.
    #[serde(rename = "kl+", alias = "k1+")]
    K1Plus,
    /// `|d|`.
    #[serde(rename = "abs")]
    Abs,
    /// Value of abs, gradient of k2.
    #[serde(rename = "abs+")]
    AbsPlus,
    /// `d^2 / 2`.
    #[serde(rename = "mse", alias = "k2")]
    K2,
    /// The same as k2.
    #[serde(rename = "mse+", alias = "k2+")]
    K2Plus,
    /// `e^-d + d - 1`: unbiased and never negative.
    #[default]
    #[serde(rename = "low_var_kl", alias = "k3")]
    K3,
    /// Value of k3, gradient of k2.
    #[serde(rename = "low_var_kl+", alias = "k3+")]
    K3Plus,
}

/// A value and its derivative with respect to the policy's log-prob.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Dual {
    /// The value.
    pub value: f64,
    /// Its derivative.
    pub d: f64,
}

impl KlType {
    /// Estimate for one token, with its derivative with respect to `log_prob`.
    pub fn estimate(self, log_prob: f64, ref_log_prob: f64) -> Dual {
        let d = log_prob - ref_log_prob;
        let sign = if d == 0.0 { 0.0 } else { d.signum() };
        let k3 = k3_clamped(d);
        match self {
            KlType::K1 => Dual { value: d, d: 1.0 },
            KlType::K1Plus => Dual { value: d, d },
            KlType::Abs => Dual { value: d.abs(), d: sign },
            KlType::AbsPlus => Dual { value: d.abs(), d },
            KlType::K2 | KlType::K2Plus => Dual { value: 0.5 * d * d, d },
            KlType::K3 => k3,
            KlType::K3Plus => Dual { value: k3.value, d },
        }
    }
}

fn k3_clamped(d: f64) -> Dual {
    let x = (-d).cut(-20.0, 20.0);
    let raw = x.exp() - x - 1.0;
    let passes = cut_passes(-d, -20.0, 20.0) && cut_passes(raw, -10.0, 10.0);
    Dual { value: raw.cut(-10.0, 10.0), d: if passes { 1.0 - x.exp() } else { 0.0 } }
}

/// Estimate for every token of a batch, `[T]`, with derivatives; 0 where the mask is 0.
///
/// # Errors
/// An array of the wrong length, or a log-prob that is not finite.
pub fn kl_penalty(
    kl_type: KlType,
    batch: &TokenBatch,
    log_probs: &[f64],
    ref_log_probs: &[f64],
) -> Result<Vec<Dual>, Error> {
    batch.expect_finite("kl_penalty", "log_probs", log_probs)?;
    batch.expect_finite("kl_penalty", "ref_log_probs", ref_log_probs)?;
    let token = |t| {
        if batch.is_active(t) { kl_type.estimate(log_probs[t], ref_log_probs[t]) } else { Dual::default() }
    };
    Ok((0..batch.num_slots()).map(token).collect())
}

/// How the coefficient of the KL in the reward moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KlControllerType {
    /// It stays.
    #[default]
    Fixed,
    /// It follows the measured KL towards a target.
    Adaptive,
}

/// Settings of the controller of the KL coefficient.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct KlControllerConfig {
    /// Fixed or adaptive.
    #[serde(rename = "type")]
    pub kind: KlControllerType,
    /// Coefficient at the start.
    pub kl_coef: f64,
    /// Target of the adaptive controller.
    pub target_kl: f64,
    /// Number of samples over which it corrects.
    pub horizon: f64,
}

impl Default for KlControllerConfig {
    fn default() -> Self {
        KlControllerConfig { kind: KlControllerType::Fixed, kl_coef: 0.001, target_kl: 0.1, horizon: 10_000.0 }
    }
}

/// The coefficient and its rule: `coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * n_steps / horizon`.
///
/// # Source
/// Ziegler et al., arXiv 1909.08593.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KlController {
    config: KlControllerConfig,
    coef: f64,
}

impl KlController {
    /// A controller at its starting coefficient.
    ///
    /// # Errors
    /// A coefficient that is negative or not finite; a target or horizon that is not above 0.
    pub fn new(config: &KlControllerConfig) -> Result<Self, Error> {
        let positive = |name, v: f64| {
            if v > 0.0 && v.is_finite() { Ok(()) } else { Err(Error::setting(name, v, "a number above 0")) }
        };
        if !(config.kl_coef >= 0.0 && config.kl_coef.is_finite()) {
            return Err(Error::setting("kl_coef", config.kl_coef, "a number from 0"));
        }
        positive("target_kl", config.target_kl)?;
        positive("horizon", config.horizon)?;
        Ok(KlController { config: config.clone(), coef: config.kl_coef })
    }

    /// The coefficient now.
    pub fn coef(&self) -> f64 {
        self.coef
    }

    /// Put back a stored coefficient, on resume.
    pub fn set_coef(&mut self, coef: f64) {
        self.coef = coef;
    }

    /// Take in the KL measured over `n_steps` samples.
    pub fn update(&mut self, current_kl: f64, n_steps: u64) {
        match self.config.kind {
            KlControllerType::Fixed => {}
            KlControllerType::Adaptive => {
                let error = (current_kl / self.config.target_kl - 1.0).cut(-0.2, 0.2);
                self.coef *= 1.0 + error * n_steps as f64 / self.config.horizon;
            }
        }
    }
}

/// Settings of KL as a part of the reward.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct KlInRewardConfig {
    /// Subtract a KL penalty from the token-level rewards.
    pub use_kl_in_reward: bool,
    /// Its estimator.
    pub kl_penalty: KlType,
    /// Its coefficient.
    pub kl_ctrl: KlControllerConfig,
}

impl Default for KlInRewardConfig {
    fn default() -> Self {
        KlInRewardConfig { use_kl_in_reward: false, kl_penalty: KlType::K1, kl_ctrl: KlControllerConfig::default() }
    }
}

/// Rewards with the penalty inside, and the KL that a controller is fed with.
#[derive(Debug, Clone, PartialEq)]
pub struct PenalisedRewards {
    /// `scores - coef * kl`, `[T]`; masked tokens keep their score.
    pub token_level_rewards: Vec<f64>,
    /// Mean over rows of the mean KL over a row's tokens (rows without tokens count as 0).
    pub current_kl: f64,
}

/// Put the KL between the policy at the start of the step and the reference into the rewards.
///
/// # Shape
/// `token_level_scores`, `old_log_probs`, `ref_log_probs`: `[T]`.
///
/// # Errors
/// An array of the wrong length, or a log-prob that is not finite.
pub fn apply_kl_penalty(
    kl_type: KlType,
    coef: f64,
    batch: &TokenBatch,
    token_level_scores: &[f64],
    old_log_probs: &[f64],
    ref_log_probs: &[f64],
) -> Result<PenalisedRewards, Error> {
    batch.expect_tokens("token_level_scores", token_level_scores)?;
    let kl = kl_penalty(kl_type, batch, old_log_probs, ref_log_probs)?;
    let token_level_rewards = token_level_scores.iter().zip(&kl).map(|(s, k)| s - coef * k.value).collect();
    let row_mean = |i| {
        let sum: f64 = batch.active(i).map(|t| kl[t].value).sum();
        sum / batch.row_len(i).max(1) as f64
    };
    let total: f64 = (0..batch.num_rows()).map(row_mean).sum();
    Ok(PenalisedRewards { token_level_rewards, current_kl: total / batch.num_rows().max(1) as f64 })
}
