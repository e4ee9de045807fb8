//! Single transitions.

use super::super::{
    Action, AtBump, ControlPlane, DropReason, Entry, Event, Fence, GroupSpec, JobKey, LossCause, Origin, Outcome,
    PlaneConfig, Role, Settlement, Ticket, WorkerId, WorkerPhase,
};
use temper_types::{ContentHash, GroupId, PolicyVersion, PromptId};

fn origin(worker: u32, incarnation: u64) -> Origin {
    Origin { worker: WorkerId(worker), incarnation }
}

fn version(number: u64) -> PolicyVersion {
    PolicyVersion { number, hash: ContentHash([number as u8 + 1; 16]) }
}

fn group(id: u64, due: u64, prefix: u64) -> GroupSpec {
    let (group, prompt, seeds) = (GroupId(id), PromptId(id), vec![id * 10, id * 10 + 1]);
    GroupSpec { group, prompt, seeds, due, prompt_tokens: 10, max_new_tokens: 20, prefix, is_bound: false }
}

/// A control plane and all that it said.
struct Bench {
    plane: ControlPlane,
    journal: Vec<Entry>,
    now: u64,
}

impl Bench {
    fn new(config: PlaneConfig) -> Self {
        let (plane, actions) = ControlPlane::new(config);
        let mut bench = Bench { plane, journal: Vec::new(), now: 0 };
        bench.keep(&actions);
        bench
    }

    /// With rollout workers `0..num_workers` that attested version 0.
    fn ready(config: PlaneConfig, num_workers: u32, capacity: u32) -> Self {
        let mut bench = Bench::new(config);
        bench.tell(Event::Publish { version: version(0) });
        for worker in 0..num_workers {
            let origin = origin(worker, 1);
            bench.tell(Event::Register { origin, role: Role::Rollout, capacity });
            bench.tell(Event::Attest { origin, version: version(0) });
        }
        bench
    }

    fn keep(&mut self, actions: &[Action]) {
        for (at, action) in actions.iter().enumerate() {
            if let Action::Append(entries) = action {
                assert_eq!(at, 0, "what must be durable comes first");
                self.journal.extend(entries.clone());
            }
        }
    }

    fn tell(&mut self, event: Event) -> Vec<Action> {
        let actions = self.plane.step(event, self.now);
        self.keep(&actions);
        assert!(self.plane.ledger().is_balanced());
        actions.into_iter().filter(|action| !matches!(action, Action::Append(_))).collect()
    }

    fn submit(&mut self, groups: Vec<GroupSpec>) -> Vec<(WorkerId, Ticket, GroupId)> {
        dispatched(&self.tell(Event::Submit { groups }))
    }

    fn answer(&mut self, from: Origin, ticket: Ticket, version: PolicyVersion) -> Vec<Action> {
        self.tell(Event::Answer { origin: from, ticket, versions: vec![version], num_tokens: 20 })
    }

    fn fences(&self, fence: Fence) -> u64 {
        self.plane.fences().get(&fence).copied().unwrap_or(0)
    }
}

fn dispatched(actions: &[Action]) -> Vec<(WorkerId, Ticket, GroupId)> {
    let dispatch = |action: &Action| match action {
        Action::Dispatch { to, ticket, job, .. } => match job.key() {
            JobKey::Group(group) => Some((to.worker, *ticket, group)),
            JobKey::Score(_) => None,
        },
        _ => None,
    };
    actions.iter().filter_map(dispatch).collect()
}

fn syncs(actions: &[Action]) -> Vec<Origin> {
    let sync = |action: &Action| if let Action::Sync { to, .. } = action { Some(*to) } else { None };
    actions.iter().filter_map(sync).collect()
}

#[test]
fn groups_go_to_the_least_loaded_worker_and_a_known_prefix_breaks_ties() {
    let mut bench = Bench::ready(PlaneConfig::default(), 3, 2);
    let given = bench.submit(vec![group(1, 0, 7), group(2, 0, 8), group(3, 0, 9)]);
    assert_eq!(given.iter().map(|g| g.0.0).collect::<Vec<_>>(), [0, 1, 2]);
    for (worker, ticket, _) in &given {
        bench.answer(Origin { worker: *worker, incarnation: 1 }, *ticket, version(0));
    }
    // All are idle again: prefixes 9 and 8 go where they were, a new one to the lowest id.
    let given = bench.submit(vec![group(4, 0, 9), group(5, 0, 8), group(6, 0, 1)]);
    assert_eq!(given.iter().map(|g| g.0.0).collect::<Vec<_>>(), [2, 1, 0]);
    // Three more fill every worker; the last one waits.
    let given = bench.submit((7..11).map(|id| group(id, 0, id)).collect());
    assert_eq!(given.len(), 3);
    assert!(bench.plane.workers().all(|w| w.in_flight == 2));
    assert!(bench.plane.has_work());
}

