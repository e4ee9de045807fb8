//! Bugs put into the control plane on purpose, from outside: the code under test has no switch for them.

use super::super::super::journal::Entry;
use super::super::super::plane::GroupState;
use super::super::super::pool::WorkerPhase;
use super::super::super::{Action, ControlPlane, Event, Job, JobKey, Origin, Role, Ticket, Time};
use std::sync::Arc;
use temper_types::PolicyVersion;

/// A bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Messages of an earlier life of a worker count as if they were of the current one.
    FenceDropped,
    /// An attestation is believed whatever hash it carries.
    HashUnchecked,
    /// A silent worker is never lost.
    LeaseNeverExpires,
    /// New weights are published under the number of the old ones.
    VersionReused,
    /// An attempt of the previous step is trained on again.
    DuplicateTrained,
    /// A group whose attempt was given up does not wait again.
    SampleForgotten,
    /// A group is issued again with other seeds.
    RetryWithNewNoise,
    /// A worker counts as synced when it is told to sync.
    ReorderedPastSync,
    /// What was appended last is not on disk yet when the controller crashes.
    LostBeforeFsync,
    /// A worker that registers takes part with the weights that it happens to hold.
    AdmittedWithOldWeights,
}

impl Fault {
    pub const ALL: [Fault; 10] = [
        Fault::FenceDropped,
        Fault::HashUnchecked,
        Fault::LeaseNeverExpires,
        Fault::VersionReused,
        Fault::DuplicateTrained,
        Fault::SampleForgotten,
        Fault::RetryWithNewNoise,
        Fault::ReorderedPastSync,
        Fault::LostBeforeFsync,
        Fault::AdmittedWithOldWeights,
    ];
}

/// The control plane, with at most one bug.
pub struct Subject {
    pub plane: ControlPlane,
    fault: Option<Fault>,
    last_trained: Option<Ticket>,
}

impl Subject {
    pub fn new(plane: ControlPlane, fault: Option<Fault>) -> Self {
        Subject { plane, fault, last_trained: None }
    }

    pub fn step(&mut self, event: Event, now: Time) -> Vec<Action> {
        let registered = match &event {
            Event::Register { origin, role: Role::Rollout, .. } => Some(*origin),
            _ => None,
        };
        let event = self.before(event);
        let mut actions = self.plane.step(event, now);
        match self.fault {
            Some(Fault::DuplicateTrained) => self.train_again(&mut actions),
            Some(Fault::SampleForgotten) => self.forget(&actions),
            Some(Fault::RetryWithNewNoise) => self.change_noise(&mut actions),
            Some(Fault::ReorderedPastSync) => self.attest_at_once(&mut actions, now),
            Some(Fault::AdmittedWithOldWeights) => self.admit(registered, &mut actions, now),
            _ => {}
        }
        actions
    }

    fn before(&mut self, event: Event) -> Event {
        match (self.fault, event) {
            (Some(Fault::FenceDropped), Event::Attest { origin, version }) => {
                Event::Attest { origin: self.current(origin), version }
            }
            (Some(Fault::FenceDropped), Event::Answer { origin, ticket, versions, num_tokens }) => {
                Event::Answer { origin: self.current(origin), ticket, versions, num_tokens }
            }
            (Some(Fault::HashUnchecked), Event::Attest { origin, version }) => {
                Event::Attest { origin, version: self.wanted(version) }
            }
            (Some(Fault::VersionReused), Event::StepDone { step, version: Some(new) })
                if self.plane.training_step() == Some(step) =>
            {
                let current = self.plane.version.take().map_or(0, |v| v.number);
                Event::StepDone { step, version: Some(PolicyVersion { number: current, ..new }) }
            }
            (Some(Fault::LeaseNeverExpires), Event::Tick) => {
                let ids: Vec<_> = self.plane.pool.workers.keys().copied().collect();
                ids.iter().for_each(|id| self.plane.pool.update(*id, |w| w.lease_until = Time::MAX));
                Event::Tick
            }
            (_, event) => event,
        }
    }

    fn current(&self, origin: Origin) -> Origin {
        let known = self.plane.pool.workers.get(&origin.worker);
        Origin { incarnation: known.map_or(origin.incarnation, |w| w.incarnation), ..origin }
    }

    fn wanted(&self, claimed: PolicyVersion) -> PolicyVersion {
        self.plane.version.filter(|v| v.number == claimed.number).unwrap_or(claimed)
    }

    fn train_again(&mut self, actions: &mut [Action]) {
        for action in actions {
            if let Action::Train { tickets, .. } = action {
                let first = tickets.first().copied();
                tickets.extend(self.last_trained);
                self.last_trained = first;
            }
        }
    }

    fn forget(&mut self, actions: &[Action]) {
        let Some(Action::Append(entries)) = actions.first() else { return };
        for entry in entries {
            let Entry::Dropped { group, .. } = entry else { continue };
            let Some(state) = self.plane.groups.get(group).filter(|g| g.state == GroupState::Waiting) else { continue };
            let due = state.spec.due;
            self.plane.pool.queue_mut(Role::Rollout).waiting.remove(&(due, JobKey::Group(*group)));
        }
    }

    fn change_noise(&self, actions: &mut [Action]) {
        for action in actions {
            let Action::Dispatch { job: Job::Group(spec), .. } = action else { continue };
            if self.plane.groups[&spec.group].attempts > 1 {
                Arc::make_mut(spec).seeds.iter_mut().for_each(|seed| *seed += 1);
            }
        }
    }

    fn attest_at_once(&mut self, actions: &mut Vec<Action>, now: Time) {
        let told: Vec<(Origin, PolicyVersion)> = actions
            .iter()
            .filter_map(|action| match action {
                Action::Sync { to, version } => Some((*to, *version)),
                _ => None,
            })
            .collect();
        for (origin, version) in told {
            actions.extend(self.plane.step(Event::Attest { origin, version }, now));
        }
    }

    fn admit(&mut self, registered: Option<Origin>, actions: &mut Vec<Action>, now: Time) {
        let Some(origin) = registered else { return };
        let is_new = self.plane.live(origin).is_ok_and(|w| matches!(w.phase, WorkerPhase::Syncing(_)));
        if let (true, Some(version)) = (is_new, self.plane.version) {
            actions.retain(|action| !matches!(action, Action::Sync { to, .. } if *to == origin));
            actions.extend(self.plane.step(Event::Attest { origin, version }, now));
        }
    }
}
