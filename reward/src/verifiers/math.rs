//! `math`: the mathematical answer of the response equals the ground truth.
//!
//! The answer is the content of the last `\boxed{...}`; without a box, the line after the last `####`; without that,
//! what follows the last "answer is" or "answer:"; without that, the last line. Both sides are brought to one spelling
//! (LaTeX fractions, roots, signs, units, spaces) and evaluated exactly: sums of rational multiples of square roots
//! and powers of symbols, so that `2/\sqrt{2}` is `\sqrt{2}` and `x(x+1)` is `x^2+x`. Tuples and intervals are
//! compared in order, sets and bare lists in any order. A ground truth that is no expression (`Monday`) is compared as
//! text.
//!
//! What both sides write in mathematics that is beyond this arithmetic (a root of a sum, 128 bits exceeded) is a
//! failure unless the texts agree: it is not known whether they are equal.

mod parse;
mod tidy;
mod value;

use super::number::parse_whole;
use super::pass;
use crate::error::Cause;
use crate::text::{after_last, has_box, last_boxed, last_line, normalise};
use parse::evaluate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tidy::{Answer, split, tidy};
use value::EvalError;

/// Longest text, in bytes after normalising, that is evaluated; a longer response is no simple answer.
const MAX_ANSWER_BYTES: usize = 1000;

/// Parameters of `math`: it has none.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MathConfig {}

pub(crate) fn verify(_config: &MathConfig, answer: &str, ground_truth: &str) -> Result<f64, Cause> {
    let truth = normalise(ground_truth);
    let truth = last_boxed(&truth).or_else(|| after_last(&truth, "####")).unwrap_or(&truth);
    if truth.trim().is_empty() || truth.len() > MAX_ANSWER_BYTES {
        return Err(Cause::ground_truth(ground_truth, "answer of 1 to 1000 bytes"));
    }
    let truth = tidy(truth);
    let answer = normalise(answer);
    let answer = answer_text(&answer).filter(|text| text.len() <= MAX_ANSWER_BYTES).map(tidy);
    let truth = split(&truth);
    // The ground truth is read first, so that a bad one is reported whatever the response is.
    for item in &truth.items {
        if evaluate(item) == Err(EvalError::DivisionByZero) {
            return Err(Cause::ground_truth(ground_truth, "answer: it divides by zero"));
        }
    }
    match answer {
        Some(answer) => pass(answers_agree(&split(&answer), &truth)?),
        None => pass(false),
    }
}

fn answer_text(text: &str) -> Option<&str> {
    const PHRASES: [&str; 4] = ["answer is", "answer:", "Answer is", "Answer:"];
    if has_box(text) {
        return last_boxed(text);
    }
    let phrase = PHRASES.iter().filter_map(|p| Some((text.rfind(p)?, *p))).max().map(|(_, p)| p);
    after_last(text, "####").or_else(|| after_last(text, phrase?)).or_else(|| last_line(text))
}

fn answers_agree(answer: &Answer, truth: &Answer) -> Result<bool, Cause> {
    if answer.items.len() != truth.items.len() || answer.brackets != truth.brackets {
        return Ok(false);
    }
    if truth.is_ordered() {
        let mut agree = true;
        for (a, t) in answer.items.iter().zip(&truth.items) {
            agree &= expressions_agree(a, t)?;
        }
        return Ok(agree);
    }
    let mut left: Vec<&String> = answer.items.iter().collect();
    for wanted in &truth.items {
        let Some(found) = position_of(&left, wanted)? else {
            return Ok(false);
        };
        left.swap_remove(found);
    }
    Ok(true)
}

fn position_of(answers: &[&String], wanted: &str) -> Result<Option<usize>, Cause> {
    for (at, answer) in answers.iter().enumerate() {
        if expressions_agree(answer, wanted)? {
            return Ok(Some(at));
        }
    }
    Ok(None)
}

fn expressions_agree(answer: &str, truth: &str) -> Result<bool, Cause> {
    if without_spaces(answer) == without_spaces(truth) {
        return Ok(true);
    }
    if let (Some(a), Some(t)) = (parse_whole(answer), parse_whole(truth)) {
        return a.equals(&t).map_err(|_| undecided(EvalError::Overflow));
    }
    let truth_value = match evaluate(truth) {
        Err(EvalError::Syntax) => return Ok(false),
        other => other,
    };
    match (evaluate(answer), truth_value) {
        (Err(EvalError::Syntax | EvalError::DivisionByZero), _) => Ok(false),
        (Err(error), _) | (_, Err(error)) => Err(undecided(error)),
        (Ok(a), Ok(t)) => Ok(a == t),
    }
}

fn undecided(error: EvalError) -> Cause {
    let limit = match error {
        EvalError::Overflow => "rationals of 128 bits",
        _ => "sums of square roots and powers of symbols, without roots or quotients of sums",
    };
    Cause::TooLarge { what: "an expression", limit }
}

fn without_spaces(text: &str) -> String {
    text.chars().filter(|c| *c != ' ').collect()
}
