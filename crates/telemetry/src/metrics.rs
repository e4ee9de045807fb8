//! `metrics.jsonl`: the figures of every step.

use crate::Error;
use crate::lines::{LineFile, read_objects};
use serde_json::{Map, Value};
use std::path::Path;

/// The metrics that come first in a row, in this order; the others follow by name.
const FIRST_METRICS: [&str; 12] = [
    "reward_mean",
    "loss",
    "kl",
    "entropy",
    "response_length_mean",
    "grad_norm",
    "lr",
    "tokens_per_second",
    "rollout_seconds",
    "train_seconds",
    "rollout_train_log_prob_diff_max",
    "staleness_mean",
];

/// The figures of one step. Keys stand in a fixed order whatever the order in which they were set.
#[derive(Debug, Clone, PartialEq)]
pub struct MetricsRow {
    step: u64,
    stage: String,
    metrics: Map<String, Value>,
}

impl MetricsRow {
    /// A row without figures. `step` counts over all stages, from 1.
    pub fn new(step: u64, stage: &str) -> Self {
        MetricsRow { step, stage: stage.to_owned(), metrics: Map::new() }
    }

    /// Step over all stages.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Name of the stage.
    pub fn stage(&self) -> &str {
        &self.stage
    }

    /// Set a figure. What JSON has no number for is kept as the text `NaN`, `inf` or `-inf`.
    ///
    /// # Panics
    /// If `name` is `step` or `stage`.
    pub fn set(&mut self, name: &str, value: f64) -> &mut Self {
        let json = if value.is_finite() { Value::from(value) } else { Value::from(value.to_string()) };
        self.insert(name, json)
    }

    /// Set a count.
    ///
    /// # Panics
    /// If `name` is `step` or `stage`.
    pub fn set_count(&mut self, name: &str, value: u64) -> &mut Self {
        self.insert(name, value.into())
    }

    fn insert(&mut self, name: &str, value: Value) -> &mut Self {
        assert!(!matches!(name, "step" | "stage"), "a metric must not be named `{name}`");
        self.metrics.insert(name.to_owned(), value);
        self
    }

    /// A figure, or `None` where the row does not have it.
    pub fn get(&self, name: &str) -> Option<f64> {
        match self.metrics.get(name)? {
            Value::String(text) => text.parse().ok(),
            value => value.as_f64(),
        }
    }

    /// The row as it stands in the file: `step`, `stage`, the well-known figures, the others by name.
    pub fn to_json(&self) -> Map<String, Value> {
        let rank = |name: &str| FIRST_METRICS.iter().position(|first| *first == name).unwrap_or(FIRST_METRICS.len());
        let mut metrics: Vec<_> = self.metrics.iter().collect();
        metrics.sort_by(|(a, _), (b, _)| (rank(a), a).cmp(&(rank(b), b)));
        let mut object = Map::new();
        object.insert("step".to_owned(), self.step.into());
        object.insert("stage".to_owned(), self.stage.clone().into());
        object.extend(metrics.into_iter().map(|(name, value)| (name.clone(), value.clone())));
        object
    }

    fn from_json(mut object: Map<String, Value>) -> Option<Self> {
        let step = object.shift_remove("step")?.as_u64()?;
        let stage = object.shift_remove("stage")?.as_str()?.to_owned();
        Some(MetricsRow { step, stage, metrics: object })
    }
}

/// The log of a run's figures.
#[derive(Debug)]
pub struct MetricsLog {
    lines: LineFile,
}

impl MetricsLog {
    /// Open the log at `path` for appending, creating it where it is missing.
    ///
    /// # Errors
    /// Names the file.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Ok(MetricsLog { lines: LineFile::open(path)? })
    }

    /// Append one row.
    ///
    /// # Errors
    /// Names the file.
    pub fn append(&mut self, row: &MetricsRow) -> Result<(), Error> {
        self.lines.append(&row.to_json())
    }

    /// Keep the rows up to `step`, for resume, byte for byte: later ones go. The file is replaced in one step.
    ///
    /// # Errors
    /// Names the file, and the line that is no row.
    pub fn truncate_after(&mut self, step: u64) -> Result<(), Error> {
        let path = self.lines.path().to_owned();
        self.lines.retain(|index, object| {
            let row = MetricsRow::from_json(object).ok_or_else(|| no_row(&path, index))?;
            Ok(row.step <= step)
        })
    }

    /// Make everything appended so far durable.
    ///
    /// # Errors
    /// Names the file.
    pub fn sync(&self) -> Result<(), Error> {
        self.lines.sync()
    }
}

/// The rows of a metrics file, in order; a last line that a crash left without its end is not one of them.
///
/// # Errors
/// Names the file, and the line that is no row.
pub fn read_metrics(path: &Path) -> Result<Vec<MetricsRow>, Error> {
    let objects = read_objects(path)?.into_iter().enumerate();
    objects.map(|(index, object)| MetricsRow::from_json(object).ok_or_else(|| no_row(path, index))).collect()
}