/// Two workers of one group each, of which 0 holds what group 1 keeps, and 1 what group 2 does; both groups wait for
/// their next round.
fn bound_bench() -> (Bench, [GroupSpec; 2]) {
    let mut bench = Bench::ready(PlaneConfig::default(), 2, 1);
    let specs = [1, 2].map(|id| GroupSpec { is_bound: true, ..group(id, 0, 7) });
    let given = bench.submit(specs.to_vec());
    assert_eq!(given.iter().map(|g| g.0.0).collect::<Vec<_>>(), [0, 1]);
    for (worker, ticket, group) in given {
        bench.answer(Origin { worker, incarnation: 1 }, ticket, version(0));
        bench.tell(Event::Discard { groups: vec![group] });
    }
    (bench, specs)
}

#[test]
fn a_group_that_keeps_kv_goes_back_to_who_has_it_while_that_lives() {
    let (mut bench, [first, second]) = bound_bench();
    // Worker 1 is busy: the second group waits for it, while worker 0 takes what comes behind.
    let given = bench.submit(vec![first.clone(), group(3, 0, 7)]);
    assert_eq!(given.iter().map(|g| (g.0.0, g.2.0)).collect::<Vec<_>>(), [(0, 1), (1, 3)]);
    bench.answer(Origin { worker: given[0].0, incarnation: 1 }, given[0].1, version(0));
    let given = bench.submit(vec![second, group(4, 0, 9)]);
    assert_eq!(given.iter().map(|g| (g.0.0, g.2.0)).collect::<Vec<_>>(), [(0, 4)]);
    let answered = bench.answer(origin(0, 1), given[0].1, version(0));
    assert_eq!(dispatched(&answered), [], "worker 0 is idle, and the group waits");
    let given = dispatched(&bench.tell(Event::Leave { origin: origin(1, 1) }));
    assert_eq!(given[0].0.0, 0, "whoever lives takes it");
}

/// A worker that comes back has lost what it held: nobody waits for it.
#[test]
fn a_new_life_holds_nothing() {
    let (mut bench, [_, second]) = bound_bench();
    bench.tell(Event::Register { origin: origin(1, 2), role: Role::Rollout, capacity: 1 });
    let given = bench.submit(vec![second]);
    assert_eq!(given.iter().map(|g| (g.0.0, g.2.0)).collect::<Vec<_>>(), [(0, 2)]);
}

#[test]
fn a_worker_that_joins_late_gets_work_only_after_it_attested_number_and_hash() {
    let mut bench = Bench::ready(PlaneConfig::default(), 1, 1);
    bench.submit(vec![group(1, 0, 0), group(2, 0, 0)]);
    let late = origin(1, 1);
    let actions = bench.tell(Event::Register { origin: late, role: Role::Rollout, capacity: 1 });
    assert_eq!((syncs(&actions), dispatched(&actions)), (vec![late], vec![]));
    let wrong = PolicyVersion { hash: ContentHash([9; 16]), ..version(0) };
    let actions = bench.tell(Event::Attest { origin: late, version: wrong });
    assert_eq!((syncs(&actions), dispatched(&actions)), (vec![late], vec![]));
    assert_eq!(bench.fences(Fence::HashMismatch), 1);
    assert_eq!(bench.tell(Event::Attest { origin: late, version: version(3) }), vec![]);
    assert_eq!(bench.fences(Fence::LateAttestation), 1);
    let given = dispatched(&bench.tell(Event::Attest { origin: late, version: version(0) }));
    assert_eq!((given[0].0, given[0].2), (late.worker, GroupId(2)));
}

#[test]
fn a_lost_workers_groups_are_issued_again_with_the_same_seeds_and_its_answers_are_fenced() {
    let config = PlaneConfig { lease: 10, max_attempts: 2, ..PlaneConfig::default() };
    let mut bench = Bench::ready(config, 2, 4);
    let first = bench.submit(vec![group(1, 0, 0)])[0];
    assert_eq!(first.0, WorkerId(0));
    bench.now = 5;
    bench.tell(Event::Renew { origin: origin(1, 1) });
    bench.now = 10;
    let actions = bench.tell(Event::Tick);
    assert!(actions.contains(&Action::Lost { origin: origin(0, 1), cause: LossCause::LeaseExpired }));
    let Some(Action::Dispatch { to, ticket, job: super::super::Job::Group(spec), .. }) = actions.last() else {
        panic!("{actions:?}")
    };
    assert_eq!((*to, &spec.seeds), (origin(1, 1), &vec![10, 11]));
    let second = *ticket;
    assert_ne!(second, first.1);
    let before = bench.plane.clone();
    assert_eq!(bench.answer(origin(0, 1), first.1, version(0)), vec![]);
    assert_eq!(bench.answer(origin(1, 1), first.1, version(0)), vec![]);
    assert_eq!((bench.fences(Fence::StaleIncarnation), bench.fences(Fence::LateAnswer)), (1, 1));
    assert_eq!((before.ledger(), before.version()), (bench.plane.ledger(), bench.plane.version()));
    assert_eq!(bench.tell(Event::Renew { origin: origin(0, 1) }), vec![Action::Rejoin { origin: origin(0, 1) }]);
    // A second loss is one too many.
    let actions = bench.tell(Event::Failed { origin: origin(1, 1) });
    assert!(actions.contains(&Action::GiveUp { key: JobKey::Group(GroupId(1)), attempts: 2 }), "{actions:?}");
    assert_eq!(bench.plane.ledger().dropped()[&DropReason::WorkerLost], 4);
    assert!(!bench.plane.has_work());
}

