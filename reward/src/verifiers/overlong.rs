//! `overlong`: a penalty that grows over the last tokens before the cap.
//!
//! # Source
//! DAPO (arXiv 2503.14476), equation 13, in the form of verl's DAPO reward manager, which does not bound the penalty
//! beyond the cap. Departure: a fixed extra penalty for a truncated response, off by default.

use crate::error::Cause;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use temper_types::FinishReason;

/// Parameters of `overlong`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OverlongConfig {
    /// Length in tokens at which the penalty reaches `penalty`.
    pub max_tokens: u32,
    /// Number of tokens before `max_tokens` at which it starts.
    pub buffer_tokens: u32,
    /// Size of the penalty at `max_tokens`.
    #[serde(default = "one")]
    pub penalty: f64,
    /// Subtracted besides where the response was cut off at its token limit.
    #[serde(default)]
    pub truncated_penalty: f64,
}

fn one() -> f64 {
    1.0
}

/// `min(0, -(len - (max - buffer)) / buffer * penalty)`, less `truncated_penalty` where the response was cut off.
pub(crate) fn verify(
    config: &OverlongConfig,
    response_len_tokens: usize,
    finish_reason: FinishReason,
) -> Result<f64, Cause> {
    let free = f64::from(config.max_tokens) - f64::from(config.buffer_tokens);
    let excess = response_len_tokens as f64 - free;
    let soft = (-excess / f64::from(config.buffer_tokens) * config.penalty).min(0.0);
    let cut_off = if finish_reason == FinishReason::Length { config.truncated_penalty } else { 0.0 };
    Ok(soft - cut_off)
}
