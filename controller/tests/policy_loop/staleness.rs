//! Batches generated ahead: which weights they come from, that nothing else changes, and that they overlap with
//! training.

use crate::fakes::{Behaviour, Rollout, first_id, metrics, run_services, run_spec, services, spec, stage};
use crate::{number, samples};
use serde_json::json;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use temper_controller::{Generation, PolicyStage, ReplaySpec, RunSpec, latest_checkpoint};
use temper_proto::{GroupRequest, GroupResult, RolloutService, RolloutStats, ScoreRequest, ServiceResult};
use temper_types::{PolicyVersion, Sample};

pub(crate) fn ahead(stage: PolicyStage, staleness: u32, generation: Generation) -> RunSpec {
    RunSpec { staleness, generation, ..spec(stage, ReplaySpec::Exact) }
}

/// Metrics without what the clock decides.
pub fn numbers(dir: &Path) -> Vec<String> {
    let is_kept = |key: &str| !key.ends_with("_seconds") && key != "tokens_per_second";
    let row = |mut row: serde_json::Map<String, serde_json::Value>| {
        row.retain(|key, _| is_kept(key));
        serde_json::to_string(&row).expect("plain data")
    };
    metrics(dir).into_iter().map(row).collect()
}

/// Samples without times.
pub fn timeless(dir: &Path) -> Vec<Sample> {
    let mut samples = samples(dir);
    samples.iter_mut().for_each(|sample| sample.timings = Default::default());
    samples
}

/// A stage in which a step remembers and refills all that it can: a curriculum, dynamic sampling, greedy baselines.
pub fn demanding(steps: u64) -> (PolicyStage, Behaviour) {
    let reward = |r: &ScoreRequest| {
        Some(if r.key.prompt_id.0.is_multiple_of(3) { 1.0 } else { f64::from(first_id(r) % 3) / 3.0 })
    };
    let mut stage = stage(steps, json!({"advantage": {"adv_estimator": "remax"}, "filter_groups": {"enable": true}}));
    stage.curriculum.enable = true;
    stage.curriculum.revisit_after = 2;
    (stage, Behaviour { reward, ..Behaviour::default() })
}

#[test]
fn a_batch_is_of_the_weights_so_many_steps_ago() {
    for staleness in [0u64, 1, 2, 7] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let spec = ahead(stage(5, json!({})), staleness as u32, Generation::BeforeTraining);
        run_spec(dir.path(), spec, Behaviour::default()).expect("the run ends well");
        let samples = samples(dir.path());
        assert_eq!(samples.len(), 5 * 16, "nothing is generated that is not trained on");
        for sample in &samples {
            let version = (sample.step.0 - 1).saturating_sub(staleness);
            assert!(sample.policy_versions.iter().all(|(v, _)| v.number == version), "{sample:?}");
            assert_eq!(u64::from(sample.staleness), sample.step.0 - 1 - version);
        }
        for (row, step) in metrics(dir.path()).iter().zip(1u64..) {
            let behind = (step - 1).min(staleness) as f64;
            assert_eq!((number(row, "staleness_mean"), number(row, "staleness_max")), (behind, behind));
            let gap = row.get("rollout_train_log_prob_diff_max");
            assert_eq!(gap.is_some(), behind == 0.0, "the gap is that of tokens of the current version");
        }
        let groups: std::collections::BTreeSet<u64> = samples.iter().map(|s| s.group_id.0).collect();
        assert_eq!(groups, (0..20).collect(), "prompts are drawn in the same order at any staleness");
    }
}

#[test]
fn generating_beside_the_trainer_gives_the_numbers_of_generating_before_it() {
    let outcome = |generation| {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (stage, behaviour) = demanding(6);
        let calls = run_spec(dir.path(), ahead(stage, 2, generation), behaviour).expect("the run ends well");
        (calls, numbers(dir.path()), timeless(dir.path()))
    };
    assert_eq!(outcome(Generation::DuringTraining), outcome(Generation::BeforeTraining));
}

