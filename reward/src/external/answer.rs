//! Answers of user code: what counts as a score, and what is wrong with the rest.

use serde_json::{Map, Value};
use temper_types::RewardComponent;

/// Scores and components beyond this magnitude are errors: no advantage computed in f32 from them would be sane.
pub const MAX_ABS_SCORE: f64 = 1e6;
/// Most components in one answer.
const MAX_COMPONENTS: usize = 64;
/// Longest name of a component, in bytes.
const MAX_NAME_BYTES: usize = 64;
/// How much of a wrong answer is quoted, in characters.
const QUOTED_CHARS: usize = 160;

/// A sample's score by user code.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Answer {
    /// Finite, at most [`MAX_ABS_SCORE`] in magnitude.
    pub(crate) score: f64,
    /// What the code reported beside it, bounded as the score is.
    pub(crate) components: Vec<RewardComponent>,
}

/// Why a line is no score.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum BadAnswer {
    /// The speaker is out of step: what it says next cannot be trusted.
    OutOfStep(String),
    /// The answer to this sample, but no score. The next sample may fare better.
    Sample(String),
}

/// Whether an answer must repeat the id of its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum IdRule {
    /// Over a pipe, an id is what tells answers apart.
    Required,
    /// Over a connection of its own, a request has one answer.
    Optional,
}

/// Read the answer to request `id`.
pub(crate) fn parse(line: &str, id: &str, rule: IdRule) -> Result<Answer, BadAnswer> {
    let out_of_step = |why: String| Err(BadAnswer::OutOfStep(format!("{why}: {}", quote(line))));
    let mut table = match serde_json::from_str(line) {
        Ok(Value::Object(table)) => table,
        Ok(_) => return out_of_step("the answer is no JSON object".to_owned()),
        Err(error) => return out_of_step(format!("the answer is no JSON ({error})")),
    };
    match table.remove("id") {
        Some(Value::String(given)) if given == id => {}
        None if rule == IdRule::Optional => {}
        None => return out_of_step("the answer has no `id`".to_owned()),
        Some(given) => return out_of_step(format!("the answer has the id {given} instead of \"{id}\"")),
    }
    from_table(table).map_err(BadAnswer::Sample)
}

fn from_table(mut table: Map<String, Value>) -> Result<Answer, String> {
    if let Some(error) = table.remove("error") {
        return Err(error.as_str().map_or_else(|| quote(&error.to_string()), str::to_owned));
    }
    let score = table.remove("score").ok_or("the answer has no `score`")?;
    let score = number("score", &score)?;
    let components = match table.remove("components") {
        None => Vec::new(),
        Some(Value::Object(components)) => components.iter().map(component).collect::<Result<_, _>>()?,
        Some(other) => return Err(format!("components is {}: expected an object", quote(&other.to_string()))),
    };
    if components.len() > MAX_COMPONENTS {
        return Err(format!("{} components: expected at most {MAX_COMPONENTS}", components.len()));
    }
    match table.keys().next() {
        Some(key) => {
            Err(format!("the answer has the unknown key {}: known are id, score, components, error", quote(key)))
        }
        None => Ok(Answer { score, components }),
    }
}

fn component((name, value): (&String, &Value)) -> Result<RewardComponent, String> {
    if name.is_empty() || name.len() > MAX_NAME_BYTES {
        return Err(format!("component name {}: expected 1 to {MAX_NAME_BYTES} bytes", quote(name)));
    }
    Ok(RewardComponent { name: name.clone(), value: number(&format!("component `{name}`"), value)? })
}

fn number(what: &str, value: &Value) -> Result<f64, String> {
    let Some(number) = value.as_f64().filter(|_| value.is_number()) else {
        return Err(format!("{what} is {}: expected a number", quote(&value.to_string())));
    };
    if number.is_finite() && number.abs() <= MAX_ABS_SCORE {
        return Ok(number);
    }
    Err(format!("{what} {number:e} is out of range: expected a finite number from -1e6 to 1e6"))
}

/// A piece of foreign text for a message: on one line and not too long.
pub(crate) fn quote(text: &str) -> String {
    let mut shown: String = text.chars().take(QUOTED_CHARS).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    format!("`{shown}`")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_with_or_without_components() {
        let answer = parse(r#"{"id": "a", "score": 0.25, "components": {"x": 1, "y": -2.5}}"#, "a", IdRule::Required);
        let answer = answer.expect("a good answer");
        let components: Vec<(&str, f64)> = answer.components.iter().map(|c| (c.name.as_str(), c.value)).collect();
        assert_eq!((answer.score, components), (0.25, vec![("x", 1.0), ("y", -2.5)]));
        assert_eq!(parse(r#"{"score": 1}"#, "a", IdRule::Optional).expect("no id is needed").score, 1.0);
        assert_eq!(parse(r#"{"id": "a", "score": 1e6}"#, "a", IdRule::Required).expect("in range").score, 1e6);
    }

    #[test]
    fn fifteen_digits_arrive_to_the_bit() {
        for score in (0..2000u32).map(|i| f64::from(i) * 499_999_999.0 / 1e15 - 0.3) {
            let text = format!("{score:.15}");
            let line = format!(r#"{{"id": "a", "score": {text}}}"#);
            let exact: f64 = text.parse().expect("a number");
            assert_eq!(
                parse(&line, "a", IdRule::Required).expect("a number").score.to_bits(),
                exact.to_bits(),
                "{line}"
            );
        }
    }

    #[test]
    fn whatever_is_no_score_is_named() {
        for (line, in_step, part) in [
            ("hello", false, "no JSON"),
            ("", false, "no JSON"),
            ("[1]", false, "no JSON object"),
            (r#"{"id": "a", "score": NaN}"#, false, "NaN"),
            (r#"{"id": "a", "score": 1e400}"#, false, "out of range"),
            (r#"{"score": 1}"#, false, "no `id`"),
            (r#"{"id": "b", "score": 1}"#, false, "the id \"b\" instead of \"a\""),
            (r#"{"id": 7, "score": 1}"#, false, "the id 7"),
            (r#"{"id": "a"}"#, true, "no `score`"),
            (r#"{"id": "a", "score": null}"#, true, "score is `null`: expected a number"),
            (r#"{"id": "a", "score": "1"}"#, true, "expected a number"),
            (r#"{"id": "a", "score": true}"#, true, "expected a number"),
            (r#"{"id": "a", "score": [1]}"#, true, "expected a number"),
            (r#"{"id": "a", "score": 1e308}"#, true, "score 1e308 is out of range"),
            (r#"{"id": "a", "score": -1000001}"#, true, "out of range"),
            (r#"{"id": "a", "score": 1, "components": [1]}"#, true, "components is `[1]`"),
            (r#"{"id": "a", "score": 1, "components": {"x": "y"}}"#, true, "component `x` is"),
            (r#"{"id": "a", "score": 1, "components": {"": 1}}"#, true, "component name"),
            (r#"{"id": "a", "score": 1, "extra": 1}"#, true, "unknown key `extra`"),
            (r#"{"id": "a", "error": "no tests"}"#, true, "no tests"),
        ] {
            let error = parse(line, "a", IdRule::Required).expect_err(line);
            let (BadAnswer::OutOfStep(text) | BadAnswer::Sample(text)) = &error;
            assert!(text.contains(part), "{line}\n  says: {text}\n  lacks: {part}");
            assert_eq!(matches!(error, BadAnswer::Sample(_)), in_step, "{line}: {error:?}");
        }
    }
}
