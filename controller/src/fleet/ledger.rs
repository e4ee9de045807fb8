//! What became of every issued sample.

use super::event::Ticket;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Why an attempt's samples were not trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DropReason {
    /// Its worker was lost; the group was issued again or given up.
    WorkerLost,
    /// It was given up for new weights; the group was issued again.
    Superseded,
    /// The caller gave its group up.
    Aborted,
    /// Its worker refused it.
    Refused,
    /// It was too far behind the weights to be trained.
    TooStale,
    /// The loop had no use for it: its group was filtered, its reward failed, or it served another purpose.
    Filtered,
    /// It was in memory when the controller died.
    ControllerRestarted,
}

/// Accounts in samples: `issued = trained + dropped + open`, at every moment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ledger {
    issued: u64,
    trained: u64,
    dropped: BTreeMap<DropReason, u64>,
    open: BTreeMap<Ticket, u64>,
}

impl Ledger {
    /// Samples issued, every attempt counted.
    pub fn issued(&self) -> u64 {
        self.issued
    }

    /// Samples trained on.
    pub fn trained(&self) -> u64 {
        self.trained
    }

    /// Samples dropped, by reason.
    pub fn dropped(&self) -> &BTreeMap<DropReason, u64> {
        &self.dropped
    }

    /// Samples whose fate is open.
    pub fn open(&self) -> u64 {
        self.open.values().sum()
    }

    /// True for an attempt whose fate is open.
    pub fn is_open(&self, ticket: Ticket) -> bool {
        self.open.contains_key(&ticket)
    }

    /// True where nothing was lost and nothing counted twice.
    pub fn is_balanced(&self) -> bool {
        self.issued == self.trained + self.dropped.values().sum::<u64>() + self.open()
    }

    pub(super) fn issue(&mut self, ticket: Ticket, num_samples: u64) {
        let earlier = self.open.insert(ticket, num_samples);
        assert!(earlier.is_none(), "ticket {} is issued twice", ticket.0);
        self.issued += num_samples;
    }

    /// Close an attempt whose samples are all dropped.
    pub(super) fn drop_all(&mut self, ticket: Ticket, reason: DropReason) {
        let num_samples = self.close(ticket);
        *self.dropped.entry(reason).or_default() += num_samples;
    }

    /// Close an attempt of which `num_trained` samples are trained on.
    pub(super) fn train(&mut self, ticket: Ticket, num_trained: u64) {
        let num_samples = self.close(ticket);
        assert!(num_trained <= num_samples, "{num_trained} of {num_samples} samples cannot be trained on");
        self.trained += num_trained;
        if num_trained < num_samples {
            *self.dropped.entry(DropReason::Filtered).or_default() += num_samples - num_trained;
        }
    }

    fn close(&mut self, ticket: Ticket) -> u64 {
        self.open.remove(&ticket).expect("an attempt is closed once, by whoever owns it")
    }
}
