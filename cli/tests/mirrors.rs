//! Trainer ranks that are killed, or stand still until they are given up, and are brought back from the memory of the
//! others: the bits of the run that was not disturbed, no return to a checkpoint, and engines that stay as they are.

mod common;
mod processes;
mod ranks;
mod run;
mod wait;

use common::{SMALL, recipe, stderr};
use processes::{
    Joined, control, control_json, finish, free_address, is_there, life_in, over_processes, signal, start, worker,
};
use ranks::without_communication;
use run::{Outcome, outcome, train, whole_outcome};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Output};
use std::time::Duration;
use temper_data::trajectories::read_dataset;
use wait::until;

/// A third of the time that a worker may say nothing.
const LESS_THAN_A_LEASE: Duration = Duration::from_secs(3);

/// The small recipe with checkpoints at the ends of its stages alone: one that is gone back to costs every step since.
fn text() -> String {
    SMALL.replace("every_steps = 2", "every_steps = 1000")
}

/// What a run in one process without mirrors gives.
fn undisturbed(recipe: &Path, run_dir: &Path, sets: &[&str]) -> Outcome {
    let args: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
    let output = train(recipe, run_dir, &args, None);
    assert!(output.status.success(), "{}", stderr(&output));
    without_communication(whole_outcome(run_dir))
}

/// A run over processes whose ranks mirror each other, with workers killed or stopped at the points of `kill_at`.
fn begin(recipe: &Path, run_dir: &Path, sets: &[&str], kill_at: &str) -> Child {
    let mut command = over_processes(recipe, run_dir, &[&["placement.mirror_shards=true"], sets].concat());
    command.env("TEMPER_KILL_AT", kill_at).spawn().expect("the binary starts")
}

/// Such a run to its end.
fn mirrored(recipe: &Path, run_dir: &Path, sets: &[&str], kill_at: &str) -> Output {
    finish(begin(recipe, run_dir, sets, kill_at))
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
        assert_eq!(event["kept_workers"], serde_json::json!(["reward-0", "rollout-0"]), "{event}");
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

/// Processes and lives of all workers, by name.
fn workers(run_dir: &Path) -> BTreeMap<String, (u64, u64)> {
    let all = until("the workers", || control_json(run_dir, &["workers"]));
    let numbers = |w: &Value| Some((w["process_id"].as_u64()?, w["incarnation"].as_u64()?));
    let one = |w: &Value| Some((w["name"].as_str()?.to_owned(), numbers(w)?));
    all.as_array().expect("a list").iter().filter_map(one).collect()
}

/// True where the process stands still.
fn is_stopped(pid: u64) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
}

/// The run equals the undisturbed one, went back from memory once, to one of `steps`, for want of a heartbeat of
/// trainer-1, and no process of it is left.
fn check_given_up(run_dir: &Path, expected: &Outcome, steps: &[u64], processes: &BTreeMap<String, (u64, u64)>) {
    let recoveries = events(run_dir, "recovered");
    let [event] = &recoveries[..] else { panic!("{recoveries:?}") };
    assert!(steps.contains(&event["step"].as_u64().expect("a step")), "{event}");
    assert_eq!(event["lost"], serde_json::json!(["trainer-1: no heartbeat for 10s"]));
    assert_eq!(event["shards"], serde_json::json!([{"rank": 1, "from": 0}]));
    assert_eq!(events(run_dir, "resumed"), Vec::<Value>::new(), "no return to a checkpoint");
    assert_eq!(events(run_dir, "mirrors_unusable"), Vec::<Value>::new());
    assert_eq!(&without_communication(whole_outcome(run_dir)), expected);
    check_accounts(run_dir);
    for (name, (pid, _)) in processes {
        until(&format!("the end of {name}"), || (!is_there(*pid)).then_some(()));
    }
}

/// A rank that the run started stands still until its lease is over: it is killed, and started again.
fn check_stopped(text: &str, stop_at: &str, steps: &[u64]) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), text);
    let sets = ["placement.trainer_ranks=2"];
    let expected = undisturbed(&recipe, &dir.path().join("reference"), &sets);
    let run_dir = dir.path().join("stopped");
    let run = begin(&recipe, &run_dir, &sets, stop_at);
    let (pid, life) = until("the second rank", || worker(&run_dir, "trainer-1", 0));
    until("its stop", || is_stopped(pid).then_some(()));
    let mut before = workers(&run_dir);
    let (next, _) = until("its successor", || life_in(&run_dir, "trainer-1", |_| true).filter(|found| found.1 != life));
    assert!(next != pid && !is_there(pid), "it is killed before its successor is there");
    finish(run);
    before.insert("the successor".to_owned(), (next, 0));
    check_given_up(&run_dir, &expected, steps, &before);
    let event = &events(&run_dir, "recovered")[0];
    assert_eq!(event["kept_workers"], serde_json::json!(["reward-0", "rollout-0"]), "{event}");
}

#[test]
fn a_rank_that_is_stopped_in_an_update_until_its_lease_is_over_comes_back_from_memory() {
    check_stopped(&text(), "7:update:trainer-1:stop", &[5, 6]);
}

/// The other rank sends its copy, which does not fit between the two of them, and waits for what does not come.
#[test]
fn a_rank_that_is_stopped_in_a_mirror_until_its_lease_is_over_takes_all_back_a_step() {
    let wide = text().replace("hidden_size = 32", "hidden_size = 256").replace("size = 48", "size = 1024");
    check_stopped(&wide, "7:mirror:trainer-1:stop", &[5, 6]);
}

