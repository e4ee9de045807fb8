//! One rank among several: what it holds of every unit, and how it shares with the others.
//!
//! | sharding | masters | gradients | moments |
//! |---|---|---|---|
//! | zero1 | whole | whole | shard of the world |
//! | zero2 | whole | shard | shard |
//! | zero3 | shard | shard | shard |
//! | hybrid | shard of a group of `shard_size` ranks | the same | the same |
//!
//! The packed weights that engines and forwards read are whole, once per process. Beside its shards a rank holds, while
//! a backward runs, the gradient of the unit at work (and that of the embedding table throughout) and, where masters
//! are sharded, the same units' masters and what has arrived of the next unit's.

use crate::Error;
use crate::sequence::SequenceGroup;
use crate::trainer::SharedPolicy;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use temper_actor::PackedPolicy;
use temper_collective::{Collective, Counts, Gathering, Operation, shard_ranges};

/// What of a model is divided over ranks. All of them give the same bits in a world of one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharding {
    /// Optimizer moments.
    Zero1,
    /// Moments and gradients.
    Zero2,
    /// Moments, gradients and masters.
    Zero3,
    /// As [`Sharding::Zero3`] within groups of consecutive ranks; every group holds everything.
    Hybrid {
        /// Ranks of a group; a divisor of the world.
        shard_size: usize,
    },
}

impl Sharding {
    /// Ranks that share one copy, of `world`.
    pub fn num_shards(self, world: usize) -> usize {
        match self {
            Sharding::Hybrid { shard_size } => shard_size,
            Sharding::Zero1 | Sharding::Zero2 | Sharding::Zero3 => world,
        }
    }

    pub(crate) fn shards_masters(self) -> bool {
        matches!(self, Sharding::Zero3 | Sharding::Hybrid { .. })
    }

    pub(crate) fn shards_gradients(self) -> bool {
        self != Sharding::Zero1
    }
}

/// Where ranks of one process hand packed weights to each other. Ranks of other processes have one of their own.
#[derive(Debug, Clone, Default)]
pub struct ProcessShare(Arc<Mutex<Option<SharedPolicy>>>);

/// Who writes the packed weights that the ranks of a process share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessRole {
    /// This rank.
    Leader,
    /// Another rank of the process.
    Follower,
}

/// Channels of the groups of a world: groups that may be of the same ranks need different ones.
pub(crate) mod channel {
    /// [`super::Ranks`]: what is divided.
    pub(crate) const SHARDS: u32 = 1;
    /// Copies of it.
    pub(crate) const REPLICAS: u32 = 2;
    /// Ranks that share the rows of a micro-batch.
    pub(crate) const SEQUENCE: u32 = 3;
    /// Gathers that are under way while the ranks do something else.
    pub(crate) const AHEAD: u32 = 4;
    /// Whether all ranks have their mirrors.
    pub(crate) const MIRRORS: u32 = 5;
    /// From rank r to the one that mirrors it: this and r.
    pub(crate) const MIRROR_OF: u32 = 1 << 16;
    /// To rank r, which lost its shard: this and r.
    pub(crate) const RECOVERY: u32 = 1 << 17;
}

/// The ways on which mirrors of a rank's state go.
#[derive(Debug)]
pub(crate) struct MirrorLinks {
    /// To the rank that mirrors this one, and from the one that this one mirrors, each a group of two; none where
    /// replicas hold the same shard anyway.
    pub(crate) ring: Option<(Collective, Collective)>,
    /// Everybody.
    pub(crate) all: Collective,
}

/// A rank's place in the world of trainers.
#[derive(Debug)]
pub struct Ranks {
    sharding: Sharding,
    world: Collective,
    /// The ranks that hold one copy together.
    shards: Collective,
    /// The same ranks, for gathers that are under way while they do something else.
    ahead: Collective,
    /// The ranks that hold the same shard.
    replicas: Collective,
    /// The ranks that share the rows of every micro-batch with this one, where there are any.
    pub(crate) sequence: Option<Arc<SequenceGroup>>,
    role: ProcessRole,
    share: ProcessShare,
    /// Backwards whose gradients were all given away.
    num_passes: AtomicU64,
}

impl Ranks {
    /// This rank's place; `share` is that of its process, which has one leader.
    ///
    /// # Errors
    /// A shard size that does not divide the world.
    pub fn new(
        world: Collective,
        sharding: Sharding,
        (role, share): (ProcessRole, ProcessShare),
    ) -> Result<Self, Error> {
        let (rank, size) = (world.rank(), world.world());
        let num_shards = sharding.num_shards(size);
        if num_shards == 0 || !size.is_multiple_of(num_shards) {
            let problem = format!("is {num_shards}: expected a divisor of the world of {size} ranks");
            return Err(Error::invalid("shard_size", problem));
        }
        let first = rank / num_shards * num_shards;
        let copy: Vec<usize> = (first..first + num_shards).collect();
        let (shards, ahead) = (world.subgroup(&copy, channel::SHARDS)?, world.subgroup(&copy, channel::AHEAD)?);
        let replicas =
            world.subgroup(&(rank % num_shards..size).step_by(num_shards).collect::<Vec<_>>(), channel::REPLICAS)?;
        let num_passes = AtomicU64::new(0);
        Ok(Ranks { sharding, world, shards, ahead, replicas, sequence: None, role, share, num_passes })
    }

    /// This rank's number.
    pub fn rank(&self) -> usize {
        self.world.rank()
    }

    /// Number of ranks.
    pub fn world(&self) -> usize {
        self.world.world()
    }

    pub(crate) fn world_ranks(&self) -> &Collective {
        &self.world
    }

