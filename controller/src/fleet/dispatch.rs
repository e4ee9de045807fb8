//! Jobs: who gets them, and which answers count.

use super::event::{Action, Fence, GroupSpec, Job, JobKey, LossCause, Origin, Role, Ticket, WorkerId};
use super::journal::Entry;
use super::ledger::DropReason;
use super::plane::{Bundle, ControlPlane, Group, GroupState, Outbox};
use super::pool::{Attempt, Worker, WorkerPhase};
use std::sync::Arc;
use temper_types::{GroupId, PolicyVersion};

/// Samples after which older lengths count half.
const LENGTH_WINDOW: u64 = 4096;

impl ControlPlane {
    pub(super) fn submit(&mut self, groups: Vec<GroupSpec>, out: &mut Outbox) -> Result<(), Fence> {
        let mut result = Ok(());
        for spec in groups {
            if self.groups.contains_key(&spec.group) {
                result = Err(Fence::DuplicateJob);
            } else {
                self.record(Entry::Submitted(spec), out);
            }
        }
        result
    }

    pub(super) fn add_group(&mut self, spec: Arc<GroupSpec>) {
        self.pool.queue_mut(Role::Rollout).waiting.insert((spec.due, JobKey::Group(spec.group)));
        let group = Group { spec, state: GroupState::Waiting, attempts: 0, losses: 0 };
        self.groups.insert(group.spec.group, group);
    }

    pub(super) fn submit_score(&mut self, job: u64, cost: u64) -> Result<(), Fence> {
        if self.bundles.contains_key(&job) {
            return Err(Fence::DuplicateJob);
        }
        self.bundles.insert(job, Bundle { cost, attempts: 0 });
        self.pool.queue_mut(Role::Reward).waiting.insert((0, JobKey::Score(job)));
        Ok(())
    }

    /// Give waiting jobs to workers that can take them.
    pub(super) fn dispatch(&mut self, out: &mut Outbox) {
        if self.is_paused {
            return;
        }
        while let Some((spec, version, worker)) = self.next_group_to_issue() {
            let (group, cost) = (spec.group, self.expected_tokens(&spec));
            let ticket = self.new_ticket();
            self.pool.set_home(spec.prefix, worker);
            if spec.is_bound {
                self.pool.set_holder(group, worker);
            }
            self.record(Entry::Issued { ticket, group, version }, out);
            let attempt = Attempt { key: JobKey::Group(group), worker, version: Some(version), cost };
            self.hand_over((ticket, attempt), Job::Group(spec), out);
        }
        while let Some((_, JobKey::Score(job))) = self.pool.queue(Role::Reward).waiting.first().copied() {
            let cost = self.bundles[&job].cost;
            let Some(worker) = self.pool.choose(Role::Reward, cost, None) else { break };
            let ticket = self.new_ticket();
            self.pool.queue_mut(Role::Reward).waiting.remove(&(0, JobKey::Score(job)));
            self.bundles.entry(job).and_modify(|bundle| bundle.attempts += 1);
            let attempt = Attempt { key: JobKey::Score(job), worker, version: None, cost };
            self.hand_over((ticket, attempt), Job::Score { job, cost }, out);
        }
    }

    /// The oldest group that is due and that a worker can take, with the weights and the worker.
    fn next_group_to_issue(&self) -> Option<(Arc<GroupSpec>, PolicyVersion, WorkerId)> {
        let version = self.version?;
        if !self.pool.has_room(Role::Rollout) {
            return None;
        }
        let last_due = version.number.saturating_add(self.config.max_staleness);
        let waiting = self.pool.queue(Role::Rollout).waiting.iter().take_while(|(due, _)| *due <= last_due);
        waiting.into_iter().find_map(|(_, key)| {
            let JobKey::Group(group) = key else { return None };
            let spec = &self.groups[group].spec;
            Some((Arc::clone(spec), version, self.worker_for(spec)?))
        })
    }

    /// Who takes a group now: of one that is bound the worker that had it, as long as that life of it lasts.
    fn worker_for(&self, spec: &GroupSpec) -> Option<WorkerId> {
        match self.pool.holder(spec.group).filter(|_| spec.is_bound) {
            Some(holder) => self.pool.can_take_a_job(holder).then_some(holder),
            None => self.pool.choose(Role::Rollout, self.expected_tokens(spec), Some(spec.prefix)),
        }
    }

    /// The durable part of issuing a group.
    pub(super) fn issue_group(&mut self, ticket: Ticket, group: GroupId) {
        let Some(state) = self.groups.get_mut(&group) else { return };
        state.state = GroupState::Running(ticket);
        state.attempts += 1;
        self.ledger.issue(ticket, state.spec.seeds.len() as u64);
        self.pool.queue_mut(Role::Rollout).waiting.remove(&(state.spec.due, JobKey::Group(group)));
    }

