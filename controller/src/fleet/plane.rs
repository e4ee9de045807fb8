//! The state machine: its state, and the events of workers.

use super::event::{
    Action, AtBump, Event, Fence, GroupSpec, JobKey, LossCause, Origin, Outcome, PlaneConfig, Role, Ticket, Time,
    WorkerId,
};
use super::journal::Entry;
use super::ledger::{DropReason, Ledger};
use super::pool::{Pool, Worker, WorkerPhase, WorkerView};
use super::trainer_step::Training;
use std::collections::BTreeMap;
use std::sync::Arc;
use temper_types::{GroupId, PolicyVersion};

/// Bits of a ticket below the term of the controller.
const TICKET_BITS: u32 = 40;

/// Where a group stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GroupState {
    /// For a worker.
    Waiting,
    /// In a worker's hands, or lost with one that nobody knows any more.
    Running(Ticket),
    /// With the caller.
    Delivered(Ticket, PolicyVersion),
    /// In the step under way.
    Training(Ticket),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) spec: Arc<GroupSpec>,
    pub(super) state: GroupState,
    /// Attempts so far.
    pub(super) attempts: u32,
    /// Those that were lost with their worker.
    pub(super) losses: u32,
}

/// A bundle of responses to score.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bundle {
    pub(super) cost: u64,
    pub(super) attempts: u32,
}

/// What a step of the machine gives: what must be durable, and what is done after that.
#[derive(Default)]
pub(super) struct Outbox {
    entries: Vec<Entry>,
    actions: Vec<Action>,
}

impl Outbox {
    pub(super) fn append(&mut self, entry: Entry) {
        self.entries.push(entry);
    }

    pub(super) fn push(&mut self, action: Action) {
        self.actions.push(action);
    }

    pub(super) fn into_actions(mut self) -> Vec<Action> {
        if !self.entries.is_empty() {
            self.actions.insert(0, Action::Append(self.entries));
        }
        self.actions
    }
}

/// The control plane of rollout and reward workers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlPlane {
    pub(super) config: PlaneConfig,
    pub(super) now: Time,
    pub(super) term: u64,
    pub(super) next_ticket: u64,
    pub(super) version: Option<PolicyVersion>,
    pub(super) is_paused: bool,
    pub(super) groups: BTreeMap<GroupId, Group>,
    pub(super) bundles: BTreeMap<u64, Bundle>,
    pub(super) pool: Pool,
    pub(super) ledger: Ledger,
    pub(super) training: Option<Training>,
    pub(super) last_step: u64,
    /// When the trainer was last asked or told something that it has not answered.
    pub(super) told_trainer_at: Option<Time>,
    pub(super) is_asking_trainer: bool,
    /// Tokens and samples of accepted answers, halved now and then: their mean length.
    pub(super) lengths: (u64, u64),
    pub(super) fences: BTreeMap<Fence, u64>,
}

impl ControlPlane {
    /// A new run, and the first actions.
    pub fn new(config: PlaneConfig) -> (Self, Vec<Action>) {
        Self::recover(config, &[])
    }

    pub(super) fn empty(config: PlaneConfig) -> Self {
        ControlPlane {
            config,
            now: 0,
            term: 0,
            next_ticket: 0,
            version: None,
            is_paused: false,
            groups: BTreeMap::new(),
            bundles: BTreeMap::new(),
            pool: Pool::default(),
            ledger: Ledger::default(),
            training: None,
            last_step: 0,
            told_trainer_at: None,
            is_asking_trainer: false,
            lengths: (0, 0),
            fences: BTreeMap::new(),
        }
    }

    /// Take note of an event at a time and say what is to be done.
    pub fn step(&mut self, event: Event, now: Time) -> Vec<Action> {
        self.now = self.now.max(now);
        let mut out = Outbox::default();
        let fenced = match event {
            Event::Register { origin, role, capacity } => self.register(origin, role, capacity, &mut out),
            Event::Renew { origin } => self.renew(origin, &mut out),
            Event::Leave { origin } => self.end_life(origin, LossCause::Left, &mut out),
            Event::Failed { origin } => self.fail(origin, &mut out),
            Event::Submit { groups } => self.submit(groups, &mut out),
            Event::SubmitScore { job, cost } => self.submit_score(job, cost),
            Event::Answer { origin, ticket, versions, num_tokens } => {
                self.answer(origin, ticket, (&versions, num_tokens), &mut out)
            }
            Event::Refuse { origin, ticket } => self.refuse(origin, ticket, &mut out),
            Event::Attest { origin, version } => self.attest(origin, version, &mut out),
            Event::Publish { version } => self.publish(version, &mut out),
            Event::AbortAll => self.abort_all(&mut out),
            Event::Discard { groups } => self.discard(&groups, &mut out),
            Event::Pause => self.set_paused(true),
            Event::Resume => self.set_paused(false),
            Event::BeginStep { step, groups } => self.begin_step(step, groups, &mut out),
            Event::StepDone { step, version } => self.step_done(step, version, &mut out),
            Event::TrainerAt { term, step, version } => self.trainer_at(term, step, version, &mut out),
            Event::Tick => self.tick(&mut out),
        };
        if let Err(fence) = fenced {
            *self.fences.entry(fence).or_default() += 1;
        }
        self.dispatch(&mut out);
        out.into_actions()
    }

