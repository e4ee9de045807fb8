//! Where the parts of a run best live: a search over placements by a cost model.
//!
//! ```text
//! cluster file  -> Cluster (hosts and the places on them)
//! recipe, model -> Workload (what a step has to do, in samples, tokens and bytes)
//! measurement   -> Calibration (seconds of what this machine did, by size)
//! Cluster x Workload -> Layouts (every placement that a recipe can say) -> Estimate each -> Search (best first)
//! ```
//! Owns the model of time and memory. Pure but for reading the cluster file and the calibration: no clock, no device.
//! Everything that it predicts is a function of the three, and their order decides ties, so that a plan is
//! reproducible. `commands/plan.rs` prints it; `commands/bench/calibrate/` measures.

mod calibration;
mod cluster;
mod cost;
mod layout;
mod memory;
mod report;
mod search;
#[cfg(test)]
mod tests;
mod time;
mod workload;

pub use calibration::{Calibration, FORMAT, Link, ModelSizes, Point};
pub use cluster::Cluster;
pub use report::{Detail, Subject, to_json, to_text};
pub use search::{Search, search};
pub use time::tensor_exchange;
pub use workload::{Divisions, Expected, Workload};
