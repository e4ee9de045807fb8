//! The rollout fleet over workers that die, stall, lie and come late: the batch is the same.

use super::super::{
    AtBump, DropReason, Fence, FleetConfig, FleetRollout, LossCause, Settlement, WorkerPhase, WorkerStatus,
};
use super::fakes::{Batch, FakeRollout, Manner, request, until, version};
use crate::clock::ManualClock;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use temper_proto::{BegunResponse, GeneratedSample, GroupRequest, RolloutService, ServiceError};
use temper_types::{ErrorCode, GroupId};

const NUM_GROUPS: u64 = 12;
const PROGRESS: Duration = Duration::from_secs(10);

fn config() -> FleetConfig {
    FleetConfig { max_in_flight: 3, progress_timeout: PROGRESS, worker_wait: Duration::ZERO, ..FleetConfig::default() }
}

struct Run {
    fleet: FleetRollout,
    clock: Arc<ManualClock>,
    workers: Vec<Arc<FakeRollout>>,
}

const NAMES: [&str; 3] = ["engine-0", "engine-1", "engine-2"];

fn start(config: FleetConfig, manners: &[Manner]) -> Run {
    let clock = Arc::new(ManualClock::default());
    let fleet = FleetRollout::with_clock(config, clock.clone());
    let workers: Vec<_> = NAMES.iter().zip(manners).map(|(name, manner)| FakeRollout::new(name, *manner)).collect();
    for worker in &workers {
        fleet.join(worker.name, worker.clone()).expect("a thread");
    }
    Run { fleet, clock, workers }
}

impl Run {
    fn status(&self, name: &str) -> WorkerStatus {
        self.fleet.workers().into_iter().find(|w| w.name == name).expect("it joined")
    }

    /// Time passes where nobody but a worker that hangs has anything to do.
    fn pass_time_if_stuck(&self) {
        let is_stuck = |worker: &&Arc<FakeRollout>| worker.manner == Manner::Stalls && worker.gate.is_holding();
        let Some(stuck) = self.workers.iter().find(is_stuck) else { return };
        let others = self.fleet.workers().into_iter().filter(|w| w.name != stuck.name);
        if others.map(|w| w.in_flight).sum::<usize>() == 0 && self.status(stuck.name).in_flight > 0 {
            self.clock.advance(PROGRESS);
        }
    }

    fn collect(&self) -> Result<Batch, ServiceError> {
        let mut batch = Batch::new();
        loop {
            match self.fleet.next_group(Duration::ZERO) {
                Ok(Some(result)) => {
                    let earlier = batch.insert(result.group_id, result.samples);
                    assert!(earlier.is_none(), "group {} is handed on twice", result.group_id);
                }
                Ok(None) => return Ok(batch),
                Err(error) if error.code == ErrorCode::DeadlineExceeded => self.pass_time_if_stuck(),
                Err(error) => return Err(error),
            }
        }
    }

    fn batch(&self) -> Result<Batch, ServiceError> {
        self.fleet.set_version(version(4))?;
        self.fleet.submit((0..NUM_GROUPS).map(request).collect())?;
        self.collect()
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        self.workers.iter().for_each(|worker| worker.gate.open());
    }
}

fn undisturbed() -> Batch {
    start(config(), &[Manner::Good]).batch().expect("nothing fails")
}

#[test]
fn one_two_or_three_workers_give_the_same_bits() {
    let expected = undisturbed();
    assert_eq!(expected.len() as u64, NUM_GROUPS);
    assert_eq!(start(config(), &[Manner::NewestFirst, Manner::Good]).batch().as_ref(), Ok(&expected));
    let run = start(config(), &[Manner::Good, Manner::NewestFirst, Manner::Good]);
    assert_eq!(run.batch().as_ref(), Ok(&expected));
    assert!(run.workers.iter().all(|w| w.num_submitted.load(Ordering::SeqCst) > 0), "all of them worked");
    assert_eq!((run.fleet.stats().num_generated_tokens, run.fleet.stats().kv_blocks), (NUM_GROUPS, 30));
    assert!(run.fleet.fences().is_empty());
}

