//! A change of weights under an engine that serves: pause, drain, refit, bump, resume. A pure function.
//!
//! ```text
//! serving v --publish w--> draining --drained--> refitting --attested w--> serving w
//!                             |                      |
//!                             +-------failed---------+-- attested other --> serving v
//! ```
//!
//! Owns: which of these an engine does now, and what comes next. Knows no engine, no weight and no clock: whoever
//! drives it ([`crate::SyncedRolloutService`]) does what the actions say and tells what came of it.
//!
//! # Invariants
//! A group is admitted only while serving, and computed only while serving or draining: it is never of two versions ·
//! weights are fetched only when no group is open · a version is served only after weights that hash to it were
//! attested · whatever fails, the version before is served on · every publication ends in serving.

use temper_types::PolicyVersion;

/// What an engine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refit {
    /// Groups are admitted, and computed under this version.
    Serving(PolicyVersion),
    /// Open groups are computed to their ends under the version that is served; none is admitted.
    Draining(Change),
    /// No group is open; weights are on their way.
    Refitting(Change),
}

/// From which version to which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// What is served until the change is made, and after it where it fails.
    pub served: PolicyVersion,
    /// What is to be served.
    pub wanted: PolicyVersion,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefitEvent {
    /// This version is to be served.
    Publish(PolicyVersion),
    /// No group is open any more.
    Drained,
    /// The weights that arrived hash to this version.
    Attested(PolicyVersion),
    /// What was asked for cannot be done.
    Failed,
}

/// What is to be done, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefitAction {
    /// Admit no group any more.
    Pause,
    /// Compute open groups to their ends.
    Drain,
    /// Bring the weights of this version, beside those that are served, and hash them.
    Fetch(PolicyVersion),
    /// Serve the weights that were attested, under this name.
    Bump(PolicyVersion),
    /// Admit groups again.
    Resume,
}

impl Refit {
    /// The version that groups are computed under.
    pub fn served(self) -> PolicyVersion {
        match self {
            Refit::Serving(version) => version,
            Refit::Draining(change) | Refit::Refitting(change) => change.served,
        }
    }

    /// True where a new group is let in.
    pub fn admits(self) -> bool {
        matches!(self, Refit::Serving(_))
    }

    /// True where open groups are computed.
    pub fn computes(self) -> bool {
        !matches!(self, Refit::Refitting(_))
    }

    /// What follows from `event`. One that says nothing to this state changes nothing.
    #[must_use]
    pub fn step(self, event: RefitEvent) -> (Refit, Vec<RefitAction>) {
        use RefitAction::{Bump, Drain, Fetch, Pause, Resume};
        match (self, event) {
            (Refit::Serving(served), RefitEvent::Publish(wanted)) if served != wanted => {
                (Refit::Draining(Change { served, wanted }), vec![Pause, Drain])
            }
            (Refit::Draining(Change { served, .. }), RefitEvent::Publish(wanted)) if served == wanted => {
                (Refit::Serving(served), vec![Resume])
            }
            (Refit::Draining(Change { served, .. }), RefitEvent::Publish(wanted)) => {
                (Refit::Draining(Change { served, wanted }), Vec::new())
            }
            (Refit::Draining(change), RefitEvent::Drained) => (Refit::Refitting(change), vec![Fetch(change.wanted)]),
            (Refit::Refitting(change), RefitEvent::Attested(found)) if found == change.wanted => {
                (Refit::Serving(found), vec![Bump(found), Resume])
            }
            (Refit::Refitting(change), RefitEvent::Attested(_)) => (Refit::Serving(change.served), vec![Resume]),
            (Refit::Draining(change) | Refit::Refitting(change), RefitEvent::Failed) => {
                (Refit::Serving(change.served), vec![Resume])
            }
            (state, _) => (state, Vec::new()),
        }
    }
}

#[cfg(test)]
mod tests;
