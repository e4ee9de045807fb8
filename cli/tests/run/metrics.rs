//! Rows of metrics that two equal runs have in common.

use serde_json::{Map, Value};
use std::path::Path;

/// The run's rows of metrics without what the clock and the loss of workers decide.
pub fn metrics(run_dir: &Path) -> Vec<Map<String, Value>> {
    let text = std::fs::read_to_string(run_dir.join("metrics.jsonl")).expect("metrics");
    text.lines().map(without_clock).collect()
}

fn without_clock(line: &str) -> Map<String, Value> {
    let mut row: Map<String, Value> = serde_json::from_str(line).expect("a row");
    let is_the_clocks = |key: &str| {
        let prefixes = ["fleet/", "engine/"];
        key.ends_with("_seconds") || key == "tokens_per_second" || prefixes.iter().any(|prefix| key.starts_with(prefix))
    };
    row.retain(|key, _| !is_the_clocks(key));
    row
}