#[test]
fn a_worker_that_dies_or_lies_is_lost_by_name_and_changes_no_bit() {
    let expected = undisturbed();
    for (manner, cause) in [
        (Manner::DiesAfter(1), "engine-1: next_group failed: connection reset"),
        (Manner::PanicsAfter(1), "the call panicked"),
        (Manner::AnswersWithOtherWeights, "it answered with other weights than it attested"),
        (Manner::ChangesSeeds, "its answer to group"),
        (Manner::Forgets, "it knows nothing of"),
        (Manner::HoldsOtherWeights, "engine-1: set_version failed: other weights"),
    ] {
        let run = start(config(), &[Manner::Good, manner]);
        assert_eq!(run.batch().as_ref(), Ok(&expected), "{cause}");
        let status = run.status("engine-1");
        assert!(matches!(status.phase, WorkerPhase::Lost(_)), "{status:?}");
        assert!(status.last_error.as_deref().is_some_and(|error| error.contains(cause)), "{status:?}");
        assert!(run.fleet.ledger().is_balanced());
    }
}

#[test]
fn a_worker_that_stalls_is_lost_in_time_and_what_it_answers_later_is_fenced() {
    let expected = undisturbed();
    let run = start(config(), &[Manner::Stalls, Manner::Good]);
    assert_eq!(run.batch().as_ref(), Ok(&expected));
    assert_eq!(run.status("engine-0").phase, WorkerPhase::Lost(LossCause::Stalled));
    run.workers[0].gate.open();
    until("the late answer", || run.fleet.fences().contains_key(&Fence::StaleIncarnation));
    assert_eq!(run.fleet.next_group(Duration::ZERO), Ok(None));
    assert_eq!(run.fleet.ledger().dropped()[&DropReason::WorkerLost] % 3, 0);
}

#[test]
fn a_worker_that_answers_twice_is_counted_and_changes_nothing() {
    let expected = undisturbed();
    let run = start(config(), &[Manner::Twice, Manner::Good]);
    assert_eq!(run.batch().as_ref(), Ok(&expected));
    assert_eq!(run.status("engine-0").phase, WorkerPhase::Ready);
    assert!(run.fleet.fences()[&Fence::DuplicateAnswer] > 0);
}

/// Whoever is at rest goes on in another fleet, with nothing in hand; whoever is lost or does not answer does not.
#[test]
fn workers_of_a_fleet_that_retires_go_on_in_another_one() {
    let expected = undisturbed();
    let mut run = start(config(), &[Manner::Good, Manner::DiesAfter(0), Manner::Stalls]);
    run.fleet.set_version(version(4)).expect("all prove it");
    run.fleet.submit((0..NUM_GROUPS).map(request).collect()).expect("new groups");
    until("a call that does not end", || run.workers[2].gate.is_holding());
    until("a loss", || run.status("engine-1").phase == WorkerPhase::Lost(LossCause::CallFailed));
    run.fleet.retire();
    let unfit = || run.fleet.unfit(Duration::ZERO).into_iter().collect::<Vec<_>>();
    until("the end of a call", || unfit() == ["engine-1", "engine-2"]);
    run.workers[2].gate.open();
    until("the end of the other", || unfit() == ["engine-1"]);
    for worker in [&run.workers[0], &run.workers[2]] {
        assert_eq!(worker.next_group(Duration::ZERO), Ok(None), "{} has something in hand", worker.name);
    }
    run.fleet = FleetRollout::with_clock(config(), run.clock.clone());
    for worker in [&run.workers[0], &run.workers[2]] {
        assert_eq!(run.fleet.join(worker.name, worker.clone()), Ok(1));
    }
    assert_eq!(run.batch().as_ref(), Ok(&expected));
    assert!(run.fleet.fences().is_empty());
}

#[test]
fn a_worker_that_could_not_take_new_weights_goes_on_in_another_fleet() {
    let run = start(config(), &[Manner::HoldsOtherWeights]);
    run.fleet.set_version(version(4)).expect_err("it holds others");
    assert_eq!(run.status("engine-0").phase, WorkerPhase::Lost(LossCause::SyncFailed));
    run.fleet.retire();
    until("the end of its thread", || run.fleet.unfit(Duration::ZERO).is_empty());
}

