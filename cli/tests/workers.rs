//! A run over worker processes gives the run in one process, whatever becomes of the workers; and it can be controlled.

mod common;
mod processes;
mod ranks;
mod run;
mod wait;

use common::{SMALL, recipe, stderr, temper};
use processes::{Joined, control, control_json, finish, free_address, is_there, life_in, signal, start, worker};
use ranks::without_communication;
use run::{outcome, train};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};
use temper_data::trajectories::read_dataset;
use temper_types::Philox;
use wait::until;

const PROCESSES: [&str; 2] = ["--set", "placement.mode=processes"];

/// The small recipe with more steps, so that there is something to disturb.
fn longer() -> String {
    SMALL.replace("steps = 6", "steps = 40").replace("every_steps = 2", "every_steps = 4")
}

/// Go on with the run in `run_dir` from its last checkpoint.
fn resume(recipe: &Path, run_dir: &Path) -> Child {
    let mut command = temper();
    command.arg("train").arg(recipe).arg("--run-dir").arg(run_dir).args(PROCESSES).arg("--resume");
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary starts")
}

#[test]
fn any_number_of_workers_gives_the_bits_of_one_process() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), SMALL);
    let reference = dir.path().join("reference");
    assert!(train(&recipe, &reference, &[], None).status.success());
    let expected = outcome(&reference);
    for (workers, transport) in [(1, "auto"), (2, "grpc"), (3, "auto"), (2, "delta")] {
        let run_dir = dir.path().join(format!("workers-{workers}-{transport}"));
        let (rollout, reward) =
            (format!("placement.rollout_workers={workers}"), format!("placement.reward_workers={}", 4 - workers));
        let transport_key = format!("placement.weight_transport={transport}");
        let sleep = format!("placement.sleep={}", workers == 2);
        let output = finish(start(&recipe, &run_dir, &[&rollout, &reward, &transport_key, &sleep]));
        assert_eq!(outcome(&run_dir), expected, "{workers} rollout workers, {transport}");
        let said = stderr(&output).matches("weights come through memory shared with the trainer").count();
        assert_eq!(said, if transport == "auto" { workers } else { 0 }, "{}", stderr(&output));
        let said = stderr(&output).matches("weights come as changes since the version before").count();
        assert_eq!(said, if transport == "delta" { workers } else { 0 }, "{}", stderr(&output));
    }
}

/// Engines generate a step ahead, while the trainer trains: the bits of one process that does one thing after another.
#[test]
fn a_run_one_step_ahead_gives_the_bits_of_one_process() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), SMALL);
    let (reference, run_dir) = (dir.path().join("reference"), dir.path().join("workers"));
    assert!(train(&recipe, &reference, &["--set", "placement.staleness=1"], None).status.success());
    let expected = outcome(&reference);
    for sample in &expected.samples {
        let begin = 4;
        let version = (sample.step.0 - 2).max(begin);
        assert!(sample.policy_versions.iter().all(|(v, _)| v.number == version), "{sample:?}");
        assert_eq!(u64::from(sample.staleness), sample.step.0 - 1 - version);
    }
    for workers in 1..=2 {
        let run_dir = run_dir.with_extension(workers.to_string());
        let sets =
            [format!("placement.rollout_workers={workers}"), format!("placement.reward_workers={}", 3 - workers)];
        finish(start(&recipe, &run_dir, &["placement.staleness=1", &sets[0], &sets[1]]));
        assert_eq!(outcome(&run_dir), expected, "{workers} rollout workers");
    }
}

#[test]
fn trainer_ranks_in_processes_give_the_bits_of_ranks_in_one() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), SMALL);
    let reference = dir.path().join("reference");
    assert!(train(&recipe, &reference, &["--set", "placement.trainer_ranks=4"], None).status.success());
    let expected = without_communication(outcome(&reference));
    for sharding in ["zero1", "zero3", "hybrid"] {
        let run_dir = dir.path().join(sharding);
        let sharding_key = format!("placement.sharding={sharding}");
        let mut sets = vec!["placement.trainer_ranks=4", "placement.rollout_workers=2", &sharding_key];
        if sharding == "hybrid" {
            sets.push("placement.shard_size=2");
        }
        finish(start(&recipe, &run_dir, &sets));
        assert_eq!(without_communication(outcome(&run_dir)), expected, "{sharding}");
    }
}

