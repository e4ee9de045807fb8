//! `length`: 1 near a target length, falling to 0 with the distance from it.

use crate::error::Cause;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Parameters of `length`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LengthConfig {
    /// The wanted length of the response in tokens.
    pub target_tokens: u32,
    /// Distance from the target, in tokens, that costs nothing.
    #[serde(default)]
    pub tolerance_tokens: u32,
    /// Further distance, in tokens, over which the value falls from 1 to 0; the target itself where this is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub falloff_tokens: Option<u32>,
}

impl LengthConfig {
    /// The distance over which the value falls, in tokens.
    pub fn falloff(&self) -> u32 {
        self.falloff_tokens.unwrap_or(self.target_tokens)
    }
}

/// `max(0, 1 - max(0, |len - target| - tolerance) / falloff)`.
pub(crate) fn verify(config: &LengthConfig, response_len_tokens: usize) -> Result<f64, Cause> {
    let distance = response_len_tokens.abs_diff(config.target_tokens as usize);
    let excess = distance.saturating_sub(config.tolerance_tokens as usize);
    Ok((1.0 - excess as f64 / f64::from(config.falloff())).max(0.0))
}