/// What a second round over `first` draws.
fn second_round(run: &Run, first: &Batch) -> Result<Batch, ServiceError> {
    let begun = |sample: &GeneratedSample| BegunResponse { token_ids: sample.token_ids.clone(), is_complete: false };
    let go_on = |id| GroupRequest { begun: first[&GroupId(id)].iter().map(begun).collect(), ..request(id) };
    run.fleet.submit((0..NUM_GROUPS).map(go_on).collect())?;
    run.collect()
}

/// Groups that go on are issued again with the same beginnings, and a second answer to their first round is none to
/// their second.
#[test]
fn a_second_round_survives_losses_and_second_answers() {
    let undisturbed = start(config(), &[Manner::Good]);
    let first = undisturbed.batch().expect("nothing fails");
    let expected = second_round(&undisturbed, &first).expect("nothing fails");
    assert_ne!(first, expected);
    for manner in [Manner::Twice, Manner::NewestFirst, Manner::DiesAfter(8), Manner::DiesAfter(5)] {
        let run = start(config(), &[manner, Manner::Good]);
        assert_eq!(run.batch().as_ref(), Ok(&first));
        assert_eq!(second_round(&run, &first).as_ref(), Ok(&expected));
        let ledger = run.fleet.ledger();
        assert!(ledger.is_balanced() && ledger.open() == 3 * NUM_GROUPS, "{ledger:?}");
    }
}

#[test]
fn a_worker_that_joins_midway_works_only_after_it_proved_the_version() {
    let expected = undisturbed();
    let mut run = start(config(), &[Manner::Stalls]);
    run.fleet.set_version(version(4)).expect("the first worker proves it");
    run.fleet.submit((0..NUM_GROUPS).map(request).collect()).expect("new groups");
    let late = FakeRollout::new("late", Manner::SyncsLate);
    run.workers.push(late.clone());
    assert_eq!(run.fleet.join("late", late.clone()), Ok(1));
    until("the question for the version", || late.gate.is_reached());
    assert_eq!(run.status("late").phase, WorkerPhase::Syncing(version(4)));
    assert_eq!((late.num_submitted.load(Ordering::SeqCst), run.status("late").in_flight), (0, 0));
    late.gate.open();
    until("the proof", || run.status("late").version == Some(version(4)));
    assert_eq!(run.collect().as_ref(), Ok(&expected));
    assert!(late.num_submitted.load(Ordering::SeqCst) as u64 >= NUM_GROUPS - 3);
}

#[test]
fn with_no_worker_left_the_error_names_all_of_them_and_why() {
    let run = start(config(), &[Manner::DiesAfter(2), Manner::DiesAfter(0)]);
    let error = run.batch().expect_err("nobody is left");
    assert_eq!(error.code, ErrorCode::Unavailable);
    let text = error.to_string();
    for part in [
        "rollout fleet: next_group failed: no worker is left",
        "engine-0 (incarnation 1): engine-0: next_group",
        "engine-1 (incarnation 1): engine-1: next_group failed: connection reset",
    ] {
        assert!(text.contains(part), "{text}");
    }
    // What was not done is done when somebody comes.
    let again = FakeRollout::new("engine-0", Manner::Good);
    assert_eq!(run.fleet.join("engine-0", again), Ok(2));
    let rest = run.collect().expect("the new life does the rest");
    assert!(rest.iter().all(|(group, samples)| undisturbed()[group] == *samples) && !rest.is_empty());
    let nobody = FleetRollout::new(config()).set_version(version(0)).expect_err("nobody joined");
    assert!(nobody.to_string().contains("no worker ever joined"), "{nobody}");
}

#[test]
fn a_group_that_is_lost_too_often_or_refused_is_an_error_that_names_it() {
    let deadly = FleetConfig { max_attempts: 1, ..config() };
    let error = start(deadly, &[Manner::Good, Manner::DiesAfter(0)]).batch().expect_err("a group is given up");
    assert!(
        error.to_string().contains("given up after 1 attempts") && error.to_string().contains("(prompt "),
        "{error}"
    );
    let run = start(config(), &[Manner::RefusesPromptOne]);
    let error = run.batch().expect_err("a prompt is wrong");
    assert_eq!((error.code, error.service.as_str()), (ErrorCode::InvalidArgument, "engine-0"));
    assert_eq!(run.status("engine-0").phase, WorkerPhase::Ready, "the worker is not to blame");
}

