//! `regex`: a pattern matches the response. Matching takes time linear in the response: the engine does not backtrack.

use super::pass;
use crate::error::Cause;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Parameters of `regex`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RegexConfig {
    /// The pattern, in the syntax of the Rust `regex` crate: no look-around and no back-references.
    pub pattern: String,
    /// Whether it must match the whole response or any part of it.
    #[serde(default)]
    pub scope: RegexScope,
}

/// How much of the response a pattern must cover.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RegexScope {
    /// Some part of it.
    #[default]
    Anywhere,
    /// All of it.
    Whole,
}

/// The pattern compiled, anchored where the whole response must match.
pub(crate) fn compile(config: &RegexConfig) -> Result<regex::Regex, regex::Error> {
    match config.scope {
        RegexScope::Anywhere => regex::Regex::new(&config.pattern),
        RegexScope::Whole => {
            // Compiled alone first, so that an unbalanced group cannot escape the anchors.
            regex::Regex::new(&config.pattern)?;
            // The line break before the bracket ends a comment that verbose mode may have open.
            let closing = if config.pattern.contains("(?x") { "\n)" } else { ")" };
            regex::Regex::new(&format!(r"\A(?:{}{closing}\z", config.pattern))
        }
    }
}

pub(crate) fn verify(pattern: &regex::Regex, answer: &str) -> Result<f64, Cause> {
    pass(pattern.is_match(answer))
}