    fn hand_over(&mut self, (ticket, attempt): (Ticket, Attempt), job: Job, out: &mut Outbox) {
        let progress_by = self.now.saturating_add(self.config.progress_timeout);
        self.pool.attach(ticket, attempt, progress_by);
        let incarnation = self.pool.workers[&attempt.worker].incarnation;
        let to = Origin { worker: attempt.worker, incarnation };
        out.push(Action::Dispatch { to, ticket, job, version: attempt.version });
    }

    fn new_ticket(&mut self) -> Ticket {
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        ticket
    }

    /// Prompt rows once, and of every sample as many tokens as samples had in the mean, at most what it may have.
    fn expected_tokens(&self, spec: &GroupSpec) -> u64 {
        let (tokens, samples) = self.lengths;
        let mean = tokens.checked_div(samples).unwrap_or(spec.max_new_tokens);
        spec.prompt_tokens + spec.seeds.len() as u64 * mean.min(spec.max_new_tokens).max(1)
    }

    pub(super) fn answer(
        &mut self,
        origin: Origin,
        ticket: Ticket,
        (versions, num_tokens): (&[PolicyVersion], u64),
        out: &mut Outbox,
    ) -> Result<(), Fence> {
        let attempt = self.attempt_of(origin, ticket)?;
        if versions.iter().any(|v| Some(*v) != attempt.version) {
            self.lose(origin.worker, LossCause::WrongWeights, out);
            return Err(Fence::WrongVersion);
        }
        if let (JobKey::Group(group), Some(version)) = (attempt.key, attempt.version) {
            let state = &self.groups[&group];
            let consumed_at = self.version.map_or(0, |v| v.number).max(state.spec.due);
            if consumed_at - version.number > self.config.max_staleness {
                self.record(Entry::Dropped { ticket, group, reason: DropReason::TooStale }, out);
                self.made_progress(origin.worker, out);
                return Err(Fence::StaleVersion);
            }
            self.observe_length(num_tokens, state.spec.seeds.len() as u64);
            self.groups.entry(group).and_modify(|g| g.state = GroupState::Delivered(ticket, version));
        }
        if let JobKey::Score(job) = attempt.key {
            self.bundles.remove(&job);
        }
        self.pool.detach(ticket);
        out.push(Action::Accept { ticket, key: attempt.key });
        self.made_progress(origin.worker, out);
        Ok(())
    }

    /// The attempt that a message is about, if it is in the sender's hands.
    fn attempt_of(&self, origin: Origin, ticket: Ticket) -> Result<Attempt, Fence> {
        self.live(origin)?;
        match self.pool.open.get(&ticket) {
            Some(attempt) if attempt.worker == origin.worker => Ok(*attempt),
            Some(_) => Err(Fence::WrongWorker),
            None if self.ledger.is_open(ticket) => Err(Fence::DuplicateAnswer),
            None => Err(Fence::LateAnswer),
        }
    }

    pub(super) fn refuse(&mut self, origin: Origin, ticket: Ticket, out: &mut Outbox) -> Result<(), Fence> {
        let key = self.attempt_of(origin, ticket)?.key;
        let attempts = match key {
            JobKey::Group(group) => {
                let attempts = self.groups[&group].attempts;
                self.record(Entry::Dropped { ticket, group, reason: DropReason::Refused }, out);
                self.record(Entry::Closed { group }, out);
                attempts
            }
            JobKey::Score(job) => {
                self.pool.detach(ticket);
                self.bundles.remove(&job).map_or(0, |bundle| bundle.attempts)
            }
        };
        out.push(Action::GiveUp { key, attempts });
        self.made_progress(origin.worker, out);
        Ok(())
    }

    /// A worker gave an answer: its time runs anew, and where it drained it takes the new weights.
    fn made_progress(&mut self, id: WorkerId, out: &mut Outbox) {
        let progress_by = self.now.saturating_add(self.config.progress_timeout);
        self.pool.update(id, |worker| {
            if !worker.in_flight.is_empty() {
                worker.progress_by = progress_by;
            }
        });
        let is_drained = |w: &Worker| w.phase == WorkerPhase::Draining && w.in_flight.is_empty();
        if self.pool.workers.get(&id).is_some_and(is_drained) {
            self.sync(id, out);
        }
    }

    fn observe_length(&mut self, num_tokens: u64, num_samples: u64) {
        self.lengths.0 += num_tokens;
        self.lengths.1 += num_samples;
        if self.lengths.1 >= LENGTH_WINDOW {
            self.lengths = (self.lengths.0 / 2, self.lengths.1 / 2);
        }
    }
}