/// Two ranks that share the rows of every micro-batch, and two such pairs; killed and resumed, the same again.
#[test]
fn ranks_that_share_sequences_in_processes_give_the_bits_of_ranks_in_one() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), SMALL);
    for ranks in [2, 4] {
        let [reference, run_dir] = ["one", "many"].map(|name| dir.path().join(format!("{name}-{ranks}")));
        let ranks = format!("placement.trainer_ranks={ranks}");
        let keys = [ranks.as_str(), "placement.sequence_parallel=2", "placement.sharding=zero3"];
        let args: Vec<&str> = keys.iter().flat_map(|key| ["--set", key]).collect();
        assert!(train(&recipe, &reference, &args, None).status.success());
        let expected = without_communication(outcome(&reference));
        let gap = |line: &String| {
            let row: serde_json::Value = serde_json::from_str(line).expect("a row");
            row.get("rollout_train_log_prob_diff_max").and_then(serde_json::Value::as_f64)
        };
        let gaps: Vec<f64> = expected.metrics.iter().filter_map(gap).collect();
        assert!(gaps.len() >= 6 && gaps.iter().all(|gap| *gap == 0.0), "{gaps:?}");
        finish(start(&recipe, &run_dir, &keys));
        assert_eq!(without_communication(outcome(&run_dir)), expected, "{ranks}");
        if ranks.ends_with('2') {
            let killed = dir.path().join("killed");
            assert!(!train(&recipe, &killed, &args, Some("7:update")).status.success());
            assert!(train(&recipe, &killed, &[&args[..], &["--resume"]].concat(), None).status.success());
            assert_eq!(without_communication(outcome(&killed)), expected, "resumed");
        }
    }
}

/// A recipe with heads that two ranks can divide.
fn divisible(text: &str) -> String {
    text.replace("num_key_value_heads = 1", "num_key_value_heads = 2")
}

#[test]
fn engines_over_tensor_parallel_ranks_give_the_bits_of_whole_ones() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), &divisible(SMALL));
    let [reference, threads, processes] = ["reference", "threads", "processes"].map(|name| dir.path().join(name));
    const DIVIDED: &str = "placement.rollout_tensor_parallel=2";
    assert!(train(&recipe, &reference, &[], None).status.success());
    let expected = outcome(&reference);
    let output = train(&recipe, &threads, &["--set", DIVIDED], None);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(outcome(&threads), expected, "ranks that are threads");
    finish(start(&recipe, &processes, &[DIVIDED, "placement.rollout_workers=2", "placement.sleep=true"]));
    assert_eq!(outcome(&processes), expected, "ranks that are processes");
}

/// Processes that `pid` started and that are still there.
fn children(pid: u64) -> Vec<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().map(|pid| pid.parse().expect("a process")).collect()
}

#[test]
fn an_engine_whose_rank_is_killed_begins_anew_and_leaves_none_behind() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), &divisible(&longer()));
    let [reference, run_dir] = ["reference", "killed"].map(|name| dir.path().join(name));
    assert!(train(&recipe, &reference, &[], None).status.success());
    let child = start(&recipe, &run_dir, &["placement.rollout_tensor_parallel=2", "placement.rollout_workers=2"]);
    let (worker_pid, life) = until("the engine", || worker(&run_dir, "rollout-0", 0));
    let rank = until("its rank", || children(worker_pid).first().copied());
    until("steps", || (control_json(&run_dir, &["status"])?["step"].as_u64()? > 5).then_some(()));
    signal(rank, "KILL");
    assert_eq!(control_json(&run_dir, &["pause"]).expect("it pauses")["state"], "paused");
    let (second, life) = until("its next life", || worker(&run_dir, "rollout-0", life));
    let rank = until("its next rank", || children(second).first().copied());
    // The worker itself, with nobody left to end its rank in order.
    signal(second, "KILL");
    until("the end of its rank", || (!is_there(rank)).then_some(()));
    until("its last life", || worker(&run_dir, "rollout-0", life));
    assert_eq!(control_json(&run_dir, &["resume"]).expect("it goes on")["state"], "running");
    let output = finish(child);
    let said = stderr(&output);
    assert!(said.contains("tensor-parallel rank 1 is lost: it was killed by signal 9"), "{said}");
    assert_eq!(run::whole_outcome(&run_dir), run::whole_outcome(&reference));
}

