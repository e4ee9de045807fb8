//! Parameters of generation.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Below it, logits over the temperature leave the range of f32.
const LEAST_TEMPERATURE: f32 = 1e-6;
/// The most that is added to a logit or taken from it: it outweighs every logit, and stays finite over any temperature.
const LARGEST_SHIFT: f32 = 1e9;

/// How tokens are drawn and when a response ends. Defaults are those of RL: the untruncated law at temperature 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingParams {
    /// Divides the logits, at least 1e-6; 0 takes the most likely token (lowest id on ties).
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
    /// Added to the raw logit of each of these token ids, before penalties.
    #[serde(with = "by_id")]
    #[schemars(with = "BTreeMap<String, f32>")]
    pub logit_bias: BTreeMap<u32, f32>,
    /// The only token ids that are drawn; empty allows all.
    pub allowed_token_ids: Vec<u32>,
    /// Texts whose token ids are never completed; see [`SamplingParams::resolve_bad_words`].
    pub bad_words: Vec<String>,
    /// Sequences of token ids that no draw completes, counted over prompt and response.
    pub bad_words_ids: Vec<Vec<u32>>,
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
            logit_bias: BTreeMap::new(),
            allowed_token_ids: Vec::new(),
            bad_words: Vec::new(),
            bad_words_ids: Vec::new(),
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
        let is_drawable = (LEAST_TEMPERATURE..=f32::MAX).contains(&self.temperature);
        check(self.temperature == 0.0 || is_drawable, "temperature", self.temperature, "0, or 1e-6 or more")?;
        check(self.top_p > 0.0 && self.top_p <= 1.0, "top_p", self.top_p, "more than 0, at most 1")?;
        check((0.0..=1.0).contains(&self.min_p), "min_p", self.min_p, "0 to 1")?;
        let penalty = self.repetition_penalty;
        check((1e-6..=1e6).contains(&penalty), "repetition_penalty", penalty, "1e-6 to 1e6")?;
        let is_shift = |value: f32| value.abs() <= LARGEST_SHIFT;
        check(is_shift(self.presence_penalty), "presence_penalty", self.presence_penalty, "-1e9 to 1e9")?;
        check(is_shift(self.frequency_penalty), "frequency_penalty", self.frequency_penalty, "-1e9 to 1e9")?;
        for bias in self.logit_bias.values() {
            check(is_shift(*bias), "logit_bias", *bias, "-1e9 to 1e9")?;
        }
        let is_blank = self.bad_words.iter().position(|word| word.trim().is_empty());
        check(is_blank.is_none(), "bad_words", is_blank.unwrap_or(0) as f32, "words with a character beside spaces")?;
        let is_empty = self.bad_words_ids.iter().position(Vec::is_empty);
        check(is_empty.is_none(), "bad_words_ids", is_empty.unwrap_or(0) as f32, "sequences of at least one id")?;
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
            || !self.logit_bias.is_empty()
            || !self.allowed_token_ids.is_empty()
            || !self.bad_words.is_empty()
            || !self.bad_words_ids.is_empty()
            || (self.min_new_tokens > 0 && !self.stop_token_ids.is_empty())
    }

    /// True where logits depend on the tokens before, beyond the model itself.
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// Turn `bad_words` into `bad_words_ids`: each word as it is tokenized at the start of a text and behind a space.
    ///
    /// # Errors
    /// Those of `encode`, which gives the ids of a text without special tokens.
    pub fn resolve_bad_words<E>(&mut self, mut encode: impl FnMut(&str) -> Result<Vec<u32>, E>) -> Result<(), E> {
        for word in std::mem::take(&mut self.bad_words) {
            let word = word.trim_start();
            for text in [word.to_owned(), format!(" {word}")] {
                let ids = encode(&text)?;
                if !ids.is_empty() && !self.bad_words_ids.contains(&ids) {
                    self.bad_words_ids.push(ids);
                }
            }
        }
        Ok(())
    }

    /// The temperature at which log-probs are reported: 1 where sampling is greedy.
    pub fn log_prob_temperature(&self) -> f32 {
        if self.temperature == 0.0 { 1.0 } else { self.temperature }
    }
}

