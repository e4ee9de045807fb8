//! What must hold after every event, judged from outside: by what was made durable, sent, held and trained.

use super::super::super::journal::Entry;
use super::super::super::plane::GroupState;
use super::super::super::{ControlPlane, Fence, GroupSpec, JobKey, Origin, Role, Ticket, Time, WorkerId};
use super::rng::mix;
use std::collections::{BTreeMap, BTreeSet};
use temper_types::{ContentHash, GroupId, PolicyVersion};

/// A broken invariant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Which.
    pub invariant: &'static str,
    /// How.
    pub detail: String,
}

pub type Check = Result<(), Violation>;

pub fn violated<T>(invariant: &'static str, detail: String) -> Result<T, Violation> {
    Err(Violation { invariant, detail })
}

/// An attempt, as its durable entries tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Audit {
    group: GroupId,
    version: PolicyVersion,
    num_samples: u64,
    num_trained: Option<u64>,
    is_closed: bool,
}

/// Keeps books of its own.
pub struct Checker {
    max_staleness: u64,
    specs: BTreeMap<GroupId, GroupSpec>,
    /// Groups that were submitted and neither trained nor closed.
    open: BTreeSet<GroupId>,
    attempts: BTreeMap<Ticket, Audit>,
    begun: BTreeMap<u64, Vec<(Ticket, u64)>>,
    published: Vec<PolicyVersion>,
    /// What each life of a worker attested last.
    attested: BTreeMap<Origin, PolicyVersion>,
    renewed: BTreeMap<Origin, Time>,
    /// Attempts on which the trainer trained, by step.
    pub trained: BTreeMap<Ticket, u64>,
    trained_groups: BTreeSet<GroupId>,
}

impl Checker {
    pub fn new(max_staleness: u64) -> Self {
        Checker {
            max_staleness,
            specs: BTreeMap::new(),
            open: BTreeSet::new(),
            attempts: BTreeMap::new(),
            begun: BTreeMap::new(),
            published: Vec::new(),
            attested: BTreeMap::new(),
            renewed: BTreeMap::new(),
            trained: BTreeMap::new(),
            trained_groups: BTreeSet::new(),
        }
    }

    pub fn durable(&mut self, entries: &[Entry]) -> Check {
        entries.iter().try_for_each(|entry| self.entry(entry))
    }

    fn entry(&mut self, entry: &Entry) -> Check {
        match entry {
            Entry::Submitted(spec) => {
                let first = self.specs.entry(spec.group).or_insert_with(|| spec.clone());
                if first.seeds != spec.seeds || !self.open.insert(spec.group) {
                    return violated("ledger", format!("group {} is submitted again", spec.group));
                }
            }
            Entry::Issued { ticket, group, version } => {
                let num_samples = self.specs[group].seeds.len() as u64;
                let audit =
                    Audit { group: *group, version: *version, num_samples, num_trained: None, is_closed: false };
                if self.attempts.insert(*ticket, audit).is_some() {
                    return violated("ledger", format!("ticket {} is issued twice", ticket.0));
                }
            }
            Entry::Dropped { ticket, .. } => self.close(*ticket, 0)?,
            Entry::Closed { group } => {
                self.open.remove(group);
            }
            Entry::Published { version } => self.publish(*version)?,
            Entry::StepBegun { step, groups } => {
                let count = |(ticket, s): &(Ticket, super::super::super::Settlement)| (*ticket, s.trained.len() as u64);
                self.begun.insert(*step, groups.iter().map(count).collect());
            }
            Entry::StepDone { step, version } => {
                for (ticket, num_trained) in self.begun.remove(step).unwrap_or_default() {
                    self.close(ticket, num_trained)?;
                    self.open.remove(&self.attempts[&ticket].group);
                }
                version.map_or(Ok(()), |version| self.publish(version))?;
            }
            Entry::Began { .. } | Entry::Registered { .. } | Entry::StepCancelled { .. } => {}
        }
        Ok(())
    }

    fn close(&mut self, ticket: Ticket, num_trained: u64) -> Check {
        match self.attempts.get_mut(&ticket) {
            Some(audit) if !audit.is_closed => {
                audit.is_closed = true;
                audit.num_trained = Some(num_trained);
                Ok(())
            }
            Some(_) => violated("ledger", format!("ticket {} ends twice", ticket.0)),
            None => violated("ledger", format!("ticket {} ends and was never issued", ticket.0)),
        }
    }

    fn publish(&mut self, version: PolicyVersion) -> Check {
        if self.published.last().is_some_and(|last| version.number <= last.number) {
            return violated("versions monotone", format!("{version} is published after {:?}", self.published.last()));
        }
        self.published.push(version);
        Ok(())
    }

    pub fn renewed(&mut self, origin: Origin, now: Time) {
        self.renewed.insert(origin, now);
    }

    /// A worker proves what it holds.
    pub fn attested(&mut self, origin: Origin, version: PolicyVersion) -> Check {
        match self.attested.insert(origin, version) {
            Some(before) if before.number > version.number => {
                violated("versions monotone", format!("{origin:?} went back from {before} to {version}"))
            }
            _ => Ok(()),
        }
    }

    /// A group is given to a worker.
    pub fn dispatched(&self, to: Origin, spec: &GroupSpec, version: Option<PolicyVersion>) -> Check {
        if self.specs[&spec.group].seeds != spec.seeds {
            return violated("same noise", format!("group {} is issued with other seeds", spec.group));
        }
        if version.is_none() || self.attested.get(&to).copied() != version {
            let attested = self.attested.get(&to);
            return violated("attested before serving", format!("{to:?} gets {version:?} and attested {attested:?}"));
        }
        Ok(())
    }

