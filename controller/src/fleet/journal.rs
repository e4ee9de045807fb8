//! What must be durable before an action takes effect, and how a controller comes back from it.
//!
//! Durable: lives of workers (so that an earlier life stays fenced), groups (so that none is forgotten), attempts and
//! how they ended (the ledger), versions (so that a number never names two weights), steps before and after the trainer
//! does them (so that none is done twice). Not durable: leases, answers and scores. A group whose answer was in memory
//! is issued again with its seeds.

use super::event::{Action, GroupSpec, Origin, PlaneConfig, Role, Settlement, Ticket};
use super::ledger::DropReason;
use super::plane::{ControlPlane, Outbox};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use temper_types::{GroupId, PolicyVersion};

/// One line of the journal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Entry {
    /// A controller began, or came back.
    Began {
        /// Its life, from 1.
        term: u64,
    },
    /// A life of a worker began.
    Registered {
        /// Who.
        origin: Origin,
        /// What it does.
        role: Role,
    },
    /// A group is to be generated.
    Submitted(GroupSpec),
    /// An attempt at it began.
    Issued {
        /// Its name.
        ticket: Ticket,
        /// The group.
        group: GroupId,
        /// The weights.
        version: PolicyVersion,
    },
    /// An attempt ended without being trained on.
    Dropped {
        /// Which.
        ticket: Ticket,
        /// Of which group.
        group: GroupId,
        /// Why.
        reason: DropReason,
    },
    /// A group is not wanted any more; its attempts have ended.
    Closed {
        /// Which.
        group: GroupId,
    },
    /// Weights are to be served.
    Published {
        /// Which.
        version: PolicyVersion,
    },
    /// The trainer is about to do a step.
    StepBegun {
        /// Which.
        step: u64,
        /// On which attempts, and what becomes of their samples.
        groups: Vec<(Ticket, Settlement)>,
    },
    /// It did.
    StepDone {
        /// Which.
        step: u64,
        /// The weights it published.
        version: Option<PolicyVersion>,
    },
    /// It did not, and its attempts are gone.
    StepCancelled {
        /// Which.
        step: u64,
    },
}

impl ControlPlane {
    /// A control plane that goes on where `entries` end, and what it does first. With no entry this is a new run.
    ///
    /// Every worker has to register again. Every attempt that was open is dropped, and its group issued again, but for
    /// those of a step that may have been done: the trainer is asked.
    pub fn recover(config: PlaneConfig, entries: &[Entry]) -> (Self, Vec<Action>) {
        let mut plane = ControlPlane::empty(config);
        let mut out = Outbox::default();
        for entry in entries {
            plane.apply(entry, &mut out);
        }
        // What the entries did was done before.
        let mut out = Outbox::default();
        let term = plane.term + 1;
        plane.record(Entry::Began { term }, &mut out);
        plane.drop_what_was_in_memory(&mut out);
        if !entries.is_empty() {
            plane.ask_trainer(&mut out);
        }
        (plane, out.into_actions())
    }

    /// Write an entry and do what it says.
    pub(super) fn record(&mut self, entry: Entry, out: &mut Outbox) {
        self.apply(&entry, out);
        out.append(entry);
    }

    /// The one place where durable state changes.
    fn apply(&mut self, entry: &Entry, out: &mut Outbox) {
        match entry {
            Entry::Began { term } => self.begin_term(*term),
            Entry::Registered { origin, role } => self.begin_life(*origin, *role),
            Entry::Submitted(spec) => self.add_group(Arc::new(spec.clone())),
            Entry::Issued { ticket, group, .. } => self.issue_group(*ticket, *group),
            Entry::Dropped { ticket, group, reason } => self.drop_attempt(*ticket, *group, *reason, out),
            Entry::Closed { group } => self.close_group(*group),
            Entry::Published { version } => self.version = Some(*version),
            Entry::StepBegun { step, groups } => self.begin_training(*step, groups),
            Entry::StepDone { step, version } => self.end_training(*step, *version, out),
            Entry::StepCancelled { .. } => self.training = None,
        }
    }
}
