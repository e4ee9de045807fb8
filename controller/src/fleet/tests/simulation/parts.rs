//! The parts of the simulated system: workers, the trainer, and the loop that wants groups.

use super::super::super::{
    Action, ControlPlane, Event, GroupSpec, Job, JobKey, Origin, Role, Settlement, Ticket, WorkerId,
};
use super::checker::{Check, Checker, Violation, tokens};
use super::rng::mix;
use super::scenario::Scenario;
use std::collections::{BTreeMap, BTreeSet};
use temper_types::{ContentHash, GroupId, PolicyVersion, PromptId};

/// The weights after so many updates.
pub fn weights(number: u64) -> PolicyVersion {
    let half = mix(number, 77).to_le_bytes();
    let mut hash = [0; 16];
    hash[..8].copy_from_slice(&half);
    PolicyVersion { number, hash: ContentHash(hash) }
}

/// A message to the controller, with what the control plane does not read.
#[derive(Debug, Clone)]
pub struct ToController {
    pub event: Event,
    pub payload: Vec<u64>,
}

impl From<Event> for ToController {
    fn from(event: Event) -> Self {
        ToController { event, payload: Vec::new() }
    }
}

/// A worker process.
pub struct SimWorker {
    pub origin: Origin,
    pub role: Role,
    pub is_up: bool,
    pub held: Option<PolicyVersion>,
    pub running: BTreeMap<Ticket, Job>,
}

impl SimWorker {
    pub fn new(id: usize, role: Role) -> Self {
        let origin = Origin { worker: WorkerId(id as u32), incarnation: 0 };
        SimWorker { origin, role, is_up: false, held: None, running: BTreeMap::new() }
    }

    /// Begin a life. One that goes on in the same process keeps its weights, and nothing else.
    pub fn begin_life(&mut self) -> ToController {
        self.is_up = true;
        self.origin.incarnation += 1;
        self.running.clear();
        Event::Register { origin: self.origin, role: self.role, capacity: 2 }.into()
    }

    pub fn crash(&mut self) {
        self.is_up = false;
        self.held = None;
        self.running.clear();
    }

    /// Take weights, which may arrive damaged; older ones than it has are ignored.
    pub fn sync(&mut self, version: PolicyVersion, is_damaged: bool) -> Option<ToController> {
        if self.held.is_some_and(|held| held.number > version.number) {
            return None;
        }
        if self.held != Some(version) {
            let damaged = PolicyVersion { hash: ContentHash([0xee; 16]), ..version };
            self.held = Some(if is_damaged { damaged } else { version });
        }
        Some(Event::Attest { origin: self.origin, version: self.held? }.into())
    }

    /// The answer to a job that is done, unless it was given up.
    pub fn finish(&mut self, ticket: Ticket) -> Option<ToController> {
        let job = self.running.remove(&ticket)?;
        let (versions, payload) = match (&job, self.held) {
            (Job::Group(spec), Some(held)) => (vec![held], tokens(spec, held)),
            _ => (Vec::new(), Vec::new()),
        };
        let num_tokens = 10 * payload.len() as u64;
        Some(ToController { event: Event::Answer { origin: self.origin, ticket, versions, num_tokens }, payload })
    }
}

/// The trainer: it never fails, but its messages do.
#[derive(Default)]
pub struct SimTrainer {
    term: u64,
    done: u64,
}

impl SimTrainer {
    pub fn train(
        &mut self,
        term: u64,
        step: u64,
        tickets: &[Ticket],
        checker: &mut Checker,
    ) -> Result<Option<Event>, Violation> {
        if term < self.term || step > self.done + 1 {
            return Ok(None);
        }
        self.term = term;
        if step == self.done + 1 {
            checker.trains(step, tickets)?;
            self.done = step;
        }
        Ok(Some(Event::StepDone { step, version: Some(weights(step)) }))
    }

    pub fn ask(&mut self, term: u64) -> Option<Event> {
        if term < self.term {
            return None;
        }
        self.term = term;
        let version = (self.done > 0).then(|| weights(self.done));
        Some(Event::TrainerAt { term, step: self.done, version })
    }
}

/// The loop: submits the groups of each step, has them scored, and trains on them. It lives and dies with the
/// controller.
#[derive(Default)]
pub struct Conductor {
    answers: BTreeMap<GroupId, Ticket>,
    scoring: BTreeSet<GroupId>,
    scored: BTreeSet<GroupId>,
}

