//! Parameters of generation.

use serde::{Deserialize, Serialize};

/// How tokens are drawn and when a response ends. Defaults are those of RL: the untruncated law at temperature 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingParams {
    /// Divides the logits; 0 takes the most likely token (lowest id on ties).
    pub temperature: f32,
    /// Nucleus mass in (0, 1]; 1 keeps all.
    pub top_p: f32,
    /// Number of most likely tokens kept; 0 keeps all.
    pub top_k: u32,
    /// Tokens less likely than `min_p` times the most likely are dropped; 0 keeps all.
    pub min_p: f32,
    /// Divides (positive) or multiplies (negative) the logits of seen tokens; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens generated before; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted once per earlier occurrence in the response; 0 is off.
    pub frequency_penalty: f32,
    /// Longest response in tokens, the stop token included.
    pub max_new_tokens: u32,
    /// Stop tokens are not drawn before this many tokens.
    pub min_new_tokens: u32,
    /// Token ids that end a response; the stop token stays in the ids.
    pub stop_token_ids: Vec<u32>,
    /// Texts that end a response, matched over token bytes.
    pub stop: Vec<String>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        SamplingParams {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            max_new_tokens: 128,
            min_new_tokens: 0,
            stop_token_ids: Vec::new(),
            stop: Vec::new(),
        }
    }
}

/// A sampling parameter outside its range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{name} = {value} is out of range: expected {expected}")]
pub struct SamplingError {
    /// Name of the parameter.
    pub name: &'static str,
    /// What was given.
    pub value: f64,
    /// The range that is accepted.
    pub expected: &'static str,
}

impl SamplingParams {
    /// Check every range.
    ///
    /// # Errors
    /// The first parameter out of range, by name.
    pub fn validate(&self) -> Result<(), SamplingError> {
        let check = |ok: bool, name, value: f32, expected| {
            if ok { Ok(()) } else { Err(SamplingError { name, value: f64::from(value), expected }) }
        };
        check(self.temperature >= 0.0 && self.temperature.is_finite(), "temperature", self.temperature, "0 or more")?;
        check(self.top_p > 0.0 && self.top_p <= 1.0, "top_p", self.top_p, "more than 0, at most 1")?;
        check(self.min_p >= 0.0 && self.min_p < 1.0, "min_p", self.min_p, "0 or more, less than 1")?;
        let penalty = self.repetition_penalty;
        check(penalty > 0.0 && penalty.is_finite(), "repetition_penalty", penalty, "more than 0")?;
        check(self.presence_penalty.is_finite(), "presence_penalty", self.presence_penalty, "a finite number")?;
        check(self.frequency_penalty.is_finite(), "frequency_penalty", self.frequency_penalty, "a finite number")?;
        check(self.max_new_tokens > 0, "max_new_tokens", 0.0, "1 or more")?;
        let min = self.min_new_tokens;
        check(min <= self.max_new_tokens, "min_new_tokens", min as f32, "at most max_new_tokens")
    }

    /// True where the drawn token may follow another law than `softmax(logits / temperature)`.
    pub fn is_truncated(&self) -> bool {
        self.top_p < 1.0
            || self.top_k > 0
            || self.min_p > 0.0
            || self.has_penalties()
            || (self.min_new_tokens > 0 && !self.stop_token_ids.is_empty())
    }

    /// True where logits depend on the tokens before, beyond the model itself.
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// The temperature at which log-probs are reported: 1 where sampling is greedy.
    pub fn log_prob_temperature(&self) -> f32 {
        if self.temperature == 0.0 { 1.0 } else { self.temperature }
    }
}
