//! Shards of a trainer's state in the memory of its ranks, so that a rank that is lost costs no return to a checkpoint.

use crate::ServiceResult;
use temper_types::{ContentHash, ErrorCode};

/// A shard of the state after a step that a rank holds in memory: its own, or a mirror of another rank's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct HeldShard {
    /// The step after which the state was so.
    pub step: u64,
    /// Number of the shard: that of the rank within the ranks that hold one copy of the state together.
    pub shard: u32,
    /// Hash of all that it is.
    pub hash: ContentHash,
}

/// What keeping mirrors has cost.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct MirrorReport {
    /// Bytes that went to other ranks for the mirrors before this one.
    pub bytes_sent: u64,
    /// Seconds for which the call held the trainer up.
    pub wait_seconds: f64,
    /// Seconds from the beginning of the mirrors before this one to the moment when all ranks had theirs.
    pub transfer_seconds: f64,
}

/// From whom a rank that does not hold its own shard gets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ShardSource {
    /// Who needs it.
    pub rank: u32,
    /// Who has it.
    pub from: u32,
}

/// Which state all ranks go back to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MirrorPlan {
    /// The step after which the state was so.
    pub step: u64,
    /// Ranks without their shard, ascending; every other rank goes back by its own memory.
    pub sources: Vec<ShardSource>,
}

/// Keeps the state after a step in the memory of the trainer's ranks, each shard twice. Part of a trainer; one that
/// keeps no mirrors refuses all of it.
pub trait MirrorService: Send + Sync {
    /// Keep the state as it is after `step`, and begin to send this rank's shard to the rank that mirrors it. Returns
    /// when the state may change again: what is sent is a copy. The states of this step and of the last one that is
    /// known to be mirrored everywhere are held.
    ///
    /// # Errors
    /// `Unavailable` where a rank is lost, `InvalidArgument` for a trainer that keeps no mirrors.
    fn mirror(&self, step: u64) -> ServiceResult<MirrorReport> {
        let _ = step;
        Err(refused("mirror"))
    }

    /// The shards that are held now. What is under way is waited for, or given up where its other end is lost.
    ///
    /// # Errors
    /// `InvalidArgument` for a trainer that keeps no mirrors.
    fn held_shards(&self) -> ServiceResult<Vec<HeldShard>> {
        Err(refused("held_shards"))
    }

    /// Leave the other ranks, of which one is lost, and meet those that are there now. State is kept.
    ///
    /// # Errors
    /// `Unavailable` where they do not meet in time.
    fn rejoin(&self) -> ServiceResult<()> {
        Err(refused("rejoin"))
    }

    /// Go back to a state that is held: into a stage that has begun. All ranks together.
    ///
    /// # Errors
    /// `DataLoss` where the state is not held or is not what its hash says.
    fn restore_mirrored(&self, plan: &MirrorPlan) -> ServiceResult<()> {
        let _ = plan;
        Err(refused("restore_mirrored"))
    }
}

fn refused(operation: &'static str) -> crate::ServiceError {
    crate::ServiceError::new(ErrorCode::InvalidArgument, "trainer", operation, "it keeps no mirrors")
}
