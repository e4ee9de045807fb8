//! Groups that are scored while others are generated: that it happens, and that it reaches no number.

use crate::fakes::{Behaviour, Rollout, metrics, run_services, services, spec, stage};
use crate::number;
use crate::staleness::{demanding, numbers, timeless};
use serde_json::json;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use temper_controller::{Generation, ReplaySpec, RunSpec, Scoring};
use temper_proto::{
    GroupRequest, GroupResult, RewardService, RolloutService, RolloutStats, ScoreRequest, ServiceError, ServiceResult,
};
use temper_types::{ErrorCode, PolicyVersion, RewardOutcome};

/// Nothing here takes so long; what does is a failure.
const PATIENCE: Duration = Duration::from_secs(60);

/// What happened so far.
#[derive(Default)]
struct Seen {
    /// Groups of the batch that were not handed out yet, and those that were.
    open: AtomicUsize,
    ended: AtomicUsize,
    /// Responses that were scored, and calls that began while a group was open.
    scored: AtomicUsize,
    early_calls: AtomicU64,
    /// The next call fails.
    is_broken: AtomicBool,
}

/// Hands groups out in an order of its own. Where it waits, the last group of a batch ends only once another one's
/// score was asked for.
struct Engine {
    inner: Rollout,
    seen: Arc<Seen>,
    ready: Mutex<Vec<GroupResult>>,
    turn: usize,
    waits: bool,
}

impl RolloutService for Engine {
    fn submit(&self, groups: Vec<GroupRequest>) -> ServiceResult<()> {
        self.seen.open.fetch_add(groups.len(), Ordering::SeqCst);
        self.inner.submit(groups)
    }
    fn next_group(&self, timeout: Duration) -> ServiceResult<Option<GroupResult>> {
        let mut ready = self.ready.lock().expect("no panic elsewhere");
        while let Some(result) = self.inner.next_group(timeout)? {
            ready.push(result);
        }
        if ready.is_empty() {
            return Ok(None);
        }
        let deadline = Instant::now() + PATIENCE;
        while self.waits && ready.len() == 1 && self.seen.early_calls.load(Ordering::SeqCst) == 0 {
            assert!(Instant::now() < deadline, "no group is scored before the last one ends");
            std::thread::yield_now();
        }
        let index = self.turn % ready.len();
        self.seen.open.fetch_sub(1, Ordering::SeqCst);
        self.seen.ended.fetch_add(1, Ordering::SeqCst);
        Ok(Some(ready.swap_remove(index)))
    }
    fn abort_all(&self) -> ServiceResult<usize> {
        let mut ready = self.ready.lock().expect("no panic elsewhere");
        let count = self.inner.abort_all()? + std::mem::take(&mut *ready).len();
        self.seen.open.store(0, Ordering::SeqCst);
        Ok(count)
    }
    fn set_version(&self, version: PolicyVersion) -> ServiceResult<()> {
        self.inner.set_version(version)
    }
    fn stats(&self) -> RolloutStats {
        self.inner.stats()
    }
}

struct Reward {
    inner: Arc<dyn RewardService>,
    seen: Arc<Seen>,
}

impl RewardService for Reward {
    fn score(&self, requests: &[ScoreRequest]) -> ServiceResult<Vec<RewardOutcome>> {
        if self.seen.open.load(Ordering::SeqCst) > 0 {
            self.seen.early_calls.fetch_add(1, Ordering::SeqCst);
        }
        if self.seen.is_broken.load(Ordering::SeqCst) {
            return Err(ServiceError::new(ErrorCode::InvalidArgument, "reward", "score", "reward `x` is broken"));
        }
        self.seen.scored.fetch_add(requests.len(), Ordering::SeqCst);
        self.inner.score(requests)
    }
}

fn streamed(run: RunSpec, scoring: Scoring) -> RunSpec {
    RunSpec { scoring, ..run }
}

fn watched(behaviour: Behaviour, turn: usize, waits: bool) -> (temper_controller::Services, Arc<Seen>) {
    let seen = Arc::new(Seen::default());
    let (mut services, _) = services(behaviour);
    let engine = Engine { inner: Rollout::default(), seen: Arc::clone(&seen), ready: Mutex::default(), turn, waits };
    services.rollout = Arc::new(engine);
    services.reward = Arc::new(Reward { inner: services.reward, seen: Arc::clone(&seen) });
    (services, seen)
}

#[test]
fn no_number_depends_on_when_or_in_which_order_groups_are_scored() {
    let outcome = |scoring, turn, generation| {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (stage, behaviour) = demanding(5);
        let run = RunSpec { staleness: 1, generation, ..spec(stage, ReplaySpec::Exact) };
        let (services, seen) = watched(behaviour, turn, false);
        run_services(dir.path(), streamed(run, scoring), services).expect("the run ends well");
        (numbers(dir.path()), timeless(dir.path()), seen.scored.load(Ordering::SeqCst))
    };
    let expected = outcome(Scoring::AfterGeneration, 0, Generation::BeforeTraining);
    for (max_calls, turn) in [(1, 0), (1, 3), (2, 1), (64, 2)] {
        let scoring = Scoring::AsGroupsEnd { max_calls };
        for generation in [Generation::BeforeTraining, Generation::DuringTraining] {
            assert_eq!(outcome(scoring, turn, generation), expected, "{scoring:?} turn {turn} {generation:?}");
        }
    }
}

#[test]
fn scoring_begins_before_the_last_group_is_generated() {
    for max_calls in [1, 8] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (services, seen) = watched(Behaviour::default(), 1, true);
        let run = spec(stage(1, json!({})), ReplaySpec::Exact);
        run_services(dir.path(), streamed(run, Scoring::AsGroupsEnd { max_calls }), services).expect("it ends well");
        assert!(seen.early_calls.load(Ordering::SeqCst) > 0);
        let row = &metrics(dir.path())[0];
        assert!(number(row, "reward_overlap_seconds") > 0.0, "{row:?}");
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (services, seen) = watched(Behaviour::default(), 1, false);
    let run = spec(stage(2, json!({})), ReplaySpec::Exact);
    run_services(dir.path(), streamed(run, Scoring::AfterGeneration), services).expect("it ends well");
    assert_eq!(seen.early_calls.load(Ordering::SeqCst), 0, "it can be told not to");
    assert_eq!(number(&metrics(dir.path())[0], "reward_overlap_seconds"), 0.0);
}

#[test]
fn a_reward_that_is_broken_ends_the_run_and_the_batch() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (services, seen) = watched(Behaviour::default(), 1, true);
    seen.is_broken.store(true, Ordering::SeqCst);
    let run = spec(stage(2, json!({})), ReplaySpec::Exact);
    let error = run_services(dir.path(), streamed(run, Scoring::default()), services).expect_err("it is broken");
    let error = error.to_string();
    assert!(error.contains("step 1") && error.contains("reward") && error.contains("reward `x` is broken"), "{error}");
    assert_eq!(seen.scored.load(Ordering::SeqCst), 0);
}
