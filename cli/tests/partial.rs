//! Partial rollouts end to end: whatever is cut, killed or spread over processes, the run is the same.

mod common;
mod finished;
mod run;

use common::{SMALL, recipe, stderr, temper};
use finished::finish;
use run::{Outcome, train};
use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use temper_types::FinishReason;

/// Steps after the supervised one.
const NUM_STEPS: u64 = 9;

/// Responses of up to 32 tokens in rounds of 8; two samples a prompt, and twice the prompts that a step trains on.
fn partial(policy: &str) -> String {
    let sampling = format!(
        "sampling = {{ max_new_tokens = 32 }}\n\
         partial_rollouts = {{ policy = \"{policy}\", over_sampling = 2.0, round_tokens = 8 }}"
    );
    with_sampling(&sampling)
}

fn with_sampling(sampling: &str) -> String {
    let changes = [
        ("sampling = { max_new_tokens = 6 }", sampling),
        ("max_position_embeddings = 32", "max_position_embeddings = 64"),
        ("num_generations = 4", "num_generations = 2"),
        ("steps = 4\n", "steps = 1\n"),
        ("steps = 6\n", "steps = 9\n"),
        ("entropy_coeff = 0.001", "entropy_coeff = 0.001, rollout_correction = { rollout_is = \"token\" }"),
        ("[data.held_out]", "[data.unused]"),
        ("[validation]\ndata = \"held_out\"\nevery_steps = 3\n", ""),
    ];
    changes.into_iter().fold(SMALL.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "{from}");
        text.replace(from, to)
    })
}

/// Sum of a column over the run.
fn total(outcome: &Outcome, key: &str) -> f64 {
    let value = |line: &String| {
        let row: serde_json::Value = serde_json::from_str(line).expect("a row");
        row[key].as_f64()
    };
    outcome.metrics.iter().filter_map(value).sum()
}

/// Every sample of every prompt once, whole, in the versions that drew it; the steps that can compare their log-probs
/// with the trainer's number at least `least_gaps`.
fn check_samples(outcome: &Outcome, least_gaps: usize) {
    assert_eq!(outcome.samples.len() as u64, NUM_STEPS * 4 * 2);
    let mut steps: BTreeMap<u64, u64> = BTreeMap::new();
    for sample in &outcome.samples {
        let num_tokens = sample.response_token_ids.len();
        assert!(sample.finish_reason != FinishReason::Paused && num_tokens > 0, "{sample:?}");
        assert!(sample.finish_reason != FinishReason::Length || num_tokens == 32, "{sample:?}");
        assert_eq!((sample.rollout_log_probs.len(), sample.old_log_probs.len()), (num_tokens, num_tokens));
        let versions: Vec<u64> = sample.policy_versions.iter().map(|(version, _)| version.number).collect();
        assert!(versions.is_sorted_by(|a, b| a < b) && versions.last() < Some(&sample.step.0), "{versions:?}");
        assert_eq!(sample.policy_versions.iter().map(|(_, n)| *n as usize).sum::<usize>(), num_tokens);
        *steps.entry(sample.step.0).or_default() += 1;
    }
    assert!(steps.values().all(|n| *n == 8), "{steps:?}");
    let gap = |line: &String| {
        let row: serde_json::Value = serde_json::from_str(line).expect("a row");
        row["rollout_train_log_prob_diff_max"].as_f64()
    };
    let gaps: Vec<f64> = outcome.metrics.iter().filter_map(gap).collect();
    assert!(gaps.len() >= least_gaps && gaps.iter().all(|gap| *gap < 1e-4), "engine and trainer agree: {gaps:?}");
}

/// Killed twice and resumed, once over processes; then over processes from the start.
fn check_equal_runs(recipe: &Path, dir: &Path, expected: &Outcome) {
    let killed = dir.join("killed");
    let processes = ["--set", "placement.mode=processes", "--set", "placement.rollout_workers=2"];
    let resume = [&processes[..], &["--resume"]].concat();
    for (point, args) in [("4:update", &[][..]), ("6:reward", &resume)] {
        let output = train(recipe, &killed, args, Some(point));
        assert_eq!(output.status.signal(), Some(9), "{point}: {}", stderr(&output));
    }
    assert_eq!(&finish(recipe, &killed, &["--resume"]), expected, "killed and resumed");
    assert_eq!(&finish(recipe, &dir.join("processes"), &processes), expected, "two engines in processes");
}