    /// The weights that are to be served.
    pub fn version(&self) -> Option<PolicyVersion> {
        self.version
    }

    /// Last step that the trainer finished.
    pub fn last_step(&self) -> u64 {
        self.last_step
    }

    /// The step under way.
    pub fn training_step(&self) -> Option<u64> {
        self.training.as_ref().map(|training| training.step)
    }

    /// Groups that are neither settled nor given up.
    pub fn open_groups(&self) -> impl Iterator<Item = GroupId> + '_ {
        self.groups.keys().copied()
    }

    /// True where a group waits for a worker or an answer.
    pub fn has_work(&self) -> bool {
        let unanswered = |g: &Group| matches!(g.state, GroupState::Waiting | GroupState::Running(_));
        !self.bundles.is_empty() || self.groups.values().any(unanswered)
    }

    /// Every worker that was ever registered.
    pub fn workers(&self) -> impl Iterator<Item = WorkerView> + '_ {
        self.pool.view()
    }

    /// One of them.
    pub fn worker(&self, id: WorkerId) -> Option<WorkerView> {
        self.pool.workers.get(&id).map(|worker| worker.view(id))
    }

    /// The accounts.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Messages that were fenced, by kind.
    pub fn fences(&self) -> &BTreeMap<Fence, u64> {
        &self.fences
    }

    /// When [`Event::Tick`] is next due, if nothing happens before.
    pub fn next_deadline(&self) -> Option<Time> {
        let trainer = self.told_trainer_at.map(|at| at.saturating_add(self.config.train_timeout));
        [self.pool.next_deadline(), trainer].into_iter().flatten().min()
    }

    /// Fence messages of workers that are unknown, lost, or in another life.
    pub(super) fn live(&self, origin: Origin) -> Result<&Worker, Fence> {
        let worker = self.pool.workers.get(&origin.worker).ok_or(Fence::UnknownWorker)?;
        if worker.incarnation != origin.incarnation || worker.is_lost() {
            return Err(Fence::StaleIncarnation);
        }
        Ok(worker)
    }

    fn register(&mut self, origin: Origin, role: Role, capacity: u32, out: &mut Outbox) -> Result<(), Fence> {
        let known = self.pool.workers.get(&origin.worker);
        if known.is_some_and(|w| origin.incarnation <= w.incarnation) {
            return Err(Fence::StaleIncarnation);
        }
        if known.is_some_and(|w| !w.is_lost()) {
            self.lose(origin.worker, LossCause::Superseded, out);
        }
        self.record(Entry::Registered { origin, role }, out);
        let lease_until = self.now.saturating_add(self.config.lease);
        self.pool.update(origin.worker, |worker| {
            worker.capacity = capacity.max(1);
            worker.lease_until = lease_until;
            worker.phase = if role == Role::Rollout { WorkerPhase::Joining } else { WorkerPhase::Ready };
        });
        self.sync(origin.worker, out);
        Ok(())
    }

    /// The durable part of a registration.
    pub(super) fn begin_life(&mut self, origin: Origin, role: Role) {
        self.pool.workers.entry(origin.worker).or_insert_with(|| Worker::new(role));
        self.pool.update(origin.worker, |worker| {
            // A life begins where none is left, so that the worker stands in no index.
            *worker = Worker::new(role);
            worker.incarnation = origin.incarnation;
        });
    }

    pub(super) fn begin_term(&mut self, term: u64) {
        self.term = term;
        self.next_ticket = term << TICKET_BITS;
    }

    fn renew(&mut self, origin: Origin, out: &mut Outbox) -> Result<(), Fence> {
        if let Err(fence) = self.live(origin) {
            let known = self.pool.workers.get(&origin.worker).map_or(0, |w| w.incarnation);
            if origin.incarnation >= known {
                out.push(Action::Rejoin { origin });
            }
            return Err(fence);
        }
        let lease_until = self.now.saturating_add(self.config.lease);
        self.pool.update(origin.worker, |worker| worker.lease_until = lease_until);
        Ok(())
    }

    fn fail(&mut self, origin: Origin, out: &mut Outbox) -> Result<(), Fence> {
        let worker = self.live(origin)?;
        let is_syncing = matches!(worker.phase, WorkerPhase::Syncing(_)) && worker.in_flight.is_empty();
        self.end_life(origin, if is_syncing { LossCause::SyncFailed } else { LossCause::CallFailed }, out)
    }

    fn end_life(&mut self, origin: Origin, cause: LossCause, out: &mut Outbox) -> Result<(), Fence> {
        self.live(origin)?;
        self.lose(origin.worker, cause, out);
        Ok(())
    }

    /// Count on a worker no more; what it had waits again, or is given up where it was lost too often.
    pub(super) fn lose(&mut self, id: WorkerId, cause: LossCause, out: &mut Outbox) {
        let Some(worker) = self.pool.workers.get(&id) else { return };
        let origin = Origin { worker: id, incarnation: worker.incarnation };
        let tickets: Vec<Ticket> = worker.in_flight.iter().copied().collect();
        self.pool.update(id, |worker| {
            worker.phase = WorkerPhase::Lost(cause);
            worker.held = None;
        });
        out.push(Action::Lost { origin, cause });
        for ticket in tickets {
            match self.pool.open.get(&ticket).map(|attempt| attempt.key) {
                Some(JobKey::Group(group)) => self.lose_group(ticket, group, out),
                Some(JobKey::Score(job)) => self.lose_bundle(ticket, job, out),
                None => {}
            }
        }
    }

    fn lose_group(&mut self, ticket: Ticket, group: GroupId, out: &mut Outbox) {
        self.record(Entry::Dropped { ticket, group, reason: DropReason::WorkerLost }, out);
        let Some(state) = self.groups.get(&group) else { return };
        let attempts = state.attempts;
        if state.losses >= self.config.max_attempts {
            self.record(Entry::Closed { group }, out);
            out.push(Action::GiveUp { key: JobKey::Group(group), attempts });
        }
    }

    fn lose_bundle(&mut self, ticket: Ticket, job: u64, out: &mut Outbox) {
        self.pool.detach(ticket);
        let Some(attempts) = self.bundles.get(&job).map(|bundle| bundle.attempts) else { return };
        if attempts >= self.config.max_attempts {
            self.bundles.remove(&job);
            out.push(Action::GiveUp { key: JobKey::Score(job), attempts });
        } else {
            self.pool.queue_mut(Role::Reward).waiting.insert((0, JobKey::Score(job)));
        }
    }

    /// An attempt ends untrained; its group waits again.
    pub(super) fn drop_attempt(&mut self, ticket: Ticket, group: GroupId, reason: DropReason, out: &mut Outbox) {
        self.pool.detach(ticket);
        self.ledger.drop_all(ticket, reason);
        out.push(Action::Settled { ticket, group, outcome: Outcome::Dropped(reason) });
        if let Some(state) = self.groups.get_mut(&group) {
            state.state = GroupState::Waiting;
            state.losses += u32::from(reason == DropReason::WorkerLost);
            let due = state.spec.due;
            self.pool.queue_mut(Role::Rollout).waiting.insert((due, JobKey::Group(group)));
        }
    }

    pub(super) fn close_group(&mut self, group: GroupId) {
        if let Some(state) = self.groups.remove(&group) {
            self.pool.queue_mut(Role::Rollout).waiting.remove(&(state.spec.due, JobKey::Group(group)));
        }
    }

    fn publish(&mut self, version: PolicyVersion, out: &mut Outbox) -> Result<(), Fence> {
        if self.version == Some(version) {
            return Ok(());
        }
        if self.version.is_some_and(|current| version.number <= current.number) {
            return Err(Fence::VersionReused);
        }
        self.record(Entry::Published { version }, out);
        self.bump(out);
        Ok(())
    }

    /// Bring every rollout worker to the current version, and let go of answers that are too old for it.
    pub(super) fn bump(&mut self, out: &mut Outbox) {
        let (number, bound) = (self.version.map_or(0, |v| v.number), self.config.max_staleness);
        let is_old = |g: &Group| matches!(g.state, GroupState::Delivered(_, v) if number - v.number > bound);
        let old: Vec<GroupId> = self.groups.iter().filter(|(_, g)| is_old(g)).map(|(id, _)| *id).collect();
        for group in old {
            self.close_delivered(group, DropReason::TooStale, out);
        }
        let is_behind = |w: &Worker| w.role == Role::Rollout && !w.is_lost() && w.held != self.version;
        let behind: Vec<WorkerId> = self.pool.workers.iter().filter(|(_, w)| is_behind(w)).map(|(id, _)| *id).collect();
        for id in behind {
            let worker = &self.pool.workers[&id];
            let origin = Origin { worker: id, incarnation: worker.incarnation };
            let tickets: Vec<Ticket> = worker.in_flight.iter().copied().collect();
            if !tickets.is_empty() && self.config.at_bump == AtBump::AbortReissue {
                self.take_back(&tickets, DropReason::Superseded, out);
                out.push(Action::Abort { to: origin, before: Ticket(self.next_ticket) });
            }
            self.sync(id, out);
        }
    }

    /// Drop attempts that are in workers' hands; their groups wait again.
    fn take_back(&mut self, tickets: &[Ticket], reason: DropReason, out: &mut Outbox) {
        for ticket in tickets {
            if let Some(JobKey::Group(group)) = self.pool.open.get(ticket).map(|attempt| attempt.key) {
                self.record(Entry::Dropped { ticket: *ticket, group, reason }, out);
            }
        }
    }

    /// Tell a rollout worker to take the current version; one that has jobs in hand finishes them first.
    pub(super) fn sync(&mut self, id: WorkerId, out: &mut Outbox) {
        let (Some(version), Some(worker)) = (self.version, self.pool.workers.get(&id)) else { return };
        if worker.role != Role::Rollout || worker.held == Some(version) {
            return;
        }
        if !worker.in_flight.is_empty() {
            self.pool.update(id, |worker| worker.phase = WorkerPhase::Draining);
            return;
        }
        let to = Origin { worker: id, incarnation: worker.incarnation };
        let progress_by = self.now.saturating_add(self.config.sync_timeout);
        self.pool.update(id, |worker| {
            worker.phase = WorkerPhase::Syncing(version);
            worker.progress_by = progress_by;
        });
        out.push(Action::Sync { to, version });
    }

    fn attest(&mut self, origin: Origin, version: PolicyVersion, out: &mut Outbox) -> Result<(), Fence> {
        let WorkerPhase::Syncing(wanted) = self.live(origin)?.phase else { return Err(Fence::LateAttestation) };
        if version.number != wanted.number {
            return Err(Fence::LateAttestation);
        }
        if version.hash != wanted.hash {
            out.push(Action::Sync { to: origin, version: wanted });
            return Err(Fence::HashMismatch);
        }
        self.pool.update(origin.worker, |worker| {
            worker.phase = WorkerPhase::Ready;
            worker.held = Some(version);
            worker.progress_by = Time::MAX;
        });
        Ok(())
    }

    fn abort_all(&mut self, out: &mut Outbox) -> Result<(), Fence> {
        let is_open = |g: &Group| matches!(g.state, GroupState::Waiting | GroupState::Running(_));
        let groups: Vec<GroupId> = self.groups.iter().filter(|(_, g)| is_open(g)).map(|(id, _)| *id).collect();
        let is_busy = |w: &Worker| w.role == Role::Rollout && !w.is_lost() && !w.in_flight.is_empty();
        let busy: Vec<WorkerId> = self.pool.workers.iter().filter(|(_, w)| is_busy(w)).map(|(id, _)| *id).collect();
        let tickets: Vec<Ticket> = self.pool.open.keys().copied().collect();
        self.take_back(&tickets, DropReason::Aborted, out);
        for group in groups {
            self.record(Entry::Closed { group }, out);
        }
        for id in busy {
            let to = Origin { worker: id, incarnation: self.pool.workers[&id].incarnation };
            out.push(Action::Abort { to, before: Ticket(self.next_ticket) });
            self.sync(id, out);
        }
        Ok(())
    }

    fn discard(&mut self, groups: &[GroupId], out: &mut Outbox) -> Result<(), Fence> {
        for group in groups {
            self.close_delivered(*group, DropReason::Filtered, out);
        }
        Ok(())
    }

    fn close_delivered(&mut self, group: GroupId, reason: DropReason, out: &mut Outbox) {
        let Some(Group { state: GroupState::Delivered(ticket, _), attempts, .. }) = self.groups.get(&group) else {
            return;
        };
        let (ticket, attempts) = (*ticket, *attempts);
        self.record(Entry::Dropped { ticket, group, reason }, out);
        self.record(Entry::Closed { group }, out);
        out.push(Action::GiveUp { key: JobKey::Group(group), attempts });
    }

    fn set_paused(&mut self, is_paused: bool) -> Result<(), Fence> {
        self.is_paused = is_paused;
        Ok(())
    }

    fn tick(&mut self, out: &mut Outbox) -> Result<(), Fence> {
        while let Some(id) = self.pool.overdue(self.now) {
            let worker = &self.pool.workers[&id];
            let cause = match worker.phase {
                _ if worker.lease_until <= self.now => LossCause::LeaseExpired,
                WorkerPhase::Syncing(_) => LossCause::SyncTimedOut,
                _ => LossCause::Stalled,
            };
            self.lose(id, cause, out);
        }
        self.tell_trainer_again(out);
        Ok(())
    }
}
