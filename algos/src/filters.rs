//! Which samples take part: dynamic sampling, overlong penalty, truncated responses.

use crate::Error;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// DAPO's dynamic sampling: groups without any spread of a metric teach nothing and are drawn anew.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FilterGroupsConfig {
    /// Drop such groups and refill the batch with new prompts.
    pub enable: bool,
    /// What is compared: `reward` (before any KL penalty), or the name of a reward component.
    pub metric: String,
    /// Refill at most this many times; 0 is without limit.
    pub max_num_gen_batches: u32,
}

impl Default for FilterGroupsConfig {
    fn default() -> Self {
        FilterGroupsConfig { enable: false, metric: "reward".to_owned(), max_num_gen_batches: 0 }
    }
}

/// True where a group is kept: it has one member, or its values are not all equal.
///
/// # Source
/// DAPO, arXiv 2503.14476. verl asks whether the standard deviation is exactly 0, which rounding can spoil for equal
/// values; equality is asked here.
pub fn keep_group(values: &[f64]) -> bool {
    values.len() <= 1 || values.iter().any(|v| *v != values[0])
}

/// Penalty for responses that come near the longest allowed length.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct OverlongConfig {
    /// Add the penalty.
    pub enable: bool,
    /// Number of tokens before the longest length over which the penalty grows.
    pub len: u32,
    /// The penalty at the longest length.
    pub penalty_factor: f64,
    /// Longest response in tokens.
    pub max_response_length: u32,
}

impl Default for OverlongConfig {
    fn default() -> Self {
        OverlongConfig { enable: false, len: 4096, penalty_factor: 1.0, max_response_length: 20_480 }
    }
}

impl OverlongConfig {
    /// Check every range.
    ///
    /// # Errors
    /// An empty buffer, or one longer than the response.
    pub fn validate(&self) -> Result<(), Error> {
        if self.enable && (self.len == 0 || self.len > self.max_response_length) {
            return Err(Error::setting("overlong.len", self.len, "a number from 1 to max_response_length"));
        }
        Ok(())
    }

    /// What is added to the reward of a response of `response_length` tokens:
    /// `min(-(length - (max - len)) / len * penalty_factor, 0)`; 0 where the penalty is off.
    ///
    /// # Source
    /// DAPO, arXiv 2503.14476. Like verl's, it goes on growing beyond the longest length.
    pub fn penalty(&self, response_length: u64) -> f64 {
        if !self.enable {
            return 0.0;
        }
        let expected = f64::from(self.max_response_length) - f64::from(self.len);
        let exceeded = response_length as f64 - expected;
        (-exceeded / f64::from(self.len) * self.penalty_factor).min(0.0)
    }
}

/// Clear the masks of rows that were cut off by the length limit.
///
/// # Errors
/// If `truncated` does not have one entry per row.
pub fn mask_truncated(offsets: &[usize], truncated: &[bool], response_mask: &mut [u8]) -> Result<(), Error> {
    crate::batch::expect_len("truncated", offsets.len().saturating_sub(1), truncated.len())?;
    for (range, cut) in offsets.windows(2).zip(truncated) {
        if *cut {
            response_mask[range[0]..range[1]].fill(0);
        }
    }
    Ok(())
}