#[test]
fn a_lost_trainer_rank_takes_all_ranks_back_to_the_last_checkpoint() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), &longer());
    let (reference, run_dir) = (dir.path().join("reference"), dir.path().join("killed"));
    assert!(train(&recipe, &reference, &["--set", "placement.trainer_ranks=2"], None).status.success());
    let child = start(&recipe, &run_dir, &["placement.trainer_ranks=2"]);
    let (pid, _) = until("the second rank", || worker(&run_dir, "trainer-1", 0));
    until("steps", || (control_json(&run_dir, &["status"])?["step"].as_u64()? > 5).then_some(()));
    signal(pid, "KILL");
    finish(child);
    let (killed, whole) = (run::whole_outcome(&run_dir), run::whole_outcome(&reference));
    assert_eq!(without_communication(killed), without_communication(whole));
}

/// Kill these workers one after another, each some time after it serves in a new life.
fn kill(run_dir: &Path, names: &[&'static str]) {
    let noise = Philox::new(3);
    let mut lives = BTreeMap::new();
    let mut kills = 0;
    for (index, name) in names.iter().enumerate() {
        let before = lives.get(name).copied().unwrap_or(0);
        let found = until(name, || match worker(run_dir, name, before) {
            Some(found) => Some(Some(found)),
            // The run may be over before every worker had its turn.
            None => is_complete(run_dir).then_some(None),
        });
        let Some((pid, life)) = found else { break };
        std::thread::sleep(Duration::from_millis(noise.below(300, index as u64, 0)));
        signal(pid, "KILL");
        lives.insert(*name, life);
        kills += 1;
    }
    assert!(kills >= 4, "only {kills} kills before the run was over");
}

#[test]
fn workers_of_every_role_are_killed_and_stopped_and_the_result_stays() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), &longer());
    let reference = dir.path().join("reference");
    assert!(train(&recipe, &reference, &[], None).status.success());
    let run_dir = dir.path().join("killed");
    let child = start(&recipe, &run_dir, &["placement.rollout_workers=2", "placement.reward_workers=2"]);
    kill(&run_dir, &["rollout-0", "trainer-0", "reward-1", "rollout-1", "trainer-0", "reward-0"]);
    finish(child);
    assert_eq!(run::whole_outcome(&run_dir), run::whole_outcome(&reference));
    check_accounts(&run_dir);
}

/// An engine that comes back while the trainer updates cannot have the weights that it is to generate with. With no
/// other engine the run goes back to its last checkpoint, and does not wait first for somebody who could.
#[test]
fn the_only_engine_of_a_run_one_step_ahead_is_killed_and_nothing_waits_for_it() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), &longer());
    let reference = dir.path().join("reference");
    assert!(train(&recipe, &reference, &["--set", "placement.staleness=1"], None).status.success());
    let (run_dir, begin) = (dir.path().join("killed"), Instant::now());
    let child = start(&recipe, &run_dir, &["placement.staleness=1"]);
    kill(&run_dir, &["rollout-0"; 6]);
    finish(child);
    assert!(begin.elapsed() < Duration::from_secs(110), "a wait for a worker alone takes 120 s");
    assert_eq!(run::whole_outcome(&run_dir), run::whole_outcome(&reference));
}

/// By the rows of the run: no sample is lost, and none is trained on twice.
fn check_accounts(run_dir: &Path) {
    let mut per_step: BTreeMap<u64, u64> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for sample in read_dataset(&run_dir.join("rollouts")).expect("a dataset") {
        let key = (sample.prompt_id, sample.epoch, sample.sample_index);
        assert!(seen.insert(key), "step {}: sample {:?} is there twice", sample.step, sample.key());
        *per_step.entry(sample.step.0).or_default() += 1;
    }
    assert!(per_step.len() >= 40, "{} steps over samples", per_step.len());
    let metrics = std::fs::read_to_string(run_dir.join("metrics.jsonl")).expect("metrics");
    for line in metrics.lines() {
        let row: serde_json::Map<String, serde_json::Value> = serde_json::from_str(line).expect("a row");
        let Some(recorded) = per_step.get(&row["step"].as_u64().expect("a step")) else { continue };
        let count = |key: &str| row.get(key).map_or(0, |value| value.as_f64().expect("a count") as u64);
        let dropped = |reason: &str| count(&format!("ledger/dropped/{reason}"));
        let with_a_row = count("ledger/trained")
            + ["reward_error", "masked", "not_chosen", "baseline"].into_iter().map(dropped).sum::<u64>();
        let without = ["filtered", "validation", "aborted"].into_iter().map(dropped).sum::<u64>();
        assert_eq!((count("ledger/issued"), *recorded), (with_a_row + without, with_a_row), "{line}");
        assert!(count("ledger/trained") > 0, "{line}");
    }
}

