//! A run that is killed with -9 anywhere and resumed gives the run that was not: weights, metrics, trajectories.

mod common;
mod run;

use common::{SMALL, recipe, stderr, temper};
use run::{Outcome, outcome, train};
use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use temper_controller::{Phase, latest_checkpoint};
use temper_types::Philox;

const NUM_KILLS: usize = 20;
/// Steps at which each phase comes by in the small recipe (4 supervised steps, then 6 of policy optimisation).
fn steps_with(phase: Phase) -> Vec<u64> {
    match phase {
        // The second stage begins within the last step of the first.
        Phase::BeginStage => vec![0, 4],
        Phase::Rollout | Phase::Reward | Phase::LogProbs | Phase::Advantages => (5..=10).collect(),
        Phase::Validation => vec![5, 7, 10],
        Phase::Update | Phase::Publish | Phase::Record | Phase::Mirror => (5..=10).collect(),
        Phase::CheckpointModel
        | Phase::CheckpointOptimizer
        | Phase::CheckpointManifest
        | Phase::CheckpointRename
        | Phase::CheckpointPrune => vec![2, 4, 6, 8, 10],
    }
}

/// Twenty points: every phase once, the rest drawn; a step from the seed, in ascending order of steps.
fn schedule(seed: u64) -> Vec<(u64, Phase)> {
    let noise = Philox::new(seed);
    let draw = |bound: usize, counter: usize| noise.below(bound as u64, counter as u64, 0) as usize;
    let phase = |index: usize| match Phase::ALL.get(index) {
        Some(phase) => *phase,
        None => Phase::ALL[draw(Phase::ALL.len(), 100 + index)],
    };
    let point = |index: usize| {
        let phase = phase(index);
        let steps = steps_with(phase);
        (steps[draw(steps.len(), index)], phase)
    };
    let mut points: Vec<(u64, Phase)> = (0..NUM_KILLS).map(point).collect();
    points.sort();
    points
}

fn reference(dir: &Path) -> (PathBuf, Outcome) {
    reference_of(dir, SMALL)
}

fn reference_of(dir: &Path, text: &str) -> (PathBuf, Outcome) {
    let recipe = recipe(dir, text);
    let run_dir = dir.join("reference");
    let output = train(&recipe, &run_dir, &[], None);
    assert!(output.status.success(), "{}", stderr(&output));
    let outcome = outcome(&run_dir);
    (recipe, outcome)
}

#[test]
fn twenty_kills_in_every_phase_leave_the_result_as_it_was() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (recipe, expected) = reference(dir.path());
    let run_dir = dir.path().join("killed");
    let mut histogram: BTreeMap<&str, usize> = BTreeMap::new();
    for (index, (step, phase)) in schedule(1).into_iter().enumerate() {
        let point = format!("{step}:{}", phase.name());
        let args: &[&str] = if index == 0 { &[] } else { &["--resume"] };
        let output = train(&recipe, &run_dir, args, Some(&point));
        if output.status.signal() == Some(9) {
            *histogram.entry(phase.name()).or_default() += 1;
            continue;
        }
        // The step was completed and saved before an earlier kill: the point does not come by again.
        assert!(output.status.success(), "{point}: {}", stderr(&output));
        std::fs::remove_dir_all(&run_dir).expect("removable");
        let output = train(&recipe, &run_dir, &[], Some(&point));
        assert_eq!(output.status.signal(), Some(9), "{point} was not reached: {}", stderr(&output));
        *histogram.entry(phase.name()).or_default() += 1;
    }
    println!("kills by phase: {histogram:?}");
    assert_eq!(histogram.len(), Phase::ALL.len(), "every phase was hit: {histogram:?}");
    let output = train(&recipe, &run_dir, &["--resume"], None);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(outcome(&run_dir), expected);
}

/// An attempt dies before its first checkpoint, and has changed a setting. `--resume` goes on with it and makes the
/// change again; a start without `--resume` is another attempt, which nobody has changed.
#[test]
fn a_start_without_resume_makes_no_change_of_an_attempt_that_died() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (recipe, expected) = reference(dir.path());
    let change = "{\"event\":\"set\",\"step\":2,\"key\":\"learning_rate\",\"value\":\"0.5\"}\n";
    for (args, is_changed) in [(&["--resume"][..], true), (&[], false)] {
        let run_dir = dir.path().join(format!("changed-{is_changed}"));
        let killed = train(&recipe, &run_dir, &[], Some("1:update"));
        assert_eq!(killed.status.signal(), Some(9), "{}", stderr(&killed));
        let journal = run_dir.join("control.jsonl");
        std::fs::write(&journal, change).expect("the directory is writable");
        let output = train(&recipe, &run_dir, args, None);
        assert!(output.status.success(), "{}", stderr(&output));
        assert_eq!(outcome(&run_dir) != expected, is_changed, "{args:?}");
        let kept = std::fs::read_to_string(&journal).expect("a journal");
        assert_eq!(kept, if is_changed { change } else { "" }, "{args:?}");
    }
}

