//! What a run reached, out of its `metrics.jsonl` and `events.jsonl`.

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value};
use std::path::Path;

/// Steps over which the start and the end of a curve are averaged.
const ENDS: usize = 5;

/// A number before and after.
pub(crate) type Change = Option<(f64, f64)>;

/// The curve of one run and its ends.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Curve {
    /// Steps of all stages.
    pub(crate) num_steps: u64,
    /// Minutes from start to end; where the run was interrupted, those that its steps took.
    pub(crate) minutes: f64,
    /// Mean reward by step of the policy stages, from 1.
    pub(crate) rewards: Vec<(u64, f64)>,
    /// Mean reward of the first and of the last steps.
    pub(crate) reward: Change,
    /// Held-out mean reward, before and after.
    pub(crate) held_out: Change,
    /// Held-out preference accuracy, before and after.
    pub(crate) accuracy: Change,
}

/// True where the directory holds a run that reached its end.
pub(crate) fn is_complete(dir: &Path) -> Result<bool> {
    let path = dir.join("events.jsonl");
    if !path.is_file() {
        return Ok(false);
    }
    let events = objects(&path)?;
    Ok(events.last().is_some_and(|e| e.get("event").and_then(Value::as_str) == Some("completed")))
}

impl Curve {
    /// Read a run.
    pub(crate) fn read(dir: &Path) -> Result<Curve> {
        let rows = objects(&dir.join("metrics.jsonl"))?;
        ensure!(!rows.is_empty(), "{}: metrics.jsonl is empty", dir.display());
        let mut curve = Curve::from_rows(&rows);
        curve.minutes = wall_seconds(dir).map_or_else(|| minutes(&rows), |seconds| seconds / 60.0);
        Ok(curve)
    }

    /// The curve of the rows of `metrics.jsonl`.
    fn from_rows(rows: &[Map<String, Value>]) -> Curve {
        // Where a reward model scores, the verifier beside it says how good the policy is; where groups are filtered,
        // the reward of what was generated.
        let by_model = rows.iter().any(|row| row.contains_key("reward/reward_model"));
        let keys = [Some(TRUE_REWARD).filter(|_| by_model), Some("generated_reward_mean"), Some("reward_mean")];
        let reward = |row| keys.iter().flatten().find_map(|key| number(row, key));
        let all = rows.iter().filter_map(reward);
        let rewards: Vec<(u64, f64)> = all.enumerate().map(|(index, reward)| (index as u64 + 1, reward)).collect();
        let values: Vec<f64> = rewards.iter().map(|(_, reward)| *reward).collect();
        let end = ENDS.min(values.len());
        let reward = (end > 0).then(|| (mean(&values[..end]), mean(&values[values.len() - end..])));
        Curve {
            num_steps: rows.last().and_then(|row| row.get("step")?.as_u64()).unwrap_or(0),
            minutes: 0.0,
            rewards,
            reward,
            held_out: change(rows, |key| key.contains("/mean@") && key.ends_with("/exact_match") == by_model),
            accuracy: change(rows, |key| key.contains("accurac")),
        }
    }
}

/// Component of the recipes' reward that compares with the right answer.
const TRUE_REWARD: &str = "reward/exact_match";

/// File in a run's directory that holds the seconds that the whole run took.
const WALL_SECONDS: &str = "wall_seconds.txt";

/// Keep how long a run took from start to end.
pub(crate) fn keep_wall_seconds(dir: &Path, seconds: f64) -> Result<()> {
    let path = dir.join(WALL_SECONDS);
    std::fs::write(&path, format!("{seconds:.1}\n")).with_context(|| format!("writing {}", path.display()))
}

fn wall_seconds(dir: &Path) -> Option<f64> {
    std::fs::read_to_string(dir.join(WALL_SECONDS)).ok()?.trim().parse().ok()
}