#[test]
fn responses_that_go_on_are_the_same_wherever_they_do() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), &partial("recompute"));
    let expected = finish(&recipe, &dir.path().join("straight"), &[]);
    check_samples(&expected, 4);
    let num_mixed = expected.samples.iter().filter(|sample| sample.policy_versions.len() > 1).count();
    assert!(num_mixed > 2 && total(&expected, "partial/num_carried_tokens") > 0.0, "{num_mixed} of several versions");
    // Tokens of older weights are weighed: the ratio against the engine's log-probs is not 1.
    let mut corrected = expected.metrics.iter().filter(|line| line.contains("rollout_corr/ppl_ratio"));
    assert!(corrected.any(|line| !line.contains("\"rollout_corr/ppl_ratio\":1.0")));
    check_equal_runs(&recipe, dir.path(), &expected);
    let cut = ["--set", "engine.block_size=16", "--set", "engine.prefill_chunk=5", "--set", "engine.max_num_seqs=3"];
    assert_eq!(finish(&recipe, &dir.path().join("other-limits"), &cut), expected, "another engine");
}

#[test]
fn aborted_responses_are_drawn_anew_under_one_version() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), &partial("abort"));
    let expected = finish(&recipe, &dir.path().join("straight"), &[]);
    check_samples(&expected, 4);
    assert!(expected.samples.iter().all(|sample| sample.policy_versions.len() == 1));
    let num_aborted = total(&expected, "partial/num_aborted_samples");
    assert!(num_aborted > 2.0);
    assert_eq!(total(&expected, "ledger/dropped/unfinished"), num_aborted);
    assert_eq!(total(&expected, "ledger/issued"), total(&expected, "ledger/trained") + num_aborted);
    check_equal_runs(&recipe, dir.path(), &expected);
}

/// Every round goes on in the engine that has its K/V: one or two of them, the run is the same. One that was killed has
/// lost them, and goes on all the same.
#[test]
fn kept_kv_are_found_where_they_are() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), &partial("keep_kv"));
    let small_blocks = ["--set", "engine.block_size=16"];
    let straight = finish(&recipe, &dir.path().join("straight"), &small_blocks);
    check_samples(&straight, 3);
    assert!(total(&straight, "partial/num_kept_tokens") > 20.0);
    let processes =
        [&small_blocks[..], &["--set", "placement.mode=processes", "--set", "placement.rollout_workers=2"]].concat();
    assert_eq!(finish(&recipe, &dir.path().join("processes"), &processes), straight, "two engines in processes");
    let anew = finish(&recipe, &dir.path().join("anew"), &["--set", "stage.1.partial_rollouts.policy=recompute"]);
    assert_ne!(anew.samples, straight.samples, "K/V of older weights change what is drawn");
    let killed = dir.path().join("killed");
    let output = train(&recipe, &killed, &small_blocks, Some("4:update"));
    assert_eq!(output.status.signal(), Some(9), "{}", stderr(&output));
    let resumed = finish(&recipe, &killed, &[&small_blocks[..], &["--resume"]].concat());
    check_samples(&resumed, 3);
}

/// Blocks decide what is kept, so a run is resumed with its own; where nothing could be kept it is not begun.
#[test]
fn what_kept_kv_need_is_checked() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = recipe(dir.path(), &partial("keep_kv"));
    let check = |sets: &str| {
        let sets = sets.split(' ').map(|set| format!("--set={set}"));
        let output = temper().arg("check").arg(&path).arg("--json").args(sets).output().expect("it starts");
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned(), stderr(&output))
    };
    let cases = [
        ("engine.prefix_cache=false", "engine.prefix_cache = true"),
        ("placement.sleep=true", "placement.sleep = false"),
        (
            "placement.mode=processes placement.trainer_ranks=2 placement.mirror_shards=true",
            "placement.mirror_shards = false",
        ),
    ];
    for (set, expected) in cases {
        let (code, _, error) = check(set);
        assert!(code == Some(2) && error.contains(expected), "{set}: {error}");
        assert!(error.contains("stage.1.partial_rollouts.policy"), "{error}");
    }
    let identity = |set: &str| {
        let report: serde_json::Value = serde_json::from_str(&check(set).1).expect("a report");
        report["identity"].as_str().expect("an identity").to_owned()
    };
    assert_ne!(identity("engine.block_size=16"), identity("engine.block_size=32"));
    assert_eq!(identity("engine.num_blocks=500"), identity("engine.num_blocks=600"));
}

/// `finish` without over-sampling is a step as ever.
#[test]
fn finishing_all_is_the_plain_run() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let plain = recipe(dir.path(), &with_sampling("sampling = { max_new_tokens = 32 }"));
    let expected = finish(&plain, &dir.path().join("plain"), &[]);
    let finish_all = ["--set", "stage.1.partial_rollouts={ policy = \"finish\", over_sampling = 1.0 }"];
    let found = finish(&plain, &dir.path().join("finish"), &finish_all);
    assert_eq!((found.weights, found.samples), (expected.weights, expected.samples));
}
