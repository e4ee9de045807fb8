//! `format`: the response consists of the required tags, each opened and closed once, in order.

use super::pass;
use crate::error::Cause;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Parameters of `format`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FormatConfig {
    /// Names of the tags, in the order in which they must stand: `think` is `<think>...</think>`.
    pub tags: Vec<String>,
    /// Whether text may stand before, between and after the tags (white space always may).
    pub outside: OutsideText,
}

/// What may stand outside the tags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OutsideText {
    /// White space only.
    #[default]
    Forbidden,
    /// Anything but the tags themselves.
    Allowed,
}

impl Default for FormatConfig {
    fn default() -> Self {
        FormatConfig { tags: vec!["think".to_owned(), "answer".to_owned()], outside: OutsideText::Forbidden }
    }
}

pub(crate) fn verify(config: &FormatConfig, answer: &str) -> Result<f64, Cause> {
    pass(is_well_formed(config, answer))
}

fn is_well_formed(config: &FormatConfig, answer: &str) -> bool {
    let mut position = 0;
    for tag in &config.tags {
        let (Some(open), Some(close)) = (only(answer, &format!("<{tag}>")), only(answer, &format!("</{tag}>"))) else {
            return false;
        };
        let (inside_start, after) = (open + tag.len() + 2, close + tag.len() + 3);
        if open < position || close < inside_start || !outside_is_fine(config, &answer[position..open]) {
            return false;
        }
        if answer[inside_start..close].trim().is_empty() {
            return false;
        }
        position = after;
    }
    outside_is_fine(config, &answer[position..])
}

fn outside_is_fine(config: &FormatConfig, text: &str) -> bool {
    config.outside == OutsideText::Allowed || text.trim().is_empty()
}

/// Where `needle` starts, if it occurs exactly once.
fn only(text: &str, needle: &str) -> Option<usize> {
    let first = text.find(needle)?;
    (text.rfind(needle) == Some(first)).then_some(first)
}