/// Seconds that the steps took, as minutes: pauses between an interruption and its resumption do not count.
fn minutes(rows: &[Map<String, Value>]) -> f64 {
    let seconds =
        |row: &Map<String, Value>| number(row, "step_seconds").or_else(|| number(row, "train_seconds")).unwrap_or(0.0);
    rows.iter().map(seconds).sum::<f64>() / 60.0
}

/// The first value of a held-out metric and its last one, each averaged over the data sources of its row.
fn change(rows: &[Map<String, Value>], is_meant: impl Fn(&str) -> bool) -> Change {
    let of_row = |row: &Map<String, Value>, prefixes: &[&str]| {
        let meant = |key: &&String| prefixes.iter().any(|p| key.starts_with(p)) && is_meant(key);
        let values: Vec<f64> = row.keys().filter(meant).filter_map(|key| number(row, key)).collect();
        (!values.is_empty()).then(|| mean(&values))
    };
    let first = rows.iter().find_map(|row| of_row(row, &["val_start/"]).or_else(|| of_row(row, &["val/"])))?;
    let last = rows.iter().rev().find_map(|row| of_row(row, &["val/"]))?;
    Some((first, last))
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

fn number(row: &Map<String, Value>, key: &str) -> Option<f64> {
    row.get(key).and_then(Value::as_f64)
}

fn objects(path: &Path) -> Result<Vec<Map<String, Value>>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let object = |(index, line): (usize, &str)| {
        serde_json::from_str(line).with_context(|| format!("{}:{}: no JSON object", path.display(), index + 1))
    };
    text.lines().enumerate().map(object).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(lines: &[Value]) -> Vec<Map<String, Value>> {
        lines.iter().filter_map(|line| line.as_object().cloned()).collect()
    }

    #[test]
    fn ends_are_means_over_five_steps_and_held_out_is_the_first_and_the_last() {
        let mut lines = vec![serde_json::json!({"step": 1, "stage": "sft", "loss": 2.0, "train_seconds": 6.0})];
        lines.extend(
            (0..10).map(|i| serde_json::json!({"step": i + 2, "reward_mean": f64::from(i), "step_seconds": 3.0})),
        );
        lines[1]["val_start/a/mean@1"] = 0.25.into();
        lines[1]["val_start/b/mean@1"] = 0.75.into();
        lines[5]["val/a/mean@1"] = 0.6.into();
        lines[10]["val/a/mean@1"] = 0.9.into();
        lines[10]["val/a/num_reward_errors"] = 7.into();
        let rows = rows(&lines);
        let curve = Curve::from_rows(&rows);
        assert_eq!((curve.num_steps, curve.reward, curve.held_out), (11, Some((2.0, 7.0)), Some((0.5, 0.9))));
        assert_eq!((curve.accuracy, curve.rewards.len(), curve.rewards[9]), (None, 10, (10, 9.0)));
        assert!((minutes(&rows) - 0.6).abs() < 1e-12);
    }

    #[test]
    fn a_run_against_a_reward_model_shows_the_true_reward() {
        let row = |step: u64, truth: f64| {
            serde_json::json!({"step": step, "reward_mean": 9.0, "reward/reward_model": 9.0, "reward/exact_match": truth,
                "val/a/mean@1": 9.0, "val/a/mean@1/exact_match": truth, "val/a/mean@1/reward_model": 9.0})
        };
        let curve = Curve::from_rows(&rows(&[row(1, 0.25), row(2, 0.75)]));
        assert_eq!((curve.rewards, curve.held_out), (vec![(1, 0.25), (2, 0.75)], Some((0.25, 0.75))));
    }

    #[test]
    fn a_preference_run_has_an_accuracy_and_no_reward() {
        let lines = [
            serde_json::json!({"step": 1, "val_start/pairs/pair_accuracy": 0.5}),
            serde_json::json!({"step": 2, "val/pairs/pair_accuracy": 0.95, "loss": 0.1}),
        ];
        let curve = Curve::from_rows(&rows(&lines));
        assert_eq!((curve.reward, curve.accuracy), (None, Some((0.5, 0.95))));
    }
}