#[test]
fn waiting_batches_are_resumed_whole() {
    let (stage, behaviour) = demanding(6);
    let spec = ahead(stage, 2, Generation::DuringTraining);
    let whole = tempfile::tempdir().expect("a temporary directory");
    let calls = run_spec(whole.path(), spec.clone(), behaviour).expect("the run ends well");
    for keep in [2, 4] {
        let rest = tempfile::tempdir().expect("a temporary directory");
        run_spec(rest.path(), spec.clone(), behaviour).expect("the run ends well");
        (keep + 1..=6).for_each(|step| {
            // Checkpoints are written every second step.
            let _ = std::fs::remove_dir_all(rest.path().join(format!("checkpoints/step-{step}")));
        });
        let last = latest_checkpoint(&rest.path().join("checkpoints")).expect("readable").expect("a checkpoint");
        assert_eq!((last.state.step, last.state.queue.len()), (keep, 2));
        let resumed = run_spec(rest.path(), spec.clone(), behaviour).expect("the run goes on");
        assert!(!resumed.is_empty() && calls.ends_with(&resumed), "{} calls of {}", resumed.len(), calls.len());
        assert_eq!(numbers(rest.path()), numbers(whole.path()));
        assert_eq!(timeless(rest.path()), timeless(whole.path()));
    }
}

/// An engine that answers only while somebody waits for it who is not the loop: it hands a group out once the trainer
/// has begun the step before the group's.
struct WaitsForTraining {
    engine: Rollout,
    calls: Arc<Mutex<Vec<crate::fakes::Call>>>,
    batches: AtomicU64,
}

impl RolloutService for WaitsForTraining {
    fn submit(&self, groups: Vec<GroupRequest>) -> ServiceResult<()> {
        self.batches.fetch_add(1, Ordering::SeqCst);
        self.engine.submit(groups)
    }
    fn next_group(&self, timeout: Duration) -> ServiceResult<Option<GroupResult>> {
        // Batch 1 is asked for before anything is trained; batch b + 1 while step b is.
        let wanted = self.batches.load(Ordering::SeqCst).saturating_sub(1) as usize;
        let deadline = Instant::now() + timeout;
        while self.calls.lock().expect("no panic elsewhere").len() < wanted {
            assert!(Instant::now() < deadline, "the trainer waits for batch {}", wanted + 1);
            std::thread::yield_now();
        }
        self.engine.next_group(timeout)
    }
    fn abort_all(&self) -> ServiceResult<usize> {
        self.engine.abort_all()
    }
    fn set_version(&self, version: PolicyVersion) -> ServiceResult<()> {
        self.engine.set_version(version)
    }
    fn stats(&self) -> RolloutStats {
        self.engine.stats()
    }
}

#[test]
fn the_next_batch_is_generated_while_the_trainer_trains() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (mut services, calls) = services(Behaviour::default());
    let engine = WaitsForTraining { engine: Rollout::default(), calls, batches: AtomicU64::new(0) };
    services.rollout = Arc::new(engine);
    let spec = ahead(stage(4, json!({})), 1, Generation::DuringTraining);
    run_services(dir.path(), spec, services).expect("every step trains before the next batch is there");
    for row in metrics(dir.path()) {
        assert!(number(&row, "rollout_overlap_seconds") >= 0.0 && number(&row, "rollout_wait_seconds") >= 0.0);
    }
}

#[test]
fn a_step_that_fails_gives_up_the_batch_beside_it() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    // No sample of the first two batches can be scored; the third is under way when step 1 fails.
    let behaviour = Behaviour { reward: |_| None, ..Behaviour::default() };
    let spec = ahead(stage(6, json!({})), 2, Generation::DuringTraining);
    let error = run_spec(dir.path(), spec, behaviour).expect_err("nothing to train on").to_string();
    assert!(error.contains("step 1: no sample can be trained on"), "{error}");
}
