//! Any algorithm on given arrays, in the schema of reference vectors: what `temper algos eval` runs and what the
//! vector tests check, by the same functions that the trainer calls.
//!
//! A document names a peer's function by `source` and `function`; each case holds `inputs` and `params` under the
//! peer's names; each result holds `outputs` and `grads` under the same names. A case that an algorithm refuses gives
//! `{"error": {"type", "message"}}` as its outputs.

mod areal;
mod case;
mod gdpo;
mod logits;
mod openrlhf;
mod openrlhf_policy;
mod reference;
mod rollout;
mod slime;
mod suite;
mod trl;
mod trl_loss;
mod trl_preference;
mod verl_advantages;
mod verl_kl;
mod verl_losses;
mod verl_misc;

use crate::Error;
use case::{Case, Results};
use serde_json::{Map, Value, json};
use std::cell::RefCell;
use suite::Suite;

/// Every algorithm, with its paper and the recipe keys that choose it.
pub fn list() -> Vec<crate::catalog::Entry> {
    crate::catalog::list()
}

/// Run every case of a document. Settings that a case was given but did not read (misspelt, or of no use beside the
/// others) stand in its `unread_params`, those of a nested table as `table.key`.
///
/// # Errors
/// If the document has no `source`, `function` or `cases`, a case is no object with a name, or no suite knows the
/// function. A case that fails by itself is reported in its place.
pub fn eval_file(document: &Value) -> Result<Value, Error> {
    let bad =
        |key: &str, cause: &str| Error::Case { case: String::new(), key: key.to_owned(), cause: cause.to_owned() };
    let text = |key: &str| document.get(key).and_then(Value::as_str).ok_or_else(|| bad(key, "expected a text"));
    let suite = Suite::find(text("source")?, text("function")?)?;
    let cases = document.get("cases").and_then(Value::as_array).ok_or_else(|| bad("cases", "expected an array"))?;
    let empty = Map::new();
    let mut results = Vec::with_capacity(cases.len());
    for case in cases {
        let name = case.get("name").and_then(Value::as_str).ok_or_else(|| bad("name", "every case needs a name"))?;
        let table = |key| case.get(key).and_then(Value::as_object).unwrap_or(&empty);
        let asked = RefCell::default();
        let case = Case { name, inputs: table("inputs"), params: table("params"), table: "", asked: &asked };
        let mut result = report(name, suite.run(&case));
        let unread = case.unread();
        if !unread.is_empty() {
            result["unread_params"] = json!(unread);
        }
        results.push(result);
    }
    Ok(json!({ "cases": results }))
}

fn report(name: &str, result: Result<Results, Error>) -> Value {
    match result {
        Ok(results) => json!({ "name": name, "outputs": results.outputs, "grads": results.grads }),
        Err(error) => {
            let outputs = json!({ "error": { "type": error_type(&error), "message": error.to_string() } });
            json!({ "name": name, "outputs": outputs, "grads": {} })
        }
    }
}

/// The peers' name of an error's kind.
fn error_type(error: &Error) -> &'static str {
    match error {
        Error::Unsupported { .. } => "NotImplementedError",
        Error::Missing { .. } | Error::Case { .. } => "KeyError",
        Error::Length { .. } | Error::Setting { .. } | Error::NonFinite { .. } | Error::Batch { .. } => "ValueError",
    }
}
