//! CISPO: the importance ratio is clipped and detached; every token keeps a gradient.
//!
//! `L = -sg(clamp(r, 1 - low, 1 + high)) A log_prob`, log-ratio clamped to +-20.
//!
//! # Source
//! arXiv 2506.13585, with verl's two relative bounds.

use super::config::ClipRange;
use super::terms::TokenTerm;
use crate::math::Cut;

/// Loss of one token.
pub(crate) fn term(log_prob: f64, log_ratio: f64, advantage: f64, range: ClipRange) -> TokenTerm {
    let ratio = log_ratio.cut(-20.0, 20.0).exp();
    let clipped = ratio.cut(1.0 - range.low, 1.0 + range.high);
    let d = -clipped * advantage;
    TokenTerm { loss: d * log_prob, d, clipped: clipped != ratio, clipped_lower: false }
}
