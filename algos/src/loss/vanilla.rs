//! PPO's clipped surrogate, with separate bounds (clip-higher) and dual clip.
//!
//! `r = exp(clamp(log_prob - old, -20, 20))`; `L = max(-A r, -A clamp(r, 1 - low, 1 + high))`; where `A < 0`, also
//! `L = min(L, -A c)`. The gradient is 0 where a bound holds, and split in halves on an exact tie, as in torch.
//!
//! # Source
//! PPO, arXiv 1707.06347; dual clip, arXiv 1912.09729; clip-higher, arXiv 2503.14476; the clamp is verl's.

use super::config::ClipRange;
use super::terms::{TokenTerm, clamped_exp, larger, smaller};
use crate::kl::Dual;
use crate::math::{Cut, cut_passes};

/// Loss of one token; `dual_clip` is `c`, or 0 for none.
pub(crate) fn term(log_ratio: f64, advantage: f64, range: ClipRange, dual_clip: f64) -> TokenTerm {
    let ratio = clamped_exp(log_ratio, -20.0, 20.0);
    clipped_surrogate(ratio, advantage, range, dual_clip)
}

/// The surrogate at a given ratio and its derivative.
pub(crate) fn clipped_surrogate(ratio: Dual, advantage: f64, range: ClipRange, dual_clip: f64) -> TokenTerm {
    let (low, high) = (1.0 - range.low, 1.0 + range.high);
    let inside = cut_passes(ratio.value, low, high);
    let plain = Dual { value: -advantage * ratio.value, d: -advantage * ratio.d };
    let bounded =
        Dual { value: -advantage * ratio.value.cut(low, high), d: if inside { -advantage * ratio.d } else { 0.0 } };
    let mut loss = larger(plain, bounded);
    let mut term = TokenTerm { clipped: bounded.value > plain.value, ..TokenTerm::default() };
    if dual_clip > 0.0 && advantage < 0.0 {
        let ceiling = Dual { value: -advantage * dual_clip, d: 0.0 };
        term.clipped_lower = loss.value > ceiling.value;
        loss = smaller(loss, ceiling);
    }
    term.loss = loss.value;
    term.d = loss.d;
    term
}
