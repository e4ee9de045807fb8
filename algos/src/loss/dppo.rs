//! DPPO: tokens whose probability moved too far, by a divergence, get no gradient.
//!
//! `L = -A sg(min(r, c)) log_prob` where the token is valid, else 0; log-ratio clamped to +-20. Total variation: valid
//! is `p - p_old <= high` for `A > 0`, `p - p_old >= -low` else. Binary KL:
//! `D = p_old (lp_old - lp) + (1 - p_old) log((1 - p_old + 1e-8) / (1 - p + 1e-8))`; valid is `D <= high` or
//! `p <= p_old` for `A > 0`, `D <= low` or `p >= p_old` else. `c` is `clip_ratio_c` (0 for none).
//!
//! # Source
//! arXiv 2602.04879.

use super::config::ClipRange;
use super::terms::TokenTerm;
use crate::math::Cut;

/// How the distance between two probabilities is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Divergence {
    TotalVariation,
    BinaryKl,
}

/// Loss of one token.
pub(crate) fn term(
    divergence: Divergence,
    log_probs: (f64, f64),
    advantage: f64,
    range: ClipRange,
    ceiling: f64,
) -> TokenTerm {
    let (log_prob, old) = log_probs;
    let (p, p_old) = (log_prob.exp(), old.exp());
    let valid = match divergence {
        Divergence::TotalVariation if advantage > 0.0 => p - p_old <= range.high,
        Divergence::TotalVariation => p - p_old >= -range.low,
        Divergence::BinaryKl => {
            let kl = p_old * (old - log_prob) + (1.0 - p_old) * ((1.0 - p_old + 1e-8) / (1.0 - p + 1e-8)).ln();
            if advantage > 0.0 { kl <= range.high || p <= p_old } else { kl <= range.low || p >= p_old }
        }
    };
    let ratio = (log_prob - old).cut(-20.0, 20.0).exp();
    let bounded = if ceiling > 0.0 { ratio.min(ceiling) } else { ratio };
    let d = if valid { -advantage * bounded } else { 0.0 };
    TokenTerm { loss: d * log_prob, d, clipped: !valid, clipped_lower: valid && bounded < ratio }
}
