//! Many workers as one: which worker does what, and what happens when one of them is lost.
//!
//! Owns: the control plane of rollout and reward workers as a pure state machine ([`ControlPlane`]), and the two
//! services that drive it in life ([`FleetRollout`], [`FleetReward`]). Knows workers only by the traits of
//! `temper-proto`; holds no weights and opens no connection.
//!
//! Invariants: [`ControlPlane::step`] reads no clock, draws no random number and does no I/O; equal events at equal
//! times give equal actions · a group that is issued again has the seeds it had before · a worker serves only after it
//! attested number and hash of the version · a message that is late, repeated or of an earlier life of a worker changes
//! nothing and is counted · every issued sample is trained in one step or dropped for one reason.
//!
//! docs/control-plane.md has states, events and fences on one page.

mod dispatch;
mod event;
mod journal;
mod ledger;
mod plane;
mod pool;
mod reward_fleet;
mod rollout_fleet;
mod roster;
mod trainer_step;

#[cfg(test)]
mod tests;

pub use event::{
    Action, AtBump, Event, Fence, GroupSpec, Job, JobKey, LossCause, Origin, Outcome, PlaneConfig, Role, Settlement,
    Ticket, Time, WorkerId,
};
pub use journal::Entry;
pub use ledger::{DropReason, Ledger};
pub use plane::ControlPlane;
pub use pool::{WorkerPhase, WorkerView};
pub use reward_fleet::FleetReward;
pub use rollout_fleet::FleetRollout;
pub use roster::{FleetConfig, WorkerStatus};