fn no_row(path: &Path, index: usize) -> Error {
    Error::Line {
        path: path.to_owned(),
        line: index + 1,
        problem: "no metrics row: expected a number `step` and a text `stage`".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(stage: &str, step: u64) -> MetricsRow {
        let mut row = MetricsRow::new(step, stage);
        row.set("loss", 0.5);
        row
    }

    fn log_of(path: &Path, rows: &[(&str, u64)]) -> MetricsLog {
        let mut log = MetricsLog::open(path).expect("writable");
        rows.iter().try_for_each(|(stage, step)| log.append(&row(stage, *step))).expect("writable");
        log
    }

    fn places(path: &Path) -> Vec<(String, u64)> {
        read_metrics(path).expect("rows").iter().map(|row| (row.stage().to_owned(), row.step())).collect()
    }

    #[test]
    fn keys_stand_in_one_order_however_they_were_set() {
        let mut one = MetricsRow::new(3, "grpo");
        one.set("val/a/mean@1", 1.0).set("lr", 3e-4).set("reward_mean", 0.25).set_count("num_failed", 2);
        let mut other = MetricsRow::new(3, "grpo");
        other.set("reward_mean", 0.25).set_count("num_failed", 2).set("lr", 3e-4).set("val/a/mean@1", 1.0);
        let text = |row: &MetricsRow| serde_json::to_string(&row.to_json()).expect("JSON");
        assert_eq!(text(&one), text(&other));
        let expected = r#"{"step":3,"stage":"grpo","reward_mean":0.25,"lr":0.0003,"num_failed":2,"val/a/mean@1":1.0}"#;
        assert_eq!(text(&one), expected);
    }

    #[test]
    fn figures_that_are_no_numbers_survive_the_file() {
        let dir = tempfile::tempdir().expect("the system gives a temporary directory");
        let path = dir.path().join("metrics.jsonl");
        let mut row = MetricsRow::new(1, "grpo");
        row.set("loss", f64::NAN).set("kl", f64::INFINITY).set("lr", f64::NEG_INFINITY).set("entropy", 0.1 + 0.2);
        MetricsLog::open(&path).and_then(|mut log| log.append(&row)).expect("writable");
        let read = read_metrics(&path).expect("one row").remove(0);
        assert!(read.get("loss").is_some_and(f64::is_nan));
        assert_eq!(read.get("kl"), Some(f64::INFINITY));
        assert_eq!(read.get("lr"), Some(f64::NEG_INFINITY));
        assert_eq!(read.get("entropy"), Some(0.1 + 0.2));
        assert_eq!(read.get("reward_mean"), None);
    }

    #[test]
    fn truncation_drops_later_steps_whatever_their_stage() {
        let rows = [("sft", 1), ("sft", 2), ("grpo", 3), ("grpo", 3), ("grpo", 4), ("dpo", 5)];
        for (step, num_kept) in [(0, 0), (1, 1), (2, 2), (3, 4), (4, 5), (9, 6)] {
            let dir = tempfile::tempdir().expect("the system gives a temporary directory");
            let path = dir.path().join("metrics.jsonl");
            let mut log = log_of(&path, &rows);
            log.truncate_after(step).expect("writable");
            log.append(&row("next", 7)).expect("writable");
            let mut expected: Vec<_> = rows[..num_kept].iter().map(|(s, n)| ((*s).to_owned(), *n)).collect();
            expected.push(("next".to_owned(), 7));
            assert_eq!(places(&path), expected, "after {step}");
        }
    }

    /// 0.10000000000000002 and the like: decimals that a fast reader may take for a neighbour.
    #[test]
    fn kept_rows_keep_every_byte() {
        let dir = tempfile::tempdir().expect("the system gives a temporary directory");
        let path = dir.path().join("metrics.jsonl");
        let mut log = MetricsLog::open(&path).expect("writable");
        for step in 1..=200 {
            let mut row = MetricsRow::new(step, "grpo");
            row.set("grad_norm", (step as f64 * 0.737_123).exp().sqrt() * 1e-7);
            row.set("lr", 3e-4 / step as f64);
            log.append(&row).expect("writable");
        }
        let before = std::fs::read_to_string(&path).expect("readable");
        log.truncate_after(150).expect("writable");
        let kept: String = before.split_inclusive('\n').take(150).collect();
        assert_eq!(std::fs::read_to_string(&path).expect("readable"), kept);
    }

    #[test]
    fn a_torn_line_is_no_row_and_a_foreign_line_is_named() {
        let dir = tempfile::tempdir().expect("the system gives a temporary directory");
        let path = dir.path().join("metrics.jsonl");
        std::fs::write(&path, "{\"step\":1,\"stage\":\"sft\"}\n{\"step\":2,\"sta").expect("writable");
        assert_eq!(places(&path), [("sft".to_owned(), 1)]);
        std::fs::write(&path, "{\"step\":1,\"stage\":\"sft\"}\n{\"loss\":2}\n").expect("writable");
        let error = read_metrics(&path).expect_err("no step").to_string();
        assert!(error.contains("metrics.jsonl, line 2: no metrics row"), "{error}");
        std::fs::write(&path, "nonsense\n").expect("writable");
        let error = read_metrics(&path).expect_err("no JSON").to_string();
        assert!(error.contains("metrics.jsonl, line 1: ") && error.contains("one JSON object a line"), "{error}");
    }
}