#[test]
fn leases_end_without_heartbeats_and_leaving_is_no_failure() {
    let lease = Duration::from_secs(5);
    let run = start(FleetConfig { lease: Some(lease), ..config() }, &[Manner::Good, Manner::Good]);
    run.fleet.set_version(version(4)).expect("both prove it");
    run.clock.advance(lease / 2);
    assert_eq!(run.fleet.heartbeat("engine-0"), Ok(()));
    run.clock.advance(lease / 2);
    assert_eq!(run.fleet.next_group(Duration::ZERO), Ok(None));
    assert_eq!(run.status("engine-1").phase, WorkerPhase::Lost(LossCause::LeaseExpired));
    let error = run.fleet.heartbeat("engine-1").expect_err("it has to join again");
    assert!(error.to_string().contains("`engine-1` is lost (its lease expired)"), "{error}");
    assert_eq!(run.fleet.join("engine-1", run.workers[1].clone()), Ok(2));
    assert_eq!((run.fleet.leave("engine-0", "scaled down"), run.fleet.heartbeat("x").is_err()), (Ok(()), true));
    assert_eq!(run.status("engine-0").last_error.as_deref(), Some("scaled down"));
    assert_eq!(run.batch(), Ok(undisturbed()));
}

#[test]
fn what_is_aborted_is_gone_and_its_ids_are_free_again() {
    let run = start(config(), &[Manner::Stalls]);
    run.fleet.set_version(version(4)).expect("it proves it");
    run.fleet.submit((0..4).map(request).collect()).expect("new groups");
    assert!(run.fleet.submit(vec![request(0)]).is_err(), "group 0 is open");
    assert_eq!(run.fleet.abort_all(), Ok(4));
    assert_eq!(run.fleet.next_group(Duration::ZERO), Ok(None));
    run.workers[0].gate.open();
    assert_eq!(run.batch(), Ok(undisturbed()));
    let ledger = run.fleet.ledger();
    assert!(ledger.is_balanced() && ledger.open() == 3 * NUM_GROUPS && ledger.dropped().len() <= 1, "{ledger:?}");
}

#[test]
fn every_sample_ends_trained_or_dropped() {
    let run = start(config(), &[Manner::Good, Manner::DiesAfter(1)]);
    run.batch().expect("one worker is enough");
    let settle = |id: u64| Settlement { group: GroupId(id), trained: vec![0, 2] };
    run.fleet.settle(1, (0..5).map(settle).collect()).expect("all were delivered");
    assert!(run.fleet.settle(1, vec![settle(5)]).is_err(), "step 1 is over");
    assert!(run.fleet.settle(2, vec![settle(0)]).is_err(), "group 0 is trained");
    // Delivered groups that no step took are too old for the next version.
    run.fleet.set_version(version(5)).expect("one worker is left");
    let ledger = run.fleet.ledger();
    assert_eq!((ledger.trained(), ledger.open(), ledger.is_balanced()), (10, 0, true));
    assert_eq!((ledger.dropped()[&DropReason::Filtered], ledger.dropped()[&DropReason::TooStale]), (5, 21));
    let error = run.fleet.set_version(version(3)).expect_err("versions only grow");
    assert_eq!(error.code, ErrorCode::VersionMismatch);
}

#[test]
fn groups_that_run_when_a_version_is_set_are_generated_with_it() {
    for at_bump in [AtBump::AbortReissue, AtBump::Finish] {
        let run = start(FleetConfig { at_bump, ..config() }, &[Manner::Stalls, Manner::Good]);
        run.fleet.set_version(version(3)).expect("both prove it");
        run.fleet.submit((0..NUM_GROUPS).map(request).collect()).expect("new groups");
        until("the stall", || run.workers[0].gate.is_reached());
        run.workers[0].gate.open();
        run.fleet.set_version(version(4)).expect("both prove it");
        let batch = run.collect().expect("nothing fails");
        assert_eq!(batch.len() as u64, NUM_GROUPS);
        for (group, samples) in batch {
            let made_with = samples[0].policy_versions[0].0;
            assert!(made_with == version(3) || samples == undisturbed()[&group], "{group}");
        }
    }
}