fn is_complete(run_dir: &Path) -> bool {
    std::fs::read_to_string(run_dir.join("events.jsonl")).is_ok_and(|text| text.contains("\"completed\""))
}

#[test]
fn a_run_is_paused_changed_saved_and_drained_while_it_runs() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let text = longer().replace("steps = 40", "steps = 4000").replace("every_steps = 4", "every_steps = 4000");
    let recipe = recipe(dir.path(), &text);
    let run_dir = dir.path().join("run");
    let child = start(&recipe, &run_dir, &[]);
    until("the second stage", || {
        let status = control_json(&run_dir, &["status"])?;
        (status["step"].as_u64()? > 5).then_some(())
    });
    let paused = control_json(&run_dir, &["pause"]).expect("it pauses");
    assert_eq!(paused["state"], "paused");
    let step = paused["step"].as_u64().expect("a step");
    let snapshot = control_json(&run_dir, &["snapshot"]).expect("it saves");
    assert_eq!(snapshot["step"].as_u64(), Some(step));
    assert!(Path::new(snapshot["path"].as_str().expect("a path")).join("MANIFEST").is_file());
    let set = control_json(&run_dir, &["set", "learning_rate=0.00025"]).expect("it changes");
    assert_eq!((set["previous"].as_f64(), set["from_step"].as_u64()), (Some(1e-3), Some(step + 1)));
    let refused = control(&run_dir, &["set", "clip=1"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("what can: learning_rate, temperature"), "{}", stderr(&refused));
    assert_eq!(control_json(&run_dir, &["status"]).expect("it answers")["step"].as_u64(), Some(step), "it waits");
    for verb in ["status", "workers", "snapshot"] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let mut command = temper();
        let output = command.arg(verb).arg("--run-dir").arg(&run_dir).stdout(writer).output().expect("it starts");
        let is_clean = output.status.code() == Some(1) && stderr(&output).starts_with("error: writing stdout");
        assert!(is_clean, "{verb} with a closed stdout: {}", stderr(&output));
    }
    assert_eq!(control_json(&run_dir, &["resume"]).expect("it goes on")["state"], "running");
    let rates = || -> Vec<(u64, f64)> {
        let metrics = std::fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap_or_default();
        let row = |line: &str| {
            let row: serde_json::Value = serde_json::from_str(line).ok()?;
            Some((row["step"].as_u64()?, row["lr"].as_f64()?))
        };
        metrics.lines().filter_map(row).collect()
    };
    until("a step with the new rate", || rates().last().filter(|(at, rate)| *at > step && *rate <= 2.5e-4).map(|_| ()));
    // The change came after the last checkpoint; the run that goes on from there makes it again.
    signal(u64::from(child.id()), "KILL");
    assert!(!child.wait_with_output().expect("the process ends").status.success());
    let child = resume(&recipe, &run_dir);
    until("steps of the resumed run", || {
        let status = control_json(&run_dir, &["status"])?;
        (status["state"] == "running" && status["step"].as_u64()? > step + 1).then_some(())
    });
    let after: Vec<(u64, f64)> = rates().into_iter().filter(|(at, _)| *at > step).collect();
    assert!(!after.is_empty() && after.iter().all(|(_, rate)| *rate <= 2.5e-4), "from step {}: {after:?}", step + 1);
    assert!(control(&run_dir, &["drain"]).status.success());
    let output = child.wait_with_output().expect("the process ends");
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
}

#[test]
fn a_worker_without_a_controller_says_so() {
    let output = temper().args(["serve", "rollout", "--join", "no address"]).output().expect("the binary starts");
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("'no address'") && stderr(&output).contains("expected HOST:PORT"), "{output:?}");
    let output = temper().args(["status", "--run-dir", "nowhere"]).output().expect("the binary starts");
    assert!(stderr(&output).contains("not a run that is controlled over the network"), "{}", stderr(&output));
}

