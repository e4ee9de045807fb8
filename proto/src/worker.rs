//! How workers find the controller, and prove that they live.

use crate::ServiceResult;
use std::time::Duration;

/// What a worker process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WorkerRole {
    /// Generates.
    Rollout,
    /// Scores.
    Reward,
    /// Trains.
    Trainer,
}

impl WorkerRole {
    /// Name in commands and logs.
    pub const fn name(self) -> &'static str {
        match self {
            WorkerRole::Rollout => "rollout",
            WorkerRole::Reward => "reward",
            WorkerRole::Trainer => "trainer",
        }
    }
}

/// One life of a named worker. A worker that comes back has a higher incarnation, and what the old one says is fenced.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct WorkerId {
    /// Name of the worker.
    pub name: String,
    /// Number of its life, from 1.
    pub incarnation: u64,
}

/// What a worker says of itself when it registers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerHello {
    /// What it does.
    pub role: WorkerRole,
    /// Its name; the controller chooses one where it is empty.
    pub name: String,
    /// HOST:PORT at which it will serve.
    pub address: String,
    /// Its process.
    pub process_id: u32,
    /// Version of its binary.
    pub build: String,
    /// HOST:PORT at which a trainer rank meets the others; empty for others.
    pub collective_address: String,
}

/// What the controller gives a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// Who it is now.
    pub id: WorkerId,
    /// How long the controller believes in it without a heartbeat.
    pub lease: Duration,
    /// The resolved recipe, TOML.
    pub recipe: String,
    /// The model that the run starts from, a Hugging Face directory.
    pub model_dir: String,
    /// Directory of the run.
    pub run_dir: String,
    /// Rank of a trainer.
    pub rank: u32,
    /// Number of trainer ranks.
    pub world: u32,
    /// HOST:PORT of the holders of weights, for an engine.
    pub weight_sources: Vec<String>,
}

/// Served by the controller to its workers.
pub trait WorkerRegistry: Send + Sync {
    /// A worker announces itself.
    ///
    /// # Errors
    /// `InvalidArgument` for another build or a role that is not wanted, `Unavailable` where it may ask again later.
    fn register(&self, hello: WorkerHello) -> ServiceResult<Assignment>;
    /// A worker serves from now on.
    ///
    /// # Errors
    /// `Cancelled` where this life is fenced.
    fn ready(&self, id: &WorkerId) -> ServiceResult<()>;
    /// Collective addresses of all trainer ranks as they are now, in the order of the ranks; empty for one that has not
    /// registered yet, or is lost.
    ///
    /// # Errors
    /// `Cancelled` where this life is fenced.
    fn ranks(&self, id: &WorkerId) -> ServiceResult<Vec<String>>;
    /// A worker lives. Gives true where the run has ended and the worker should end too.
    ///
    /// # Errors
    /// `Cancelled` where this life is fenced.
    fn heartbeat(&self, id: &WorkerId) -> ServiceResult<bool>;
}