impl Conductor {
    pub fn accept(&mut self, ticket: Ticket, key: JobKey, payload: &[u64], checker: &Checker) -> Check {
        match key {
            JobKey::Group(group) => {
                checker.accepted(ticket, payload)?;
                self.answers.insert(group, ticket);
            }
            JobKey::Score(job) => {
                self.scoring.remove(&GroupId(job));
                self.scored.insert(GroupId(job));
            }
        }
        Ok(())
    }

    pub fn give_up(&mut self, key: JobKey) {
        if let JobKey::Score(job) = key {
            self.scoring.remove(&GroupId(job));
        }
    }

    /// What to do next, if anything.
    pub fn next(&mut self, plane: &ControlPlane, scenario: &Scenario) -> Option<Event> {
        let Some(version) = plane.version() else { return Some(Event::Publish { version: weights(0) }) };
        let open: BTreeSet<GroupId> = plane.open_groups().collect();
        self.answers.retain(|group, _| open.contains(group));
        self.scored.retain(|group| open.contains(group));
        let ahead = version.number + plane.config.max_staleness + 1;
        for due in version.number..=ahead.min(scenario.num_steps - 1) {
            let missing: Vec<GroupSpec> = groups_of(scenario, due).filter(|s| !open.contains(&s.group)).collect();
            if !missing.is_empty() {
                return Some(Event::Submit { groups: missing });
            }
        }
        let unscored = self.answers.keys().find(|g| !self.scored.contains(g) && !self.scoring.contains(g)).copied();
        if let Some(group) = unscored {
            self.scoring.insert(group);
            return Some(Event::SubmitScore { job: group.0, cost: scenario.samples_per_group });
        }
        let wanted: Vec<GroupId> = groups_of(scenario, version.number).map(|s| s.group).collect();
        let is_ready = wanted.iter().all(|g| self.scored.contains(g) && self.answers.contains_key(g));
        let is_over = version.number >= scenario.num_steps;
        if is_over || !is_ready || plane.training_step().is_some() || plane.is_asking_trainer {
            return None;
        }
        let keep = |group: &GroupId, index: u32| !mix(group.0, u64::from(index)).is_multiple_of(5);
        let settle = |group: GroupId| Settlement {
            group,
            trained: (0..scenario.samples_per_group as u32).filter(|i| keep(&group, *i)).collect(),
        };
        Some(Event::BeginStep { step: version.number + 1, groups: wanted.into_iter().map(settle).collect() })
    }
}

/// The groups that step `due + 1` trains on.
fn groups_of(scenario: &Scenario, due: u64) -> impl Iterator<Item = GroupSpec> + '_ {
    let first = due * scenario.groups_per_step;
    (first..first + scenario.groups_per_step).map(move |id| GroupSpec {
        group: GroupId(id),
        prompt: PromptId(id % 3),
        seeds: (0..scenario.samples_per_group).map(|i| mix(scenario.seed, id * 100 + i)).collect(),
        due,
        prompt_tokens: 5 + id % 7,
        max_new_tokens: 30,
        prefix: id % 3,
        is_bound: id % 5 == 0,
    })
}

/// What a worker is told.
#[derive(Debug, Clone)]
pub enum Order {
    Job(Origin, Ticket, Job, Option<PolicyVersion>),
    Sync(Origin, PolicyVersion),
    Abort(Origin, Ticket),
    Rejoin(Origin),
}

impl Order {
    pub fn from_action(action: &Action) -> Option<(WorkerId, Order)> {
        let (to, order) = match action {
            Action::Dispatch { to, ticket, job, version } => (to, Order::Job(*to, *ticket, job.clone(), *version)),
            Action::Sync { to, version } => (to, Order::Sync(*to, *version)),
            Action::Abort { to, before } => (to, Order::Abort(*to, *before)),
            Action::Rejoin { origin } => (origin, Order::Rejoin(*origin)),
            _ => return None,
        };
        Some((to.worker, order))
    }

    pub fn origin(&self) -> Origin {
        match self {
            Order::Job(to, ..) | Order::Sync(to, _) | Order::Abort(to, _) | Order::Rejoin(to) => *to,
        }
    }
}