/// One rank stands still for longer than its lease; so does the other, once it is there again and waits for the first.
/// Both are told that their life is over, the second while it gets ready for the next, and the run goes on with them.
#[test]
fn ranks_that_were_given_up_one_after_the_other_join_again() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), &longer().replace("steps = 40", "steps = 120"));
    let (reference, run_dir) = (dir.path().join("reference"), dir.path().join("joined"));
    assert!(train(&recipe, &reference, &["--set", "placement.trainer_ranks=2"], None).status.success());

    let address = free_address();
    let listen = format!("placement.listen={address}");
    let run = start(&recipe, &run_dir, &["placement.spawn_workers=false", "placement.trainer_ranks=2", &listen]);
    let _workers = ["trainer", "trainer", "rollout", "reward"].map(|role| Joined::join(&address, role));

    until("steps", || (control_json(&run_dir, &["status"])?["step"].as_u64()? > 5).then_some(()));
    let [(first, life), (second, _)] = ["trainer-0", "trainer-1"].map(|name| until(name, || worker(&run_dir, name, 0)));
    signal(second, "STOP");
    let next = until("the first rank again", || {
        life_in(&run_dir, "trainer-0", |state| state != "lost").filter(|next| next.0 == first && next.1 != life)
    });
    signal(first, "STOP");
    until("the first rank given up again", || {
        life_in(&run_dir, "trainer-0", |state| state == "lost").filter(|lost| *lost == next)
    });
    signal(first, "CONT");
    signal(second, "CONT");

    finish(run);
    assert_eq!(
        without_communication(run::whole_outcome(&run_dir)),
        without_communication(run::whole_outcome(&reference))
    );
}

/// What a worker says that the run at `address` does not let in.
fn refused(address: &str, role: &str, name: &str) -> String {
    let mut command = temper();
    command.args(["serve", role, "--join", address, "--name", name]).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut worker = Joined(command.spawn().expect("the binary starts"));
    let status = until("its end", || worker.0.try_wait().expect("a process"));
    let said = std::io::read_to_string(worker.0.stderr.take().expect("piped")).expect("text");
    assert_eq!(status.code(), Some(1), "{said}");
    said
}

/// Let a run take some steps, and pause it.
fn pause_behind_steps(run_dir: &Path) {
    until("steps", || (control_json(run_dir, &["status"])?["step"].as_u64()? > 5).then_some(()));
    assert_eq!(control_json(run_dir, &["pause"]).expect("it pauses")["state"], "paused");
}

/// The run's own workers keep their names, whoever else comes by those names, and whatever else the others do.
#[test]
fn nobody_takes_the_name_of_a_worker_that_the_run_starts() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), &longer());
    let [reference, run_dir] = ["reference", "run"].map(|name| dir.path().join(name));
    assert!(train(&recipe, &reference, &[], None).status.success());
    let address = free_address();
    let run = start(&recipe, &run_dir, &[&format!("placement.listen={address}")]);
    pause_behind_steps(&run_dir);
    for name in ["trainer-0", "rollout-0", "reward-0"] {
        for role in ["trainer", "rollout", "reward"] {
            let said = refused(&address, role, name);
            assert!(said.contains(name) && said.contains("the run starts itself"), "{role} as {name}: {said}");
        }
        assert_eq!(worker(&run_dir, name, 0).map(|(_, life)| life), Some(1), "{name} is undisturbed");
    }
    let (pid, life) = worker(&run_dir, "rollout-0", 0).expect("the engine");
    signal(pid, "KILL");
    until("its next life", || worker(&run_dir, "rollout-0", life));
    assert_eq!(control_json(&run_dir, &["resume"]).expect("it goes on")["state"], "running");
    finish(run);
    assert_eq!(run::whole_outcome(&run_dir), run::whole_outcome(&reference));
}

