//! The reward fleet over workers that die and stall: the outcomes are the same.

use super::super::{FleetConfig, FleetReward, LossCause, WorkerPhase};
use super::fakes::{FakeReward, Manner, score_request, until};
use crate::clock::ManualClock;
use std::sync::Arc;
use std::time::Duration;
use temper_proto::{RewardService, ScoreRequest};
use temper_types::{ErrorCode, RewardOutcome};

const PROGRESS: Duration = Duration::from_secs(10);

fn requests() -> Vec<ScoreRequest> {
    (0..9).flat_map(|group| (0..4).map(move |index| score_request(group, index))).collect()
}

fn fleet(workers: &[Arc<FakeReward>]) -> (FleetReward, Arc<ManualClock>) {
    let clock = Arc::new(ManualClock::default());
    let config = FleetConfig {
        max_in_flight: 1,
        max_attempts: 2,
        progress_timeout: PROGRESS,
        worker_wait: Duration::ZERO,
        ..FleetConfig::default()
    };
    let fleet = FleetReward::with_clock(config, clock.clone());
    for worker in workers {
        fleet.join(worker.name, worker.clone()).expect("a thread");
    }
    (fleet, clock)
}

fn undisturbed() -> Vec<RewardOutcome> {
    FakeReward::new("alone", Manner::Good).score(&requests()).expect("it scores")
}

#[test]
fn outcomes_stand_in_the_requests_order_whoever_scores() {
    let good = |name| FakeReward::new(name, Manner::Good);
    for workers in [vec![good("a")], vec![good("a"), good("b")], vec![good("a"), good("b"), good("c")]] {
        let (fleet, _) = fleet(&workers);
        assert_eq!(fleet.score(&requests()), Ok(undisturbed()));
        assert_eq!(fleet.score(&[]), Ok(vec![]));
        assert!(fleet.fences().is_empty());
    }
    let (fleet, _) = fleet(&[good("a"), FakeReward::new("b", Manner::DiesAfter(0))]);
    assert_eq!(fleet.score(&requests()), Ok(undisturbed()));
    assert_eq!(fleet.workers()[1].phase, WorkerPhase::Lost(LossCause::CallFailed));
    assert_eq!(fleet.workers()[1].last_error.as_deref(), Some("b: score failed: connection reset"));
}

#[test]
fn a_scorer_that_hangs_is_lost_in_time() {
    let stuck = FakeReward::new("stuck", Manner::Stalls);
    let (fleet, clock) = fleet(&[stuck.clone(), FakeReward::new("b", Manner::Good)]);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            until("the stall", || stuck.gate.is_reached());
            until("the others' rest", || fleet.workers()[1].in_flight == 0);
            clock.advance(PROGRESS);
        });
        assert_eq!(fleet.score(&requests()), Ok(undisturbed()));
    });
    assert_eq!(fleet.workers()[0].phase, WorkerPhase::Lost(LossCause::Stalled));
    stuck.gate.open();
    until("the late answer", || !fleet.fences().is_empty());
}

#[test]
fn responses_that_no_worker_survives_fail_by_name_and_the_others_are_scored() {
    let poisoned = |name| FakeReward::poisoned(name, Manner::Good, 4);
    let (fleet, _) = fleet(&[poisoned("a"), poisoned("b"), poisoned("c")]);
    let outcomes = fleet.score(&requests()).expect("one worker survives");
    for (index, (outcome, expected)) in outcomes.iter().zip(undisturbed()).enumerate() {
        match outcome {
            RewardOutcome::Failed(failure) if index / 4 == 4 => {
                assert!(failure.cause.contains("given up after 2 attempts"), "{failure:?}");
            }
            outcome => assert_eq!((*outcome == expected, index / 4 == 4), (true, false)),
        }
    }
    let alive = fleet.workers().iter().filter(|w| w.phase == WorkerPhase::Ready).count();
    assert_eq!(alive, 1);
    let (fleet, _) = self::fleet(&[poisoned("a")]);
    let error = fleet.score(&requests()).expect_err("nobody is left");
    assert_eq!(error.code, ErrorCode::Unavailable);
    assert!(error.to_string().contains("no worker is left: a (incarnation 1): a: score failed"), "{error}");
}

#[test]
fn without_a_scorer_nobody_is_waited_for_where_none_will_come() {
    let config = FleetConfig { worker_wait: Duration::from_secs(300), ..FleetConfig::default() };
    let fleet = FleetReward::with_clock(config, Arc::new(ManualClock::default()));
    fleet.join("a", FakeReward::new("a", Manner::DiesAfter(2))).expect("a thread");
    fleet.expect_nobody("a is not started again");
    let error = fleet.score(&requests()).expect_err("nobody is left");
    assert_eq!(error.code, ErrorCode::Unavailable);
    assert!(error.message.contains("none will come: a is not started again"), "{error}");
    fleet.join("b", FakeReward::new("b", Manner::Good)).expect("a thread");
    assert_eq!(fleet.score(&requests()), Ok(undisturbed()));
}