    /// A worker begins a group with the weights that it holds.
    pub fn generates(&self, origin: Origin, held: Option<PolicyVersion>, wanted: Option<PolicyVersion>) -> Check {
        if held != wanted || wanted.is_none() {
            return violated("attested before serving", format!("{origin:?} holds {held:?}, not {wanted:?}"));
        }
        Ok(())
    }

    /// An answer is accepted.
    pub fn accepted(&self, ticket: Ticket, payload: &[u64]) -> Check {
        let audit = &self.attempts[&ticket];
        if payload != tokens(&self.specs[&audit.group], audit.version) {
            return violated("no mixed weights", format!("the answer of ticket {} is not its own", ticket.0));
        }
        Ok(())
    }

    /// The trainer trains on attempts.
    pub fn trains(&mut self, step: u64, tickets: &[Ticket]) -> Check {
        for ticket in tickets {
            let audit = self.attempts[ticket];
            if self.trained.insert(*ticket, step).is_some() || !self.trained_groups.insert(audit.group) {
                return violated("trained once", format!("group {} is trained again in step {step}", audit.group));
            }
            let staleness = (step - 1).saturating_sub(audit.version.number);
            if staleness > self.max_staleness {
                return violated("staleness bound", format!("ticket {} is {staleness} versions old", ticket.0));
            }
        }
        Ok(())
    }

    /// After every event.
    pub fn check(&self, plane: &ControlPlane) -> Check {
        if !plane.ledger.is_balanced() {
            return violated("ledger", format!("{:?}", plane.ledger));
        }
        for (id, worker) in &plane.pool.workers {
            if worker.in_flight.len() as u64 > u64::from(worker.capacity) {
                return violated("bounded in flight", format!("{id:?} has {}", worker.in_flight.len()));
            }
        }
        let open: BTreeSet<GroupId> = plane.open_groups().collect();
        if open != self.open {
            return violated("ledger", format!("open groups are {open:?}, by the books {:?}", self.open));
        }
        self.nothing_is_forgotten(plane)
    }

    fn nothing_is_forgotten(&self, plane: &ControlPlane) -> Check {
        for (id, group) in &plane.groups {
            let key = (group.spec.due, JobKey::Group(*id));
            let is_kept = match group.state {
                GroupState::Waiting => plane.pool.queue(Role::Rollout).waiting.contains(&key),
                GroupState::Running(ticket) => plane.pool.open.contains_key(&ticket) && plane.ledger.is_open(ticket),
                GroupState::Delivered(ticket, _) | GroupState::Training(ticket) => plane.ledger.is_open(ticket),
            };
            if !is_kept {
                return violated("no sample lost", format!("group {id} is {:?}", group.state));
            }
        }
        Ok(())
    }

    /// After every tick.
    pub fn leases(&self, plane: &ControlPlane, now: Time) -> Check {
        for (id, worker) in plane.pool.workers.iter().filter(|(_, w)| !w.is_lost()) {
            let origin = Origin { worker: *id, incarnation: worker.incarnation };
            let heard = self.renewed.get(&origin).copied().unwrap_or(0);
            if heard.saturating_add(plane.config.lease) <= now {
                return violated(
                    "leases",
                    format!("{origin:?} was last heard at {heard} and counts as alive at {now}"),
                );
            }
        }
        Ok(())
    }

    /// After a recovery.
    pub fn recovered(&self, plane: &ControlPlane) -> Check {
        let issued: u64 = self.attempts.values().map(|a| a.num_samples).sum();
        let trained: u64 = self.attempts.values().filter_map(|a| a.num_trained).sum();
        let ledger = &plane.ledger;
        if (ledger.issued(), ledger.trained()) != (issued, trained) || plane.version != self.published.last().copied() {
            let books = format!("issued {issued}, trained {trained}, version {:?}", self.published.last());
            return violated("journal", format!("{books} became {ledger:?}, version {:?}", plane.version));
        }
        Ok(())
    }

    /// At the end.
    pub fn finished(&self, plane: &ControlPlane, num_groups: u64) -> Check {
        self.recovered(plane)?;
        let closed = self.attempts.iter().filter(|(_, a)| a.num_trained.is_some_and(|n| n > 0));
        let unknown: Vec<Ticket> = closed.map(|(t, _)| *t).filter(|t| !self.trained.contains_key(t)).collect();
        if !unknown.is_empty() || self.trained_groups.len() as u64 != num_groups || plane.ledger.open() > 0 {
            let trained = self.trained_groups.len();
            return violated("ledger", format!("{trained} of {num_groups} groups trained, not by anyone: {unknown:?}"));
        }
        Ok(())
    }
}

/// Fences that change more than their count, as documented.
pub fn is_pure(fence: Fence) -> bool {
    !matches!(fence, Fence::WrongVersion | Fence::StaleVersion)
}

/// What a group's tokens are: a function of its noise and the weights.
pub fn tokens(spec: &GroupSpec, version: PolicyVersion) -> Vec<u64> {
    let ContentHash(hash) = version.hash;
    let weights = hash.iter().fold(version.number, |sum, byte| mix(sum, u64::from(*byte)));
    spec.seeds.iter().map(|seed| mix(*seed, weights)).collect()
}

/// Used to say whose worker it is in messages.
pub fn worker(id: usize) -> WorkerId {
    WorkerId(id as u32)
}