/// Workers that were started by hand: one that lives is displaced by nobody; one that ended comes back under its name.
#[test]
fn a_name_is_free_again_when_whoever_had_it_is_gone() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), &longer());
    let [reference, run_dir] = ["reference", "run"].map(|name| dir.path().join(name));
    assert!(train(&recipe, &reference, &[], None).status.success());
    let address = free_address();
    let listen = format!("placement.listen={address}");
    let run = start(&recipe, &run_dir, &["placement.spawn_workers=false", &listen]);
    let workers = [("trainer", "anna"), ("rollout", "berta"), ("reward", "clara")];
    let _workers = workers.map(|(role, name)| Joined::join_as(&address, role, name));
    pause_behind_steps(&run_dir);
    for (role, name) in [("reward", "anna"), ("trainer", "berta"), ("rollout", "berta")] {
        let said = refused(&address, role, name);
        assert!(said.contains(&format!("worker {name} lives")), "{role} as {name}: {said}");
    }
    for (_, name) in workers {
        assert_eq!(worker(&run_dir, name, 0).map(|(_, life)| life), Some(1), "{name} is undisturbed");
    }
    let (pid, life) = worker(&run_dir, "berta", 0).expect("the engine");
    signal(pid, "KILL");
    let _berta = Joined::join_as(&address, "rollout", "berta");
    until("its next life", || worker(&run_dir, "berta", life));
    assert_eq!(control_json(&run_dir, &["resume"]).expect("it goes on")["state"], "running");
    finish(run);
    assert_eq!(run::whole_outcome(&run_dir), run::whole_outcome(&reference));
}

/// The model is gone, so that an engine that ends cannot start again.
#[test]
fn a_run_whose_last_engine_cannot_start_again_ends_with_the_cause() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), &longer().replace("steps = 40", "steps = 4000"));
    let run_dir = dir.path().join("run");
    let child = start(&recipe, &run_dir, &[]);
    let (pid, _) = until("the engine", || worker(&run_dir, "rollout-0", 0));
    until("steps", || (control_json(&run_dir, &["status"])?["step"].as_u64()? > 5).then_some(()));
    std::fs::remove_dir_all(run_dir.join("init")).expect("the initial model");
    signal(pid, "KILL");
    let begin = Instant::now();
    let output = child.wait_with_output().expect("the process ends");
    let said = stderr(&output);
    assert!(begin.elapsed() < Duration::from_secs(60), "after {:?}: {said}", begin.elapsed());
    assert_eq!(output.status.code(), Some(1), "{said}");
    let last = said.lines().last().unwrap_or_default();
    assert!(last.contains("worker rollout-0 does not start") && last.contains("it exited with code 1"), "{said}");
}

/// Commands on the run in `run_dir` fail, and all say this.
fn commands_are_refused(run_dir: &Path, complaints: &[&str]) {
    for args in
        [&["stop"][..], &["drain"], &["pause"], &["set", "learning_rate=0"], &["status"], &["workers"], &["fetch"]]
    {
        let output = control(run_dir, args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let said = stderr(&output);
        complaints.iter().for_each(|complaint| assert!(said.contains(complaint), "{args:?}: {complaint}: {said}"));
    }
}

#[test]
fn commands_on_a_run_that_has_ended_reach_no_other_run() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), &SMALL.replace("steps = 6", "steps = 4000"));
    let [killed, other] = ["killed", "other"].map(|name| dir.path().join(name));
    let address = free_address();
    let listen = format!("placement.listen={address}");
    let steps = |run_dir: &Path| {
        until("steps", || (control_json(run_dir, &["status"])?["step"].as_u64()? > 5).then_some(()));
    };

    let child = start(&recipe, &killed, &[&listen]);
    steps(&killed);
    signal(u64::from(child.id()), "KILL");
    assert!(!child.wait_with_output().expect("the process ends").status.success());
    let killed_path = killed.to_str().expect("UTF-8");
    commands_are_refused(&killed, &[&format!("the run in {killed_path} has ended"), &address]);

    let child = start(&recipe, &other, &[&listen]);
    steps(&other);
    let other_path = other.canonicalize().expect("it is there");
    let other_path = other_path.to_str().expect("UTF-8");
    commands_are_refused(&killed, &[&format!("the run in {killed_path} has ended"), &address, other_path]);
    assert_eq!(control_json(&other, &["status"]).expect("it answers")["state"], "running", "it is undisturbed");
    assert!(control(&other, &["drain"]).status.success());
    let output = child.wait_with_output().expect("the process ends");
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    assert!(!other.join("control").exists(), "nothing is controlled there any more");
    commands_are_refused(&other, &[&format!("the run in {} has ended", other.display()), "interrupted"]);
}