    /// What is divided.
    pub fn sharding(&self) -> Sharding {
        self.sharding
    }

    /// What this rank has sent and received.
    pub fn counts(&self) -> Counts {
        self.world.counts()
    }

    /// Where this rank fails alone, the others are not left waiting for it. All operations fail from then on.
    pub(crate) fn give_up(&self) {
        self.world.give_up(Operation::Barrier);
    }

    /// Which shard of a copy this rank holds.
    pub(crate) fn shard(&self) -> usize {
        self.shards.rank()
    }

    /// Which shard of a copy rank `rank` of the world holds.
    pub(crate) fn shard_of(&self, rank: usize) -> usize {
        rank % self.shards.world()
    }

    /// Ways of their own, beside all that the ranks compute.
    pub(crate) fn mirror_links(&self) -> Result<MirrorLinks, Error> {
        let all: Vec<usize> = (0..self.world()).collect();
        let all = self.world.subgroup(&all, channel::MIRRORS)?;
        let (own, size) = (self.shard(), self.shards.world());
        if self.replicas.world() > 1 || size == 1 {
            return Ok(MirrorLinks { ring: None, all });
        }
        let world_rank = |shard: usize| self.shards.world_rank(shard % size);
        let (before, next) = (world_rank(own + size - 1), world_rank(own + 1));
        let to_next = self.pair((self.rank(), next), channel::MIRROR_OF + self.rank() as u32)?;
        let from_before = self.pair((before, self.rank()), channel::MIRROR_OF + before as u32)?;
        Ok(MirrorLinks { ring: Some((to_next, from_before)), all })
    }

    /// A group of two ranks, of which this one is one.
    pub(crate) fn pair(&self, (a, b): (usize, usize), channel: u32) -> Result<Collective, Error> {
        Ok(self.world.subgroup(&[a.min(b), a.max(b)], channel)?)
    }

    pub(crate) fn leads(&self) -> bool {
        self.role == ProcessRole::Leader
    }

    pub(crate) fn num_passes(&self) -> u64 {
        self.num_passes.load(Ordering::Relaxed)
    }

    pub(crate) fn count_pass(&self) {
        self.num_passes.fetch_add(1, Ordering::Relaxed);
    }

    /// The part of `len` elements whose moments this rank holds.
    pub(crate) fn own(&self, len: usize) -> Range<usize> {
        shard_ranges(len, self.shards.world())[self.shards.rank()].clone()
    }

    /// Fill `values` from the ranks that hold one copy together.
    pub(crate) fn gather(&self, values: &mut [f32]) -> Result<(), Error> {
        let ranges = shard_ranges(values.len(), self.shards.world());
        Ok(self.shards.all_gather(values, &ranges)?)
    }

    /// Send `own`, this rank's part of values that [`Ranks::end_gather`] fills in, and go on.
    pub(crate) fn begin_gather(&self, own: &[f32]) -> Result<Gathering, Error> {
        Ok(self.ahead.begin_all_gather(own)?)
    }

    /// As [`Ranks::gather`], for what was begun; gathers end in the order in which they began.
    pub(crate) fn end_gather(&self, begun: Gathering, values: &mut [f32]) -> Result<(), Error> {
        let ranges = shard_ranges(values.len(), self.ahead.world());
        Ok(self.ahead.end_all_gather(begun, values, &ranges)?)
    }

    /// Add up every rank's `values`, in rank order: all of them where gradients are whole, else this rank's part.
    pub(crate) fn reduce(&self, values: &mut [f32]) -> Result<(), Error> {
        let ranges = shard_ranges(values.len(), self.shards.world());
        match self.sharding {
            Sharding::Zero1 => self.world.all_reduce(values)?,
            Sharding::Zero2 | Sharding::Zero3 => self.world.reduce_scatter(values, &ranges)?,
            Sharding::Hybrid { .. } => {
                let own = ranges[self.shards.rank()].clone();
                let sum = self.replicas.chain(own.len(), |carry| {
                    match carry {
                        None => self.shards.reduce_scatter(values, &ranges)?,
                        Some(carry) => self.shards.reduce_scatter_onto(&carry, values, &ranges)?,
                    }
                    Ok::<_, Error>(values[own.clone()].to_vec())
                })?;
                values[own].copy_from_slice(&sum);
            }
        }
        Ok(())
    }

    /// What each rank of one copy gives, in rank order.
    pub(crate) fn shard_lists(&self, own: &[f64]) -> Result<Vec<Vec<f64>>, Error> {
        Ok(self.shards.all_gather_lists(own)?)
    }

    /// What each rank of the world gives, in rank order.
    pub(crate) fn world_lists(&self, own: &[f64]) -> Result<Vec<Vec<f64>>, Error> {
        Ok(self.world.all_gather_lists(own)?)
    }

    /// What rank 0 has.
    pub(crate) fn tell_from_first(&self, bytes: &mut [u8]) -> Result<(), Error> {
        Ok(self.world.broadcast(bytes, 0)?)
    }

    /// Wait for all ranks: what the leaders have written stands.
    pub(crate) fn fence(&self) -> Result<(), Error> {
        Ok(self.world.barrier()?)
    }

    /// The packed weights that the process's leader made, for all of its ranks.
    pub(crate) fn hand_on(&self, made: Option<PackedPolicy>) -> Result<SharedPolicy, Error> {
        let lock = || self.share.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(packed) = made {
            *lock() = Some(Arc::new(RwLock::new(packed)));
        }
        self.fence()?;
        let shared = lock().clone();
        self.fence()?;
        shared.ok_or_else(|| Error::invalid("the ranks of a process", "have no leader: expected one"))
    }
}
