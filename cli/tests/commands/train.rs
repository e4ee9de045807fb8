//! `temper train`: where it runs, what it says of it, and what a run directory holds.

use crate::common::{SMALL, recipe, stderr, temper};
use serde_json::Value;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::process::Output;

/// Run with any arguments.
fn run(args: &[&OsStr]) -> Output {
    temper().args(args).output().unwrap()
}

/// JSON that a successful run printed.
fn json(args: &[&OsStr]) -> Value {
    let output = run(args);
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// JSON has no bytes that are no UTF-8: such a path is shown as well as it can be.
#[test]
fn a_path_that_is_no_utf8_is_shown_and_ends_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let bad = |name: &[u8]| -> PathBuf { dir.path().join(OsString::from_vec(name.to_vec())) };
    let (plain, odd, run_dir) = (recipe(dir.path(), SMALL), bad(b"odd\xff.toml"), bad(b"run\xffdir"));
    std::fs::rename(plain, &odd).unwrap();
    let (check, json_flag, run_flag) = (OsStr::new("check"), OsStr::new("--json"), OsStr::new("--run-dir"));
    assert!(json(&[check, odd.as_ref(), json_flag])["recipe"].as_str().unwrap().ends_with("odd\u{fffd}.toml"));
    let report = json(&[OsStr::new("train"), odd.as_ref(), run_flag, run_dir.as_ref(), json_flag]);
    assert_eq!(report["status"], "completed");
    assert!(report["run_dir"].as_str().unwrap().ends_with("run\u{fffd}dir"), "{report}");
    let shown = json(&[OsStr::new("inspect"), run_dir.as_ref(), json_flag]);
    assert!(shown["run"].as_str().unwrap().ends_with("run\u{fffd}dir"));
    assert!(shown["checkpoints"][0]["path"].as_str().unwrap().contains("run\u{fffd}dir"));
    let recipes = json(&[OsStr::new("recipes"), OsStr::new("--dir"), dir.path().as_ref(), json_flag]);
    assert!(recipes[0]["recipe"].as_str().unwrap().ends_with("odd\u{fffd}.toml"));
}