#[test]
fn a_second_answer_is_fenced_until_and_after_its_samples_are_trained() {
    let mut bench = Bench::ready(PlaneConfig::default(), 1, 4);
    let (_, ticket, _) = bench.submit(vec![group(1, 0, 0)])[0];
    assert_eq!(
        bench.answer(origin(0, 1), ticket, version(0)),
        vec![Action::Accept { ticket, key: JobKey::Group(GroupId(1)) }]
    );
    assert_eq!(bench.answer(origin(0, 1), ticket, version(0)), vec![]);
    assert_eq!(bench.fences(Fence::DuplicateAnswer), 1);
    let settlement = Settlement { group: GroupId(1), trained: vec![1] };
    let begin = |step, groups| Event::BeginStep { step, groups };
    assert_eq!(bench.tell(begin(1, vec![settlement.clone(), settlement.clone()])), vec![]);
    assert_eq!(bench.tell(begin(0, vec![settlement.clone()])), vec![]);
    assert_eq!(bench.tell(begin(1, vec![Settlement { group: GroupId(2), trained: vec![] }])), vec![]);
    assert_eq!(bench.tell(begin(1, vec![Settlement { group: GroupId(1), trained: vec![2] }])), vec![]);
    assert_eq!(bench.fences(Fence::StepRefused), 4);
    let told = bench.tell(begin(1, vec![settlement]));
    assert_eq!(told, vec![Action::Train { term: 1, step: 1, tickets: vec![ticket] }]);
    let settled = Outcome::Trained { step: 1, samples: vec![1] };
    let done = Event::StepDone { step: 1, version: None };
    assert_eq!(bench.tell(done.clone()), vec![Action::Settled { ticket, group: GroupId(1), outcome: settled }]);
    assert_eq!(bench.tell(done), vec![]);
    bench.answer(origin(0, 1), ticket, version(0));
    assert_eq!((bench.fences(Fence::StepRepeated), bench.fences(Fence::LateAnswer)), (1, 1));
    let ledger = bench.plane.ledger();
    assert_eq!(
        (ledger.issued(), ledger.trained(), ledger.dropped()[&DropReason::Filtered], ledger.open()),
        (2, 1, 1, 0)
    );
}

#[test]
fn at_a_publication_workers_finish_or_give_up_what_they_have_then_sync() {
    let config = PlaneConfig { max_staleness: 1, ..PlaneConfig::default() };
    let mut bench = Bench::ready(config, 2, 4);
    let (_, ticket, _) = bench.submit(vec![group(1, 1, 0)])[0];
    assert_eq!(syncs(&bench.tell(Event::Publish { version: version(1) })), [origin(1, 1)]);
    assert_eq!(bench.plane.worker(WorkerId(0)).map(|w| w.phase), Some(WorkerPhase::Draining));
    assert_eq!(bench.submit(vec![group(2, 1, 0)]), vec![]);
    let actions = bench.answer(origin(0, 1), ticket, version(0));
    assert_eq!((actions.len(), syncs(&actions)), (2, vec![origin(0, 1)]), "accepted, then synced: {actions:?}");
    let given = dispatched(&bench.tell(Event::Attest { origin: origin(0, 1), version: version(1) }));
    assert_eq!(given[0].2, GroupId(2));

    let mut bench = Bench::ready(PlaneConfig { at_bump: AtBump::AbortReissue, ..config }, 1, 4);
    let (_, ticket, _) = bench.submit(vec![group(1, 1, 0)])[0];
    let actions = bench.tell(Event::Publish { version: version(1) });
    assert!(matches!(&actions[1..], [Action::Abort { .. }, Action::Sync { .. }]), "{actions:?}");
    assert_eq!(bench.plane.ledger().dropped()[&DropReason::Superseded], 2);
    let given = dispatched(&bench.tell(Event::Attest { origin: origin(0, 1), version: version(1) }));
    assert_eq!(given[0].2, GroupId(1));
    bench.answer(origin(0, 1), ticket, version(0));
    assert_eq!(bench.fences(Fence::LateAnswer), 1);
    // An answer made with other weights than the attempt's costs the worker its place.
    let actions = bench.answer(origin(0, 1), given[0].1, version(0));
    assert_eq!(actions[0], Action::Lost { origin: origin(0, 1), cause: LossCause::WrongWeights });
    assert_eq!(bench.fences(Fence::WrongVersion), 1);
}