#[test]
fn a_rank_that_is_stopped_for_less_than_its_lease_is_waited_for() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), &text());
    let sets = ["placement.trainer_ranks=2"];
    let expected = undisturbed(&recipe, &dir.path().join("reference"), &sets);
    let run_dir = dir.path().join("stopped");
    let run = begin(&recipe, &run_dir, &sets, "7:update:trainer-1:stop");
    let (pid, _) = until("the second rank", || worker(&run_dir, "trainer-1", 0));
    until("its stop", || is_stopped(pid).then_some(()));
    let before = workers(&run_dir);
    std::thread::sleep(LESS_THAN_A_LEASE);
    assert_eq!(workers(&run_dir), before, "nobody began a new life");
    assert_eq!(control_json(&run_dir, &["status"]).expect("it answers")["step"].as_u64(), Some(6), "it waits");
    signal(pid, "CONT");
    finish(run);
    for name in ["recovered", "failed", "resumed", "mirrors_unusable"] {
        assert_eq!(events(&run_dir, name), Vec::<Value>::new(), "{name}");
    }
    assert_eq!(without_communication(outcome(&run_dir)), expected);
}

/// A run whose workers join by hand, paused between two steps; its second rank stands still, the run goes on and waits
/// for it, until it is given up.
struct JoinedRun {
    _dir: tempfile::TempDir,
    run_dir: std::path::PathBuf,
    address: String,
    expected: Outcome,
    run: Child,
    workers: Vec<Joined>,
    before: BTreeMap<String, (u64, u64)>,
}

impl JoinedRun {
    fn stopped() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        // A supervised step begins with an update, which a rank that is there cannot do alone.
        let recipe = recipe(dir.path(), &text().replace("steps = 4", "steps = 60"));
        let expected = undisturbed(&recipe, &dir.path().join("reference"), &["placement.trainer_ranks=2"]);
        let (run_dir, address) = (dir.path().join("joined"), free_address());
        let listen = format!("placement.listen={address}");
        let by_hand = ["placement.spawn_workers=false", "placement.mirror_shards=true", "placement.trainer_ranks=2"];
        let run = start(&recipe, &run_dir, &[&by_hand[..], &[&listen]].concat());
        let workers = ["trainer", "trainer", "rollout", "reward"].map(|role| Joined::join(&address, role)).into();
        until("steps", || (control_json(&run_dir, &["status"])?["step"].as_u64()? > 5).then_some(()));
        assert_eq!(control_json(&run_dir, &["pause"]).expect("it pauses")["state"], "paused");
        let before = self::workers(&run_dir);
        let joined = JoinedRun { _dir: dir, run_dir, address, expected, run, workers, before };
        signal(joined.process("trainer-1"), "STOP");
        assert!(control(&joined.run_dir, &["resume"]).status.success());
        // The other rank waits for the one that stands still, whose connections are open. It is told.
        until("the loss", || events(&joined.run_dir, "failed").pop());
        joined
    }

    fn process(&self, name: &str) -> u64 {
        self.before[name].0
    }

    /// Wait for the end of the run, and of its workers, which end by themselves; gives how each did.
    fn end(mut self) -> Vec<std::process::ExitStatus> {
        finish(self.run);
        let steps: Vec<u64> = (4..60).collect();
        check_given_up(&self.run_dir, &self.expected, &steps, &BTreeMap::new());
        let end = |worker: &mut Joined| until("a worker's end", || worker.0.try_wait().expect("a child"));
        self.workers.iter_mut().map(end).collect()
    }
}

/// The same process joins again once it goes on, in a new life; engines and reward workers stay in theirs.
#[test]
fn a_rank_that_joined_by_hand_and_was_stopped_joins_again() {
    let joined = JoinedRun::stopped();
    let pid = joined.process("trainer-1");
    assert_eq!(control_json(&joined.run_dir, &["workers"]).expect("it answers")[3]["state"], "lost");
    signal(pid, "CONT");
    let (again, life) = until("its next life", || worker(&joined.run_dir, "trainer-1", joined.before["trainer-1"].1));
    assert_eq!((again, life), (pid, 2));
    let run_dir = joined.run_dir.clone();
    let kept = until("the way back", || events(&run_dir, "recovered").pop());
    assert_eq!(kept["kept_workers"], serde_json::json!(["reward-0", "rollout-0"]));
    assert!(control(&run_dir, &["pause"]).status.success());
    let after = workers(&run_dir);
    assert!(
        ["reward-0", "rollout-0", "trainer-0"].iter().all(|name| after[*name] == joined.before[*name]),
        "{after:?}"
    );
    assert!(control(&run_dir, &["resume"]).status.success());
    assert!(joined.end().iter().all(std::process::ExitStatus::success));
}

/// Another process takes the place of one that stands still, elsewhere: engines learn of it in a new life. The former
/// one is turned away when it goes on, and ends.
#[test]
fn a_rank_that_joined_by_hand_and_was_stopped_is_replaced_by_another_process() {
    let mut joined = JoinedRun::stopped();
    joined.workers.push(Joined::join(&joined.address, "trainer"));
    let event = until("the way back", || events(&joined.run_dir, "recovered").pop());
    assert_eq!(event["kept_workers"], serde_json::json!([]));
    assert!(control(&joined.run_dir, &["pause"]).status.success());
    let pid = joined.process("trainer-1");
    signal(pid, "CONT");
    let former = joined.workers.iter().position(|worker| u64::from(worker.0.id()) == pid).expect("it joined");
    let mut former = joined.workers.swap_remove(former);
    let end = until("the former one's end", || former.0.try_wait().expect("a child"));
    assert_eq!(end.code(), Some(1), "all ranks are taken");
    assert!(control(&joined.run_dir, &["resume"]).status.success());
    assert!(joined.end().iter().all(std::process::ExitStatus::success));
}
