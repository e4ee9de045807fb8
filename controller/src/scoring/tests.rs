//! Calls that overlap, fail and panic, and the time that they take.

use super::{ScoreLine, Scored, Scoring};
use crate::clock::ManualClock;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;
use temper_proto::{RewardService, ScoreRequest, ServiceError, ServiceResult};
use temper_types::{ErrorCode, FinishReason, GroupId, PromptContent, PromptId, RewardOutcome, SampleIndex, SampleKey};

/// Nothing here takes so long; what does is a failure.
const PATIENCE: Duration = Duration::from_secs(60);

fn request(group: u64, index: u32) -> ScoreRequest {
    ScoreRequest {
        key: SampleKey {
            prompt_id: PromptId(group),
            group_id: GroupId(group),
            sample_index: SampleIndex(index),
            epoch: 0,
        },
        data_source: String::new(),
        prompt: PromptContent::Text(String::new()),
        response: String::new(),
        num_response_tokens: 1,
        prompt_token_ids: vec![1],
        response_token_ids: vec![2],
        finish_reason: FinishReason::Stop,
        ground_truth: None,
        extra_info: None,
    }
}

fn outcome(request: &ScoreRequest) -> RewardOutcome {
    let reward = (request.key.group_id.0 * 100 + u64::from(request.key.sample_index.0)) as f64;
    RewardOutcome::Scored { reward, components: Vec::new() }
}

type Answer = fn(&[ScoreRequest]) -> ServiceResult<Vec<RewardOutcome>>;

/// Answers a call once `let_through` allows it, and notes which groups came in which call.
struct Reward {
    calls: Mutex<Vec<Vec<u64>>>,
    changed: Condvar,
    /// Whether a call may be answered, by the calls so far.
    let_through: fn(&[Vec<u64>]) -> bool,
    answer: Answer,
}

impl Reward {
    fn new(let_through: fn(&[Vec<u64>]) -> bool) -> Self {
        let answer: Answer = |requests| Ok(requests.iter().map(outcome).collect());
        Reward { calls: Mutex::default(), changed: Condvar::new(), let_through, answer }
    }

    /// Wait until `is_met` of the calls so far.
    fn wait(&self, is_met: impl Fn(&[Vec<u64>]) -> bool) {
        let calls = self.calls.lock().unwrap();
        let (calls, timeout) = self.changed.wait_timeout_while(calls, PATIENCE, |calls| !is_met(calls)).unwrap();
        assert!(!timeout.timed_out(), "only these calls came: {calls:?}");
    }
}

impl RewardService for Reward {
    fn score(&self, requests: &[ScoreRequest]) -> ServiceResult<Vec<RewardOutcome>> {
        let mut groups: Vec<u64> = requests.iter().map(|r| r.key.group_id.0).collect();
        groups.dedup();
        self.calls.lock().unwrap().push(groups);
        self.changed.notify_all();
        self.wait(self.let_through);
        (self.answer)(requests)
    }
}

fn line(reward: &Arc<Reward>, scoring: Scoring) -> (ScoreLine, Arc<ManualClock>) {
    let clock = Arc::new(ManualClock::default());
    (ScoreLine::new(reward.clone(), clock.clone(), scoring), clock)
}

/// Push groups of two responses in this order, `between` after each, and wait for all.
fn run(line: &ScoreLine, order: &[usize], between: impl Fn(usize) -> ServiceResult<()>) -> ServiceResult<Vec<Scored>> {
    std::thread::scope(|scope| {
        let _closing = line.closing();
        for place in order {
            line.push(scope, *place, vec![request(*place as u64, 0), request(*place as u64, 1)])?;
            between(*place)?;
        }
        line.finish()
    })
}

fn rewards(scored: &[Scored]) -> Vec<f64> {
    scored.iter().flat_map(|group| &group.outcomes).filter_map(RewardOutcome::reward).collect()
}

const ALL: [f64; 8] = [0.0, 1.0, 100.0, 101.0, 200.0, 201.0, 300.0, 301.0];

#[test]
fn outcomes_stand_by_place_in_whatever_order_groups_end_and_calls_answer() {
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]] {
        // All four are under way before one is answered.
        let reward = Arc::new(Reward::new(|calls| calls.len() >= 4));
        let (line, _) = line(&reward, Scoring::AsGroupsEnd { max_calls: 4 });
        assert_eq!(rewards(&run(&line, &order, |_| Ok(())).unwrap()), ALL, "{order:?}");
        let reward = Arc::new(Reward::new(|_| true));
        for scoring in [Scoring::AfterGeneration, Scoring::default(), Scoring::AsGroupsEnd { max_calls: 2 }] {
            let (line, _) = self::line(&reward, scoring);
            assert_eq!(rewards(&run(&line, &order, |_| Ok(())).unwrap()), ALL, "{order:?} {scoring:?}");
        }
    }
}