#[test]
fn an_interrupted_run_exits_130_with_a_checkpoint_and_goes_on() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (recipe, expected) = reference(dir.path());
    let run_dir = dir.path().join("interrupted");
    let mut child = temper()
        .args(["train".as_ref(), recipe.as_os_str(), "--run-dir".as_ref(), run_dir.as_os_str()])
        .stderr(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("the binary starts");
    // The first line of a step says that the signal handlers are in place and a step is done.
    let lines = std::io::BufReader::new(child.stderr.take().expect("piped"));
    let mut lines = std::io::BufRead::lines(lines);
    let first_step = lines.find(|line| line.as_ref().is_ok_and(|l| l.contains("step 1/")));
    assert!(first_step.is_some(), "no step was announced");
    let sent = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(sent.expect("kill starts").success());
    lines.for_each(drop);
    let status = child.wait().expect("the run ends");
    assert_eq!(status.code(), Some(130));
    let output = train(&recipe, &run_dir, &["--resume"], None);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(outcome(&run_dir), expected);
}

/// A reference that moves, an adaptive coefficient, a curriculum, greedy baselines and corrected rollouts: all that a
/// step can remember or draw.
#[test]
fn whatever_a_step_remembers_is_resumed() {
    let settings = "reference = { sync_every_steps = 3, mixup_alpha = 0.6 }\n\
        curriculum = { enable = true, correct_at = 0.5, max_pass_rate = 0.6, revisit_after = 1 }\n\
        [stage.algorithm]\n\
        advantage = { adv_estimator = \"remax\" }\n\
        policy_loss = { use_kl_loss = true, rollout_correction = { rollout_is = \"token\", rollout_rs = \"token_k1\", rollout_rs_threshold = 1.1 } }\n\
        kl_in_reward = { use_kl_in_reward = true, kl_ctrl = { type = \"adaptive\", kl_coef = 0.1, target_kl = 1e-4, horizon = 31.0 } }\n\
        pf_ppo = { enable = true }\n";
    let line = "algorithm = { policy_loss = { use_kl_loss = true, entropy_coeff = 0.001 } }\n";
    assert!(SMALL.contains(line));
    let text = SMALL.replace(line, settings);
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (recipe, expected) = reference_of(dir.path(), &text);
    let run_dir = dir.path().join("killed");
    // The reference moves after steps 7 and 10: the checkpoint of step 8 holds one that is neither policy.
    for (point, args) in [("7:publish", &[][..]), ("10:update", &["--resume"])] {
        let output = train(&recipe, &run_dir, args, Some(point));
        assert_eq!(output.status.signal(), Some(9), "{point}: {}", stderr(&output));
    }
    let output = train(&recipe, &run_dir, &["--resume"], None);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(outcome(&run_dir), expected);
    let is_exact = |line: &String| {
        line.contains("\"rollout_corr/chi2_seq\":0.0") && line.contains("\"rollout_corr/ppl_ratio\":1.0")
    };
    assert_eq!(expected.metrics.iter().filter(|line| is_exact(line)).count(), 6, "{:?}", expected.metrics.last());
    assert!(expected.metrics.iter().any(|line| line.contains("curriculum/pass_rate_mean")));
}

/// Batches that wait for their steps stand in the checkpoint: nothing of old weights is needed to go on.
#[test]
fn a_run_ahead_is_resumed_to_the_bit() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), SMALL);
    let ahead = ["--set", "placement.staleness=1"];
    let (straight, killed) = (dir.path().join("straight"), dir.path().join("killed"));
    let output = train(&recipe, &straight, &ahead, None);
    assert!(output.status.success(), "{}", stderr(&output));
    let processes = [&ahead[..], &["--set", "placement.mode=processes", "--resume"]].concat();
    let again = [&ahead[..], &["--resume"]].concat();
    let kills = [("6:rollout", &ahead[..]), ("7:update", &again), ("9:reward", &processes), ("9:publish", &again)];
    for (point, args) in kills {
        let output = train(&recipe, &killed, args, Some(point));
        assert_eq!(output.status.signal(), Some(9), "{point}: {}", stderr(&output));
    }
    let output = train(&recipe, &killed, &["--resume"], None);
    assert!(stderr(&output).contains("another recipe"), "staleness is part of what a run is: {}", stderr(&output));
    let output = train(&recipe, &killed, &again, None);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(outcome(&killed), outcome(&straight));
}