/// A version that no worker can have any more is not waited for; one that all hold is served all the same.
#[test]
fn a_lost_source_ends_the_wait_for_a_version() {
    let run = start(config(), &[Manner::Good]);
    run.fleet.set_version(version(4)).expect("the worker proves it");
    run.fleet.lose_source("trainer-0 is lost: its lease ended");
    run.fleet.set_version(version(4)).expect("the worker holds it");
    run.fleet.leave(NAMES[0], "gone").expect("it joined");
    let patient = FleetConfig { worker_wait: Duration::from_secs(300), ..config() };
    let waiting = start(patient, &[]);
    waiting.fleet.lose_source("trainer-0 is lost: its lease ended");
    let error = waiting.fleet.set_version(version(5)).expect_err("nobody can pull it");
    assert_eq!(error.code, ErrorCode::Unavailable);
    assert!(error.message.contains("version 5") && error.message.contains("trainer-0 is lost"), "{error}");
}

/// Weights that nobody can have any more are not waited for, however patient the fleet is; one that fails and comes
/// again in time is as good as new.
#[test]
fn weights_that_no_worker_can_take_end_the_wait_at_once() {
    let patient = FleetConfig { worker_wait: Duration::from_secs(300), ..config() };
    let run = start(patient, &[Manner::DiesAfter(2)]);
    run.fleet.set_version(version(4)).expect("it proves it");
    run.fleet.submit((0..NUM_GROUPS).map(request).collect()).expect("new groups");
    let is_lost = |cause| run.status(NAMES[0]).phase == WorkerPhase::Lost(cause);
    until("the end of the first life", || is_lost(LossCause::CallFailed));
    let come_again = |manner: Manner| run.fleet.join(NAMES[0], FakeRollout::new(NAMES[0], manner)).expect("a thread");
    for life in 2..=3 {
        assert_eq!(come_again(Manner::HoldsOtherWeights), life);
        until("a failed sync", || is_lost(LossCause::SyncFailed));
        let waiting = run.fleet.next_group(Duration::ZERO);
        assert!(!matches!(&waiting, Err(e) if e.code == ErrorCode::Unavailable), "{waiting:?}");
    }
    come_again(Manner::DiesAfter(2));
    until("two more groups", || is_lost(LossCause::CallFailed));
    for _ in 0..3 {
        come_again(Manner::HoldsOtherWeights);
        until("a failed sync", || is_lost(LossCause::SyncFailed));
    }
    let error = run.collect().expect_err("nobody can serve it");
    assert_eq!(error.code, ErrorCode::Unavailable);
    assert!(error.message.contains("no worker can take the weights that are to be served: engine-0"), "{error}");
    come_again(Manner::Good);
    run.fleet.set_version(version(5)).expect("new weights are another matter");
}

/// However patient the fleet is: it does not wait for whoever cannot come, and goes on with whoever comes all the same.
#[test]
fn without_a_worker_nobody_is_waited_for_where_none_will_come() {
    let patient = FleetConfig { worker_wait: Duration::from_secs(300), ..config() };
    let run = start(patient.clone(), &[Manner::DiesAfter(2)]);
    run.fleet.expect_nobody("engine-0 is not started again");
    run.fleet.set_version(version(4)).expect("whoever is there is counted on");
    run.fleet.submit((0..NUM_GROUPS).map(request).collect()).expect("new groups");
    let error = run.collect().expect_err("nobody is left");
    assert_eq!(error.code, ErrorCode::Unavailable);
    assert!(error.message.contains("none will come: engine-0 is not started again"), "{error}");
    run.fleet.join(NAMES[1], FakeRollout::new(NAMES[1], Manner::Good)).expect("a thread");
    run.collect().expect("it does the rest");

    let empty = start(patient, &[]);
    empty.fleet.expect_nobody("engine-0 is not started again");
    let error = empty.fleet.set_version(version(4)).expect_err("nobody can prove it");
    assert!(error.message.contains("none will come: engine-0 is not started again"), "{error}");
}
