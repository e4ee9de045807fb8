//! Worker processes: how they are started, found, supervised, and what runs in them.
//!
//! [`hub`] is what workers register with, [`children`] starts processes and starts them again, [`cluster`] joins both
//! into the services of a run, and [`process`] is the other side: a worker from its registration to its end;
//! [`engine_ranks`] starts the tensor-parallel ranks of a rollout worker, and [`mirrors`] brings trainer ranks back
//! from each other's memory, with the help of a [`watchdog`] in each.

mod children;
mod cluster;
mod engine_ranks;
mod hub;
mod mirrors;
mod process;
mod watchdog;

pub use children::Killer;
pub use cluster::{Cluster, ClusterSpec};
pub use engine_ranks::serve_rank;
pub use hub::{Hub, Member, Work};
pub use mirrors::{FailedService, MirroredRanks};
pub use process::{ServeOptions, WhenLost, end_with_stdin, serve_worker};

use std::time::Duration;

/// How long the controller believes in a worker that says nothing.
const LEASE: Duration = Duration::from_secs(10);
/// Longest wait for workers to start: they load the model and reserve memory.
const START_TIMEOUT: Duration = Duration::from_secs(300);

/// Pause between two heartbeats of a worker, and between two looks of its watchdog.
fn heartbeat_interval(lease: Duration) -> Duration {
    lease / 10
}