#[test]
fn a_number_names_one_version_and_nothing_is_issued_while_paused_or_too_early() {
    let mut bench = Bench::ready(PlaneConfig::default(), 1, 4);
    assert_eq!(bench.tell(Event::Publish { version: version(0) }), vec![]);
    let other = PolicyVersion { hash: ContentHash([9; 16]), ..version(0) };
    assert_eq!(bench.tell(Event::Publish { version: other }), vec![]);
    assert_eq!((bench.fences(Fence::VersionReused), bench.plane.version()), (1, Some(version(0))));
    bench.tell(Event::Pause);
    assert_eq!(bench.submit(vec![group(1, 0, 0), group(2, 1, 0)]), vec![]);
    let given = dispatched(&bench.tell(Event::Resume));
    assert_eq!(given.iter().map(|g| g.2).collect::<Vec<_>>(), [GroupId(1)], "group 2 is due for version 1");
    assert_eq!(bench.submit(vec![group(1, 0, 0)]), vec![]);
    assert_eq!(bench.fences(Fence::DuplicateJob), 1);
}

#[test]
fn scoring_is_issued_again_after_the_loss_of_a_worker() {
    let mut bench = Bench::new(PlaneConfig::default());
    for worker in 0..2 {
        bench.tell(Event::Register { origin: origin(worker, 1), role: Role::Reward, capacity: 1 });
    }
    let first = bench.tell(Event::SubmitScore { job: 4, cost: 8 });
    let [Action::Dispatch { to, .. }] = &first[..] else { panic!("{first:?}") };
    let again = bench.tell(Event::Failed { origin: *to });
    let [Action::Lost { .. }, Action::Dispatch { to, ticket, .. }] = &again[..] else { panic!("{again:?}") };
    assert_eq!(to.worker, WorkerId(1));
    let (to, ticket) = (*to, *ticket);
    let answer = Event::Answer { origin: to, ticket, versions: vec![], num_tokens: 0 };
    assert_eq!(bench.tell(answer.clone()), vec![Action::Accept { ticket, key: JobKey::Score(4) }]);
    assert_eq!(bench.tell(answer), vec![]);
    assert_eq!((bench.fences(Fence::LateAnswer), bench.plane.has_work()), (1, false));
}

#[test]
fn a_controller_comes_back_from_its_journal_and_asks_whether_the_step_was_done() {
    let mut bench = Bench::ready(PlaneConfig::default(), 1, 4);
    let given = bench.submit(vec![group(1, 0, 0), group(2, 0, 0), group(3, 0, 0)]);
    bench.answer(origin(0, 1), given[0].1, version(0));
    bench.answer(origin(0, 1), given[1].1, version(0));
    let groups = vec![Settlement { group: GroupId(1), trained: vec![0, 1] }];
    bench.tell(Event::BeginStep { step: 1, groups });
    let text: Vec<String> = bench.journal.iter().map(|e| serde_json::to_string(e).expect("plain data")).collect();
    let journal: Vec<Entry> = text.iter().map(|line| serde_json::from_str(line).expect("what was written")).collect();
    assert_eq!(journal, bench.journal);
    for (step, trained, waiting) in [(1, 2, 2), (0, 0, 3)] {
        let (plane, actions) = ControlPlane::recover(PlaneConfig::default(), &journal);
        assert_eq!(actions.last(), Some(&Action::AskTrainer { term: 2 }));
        let mut again = Bench { plane, journal: Vec::new(), now: 0 };
        assert_eq!(again.plane.ledger().dropped()[&DropReason::ControllerRestarted], 4);
        // The step is settled before anything else is trained.
        assert_eq!(again.tell(Event::BeginStep { step: 2, groups: vec![] }), vec![]);
        again.tell(Event::TrainerAt { term: 2, step, version: (step > 0).then(|| version(step)) });
        assert_eq!((again.plane.ledger().trained(), again.plane.open_groups().count()), (trained, waiting));
        // A life from before the crash stays fenced; a new one is given what waits.
        again.tell(Event::Register { origin: origin(0, 1), role: Role::Rollout, capacity: 4 });
        assert_eq!(again.fences(Fence::StaleIncarnation), 1);
        again.tell(Event::Register { origin: origin(0, 2), role: Role::Rollout, capacity: 4 });
        let attested = Event::Attest { origin: origin(0, 2), version: version(step) };
        assert_eq!(dispatched(&again.tell(attested)).len(), waiting);
    }
}
