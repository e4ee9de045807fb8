//! Whole runs and commands with external rewards.

use crate::common::{SMALL, recipe, stderr, temper};
use crate::{READ, marked, wait_until};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use temper_controller::latest_checkpoint;

/// `exact_match` of texts without escapes, as a shell script: both ends stripped, then compared.
const EXACT_MATCH: &str = r#"trim() { t=${1#"${1%%[! ]*}"}; t=${t%"${t##*[! ]}"}; }
    while read -r line; do id=${line#*\"id\":}; id=${id%%,*};
    r=${line#*\"response\":\"}; trim "${r%%\"*}"; r=$t; g=${line#*\"ground_truth\":\"}; trim "${g%%\"*}";
    if [ "$r" = "$t" ]; then s=1; else s=0; fi; printf '{"id":%s,"score":%s}\n' "$id" $s; done"#;

/// The small recipe with a command in place of its `exact_match`; `keys` are further keys of it, a line each.
fn small_with(script: &str, token: &str, keys: &str) -> String {
    let command = serde_json::json!(["/bin/sh", "-c", format!("export TOKEN={token}; {script}"), token]);
    let lines = format!("kind = \"command\"\ncommand = {command}\n{keys}");
    SMALL.replacen("kind = \"exact_match\"", &lines, 1)
}

fn train(dir: &Path, name: &str, text: &str) -> Command {
    let place = dir.join(name);
    std::fs::create_dir_all(&place).expect("a directory");
    let mut command = temper();
    command.arg("train").arg(recipe(&place, text)).arg("--run-dir").arg(place.join("run"));
    command
}

fn weights(dir: &Path, name: &str) -> Vec<u8> {
    let checkpoints = dir.join(name).join("run/checkpoints");
    let last = latest_checkpoint(&checkpoints).expect("readable").expect("a checkpoint");
    std::fs::read(last.model().join("model.safetensors")).expect("weights")
}

fn finish(mut command: Command) {
    let output = command.output().expect("the binary starts");
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn a_command_that_does_what_a_verifier_does_gives_the_same_bits() {
    let dir = tempfile::tempdir().expect("a directory");
    let token = format!("bits-{}", std::process::id());
    finish(train(dir.path(), "verifier", SMALL));
    for (name, workers) in [("one", 1), ("three", 3)] {
        let keys = format!("name = \"exact_match\"\nworkers = {workers}");
        finish(train(dir.path(), name, &small_with(EXACT_MATCH, &token, &keys)));
        assert!(weights(dir.path(), name) == weights(dir.path(), "verifier"), "{workers} workers give other weights");
    }
    assert_eq!(marked(&token), Vec::<String>::new(), "a finished run leaves no process");
}

#[test]
fn a_killed_run_leaves_no_process_and_resumes_to_the_same_bits() {
    let dir = tempfile::tempdir().expect("a directory");
    let token = format!("resumed-{}", std::process::id());
    let text = small_with(EXACT_MATCH, &token, "name = \"exact_match\"\nworkers = 2");
    finish(train(dir.path(), "verifier", SMALL));
    let killed = train(dir.path(), "killed", &text).env("TEMPER_KILL_AT", "8:update").output().expect("it starts");
    assert!(!killed.status.success(), "the run was to kill itself");
    wait_until("the end of a killed run's rewards", || marked(&token).is_empty());
    let mut resumed = train(dir.path(), "killed", &text);
    resumed.arg("--resume");
    finish(resumed);
    assert!(weights(dir.path(), "killed") == weights(dir.path(), "verifier"), "resumed to other weights");
}

/// The reward hangs, in many processes, when temper is killed: nobody asks it any more to stop.
#[test]
fn a_run_killed_while_its_reward_hangs_leaves_no_process() {
    let dir = tempfile::tempdir().expect("a directory");
    let token = format!("hanging-{}", std::process::id());
    let begun = dir.path().join("begun");
    let script = format!("{READ} trap '' TERM HUP; ( ( sleep 100000 & ) & ); echo > {begun:?}; sleep 100000");
    let text = small_with(&script, &token, "timeout_seconds = 1000");
    let mut run = train(dir.path(), "run", &text).stderr(Stdio::null()).spawn().expect("it starts");
    wait_until("the reward to begin", || begun.exists());
    assert!(!marked(&token).is_empty());
    run.kill().expect("it runs");
    run.wait().expect("it ran");
    wait_until("the end of a killed run's rewards", || marked(&token).is_empty());
}

#[test]
fn a_broken_reward_stops_the_run_with_its_name_and_cause() {
    let dir = tempfile::tempdir().expect("a directory");
    let script = format!("{READ} echo the table is missing >&2; exit 1");
    let text = small_with(&script, "stops", "name = \"mine\"");
    let output = train(dir.path(), "run", &text).output().expect("it starts");
    let error = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{error}");
    for part in ["reward `mine` is broken", "samples failed (100 %)", "exit code 1", "the table is missing"] {
        assert!(error.contains(part), "{error}\n  lacks: {part}");
    }
}

/// Failures below the breaker's rate are masked and counted, and the run goes on.
#[test]
fn failed_samples_are_masked_and_counted() {
    let dir = tempfile::tempdir().expect("a directory");
    let script = EXACT_MATCH.replace("r=${line#", "case $id in *-1-0\\\") exit 1;; esac; r=${line#");
    let text = small_with(&script, "masked", "name = \"exact_match\"\nmax_error_rate = 0.9");
    finish(train(dir.path(), "run", &text));
    let samples = temper_data::trajectories::read_dataset(&dir.path().join("run/run/rollouts")).expect("a dataset");
    let failed: Vec<_> = samples.iter().filter(|s| s.outcome.as_ref().is_some_and(|o| o.reward().is_none())).collect();
    assert!(!failed.is_empty() && failed.len() < samples.len(), "{} of {}", failed.len(), samples.len());
    for sample in failed {
        assert_eq!(sample.sample_index.0, 1);
        assert!(sample.advantages.iter().all(|a| *a == 0.0));
    }
    let metrics = std::fs::read_to_string(dir.path().join("run/run/metrics.jsonl")).expect("metrics");
    assert!(metrics.lines().any(|row| row.contains("\"num_reward_errors\":4")), "{metrics}");
}

#[test]
fn check_finds_what_is_missing() {
    let dir = tempfile::tempdir().expect("a directory");
    let unreadable: PathBuf = dir.path().join("plain.txt");
    std::fs::write(&unreadable, "no program").expect("a file");
    let plain = format!("kind = \"command\"\ncommand = [{unreadable:?}]");
    for (lines, part) in [
        ("kind = \"python\"\npath = \"nowhere.py\"", "cannot read the Python file nowhere.py: No such file"),
        ("kind = \"python\"\npath = \"/\"", "is a directory: expected a Python file"),
        ("kind = \"command\"\ncommand = [\"no-such-program\"]", "there is no program `no-such-program` in PATH"),
        ("kind = \"command\"\ncommand = \"./score\"", "invalid type: string \"./score\", expected a sequence"),
        (&plain, "expected an executable file"),
        ("kind = \"http\"\nurl = \"https://example.org\"", "expected http://HOST[:PORT]/PATH"),
        ("kind = \"command\"\ncommand = [\"sh\"]\nmemory = 5", "unknown key `memory`"),
    ] {
        let text = SMALL.replacen("kind = \"exact_match\"", lines, 1);
        let output = temper().arg("check").arg(recipe(dir.path(), &text)).output().expect("it starts");
        let error = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{lines}: {error}");
        assert!(error.contains(part) && error.contains("recipe.toml"), "{lines}: {error}\n  lacks: {part}");
    }
}

#[test]
fn eval_scores_with_a_command() {
    let dir = tempfile::tempdir().expect("a directory");
    finish(train(dir.path(), "run", SMALL));
    let last = latest_checkpoint(&dir.path().join("run/run/checkpoints")).expect("readable").expect("a checkpoint");
    let data = dir.path().join("data.jsonl");
    let row = "{\"data_source\": \"s\", \"prompt\": \"sort 21=\", \"reward_model\": {\"ground_truth\": \"12\"}}\n";
    std::fs::write(&data, row.repeat(3)).expect("a file");
    let report = |reward: &str| {
        let mut eval = temper();
        eval.arg("eval").arg("--model").arg(last.model()).arg("--data").arg(&data).args(["--reward", reward, "--json"]);
        let output = eval.args(["--n", "4", "--max-new-tokens", "6"]).output().expect("it starts");
        assert!(output.status.success(), "{}", stderr(&output));
        serde_json::from_slice::<serde_json::Value>(&output.stdout).expect("JSON")["sources"].clone()
    };
    let command = serde_json::json!({"components": [{"kind": "command", "command": ["/bin/sh", "-c", EXACT_MATCH]}]});
    assert_eq!(report(&command.to_string()), report("exact_match"));
}
