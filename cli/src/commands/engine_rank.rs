//! `temper engine-rank`: a tensor-parallel rank of an engine. A rollout worker starts it.

use crate::workers::serve_rank;

/// Compute a part of an engine's model, for the rollout worker that started this process.
#[derive(clap::Args)]
pub struct EngineRank {}

impl EngineRank {
    /// Serve until the worker ends.
    ///
    /// # Errors
    /// What the worker says makes no sense, or a rank that is lost.
    pub fn run(self) -> anyhow::Result<()> {
        serve_rank()
    }
}
