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
    /// Longest response in tokens; 0: the stage's `max_new_tokens`.
    pub max_response_length: u32,
}

impl Default for OverlongConfig {
    fn default() -> Self {
        OverlongConfig { enable: false, len: 4096, penalty_factor: 1.0, max_response_length: 0 }
    }
}

impl OverlongConfig {
    /// Check every range.
    ///
    /// # Errors
    /// An empty buffer, or one longer than the response.
    pub fn validate(&self) -> Result<(), Error> {
        let longest = if self.max_response_length == 0 { u32::MAX } else { self.max_response_length };
        if self.enable && (self.len == 0 || self.len > longest) {
            return Err(Error::setting("overlong.len", self.len, "a number from 1 to max_response_length"));
        }
        Ok(())
    }

    /// The penalty of a stage whose responses have at most `max_new_tokens` tokens.
    ///
    /// # Errors
    /// A buffer longer than the response, or one that no response reaches.
    pub fn of_stage(&self, max_new_tokens: u32) -> Result<Self, Error> {
        let mut resolved = self.clone();
        if self.max_response_length == 0 {
            resolved.max_response_length = max_new_tokens;
        }
        resolved.validate()?;
        if self.enable && resolved.max_response_length - resolved.len >= max_new_tokens {
            let expected =
                "a length that a response comes near: less than max_new_tokens + len, or 0 for max_new_tokens";
            return Err(Error::setting("overlong.max_response_length", resolved.max_response_length, expected));
        }
        Ok(resolved)
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

/// Reward of a response that the length limit cut off: `coef` times it, or `coef` itself where that is negative.
///
/// # Source
/// ProRL's stop-properly penalty, as in OpenRLHF.
pub fn stop_properly_reward(reward: f64, coef: f64) -> f64 {
    if coef >= 0.0 { coef * reward } else { coef }
}

/// Mask of a response: 1 up to and with the first stop token, 0 after.
pub fn response_mask(token_ids: &[u32], stop_token_ids: &[u32]) -> Vec<u8> {
    let end = token_ids.iter().position(|id| stop_token_ids.contains(id)).map_or(token_ids.len(), |at| at + 1);
    (0..token_ids.len()).map(|t| u8::from(t < end)).collect()
}

/// How PF-PPO weighs samples before it draws a batch from them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReweightMethod {
    /// `|score|^weight_pow`.
    #[default]
    Pow,
    /// 1 for the best and the worst scores, else 0.
    MaxMin,
    /// 0.4 for the best scores, else 0.1.
    MaxRandom,
}

/// PF-PPO's resampling weights: `max(w + 1e-8, 1e-8)`.
///
/// # Source
/// arXiv 2409.06957.
pub fn pf_ppo_weights(method: ReweightMethod, scores: &[f64], weight_pow: f64) -> Vec<f64> {
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let smallest = scores.iter().copied().fold(f64::INFINITY, f64::min);
    let weight = |s: &f64| match method {
        ReweightMethod::Pow => s.abs().powf(weight_pow),
        ReweightMethod::MaxMin => f64::from(u8::from(*s == largest || *s == smallest)),
        ReweightMethod::MaxRandom => {
            if *s == largest {
                0.4
            } else {
                0.1
            }
        }
    };
    scores.iter().map(|s| (weight(s) + 1e-8).max(1e-8)).collect()
}

/// Draw `count` indices with replacement, with probabilities proportional to `weights`, from counter-based noise.
///
/// # Errors
/// Weights that are empty, negative, not finite or all 0.
pub fn resample(weights: &[f64], count: usize, seed: u64) -> Result<Vec<usize>, Error> {
    let total: f64 = weights.iter().sum();
    if weights.iter().any(|w| *w < 0.0) || !(total > 0.0 && total.is_finite()) {
        return Err(Error::batch("resample", "weights must be finite, not negative and not all 0"));
    }
    let draw = |slot: usize| {
        let mut left = temper_types::uniform53(seed, slot as u64) * total;
        let hit = weights.iter().position(|w| {
            left -= w;
            left < 0.0
        });
        hit.or_else(|| weights.iter().rposition(|w| *w > 0.0)).unwrap_or(0)
    };
    Ok((0..count).map(draw).collect())
}
