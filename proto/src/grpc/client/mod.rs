//! Blocking clients: the service traits over a connection.

mod control;
mod reward;
mod rollout;
mod tables;
mod trainer;
mod weights;
mod worker;

pub use control::{ControlClient, Verb};
pub use reward::RewardClient;
pub use rollout::RolloutClient;
pub use tables::{TableClient, TablePart};
pub use trainer::TrainerClient;
pub use weights::WeightClient;
pub use worker::WorkerRegistryClient;
