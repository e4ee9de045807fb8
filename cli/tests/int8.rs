//! Engines of int8 weights end to end: off-policy and said so, and the same run wherever and however it goes.

mod common;
mod finished;
mod run;

use common::{SMALL, recipe, stderr, temper};
use finished::finish;
use run::{Outcome, train};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

const INT8: [&str; 2] = ["--set", "engine.weights=int8"];

fn corrected() -> String {
    let (from, to) = ("entropy_coeff = 0.001", "rollout_correction = { rollout_is = \"token\" }");
    assert!(SMALL.contains(from));
    SMALL.replace(from, to)
}

/// Numbers of a column, step by step.
fn column(outcome: &Outcome, key: &str) -> Vec<f64> {
    let rows = outcome.metrics.iter().map(|line| serde_json::from_str::<serde_json::Value>(line).expect("a row"));
    rows.filter_map(|row| row[key].as_f64()).collect()
}

fn info(run_dir: &Path) -> String {
    std::fs::read_to_string(run_dir.join("rollouts/dataset_info.json")).expect("the dataset's info")
}

#[test]
fn an_int8_run_is_the_same_killed_spread_and_speculated() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), &corrected());
    let straight = dir.path().join("straight");
    let expected = finish(&recipe, &straight, &INT8);
    let gaps = column(&expected, "rollout_train_log_prob_diff_max");
    assert!(gaps.len() == 6 && gaps.iter().all(|gap| *gap > 0.0 && *gap < 0.5), "{gaps:?}");
    let ratios = column(&expected, "rollout_corr/ppl_ratio");
    assert!(ratios.len() == 6 && ratios.iter().all(|ratio| *ratio != 1.0), "every step is weighed: {ratios:?}");
    assert!(info(&straight).contains("int8 weights"), "the dataset says so: {}", info(&straight));

    let (killed, resume) = (dir.path().join("killed"), [&INT8[..], &["--resume"]].concat());
    let processes = [&resume[..], &["--set", "placement.mode=processes"]].concat();
    for (point, args) in [("6:publish", &INT8[..]), ("8:rollout", &resume), ("9:update", &processes)] {
        let output = train(&recipe, &killed, args, Some(point));
        assert_eq!(output.status.signal(), Some(9), "{point}: {}", stderr(&output));
    }
    assert_eq!(finish(&recipe, &killed, &resume), expected, "killed and resumed");

    let sets = ["engine.speculative=auto", "engine.prefill_chunk=5", "engine.max_num_seqs=3", "engine.block_size=16"];
    let other: Vec<&str> = sets.iter().flat_map(|set| ["--set", *set]).chain(INT8).collect();
    assert_eq!(finish(&recipe, &dir.path().join("other"), &other), expected, "drafts, other limits");
}

#[test]
fn exact_weights_are_another_run() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), &corrected());
    let run_dir = dir.path().join("exact");
    let output = train(&recipe, &run_dir, &[], Some("7:rollout"));
    assert_eq!(output.status.signal(), Some(9), "{}", stderr(&output));
    assert!(!info(&run_dir).contains("int8"));
    let output = train(&recipe, &run_dir, &[&INT8[..], &["--resume"]].concat(), None);
    assert!(stderr(&output).contains("another recipe"), "{}", stderr(&output));
}

/// What `temper check` prints of a recipe with int8 weights, and whether it passed.
fn check(text: &str, sets: &[&str]) -> (bool, String) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let output = temper().arg("check").arg(recipe(dir.path(), text)).args(INT8).args(sets).output();
    let output = output.expect("the binary starts");
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned() + &stderr(&output))
}

#[test]
fn a_check_names_what_weighs_int8_and_what_cannot_hold_it() {
    let (passed, text) = check(SMALL, &[]);
    assert!(!passed && text.contains("stage.1.algorithm.policy_loss.rollout_correction"), "{text}");
    assert!(text.contains("rollout_is = \"token\" or \"sequence\""), "{text}");
    let (passed, text) = check(&corrected(), &[]);
    assert!(passed && text.contains("weights int8: OFF-POLICY"), "{text}");
    let bypass = "stage.1.algorithm.policy_loss={ loss_mode = \"bypass_mode\" }";
    assert!(check(SMALL, &["--set", bypass]).0, "its ratio is against the engine's log-probs");
    let text = corrected().replace("num_key_value_heads = 1", "num_key_value_heads = 2");
    let (passed, text) = check(&text, &["--set", "placement.rollout_tensor_parallel=2"]);
    assert!(!passed && text.contains("engine.weights") && text.contains("rollout_tensor_parallel = 2"), "{text}");
    let (passed, text) = check(&corrected(), &["--set", "engine.weights=int4"]);
    assert!(!passed && text.contains("engine.weights") && text.contains("int8"), "{text}");
}
