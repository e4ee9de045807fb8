//! A mini-batch that gave a loss or gradient that is not finite, saved for whoever looks into it.

use crate::Error;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use temper_proto::{MiniBatch, TrainRow};

/// Where such a mini-batch goes: a directory, made when it is needed, the step that the update belongs to, and the rank
/// that saves it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) dir: &'a Path,
    pub(crate) step: u64,
    pub(crate) rank: usize,
}

/// `error` as it stands, or, where it says that a number was not finite, with the file that now holds the mini-batch.
pub(crate) fn keep_batch(error: Error, batch: &MiniBatch, place: Option<Place<'_>>) -> Error {
    let (true, Some(place)) = (error.is_non_finite(), place) else {
        return error;
    };
    if place.rank > 0 && matches!(error, Error::NonFiniteGradient { .. }) {
        // The gradient is everybody's: the first rank saves the mini-batch and says what was wrong.
        return Error::OtherRanks { ranks: vec![0] };
    }
    let saved = match save(&error, batch, place) {
        Ok(path) => format!("the mini-batch was saved to {}", path.display()),
        Err(cause) => format!("the mini-batch was not saved: {cause}"),
    };
    Error::NonFiniteBatch { cause: Box::new(error), saved }
}

fn save(error: &Error, batch: &MiniBatch, place: Place<'_>) -> Result<PathBuf, Error> {
    std::fs::create_dir_all(place.dir).map_err(Error::io("create", place.dir))?;
    let name = match place.rank {
        0 => format!("step-{}.json", place.step),
        rank => format!("step-{}-rank-{rank}.json", place.step),
    };
    let path = place.dir.join(name);
    let document = json!({
        "step": place.step,
        "error": error.to_string(),
        "temperature": number(f64::from(batch.temperature)),
        "learning_rate": number(batch.learning_rate),
        "global": batch.global,
        "rows": batch.rows.iter().map(row).collect::<Vec<_>>(),
    });
    std::fs::write(&path, format!("{document}\n")).map_err(Error::io("write", &path))?;
    Ok(path)
}

/// Every column of a row that was given.
fn row(row: &TrainRow) -> Value {
    let sequence = &row.sequence;
    let mut map = Map::new();
    map.insert("prompt_token_ids".to_owned(), json!(sequence.prompt_token_ids));
    map.insert("response_token_ids".to_owned(), json!(sequence.response_token_ids));
    map.insert("response_mask".to_owned(), json!(sequence.response_mask));
    let narrow = [
        ("old_log_probs", &row.old_log_probs),
        ("rollout_log_probs", &row.rollout_log_probs),
        ("ref_log_probs", &row.ref_log_probs),
        ("values", &row.values),
    ];
    let wide = [("advantages", &row.advantages), ("returns", &row.returns), ("rollout_weights", &row.rollout_weights)];
    let narrow = narrow.into_iter().map(|(name, column)| (name, column.iter().map(|x| f64::from(*x)).collect()));
    let wide = wide.into_iter().map(|(name, column)| (name, column.clone()));
    for (name, column) in narrow.chain(wide).filter(|(_, column): &(_, Vec<f64>)| !column.is_empty()) {
        map.insert(name.to_owned(), column.into_iter().map(number).collect());
    }
    Value::Object(map)
}

/// A JSON number, or, as JSON has no other, the text `NaN`, `inf` or `-inf`.
fn number(x: f64) -> Value {
    if x.is_finite() { json!(x) } else { json!(x.to_string()) }
}
