//! Trainer ranks that are killed and brought back from the memory of the others: the bits of the run that was not
//! disturbed, and no return to a checkpoint.

mod common;
mod ranks;
mod run;

use common::{SMALL, recipe, stderr, temper};
use ranks::without_communication;
use run::{Outcome, outcome, train};
use serde_json::Value;
use std::path::Path;
use std::process::Output;
use temper_data::trajectories::read_dataset;

/// The small recipe with checkpoints at the ends of its stages alone: one that is gone back to costs every step since.
fn text() -> String {
    SMALL.replace("every_steps = 2", "every_steps = 1000")
}

/// What a run in one process without mirrors gives.
fn undisturbed(recipe: &Path, run_dir: &Path, sets: &[&str]) -> Outcome {
    let args: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    let output = train(recipe, run_dir, &args, None);
    assert!(output.status.success(), "{}", stderr(&output));
    without_communication(outcome(run_dir))
}

/// A run over processes whose ranks mirror each other, with workers killed at the points of `kill_at`.
fn mirrored(recipe: &Path, run_dir: &Path, sets: &[&str], kill_at: &str) -> Output {
    let mut command = temper();
    command.arg("train").arg(recipe).arg("--run-dir").arg(run_dir).env("TEMPER_KILL_AT", kill_at);
    for set in ["placement.mode=processes", "placement.mirror_shards=true"].iter().chain(sets) {
        command.args(["--set", set]);
    }
    let output = command.output().expect("the binary starts");
    assert!(output.status.success(), "{}", stderr(&output));
    output
}

/// Events of a run by their name.
fn events(run_dir: &Path, name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(run_dir.join("events.jsonl")).expect("events");
    let all = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("an event"));
    all.filter(|event| event["event"] == name).collect()
}

/// The steps that the run went back to.
fn recovered(run_dir: &Path) -> Vec<u64> {
    events(run_dir, "recovered").iter().map(|event| event["step"].as_u64().expect("a step")).collect()
}

/// By the rows of the run: every step trained on what it asked for, each sample once.
fn check_accounts(run_dir: &Path) {
    let mut keys: Vec<_> = read_dataset(&run_dir.join("rollouts")).expect("a dataset");
    let num_rows = keys.len();
    keys.sort_by_key(|sample| sample.key());
    keys.dedup_by_key(|sample| sample.key());
    assert_eq!(keys.len(), num_rows, "a sample is there twice");
    let metrics = std::fs::read_to_string(run_dir.join("metrics.jsonl")).expect("metrics");
    let trained = |line: &str| serde_json::from_str::<Value>(line).expect("a row")["ledger/trained"].as_f64();
    let trained: f64 = metrics.lines().filter_map(trained).sum();
    assert_eq!(trained as usize, num_rows);
}

#[test]
fn a_rank_killed_in_any_phase_comes_back_from_the_memory_of_the_other() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), &text());
    let ranks = "placement.trainer_ranks=2";
    let expected = undisturbed(&recipe, &dir.path().join("reference"), &[ranks]);
    let run_dir = dir.path().join("killed");
    // In the supervised stage; in an update; as the mirrors of a step begin; with weights that are out already; and
    // while the last checkpoint is written.
    let kills = [
        "2:update:trainer-1",
        "6:update:trainer-0",
        "7:mirror:trainer-1",
        "8:publish:trainer-0",
        "9:record:trainer-1",
        "10:checkpoint_model:trainer-0",
    ];
    mirrored(&recipe, &run_dir, &[ranks], &kills.join(","));
    let steps = recovered(&run_dir);
    assert_eq!(steps.len(), kills.len(), "{steps:?}");
    // The end of the last step whose mirrors had all arrived: a step or two before the one under way.
    for (step, kill) in steps.iter().zip(kills) {
        let killed: u64 = kill.split(':').next().and_then(|step| step.parse().ok()).expect("a step");
        assert!((killed - 2..=killed).contains(step), "{kill}: back to step {step}");
    }
    assert_eq!(events(&run_dir, "resumed"), Vec::<Value>::new(), "no return to a checkpoint");
    for (event, kill) in events(&run_dir, "recovered").iter().zip(kills) {
        let name = kill.rsplit(':').next().expect("a worker");
        assert!(event["lost"][0].as_str().expect("who").starts_with(&format!("{name}: ")), "{event}");
    }
    assert_eq!(without_communication(outcome(&run_dir)), expected);
    check_accounts(&run_dir);
}

/// Masters in shards, ranks that share sequences, batches a step ahead, and engines that have taken the weights of the
/// step that is redone.
#[test]
fn batches_ahead_and_sharded_masters_come_back_too() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), &text());
    let sets = [
        "placement.trainer_ranks=2",
        "placement.sharding=zero3",
        "placement.sequence_parallel=2",
        "placement.staleness=1",
    ];
    let expected = undisturbed(&recipe, &dir.path().join("reference"), &sets);
    let run_dir = dir.path().join("killed");
    mirrored(&recipe, &run_dir, &sets, "6:update:trainer-1,8:mirror:trainer-0,9:log_probs:trainer-1");
    assert_eq!(recovered(&run_dir).len(), 3);
    assert_eq!(events(&run_dir, "resumed"), Vec::<Value>::new());
    assert_eq!(without_communication(outcome(&run_dir)), expected);
    check_accounts(&run_dir);
}

/// Where groups of ranks hold whole copies, one of each shard may go at once.
#[test]
fn replicas_serve_in_place_of_mirrors() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), &text());
    let sets = ["placement.trainer_ranks=4", "placement.sharding=hybrid", "placement.shard_size=2"];
    let expected = undisturbed(&recipe, &dir.path().join("reference"), &sets);
    let run_dir = dir.path().join("killed");
    mirrored(&recipe, &run_dir, &sets, "7:update:trainer-0,7:update:trainer-3");
    let event = &events(&run_dir, "recovered")[..];
    let [event] = event else { panic!("{event:?}") };
    assert_eq!(event["shards"], serde_json::json!([{"rank": 0, "from": 2}, {"rank": 3, "from": 1}]));
    assert_eq!(events(&run_dir, "resumed"), Vec::<Value>::new());
    assert_eq!(without_communication(outcome(&run_dir)), expected);
}

#[test]
fn a_rank_that_is_lost_with_its_mirror_costs_a_return_to_the_checkpoint_and_it_is_said_why() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), &text());
    let ranks = "placement.trainer_ranks=2";
    let expected = undisturbed(&recipe, &dir.path().join("reference"), &[ranks]);
    let run_dir = dir.path().join("killed");
    let output = mirrored(&recipe, &run_dir, &[ranks], "7:update:trainer-0,7:update:trainer-1,9:update:trainer-0");
    let whys = events(&run_dir, "mirrors_unusable");
    let [why] = &whys[..] else { panic!("{whys:?}") };
    assert!(why["why"].as_str().expect("a text").contains("no rank holds a state"), "{why}");
    assert!(stderr(&output).contains("what the trainer ranks hold is of no use"), "{}", stderr(&output));
    let resumed = events(&run_dir, "resumed");
    assert_eq!((resumed.len(), resumed[0]["step"].as_u64()), (1, Some(4)));
    assert_eq!(recovered(&run_dir).len(), 1, "a later loss is made good from memory again");
    assert_eq!(without_communication(outcome(&run_dir)), expected);
    check_accounts(&run_dir);
}
