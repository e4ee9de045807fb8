//! TRL's weights against its engine: token or sequence level, truncated or masked by one range.
//!
//! `rho = e^(old - sampling)` per token, or of the sum over a row; an engine log-prob that is missing (NaN) counts as
//! no
//! gap. truncate: `clamp(rho, min, max)`; mask: 0 outside. Masked tokens have 1.
//!
//! # Source
//! TRL's `vllm_importance_sampling_mode`.

use super::IsLevel;
use crate::math::Cut;
use crate::{Error, TokenBatch};

/// What happens to weights outside the range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutOfRange {
    /// They are cut to it.
    Truncate,
    /// They become 0.
    Mask,
}

/// Range of the weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EngineRange {
    /// Lower bound.
    pub min: f64,
    /// Upper bound.
    pub max: f64,
    /// What happens outside.
    pub outside: OutOfRange,
}

/// Weights: `[T]` at token level, `[B]` at sequence level.
///
/// # Errors
/// An array of the wrong length, or `IsLevel::None`.
pub fn engine_ratio(
    level: IsLevel,
    range: EngineRange,
    batch: &TokenBatch,
    old_log_probs: &[f64],
    sampling_log_probs: &[f64],
) -> Result<Vec<f64>, Error> {
    batch.expect_finite("engine_ratio", "old_log_probs", old_log_probs)?;
    batch.expect_tokens("sampling_log_probs", sampling_log_probs)?;
    let gap = |t: usize| {
        let gap = old_log_probs[t] - sampling_log_probs[t];
        if batch.is_active(t) && !gap.is_nan() { gap } else { 0.0 }
    };
    let bounded = |rho: f64| match range.outside {
        OutOfRange::Truncate => rho.cut(range.min, range.max),
        OutOfRange::Mask if rho < range.min || rho > range.max => 0.0,
        OutOfRange::Mask => rho,
    };
    match level {
        IsLevel::Token => Ok((0..batch.num_slots()).map(|t| bounded(gap(t).exp())).collect()),
        IsLevel::Sequence => Ok(batch.rows().map(|row| bounded(row.map(gap).sum::<f64>().exp())).collect()),
        IsLevel::None => Err(Error::setting("level", "none", "token or sequence")),
    }
}