/// A table by token id whose keys are text in the formats that know no others.
mod by_id {
    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serializer};
    use std::collections::BTreeMap;

    pub fn serialize<S: Serializer>(table: &BTreeMap<u32, f32>, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(table.iter().map(|(id, value)| (id.to_string(), value)))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<u32, f32>, D::Error> {
        let parse = |(key, value): (String, f32)| match key.parse() {
            Ok(id) => Ok((id, value)),
            Err(_) => Err(D::Error::custom(format!("\"{key}\" is no token id: expected a whole number, 0 or more"))),
        };
        BTreeMap::<String, f32>::deserialize(deserializer)?.into_iter().map(parse).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bias_is_keyed_by_text_and_bad_keys_are_named() {
        let params: SamplingParams = serde_json::from_str(r#"{"logit_bias": {"7": -2.5, "30": 1}}"#).expect("valid");
        assert_eq!(params.logit_bias, BTreeMap::from([(7, -2.5), (30, 1.0)]));
        let text = serde_json::to_string(&params).expect("can be written");
        assert_eq!(serde_json::from_str::<SamplingParams>(&text).expect("what was written"), params);
        let error = serde_json::from_str::<SamplingParams>(r#"{"logit_bias": {"seven": 1}}"#).expect_err("no id");
        assert!(error.to_string().contains("\"seven\" is no token id"), "{error}");
        assert!(params.is_truncated() && !params.has_penalties());
    }

    #[test]
    fn what_would_overflow_is_refused_and_the_bounds_are_not() {
        let temperature = |temperature| SamplingParams { temperature, ..Default::default() };
        let bias = |bias| SamplingParams { logit_bias: BTreeMap::from([(3, bias)]), ..Default::default() };
        let repetition = |repetition_penalty| SamplingParams { repetition_penalty, ..Default::default() };
        let min_p = |min_p| SamplingParams { min_p, ..Default::default() };
        for fine in [temperature(0.0), temperature(1e-6), temperature(3e38), bias(-1e9), repetition(1e6), min_p(1.0)] {
            fine.validate().expect("within range");
        }
        let wrong = [
            (temperature(1e-7), "temperature"),
            (temperature(-1.0), "temperature"),
            (temperature(f32::NAN), "temperature"),
            (temperature(f32::INFINITY), "temperature"),
            (bias(2e9), "logit_bias"),
            (bias(f32::NAN), "logit_bias"),
            (repetition(1e-7), "repetition_penalty"),
            (min_p(1.1), "min_p"),
            (SamplingParams { presence_penalty: f32::INFINITY, ..Default::default() }, "presence_penalty"),
            (SamplingParams { frequency_penalty: -2e9, ..Default::default() }, "frequency_penalty"),
        ];
        for (params, name) in wrong {
            assert_eq!(params.validate().expect_err("out of range").name, name);
        }
    }

    #[test]
    fn bad_words_become_ids_as_at_a_start_and_behind_a_space() {
        let mut params = SamplingParams { bad_words: vec!["ab".to_owned(), " ab".to_owned()], ..Default::default() };
        params.validate().expect("within range");
        let bytes = |text: &str| Ok::<_, ()>(text.bytes().map(u32::from).collect());
        params.resolve_bad_words(bytes).expect("bytes have ids");
        assert_eq!(params.bad_words_ids, [vec![97, 98], vec![32, 97, 98]]);
        assert!(params.bad_words.is_empty());
        let blank = SamplingParams { bad_words: vec!["a".to_owned(), " ".to_owned()], ..Default::default() };
        assert_eq!(blank.validate().expect_err("a blank word").value, 1.0);
    }
}
