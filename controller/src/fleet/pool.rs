//! Workers and what they have in hand, with the indexes by which the next one is found.
//!
//! Owns: phases, loads and deadlines of workers, and the queues of waiting jobs. Decides nothing.

use super::event::{JobKey, LossCause, Origin, Role, Ticket, Time, WorkerId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use temper_types::{GroupId, PolicyVersion};

/// Most prefixes of which it is remembered who has them cached.
const MAX_HOMES: usize = 4096;
/// Most bound groups of which it is remembered who holds what they keep: by far more than are under way at once.
const MAX_HOLDERS: usize = 65_536;

/// Where a worker stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerPhase {
    /// Registered; no version was published yet.
    Joining,
    /// Told to hold a version, which it has not attested yet.
    Syncing(PolicyVersion),
    /// Takes jobs.
    Ready,
    /// Finishes what it has before it takes new weights.
    Draining,
    /// Not counted on any more; it may register again.
    Lost(LossCause),
}

/// A worker as seen from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkerView {
    /// Who, in its last life.
    pub origin: Origin,
    /// What it does.
    pub role: Role,
    /// Where it stands.
    pub phase: WorkerPhase,
    /// What it attested last in this life.
    pub held: Option<PolicyVersion>,
    /// Jobs in its hands.
    pub in_flight: usize,
    /// Work in its hands: expected tokens of rollout workers, responses of reward workers.
    pub load: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Worker {
    pub(super) role: Role,
    pub(super) incarnation: u64,
    pub(super) phase: WorkerPhase,
    pub(super) held: Option<PolicyVersion>,
    pub(super) capacity: u32,
    pub(super) in_flight: BTreeSet<Ticket>,
    pub(super) load: u64,
    pub(super) lease_until: Time,
    pub(super) progress_by: Time,
    /// Its load, where it stands in the index of workers that can take a job.
    indexed_load: Option<u64>,
    /// Its deadline, where it stands in the index of deadlines.
    indexed_deadline: Option<Time>,
}

impl Worker {
    pub(super) fn new(role: Role) -> Self {
        Worker {
            role,
            incarnation: 0,
            phase: WorkerPhase::Lost(LossCause::ControllerRestarted),
            held: None,
            capacity: 1,
            in_flight: BTreeSet::new(),
            load: 0,
            lease_until: Time::MAX,
            progress_by: Time::MAX,
            indexed_load: None,
            indexed_deadline: None,
        }
    }

    pub(super) fn view(&self, id: WorkerId) -> WorkerView {
        WorkerView {
            origin: Origin { worker: id, incarnation: self.incarnation },
            role: self.role,
            phase: self.phase,
            held: self.held,
            in_flight: self.in_flight.len(),
            load: self.load,
        }
    }

    pub(super) fn is_lost(&self) -> bool {
        matches!(self.phase, WorkerPhase::Lost(_))
    }

    fn deadline(&self) -> Option<Time> {
        let at = self.lease_until.min(self.progress_by);
        (!self.is_lost() && at != Time::MAX).then_some(at)
    }

    fn load_if_available(&self) -> Option<u64> {
        let has_room = (self.in_flight.len() as u64) < u64::from(self.capacity);
        (self.phase == WorkerPhase::Ready && has_room).then_some(self.load)
    }
}

/// An attempt in a worker's hands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Attempt {
    pub(super) key: JobKey,
    pub(super) worker: WorkerId,
    pub(super) version: Option<PolicyVersion>,
    pub(super) cost: u64,
}

/// Jobs and workers of one role.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Queue {
    /// Waiting jobs by the version they are due for, oldest first.
    pub(super) waiting: BTreeSet<(u64, JobKey)>,
    /// Workers that can take a job, by load.
    available: BTreeSet<(u64, WorkerId)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Pool {
    pub(super) workers: BTreeMap<WorkerId, Worker>,
    pub(super) open: BTreeMap<Ticket, Attempt>,
    rollout: Queue,
    reward: Queue,
    deadlines: BTreeSet<(Time, WorkerId)>,
    homes: Places<u64, WorkerId>,
    holders: Places<GroupId, Origin>,
}

/// Where something is, of the last so many things.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Places<K, V> {
    of: BTreeMap<K, V>,
    /// Keys in the order in which they came.
    order: VecDeque<K>,
}

impl<K, V> Default for Places<K, V> {
    fn default() -> Self {
        Places { of: BTreeMap::new(), order: VecDeque::new() }
    }
}

impl<K: Ord + Copy, V> Places<K, V> {
    fn set(&mut self, key: K, value: V, most: usize) {
        if self.of.insert(key, value).is_some() {
            return;
        }
        self.order.push_back(key);
        if self.order.len() > most {
            self.order.pop_front().map(|oldest| self.of.remove(&oldest));
        }
    }
}

