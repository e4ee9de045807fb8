//! Which directory a run is kept in where none is named: `runs/NAME`, then `runs/NAME-2` and so on.

use crate::usage;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Where the runs of one name are kept.
fn all(name: &str) -> impl Iterator<Item = PathBuf> {
    let numbered = move |n: u32| if n == 1 { name.to_owned() } else { format!("{name}-{n}") };
    (1..10_000).map(move |n| Path::new("runs").join(numbered(n)))
}

/// The first directory that is not there yet.
///
/// # Errors
/// There is none (exit code 2).
pub fn free(name: &str) -> anyhow::Result<PathBuf> {
    let free = all(name).find(|dir| !dir.exists());
    free.ok_or_else(|| usage("runs/ is full of runs of this name: give --run-dir"))
}

/// The directory of the run that was started last, as its events say; the first name where there is no run.
///
/// Numbers do not say it: the name of a directory that was removed is taken again.
pub fn latest(name: &str) -> PathBuf {
    let found: Vec<PathBuf> = all(name).filter(|dir| dir.is_dir()).collect();
    // Of equals the last one counts.
    let latest = found.iter().max_by_key(|dir| started(dir)).cloned();
    if let (Some(latest), 2..) = (&latest, found.len()) {
        eprintln!("--resume: {} is the run that was started last, of {} in runs/", latest.display(), found.len());
    }
    latest.unwrap_or_else(|| Path::new("runs").join(name))
}

/// When a run began, as its events say: RFC 3339, so that text compares as time does. `None` where it never began.
fn started(dir: &Path) -> Option<String> {
    let last = last_event(dir, |event| event["event"] == "started")?;
    last["time"].as_str().map(str::to_owned)
}

/// The last event of the run in `dir` of those that `is_wanted`.
pub fn last_event(dir: &Path, is_wanted: impl Fn(&Value) -> bool) -> Option<Value> {
    let text = std::fs::read_to_string(dir.join("events.jsonl")).ok()?;
    text.lines().rev().filter_map(|line| serde_json::from_str::<Value>(line).ok()).find(is_wanted)
}