#[test]
fn another_number_of_threads_and_another_engine_change_nothing() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (recipe, expected) = reference(dir.path());
    let run_dir = dir.path().join("other");
    let sets = ["placement.threads=1", "placement.reward_threads=3", "engine.max_num_seqs=3", "engine.block_size=16"];
    let mut args: Vec<&str> = sets.iter().flat_map(|set| ["--set", *set]).collect();
    args.extend(["--set", "engine.prefill_chunk=5", "--set", "checkpoint.every_steps=0"]);
    args.extend(["--set", "placement.stream_rewards=false", "--set", "placement.sleep=true"]);
    let output = train(&recipe, &run_dir, &args, None);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(outcome(&run_dir), expected);
}

/// Two trainer ranks: killed and resumed under another sharding, the run gives the same bits; one rank goes on with
/// their checkpoint, and says that it is not the same run to the bit.
#[test]
fn trainer_ranks_are_resumed_to_the_bit() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), SMALL);
    let with = |sharding: &str| {
        [
            "--set".to_owned(),
            "placement.trainer_ranks=2".to_owned(),
            "--set".to_owned(),
            format!("placement.sharding={sharding}"),
        ]
    };
    let run = |run_dir: &Path, sharding: &str, more: &[&str], kill_at: Option<&str>| {
        let sets = with(sharding);
        let args: Vec<&str> = sets.iter().map(String::as_str).chain(more.iter().copied()).collect();
        train(&recipe, run_dir, &args, kill_at)
    };
    let straight = dir.path().join("straight");
    let output = run(&straight, "zero1", &[], None);
    assert!(output.status.success(), "{}", stderr(&output));
    let numbers = |run_dir: &Path| {
        let mut outcome = outcome(run_dir);
        // Shardings move different numbers of bytes.
        for line in &mut outcome.metrics {
            let mut row: serde_json::Map<String, serde_json::Value> = serde_json::from_str(line).expect("a row");
            assert!(row.remove("communication_bytes").is_some_and(|bytes| bytes.as_f64() > Some(0.0)), "{line}");
            *line = serde_json::to_string(&row).expect("plain data");
        }
        outcome
    };
    let killed = dir.path().join("killed");
    let output = run(&killed, "zero3", &[], Some("7:update"));
    assert_eq!(output.status.signal(), Some(9), "{}", stderr(&output));
    let output = run(&killed, "zero2", &["--resume"], None);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(numbers(&killed), numbers(&straight));

    let alone = dir.path().join("alone");
    let output = run(&alone, "zero2", &[], Some("9:update"));
    assert_eq!(output.status.signal(), Some(9), "{}", stderr(&output));
    let output = train(&recipe, &alone, &["--resume"], None);
    assert!(output.status.success(), "{}", stderr(&output));
    let events = std::fs::read_to_string(alone.join("events.jsonl")).expect("events");
    assert!(events.contains("trainer_ranks_changed"), "{events}");
    outcome(&alone);
}

#[test]
fn another_recipe_is_not_resumed_and_a_damaged_checkpoint_is_named() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), SMALL);
    let run_dir = dir.path().join("run");
    let output = train(&recipe, &run_dir, &[], Some("9:rollout"));
    assert_eq!(output.status.signal(), Some(9));
    let output = train(&recipe, &run_dir, &["--resume", "--set", "seed=6"], None);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("another recipe"), "{}", stderr(&output));
    let last = latest_checkpoint(&run_dir.join("checkpoints")).expect("readable").expect("a checkpoint");
    let weights = last.model().join("model.safetensors");
    let mut bytes = std::fs::read(&weights).expect("weights");
    *bytes.last_mut().expect("not empty") ^= 1;
    std::fs::write(&weights, bytes).expect("writable");
    let output = train(&recipe, &run_dir, &["--resume"], None);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("model/model.safetensors"), "{}", stderr(&output));
}