#[test]
fn a_group_is_scored_while_the_next_one_is_generated() {
    let reward = Arc::new(Reward::new(|_| true));
    let (line, _) = line(&reward, Scoring::default());
    let scored = run(&line, &[1, 0, 2, 3], |place| {
        // The next group does not end before this one's call was made.
        reward.wait(|calls| calls.iter().flatten().any(|group| *group == place as u64));
        Ok(())
    });
    assert_eq!(rewards(&scored.unwrap()), ALL);
    assert_eq!(*reward.calls.lock().unwrap(), [[1], [0], [2], [3]]);
}

#[test]
fn after_generation_there_is_one_call_in_the_order_of_the_places() {
    let reward = Arc::new(Reward::new(|_| true));
    let (line, clock) = line(&reward, Scoring::AfterGeneration);
    let scored = run(&line, &[2, 0, 3, 1], |_| {
        clock.advance(Duration::from_millis(5));
        assert!(reward.calls.lock().unwrap().is_empty() && line.busy().is_zero());
        Ok(())
    });
    assert_eq!(rewards(&scored.unwrap()), ALL);
    assert_eq!(*reward.calls.lock().unwrap(), [[0, 1, 2, 3]]);
}

#[test]
fn groups_that_are_all_there_go_in_one_call_in_their_order() {
    for scoring in [Scoring::AfterGeneration, Scoring::default()] {
        let reward = Arc::new(Reward::new(|_| true));
        let (line, _) = line(&reward, scoring);
        let groups = (0..4).map(|group| vec![request(group, 0), request(group, 1)]).collect();
        assert_eq!(rewards(&line.score_groups(groups).unwrap()), ALL);
        assert_eq!(*reward.calls.lock().unwrap(), [[0, 1, 2, 3]]);
    }
}

#[test]
fn groups_that_end_while_the_only_call_is_under_way_go_together() {
    let reward = Arc::new(Reward::new(|_| true));
    // The first call is answered when the last group has ended: it holds a lock until then.
    let gate = Arc::new(Mutex::new(()));
    let held = gate.lock().unwrap();
    struct Gated(Arc<Reward>, Arc<Mutex<()>>);
    impl RewardService for Gated {
        fn score(&self, requests: &[ScoreRequest]) -> ServiceResult<Vec<RewardOutcome>> {
            let answer = self.0.score(requests);
            let _open = self.1.lock().unwrap();
            answer
        }
    }
    let gated = Arc::new(Gated(reward.clone(), gate.clone()));
    let clock = Arc::new(ManualClock::default());
    let line = ScoreLine::new(gated, clock.clone(), Scoring::default());
    let held = Mutex::new(Some(held));
    let scored = run(&line, &[0, 3, 1, 2], |place| {
        match place {
            0 => reward.wait(|calls| calls.len() == 1),
            2 => {
                clock.advance(Duration::from_millis(250));
                assert_eq!(line.busy(), Duration::from_millis(250), "a call is under way all the time");
                held.lock().unwrap().take();
            }
            _ => {}
        }
        Ok(())
    });
    let scored = scored.unwrap();
    assert_eq!(rewards(&scored), ALL);
    assert_eq!(*reward.calls.lock().unwrap(), [vec![0], vec![3, 1, 2]], "in the order in which they ended");
    assert_eq!((scored[0].seconds_each, scored[1].seconds_each), (0.125, 0.0));
}

#[test]
fn the_first_failure_ends_it_and_nothing_is_called_after_it() {
    let mut reward = Reward::new(|_| true);
    reward.answer = |_| Err(ServiceError::new(ErrorCode::InvalidArgument, "reward", "score", "it is broken"));
    let reward = Arc::new(reward);
    let (line, _) = line(&reward, Scoring::default());
    let failed = run(&line, &[0, 1, 2, 3], |place| {
        // Group 1 and what follows come when the failure is known.
        if place == 0 {
            reward.wait(|calls| calls.len() == 1);
            while line.lock().failure.is_none() {
                std::thread::yield_now();
            }
        }
        Ok(())
    });
    assert!(failed.unwrap_err().to_string().contains("it is broken"));
    assert_eq!(*reward.calls.lock().unwrap(), [[0]]);
}

#[test]
fn a_scorer_that_panics_or_answers_too_little_is_an_error() {
    let answers: [(Answer, &str); 2] = [
        (|_| panic!("as a test wants it"), "the scorer panicked"),
        (|requests| Ok(requests[1..].iter().map(outcome).collect()), "expected 2 outcomes, got 1"),
    ];
    for (answer, expected) in answers {
        for scoring in [Scoring::AfterGeneration, Scoring::default()] {
            let reward = Arc::new(Reward { answer, ..Reward::new(|_| true) });
            let (line, _) = line(&reward, scoring);
            let error = run(&line, &[0], |_| Ok(())).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
            let (line, _) = self::line(&reward, scoring);
            let error = line.score_groups(vec![vec![request(0, 0), request(0, 1)]]).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
}

#[test]
fn a_batch_without_groups_needs_no_call() {
    let reward = Arc::new(Reward::new(|_| true));
    let (line, _) = line(&reward, Scoring::default());
    assert!(run(&line, &[], |_| Ok(())).unwrap().is_empty());
    assert!(reward.calls.lock().unwrap().is_empty());
}
