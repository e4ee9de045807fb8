//! `number`: the number that the response ends on equals the ground truth.
//!
//! The answer is the one number in the last `\boxed{...}`; without a box, the first number after the last `####`;
//! without that, the last number of the response, unless the words before it deny it ("is not 42"). Integers,
//! decimals, fractions, mixed numbers, percentages, currency signs, groups of thousands and powers of ten are read;
//! without tolerances, equality is exact at any number of digits.

mod scan;

use super::pass;
use crate::error::Cause;
use crate::exact::Number;
use crate::text::{after_last, has_box, last_boxed, normalise};
use scan::{Found, find_numbers};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Parameters of `number`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct NumberConfig {
    /// Greatest accepted `|answer - truth|`; 0 asks for exact equality.
    pub tolerance: f64,
    /// Greatest accepted `|answer - truth| / |truth|`; 0 asks for exact equality.
    pub relative_tolerance: f64,
    /// What a percent sign means.
    pub percent: Percent,
}

/// What a percent sign means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Percent {
    /// A hundredth: 50% equals 0.5.
    #[default]
    Hundredth,
    /// A unit that is left out: 50% equals 50.
    Unit,
}

pub(crate) fn verify(config: &NumberConfig, answer: &str, ground_truth: &str) -> Result<f64, Cause> {
    let truth = ground_truth_number(ground_truth)
        .ok_or_else(|| Cause::ground_truth(ground_truth, "number"))?
        .value(config.percent);
    let Some(found) = answer_number(&normalise(answer)) else {
        return pass(false);
    };
    pass(agree(config, &found.value(config.percent), &truth)?)
}

/// The whole text as one number, or `None`.
pub(crate) fn parse_whole(text: &str) -> Option<Number> {
    let text = text.trim().trim_end_matches('.');
    match find_numbers(text).as_slice() {
        [one] if one.start == 0 && one.end == text.len() => Some(one.value(Percent::Hundredth)),
        _ => None,
    }
}

fn ground_truth_number(text: &str) -> Option<Found> {
    let text = normalise(text);
    let core = last_boxed(&text).or_else(|| after_last(&text, "####")).unwrap_or(&text);
    let core = core.trim().trim_end_matches('$').trim_end_matches('.').trim_end();
    let mut found = find_numbers(core);
    let only = found.pop()?;
    (found.is_empty() && only.start == 0 && only.end == core.len()).then_some(only)
}

fn answer_number(text: &str) -> Option<Found> {
    if has_box(text) {
        let mut found = find_numbers(last_boxed(text)?);
        return if found.len() == 1 { found.pop() } else { None };
    }
    if let Some(line) = after_last(text, "####") {
        return find_numbers(line).into_iter().next();
    }
    find_numbers(text).pop().filter(|last| !is_denied(&text[..last.start]))
}

/// True where the words just before a number say that it is not the answer.
fn is_denied(before: &str) -> bool {
    let before = before.trim_end_matches(|c: char| c.is_whitespace() || "$(*`\"'".contains(c));
    let lower = before.to_lowercase();
    if ["n't", "n\u{2019}t", "\u{2260}", "!=", "\\ne", "\\neq"].iter().any(|end| lower.ends_with(end)) {
        return true;
    }
    let lower = lower.strip_suffix("equal to").unwrap_or(&lower).trim_end();
    let word = lower.rsplit(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
    matches!(word, "not" | "never")
}

fn agree(config: &NumberConfig, answer: &Number, truth: &Number) -> Result<bool, Cause> {
    let exact = answer.equals(truth);
    if config.tolerance == 0.0 && config.relative_tolerance == 0.0 {
        return exact.map_err(|_| Cause::TooLarge { what: "a fraction", limit: "at most 2000 digits are compared" });
    }
    let (a, t) = (answer.to_f64(), truth.to_f64());
    let allowed = config.tolerance.max(config.relative_tolerance * t.abs());
    // An answer beyond f64 gives an infinite distance, one that is NaN compares as false: neither agrees.
    Ok(exact == Ok(true) || (allowed.is_finite() && (a - t).abs() <= allowed))
}
