//! `contains`: a text occurs in the response.

use super::pass;
use crate::error::Cause;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Parameters of `contains`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ContainsConfig {
    /// The text to look for; the sample's ground truth where this is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Search without regard to case.
    pub ignore_case: bool,
}

pub(crate) fn verify(config: &ContainsConfig, answer: &str, ground_truth: Option<&str>) -> Result<f64, Cause> {
    let wanted = match &config.text {
        Some(text) => text.as_str(),
        None => ground_truth.ok_or(Cause::MissingGroundTruth)?.trim(),
    };
    if wanted.is_empty() {
        return Err(Cause::ground_truth(wanted, "text to look for: every response contains the empty text"));
    }
    if config.ignore_case {
        pass(answer.to_lowercase().contains(&wanted.to_lowercase()))
    } else {
        pass(answer.contains(wanted))
    }
}
