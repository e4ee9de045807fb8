//! `exact_match`: the response is the ground truth, character for character after stripping.

use super::pass;
use crate::error::Cause;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is removed from both ends of response and ground truth before they are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Strip {
    /// Nothing.
    None,
    /// White space.
    #[default]
    Whitespace,
    /// White space and ASCII punctuation.
    Punctuation,
}

/// Parameters of `exact_match`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ExactMatchConfig {
    /// What is removed from both ends of both texts.
    pub strip: Strip,
    /// Compare without regard to case.
    pub ignore_case: bool,
}

pub(crate) fn verify(config: &ExactMatchConfig, answer: &str, ground_truth: &str) -> Result<f64, Cause> {
    let (answer, truth) = (strip(answer, config.strip), strip(ground_truth, config.strip));
    if config.ignore_case { pass(answer.to_lowercase() == truth.to_lowercase()) } else { pass(answer == truth) }
}

fn strip(text: &str, what: Strip) -> &str {
    match what {
        Strip::None => text,
        Strip::Whitespace => text.trim(),
        Strip::Punctuation => text.trim_matches(|c: char| c.is_whitespace() || c.is_ascii_punctuation()),
    }
}
