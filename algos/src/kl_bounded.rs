//! KL estimators with one bound on the value, and their importance-corrected gradient.
//!
//! With `d = log_prob - base`: k1 `d`; k2 `d^2 / 2`; k3 `e^-d - 1 + d`, its exponent cut from above at `exponent_max`.
//! The
//! value is cut to `+-bound`, with gradient 0 outside. Unbiased gradient: the value stays, the gradient becomes
//! `w d`, `w = min(e^(log_prob - old), 10)` detached: that of the reverse KL under the old policy's samples.
//!
//! # Source
//! OpenRLHF's `compute_approx_kl`; AReaL's `KLEstimator`; slime's `compute_approx_kl` (weights as a factor on the
//! value).

use crate::kl::Dual;
use crate::math::{Cut, cut_passes};
use serde::{Deserialize, Serialize};

/// Estimator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Estimator {
    /// `d`.
    K1,
    /// `d^2 / 2`.
    K2,
    /// `e^-d - 1 + d`.
    #[serde(alias = "low_var_kl")]
    K3,
}

/// An estimator with its bounds; infinite for none.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BoundedKl {
    /// The estimator.
    pub estimator: Estimator,
    /// Largest absolute value.
    pub bound: f64,
    /// Largest exponent of k3.
    pub exponent_max: f64,
}

impl BoundedKl {
    /// Estimate of one token, with its derivative with respect to the log-prob.
    pub fn estimate(&self, log_prob: f64, base: f64) -> Dual {
        let d = log_prob - base;
        let raw = match self.estimator {
            Estimator::K1 => Dual { value: d, d: 1.0 },
            Estimator::K2 => Dual { value: 0.5 * d * d, d },
            Estimator::K3 => {
                let power = (-d).min(self.exponent_max).exp();
                let slope = if -d <= self.exponent_max { 1.0 - power } else { 0.0 };
                Dual { value: power - 1.0 + d.max(-self.exponent_max), d: slope }
            }
        };
        let inside = cut_passes(raw.value, -self.bound, self.bound);
        Dual { value: raw.value.cut(-self.bound, self.bound), d: if inside { raw.d } else { 0.0 } }
    }

    /// The same value with the gradient of the reverse KL, corrected for samples of the old policy.
    pub fn estimate_unbiased(&self, log_prob: f64, base: f64, old: f64) -> Dual {
        Dual { value: self.estimate(log_prob, base).value, d: unbiased_slope(log_prob, base, old) }
    }
}

/// Gradient of the reverse KL on samples of the old policy, the importance weight cut at 10 and detached.
pub(crate) fn unbiased_slope(log_prob: f64, base: f64, old: f64) -> f64 {
    (log_prob - old).exp().min(10.0) * (log_prob - base)
}