impl Pool {
    pub(super) fn queue(&self, role: Role) -> &Queue {
        match role {
            Role::Rollout => &self.rollout,
            Role::Reward => &self.reward,
        }
    }

    pub(super) fn queue_mut(&mut self, role: Role) -> &mut Queue {
        match role {
            Role::Rollout => &mut self.rollout,
            Role::Reward => &mut self.reward,
        }
    }

    /// Change a worker and bring the indexes up to date.
    pub(super) fn update(&mut self, id: WorkerId, change: impl FnOnce(&mut Worker)) {
        let Some(worker) = self.workers.get_mut(&id) else { return };
        change(worker);
        let (role, load, deadline) = (worker.role, worker.load_if_available(), worker.deadline());
        let old_load = std::mem::replace(&mut worker.indexed_load, load);
        let old_deadline = std::mem::replace(&mut worker.indexed_deadline, deadline);
        let available = &mut self.queue_mut(role).available;
        if old_load != load {
            old_load.map(|l| available.remove(&(l, id)));
            load.map(|l| available.insert((l, id)));
        }
        if old_deadline != deadline {
            old_deadline.map(|d| self.deadlines.remove(&(d, id)));
            deadline.map(|d| self.deadlines.insert((d, id)));
        }
    }

    /// Put an attempt into a worker's hands; its time runs from `now` where it had none.
    pub(super) fn attach(&mut self, ticket: Ticket, attempt: Attempt, progress_by: Time) {
        self.open.insert(ticket, attempt);
        self.update(attempt.worker, |worker| {
            if worker.in_flight.is_empty() {
                worker.progress_by = progress_by;
            }
            worker.in_flight.insert(ticket);
            worker.load += attempt.cost;
        });
    }

    /// Take an attempt out of its worker's hands.
    pub(super) fn detach(&mut self, ticket: Ticket) -> Option<Attempt> {
        let attempt = self.open.remove(&ticket)?;
        self.update(attempt.worker, |worker| {
            worker.in_flight.remove(&ticket);
            worker.load -= attempt.cost;
            if worker.in_flight.is_empty() {
                worker.progress_by = Time::MAX;
            }
        });
        Some(attempt)
    }

    /// The worker with the least load. Among those whose loads differ by less than a job of `cost`, the one that had
    /// `prefix` last, then the one with the least load, then the one with the lowest id.
    pub(super) fn choose(&self, role: Role, cost: u64, prefix: Option<u64>) -> Option<WorkerId> {
        let (least, id) = *self.queue(role).available.first()?;
        let quantum = cost.max(1);
        let home = prefix.and_then(|prefix| self.homes.of.get(&prefix)).copied();
        let is_near = |home: &WorkerId| {
            let load = self.workers.get(home).filter(|w| w.role == role).and_then(|w| w.indexed_load);
            load.is_some_and(|load| load / quantum == least / quantum)
        };
        Some(home.filter(is_near).unwrap_or(id))
    }

    /// True where some worker can take a job.
    pub(super) fn has_room(&self, role: Role) -> bool {
        !self.queue(role).available.is_empty()
    }

    pub(super) fn can_take_a_job(&self, id: WorkerId) -> bool {
        self.workers.get(&id).is_some_and(|worker| worker.indexed_load.is_some())
    }

    /// Who holds what a bound group keeps, in the life in which it was stored; `None` where that is over.
    pub(super) fn holder(&self, group: GroupId) -> Option<WorkerId> {
        let Origin { worker, incarnation } = *self.holders.of.get(&group)?;
        let lives = self.workers.get(&worker).is_some_and(|w| !w.is_lost() && w.incarnation == incarnation);
        lives.then_some(worker)
    }

    /// Remember who has a prefix cached.
    pub(super) fn set_home(&mut self, prefix: u64, worker: WorkerId) {
        self.homes.set(prefix, worker, MAX_HOMES);
    }

    /// Remember who holds what a bound group keeps.
    pub(super) fn set_holder(&mut self, group: GroupId, worker: WorkerId) {
        if let Some(incarnation) = self.workers.get(&worker).map(|worker| worker.incarnation) {
            self.holders.set(group, Origin { worker, incarnation }, MAX_HOLDERS);
        }
    }

    /// The worker whose deadline passed first, if any has.
    pub(super) fn overdue(&self, now: Time) -> Option<WorkerId> {
        self.deadlines.first().filter(|(at, _)| *at <= now).map(|(_, id)| *id)
    }

    /// When the next deadline passes.
    pub(super) fn next_deadline(&self) -> Option<Time> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    pub(super) fn view(&self) -> impl Iterator<Item = WorkerView> + '_ {
        self.workers.iter().map(|(id, worker)| worker.view(*id))
    }
}
