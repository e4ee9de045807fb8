//! `temper inspect` over a run.

use crate::common::{SMALL, recipe};
use crate::support::{fail, succeed, text, write};
use serde_json::Value;
use std::path::{Path, PathBuf};

fn a_run(dir: &Path) -> PathBuf {
    let run = dir.join("run");
    succeed(&["train", text(&recipe(dir, SMALL)), "--run-dir", text(&run)]);
    run
}

#[test]
fn a_run_is_summarised_verified_and_exported() {
    let dir = tempfile::tempdir().unwrap();
    let run = a_run(dir.path());
    let parquet = dir.path().join("rollouts.parquet");
    let report = succeed(&["inspect", text(&run), "--verify", "--parquet", text(&parquet), "--json"]);
    let report: Value = serde_json::from_str(&report).unwrap();

    let stages = report["stages"].as_array().unwrap();
    assert_eq!(stages.len(), 2, "{stages:?}");
    assert_eq!((stages[1]["first_step"].as_u64(), stages[1]["last_step"].as_u64()), (Some(5), Some(10)));
    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let last: Value = serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
    assert_eq!(stages[1]["metrics"]["reward_mean"]["last"], last["reward_mean"]);

    let checkpoints = report["checkpoints"].as_array().unwrap();
    assert!(!checkpoints.is_empty() && checkpoints.iter().all(|c| c["verified"] == true), "{checkpoints:?}");

    let samples = temper_data::trajectories::read_dataset(&run.join("rollouts")).unwrap();
    assert_eq!(report["parquet"]["num_rows"].as_u64(), Some(samples.len() as u64));
    assert!(std::fs::read(&parquet).unwrap().starts_with(b"PAR1"));
    assert_eq!(report["rollouts"].as_array().unwrap().len(), 6);

    let responses = report["groups"][0]["responses"].as_array().unwrap();
    let group: Vec<_> =
        samples.iter().filter(|s| Some(s.group_id.0) == report["groups"][0]["group_id"].as_u64()).collect();
    assert_eq!(responses.len(), 4);
    for (response, sample) in responses.iter().zip(group) {
        assert_eq!(response["response"], sample.response.as_str());
        assert_eq!(response["reward"].as_f64(), sample.outcome.as_ref().and_then(|o| o.reward()));
        assert_eq!(response["num_tokens"].as_u64(), Some(sample.response_token_ids.len() as u64));
        assert!(response["advantage"].is_number());
    }

    let group = samples[0].group_id.to_string();
    let shown = succeed(&["inspect", text(&run), "--group", &group, "--samples", "1"]);
    for part in
        ["stage", "reward_mean", "checkpoint", "rollouts", &format!("group {group} "), "advantage", "and 3 more"]
    {
        assert!(shown.contains(part), "`{part}` is not in {shown}");
    }
    refusals(&run);
}

/// Steps and groups that are not there, and a checkpoint that is damaged.
fn refusals(run: &Path) {
    fail(&["inspect", text(run), "--step", "99"], 2, &["--step 99", "the last one is 10"]);
    fail(&["inspect", text(run), "--group", "9999"], 2, &["--group 9999"]);
    let checkpoints = run.join("checkpoints");
    let newest = std::fs::read_dir(&checkpoints).unwrap().map(|e| e.unwrap().path()).max().unwrap();
    for output in ["model", "exported"].map(|name| newest.join(name)) {
        let args = ["export", "--checkpoint", text(&newest), "--output", text(&output), "--dtype", "bf16"];
        fail(&args, 2, &[text(&output), "part of the checkpoint"]);
    }
    write(&newest.join("model"), "config.json", "{}");
    fail(&["inspect", text(run), "--verify"], 1, &["model/config.json"]);
    let out = run.join("out");
    fail(&["export", "--checkpoint", text(&newest), "--output", text(&out)], 1, &["model/config.json"]);
    assert!(!out.exists());
}

#[test]
fn what_is_no_run_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fail(&["inspect", text(dir.path())], 2, &["is no run", "metrics.jsonl"]);
}
