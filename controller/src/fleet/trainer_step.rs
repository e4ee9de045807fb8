//! Training steps: which samples they consume, and that each is done once.

use super::event::{Action, Fence, Outcome, Settlement, Ticket, Time};
use super::journal::Entry;
use super::ledger::DropReason;
use super::plane::{ControlPlane, Group, GroupState, Outbox};
use temper_types::{GroupId, PolicyVersion};

/// A step that the trainer was told to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Training {
    pub(super) step: u64,
    pub(super) groups: Vec<(Ticket, Settlement)>,
}

impl ControlPlane {
    pub(super) fn begin_step(&mut self, step: u64, groups: Vec<Settlement>, out: &mut Outbox) -> Result<(), Fence> {
        // An answer that is still awaited is about the steps before this one.
        if self.training.is_some() || self.is_asking_trainer || step <= self.last_step {
            return Err(Fence::StepRefused);
        }
        let groups: Vec<(Ticket, Settlement)> = groups
            .into_iter()
            .map(|settlement| Some((self.trainable(&settlement)?, settlement)))
            .collect::<Option<_>>()
            .ok_or(Fence::StepRefused)?;
        let mut ids: Vec<GroupId> = groups.iter().map(|(_, s)| s.group).collect();
        ids.sort_unstable();
        ids.dedup();
        if ids.len() < groups.len() {
            return Err(Fence::StepRefused);
        }
        self.record(Entry::StepBegun { step, groups }, out);
        self.tell_trainer(out);
        Ok(())
    }

    /// The delivered attempt of a group that may be trained on now as asked.
    fn trainable(&self, settlement: &Settlement) -> Option<Ticket> {
        let group = self.groups.get(&settlement.group)?;
        let GroupState::Delivered(ticket, version) = group.state else { return None };
        let num_samples = group.spec.seeds.len() as u64;
        let ascends = settlement.trained.windows(2).all(|pair| pair[0] < pair[1]);
        let is_inside = settlement.trained.iter().all(|index| u64::from(*index) < num_samples);
        let staleness = self.version?.number.saturating_sub(version.number);
        (ascends && is_inside && staleness <= self.config.max_staleness).then_some(ticket)
    }

    pub(super) fn begin_training(&mut self, step: u64, groups: &[(Ticket, Settlement)]) {
        for (ticket, settlement) in groups {
            self.groups.entry(settlement.group).and_modify(|g| g.state = GroupState::Training(*ticket));
        }
        self.training = Some(Training { step, groups: groups.to_vec() });
    }

    pub(super) fn step_done(
        &mut self,
        step: u64,
        version: Option<PolicyVersion>,
        out: &mut Outbox,
    ) -> Result<(), Fence> {
        if self.training_step() != Some(step) {
            return Err(Fence::StepRepeated);
        }
        if let (Some(new), Some(current)) = (version, self.version)
            && new.number <= current.number
        {
            return Err(Fence::VersionReused);
        }
        self.record(Entry::StepDone { step, version }, out);
        self.told_trainer_at = self.is_asking_trainer.then_some(self.now);
        if version.is_some() {
            self.bump(out);
        }
        Ok(())
    }

    pub(super) fn end_training(&mut self, step: u64, version: Option<PolicyVersion>, out: &mut Outbox) {
        self.last_step = step;
        self.version = version.or(self.version);
        for (ticket, Settlement { group, trained }) in self.training.take().map_or_else(Vec::new, |t| t.groups) {
            self.ledger.train(ticket, trained.len() as u64);
            self.groups.remove(&group);
            out.push(Action::Settled { ticket, group, outcome: Outcome::Trained { step, samples: trained } });
        }
    }

    /// After a restart: was the step that was under way done?
    pub(super) fn trainer_at(
        &mut self,
        term: u64,
        step: u64,
        version: Option<PolicyVersion>,
        out: &mut Outbox,
    ) -> Result<(), Fence> {
        if term != self.term || !self.is_asking_trainer {
            return Err(Fence::StepRepeated);
        }
        self.is_asking_trainer = false;
        self.told_trainer_at = None;
        match self.training_step() {
            Some(pending) if step >= pending => self.step_done(pending, version, out),
            Some(pending) => {
                let groups = self.training.as_ref().map_or_else(Vec::new, |t| t.groups.clone());
                for (ticket, Settlement { group, .. }) in groups {
                    let reason = DropReason::ControllerRestarted;
                    self.record(Entry::Dropped { ticket, group, reason }, out);
                }
                self.record(Entry::StepCancelled { step: pending }, out);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// After a restart: attempts whose answers or workers nobody knows any more end, their groups wait again.
    pub(super) fn drop_what_was_in_memory(&mut self, out: &mut Outbox) {
        let running = |(id, group): (&GroupId, &Group)| match group.state {
            GroupState::Running(ticket) => Some((ticket, *id)),
            _ => None,
        };
        let lost: Vec<(Ticket, GroupId)> = self.groups.iter().filter_map(running).collect();
        for (ticket, group) in lost {
            self.record(Entry::Dropped { ticket, group, reason: DropReason::ControllerRestarted }, out);
        }
    }

    pub(super) fn ask_trainer(&mut self, out: &mut Outbox) {
        self.is_asking_trainer = true;
        self.told_trainer_at = Some(self.now);
        out.push(Action::AskTrainer { term: self.term });
    }

    fn tell_trainer(&mut self, out: &mut Outbox) {
        let Some(training) = &self.training else { return };
        let tickets = training.groups.iter().map(|(ticket, _)| *ticket).collect();
        out.push(Action::Train { term: self.term, step: training.step, tickets });
        self.told_trainer_at = Some(self.now);
    }

    pub(super) fn tell_trainer_again(&mut self, out: &mut Outbox) {
        let is_due = |at: Time| at.saturating_add(self.config.train_timeout) <= self.now;
        if !self.told_trainer_at.is_some_and(is_due) {
            return;
        }
        if self.is_asking_trainer {
            self.ask_trainer(out);
        } else {
            self.tell_trainer(out);
        }
    }
}
