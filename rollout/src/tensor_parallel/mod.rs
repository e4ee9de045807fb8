//! An engine whose model is divided over tensor-parallel ranks.
//!
//! ```text
//! rank 0 (the engine)   schedules, tells every step, computes its part, draws; proves new weights and divides them
//! rank 1..              follow: compute their part of what they are told, and hold their heads' K/V
//! ```
//! Owns: what rank 0 tells the others ([`RankGroup`]), what they do about it ([`follow`]), and the exchange of partial
//! sums in between. Knows neither how ranks are connected nor how they are started.
//!
//! # Invariants
//! - Sums of ranks are joined as one device joins them: how many ranks there are changes no bit.
//! - All ranks take the same steps in the same order; one that holds other weights than a step names computes nothing.
//! - New weights leave rank 0 only after their hash was proved, and are served only when every rank has said that what
//!   it holds of them is what rank 0 sent.
//! - Every wait has a deadline, that for the next step too: rank 0 says now and then that it is there. A rank that is
//!   lost is named, and nothing is computed from then on.

mod command;
mod exchange;
mod follower;
mod leader;
#[cfg(test)]
mod tests;

pub use follower::follow;
pub use leader::RankGroup;

pub(crate) use command::StepCommand;
