//! Ranks that share the rows of a micro-batch: the group that a sequence-parallel pass turns rows and heads over in.
//!
//! Consecutive ranks form a group. All of them are given the same micro-batches, run their parts of the rows, and know
//! what the model says of all targets, so that losses are computed on each and counted once, by the group's first rank.

use crate::ranks::channel;
use crate::{Error, Ranks};
use std::sync::{Arc, Mutex, PoisonError};
use temper_actor::{ModelConfig, SequenceExchange, TrainArena, sequence_parallel_problem};
use temper_collective::{Collective, Element};

/// One rank's place in its group.
#[derive(Debug)]
pub(crate) struct SequenceGroup {
    ranks: Collective,
    /// Why what came since is zeros.
    failed: Mutex<Option<temper_collective::Error>>,
}

impl SequenceGroup {
    /// The group of `size` consecutive ranks that this rank of `world` is in.
    pub(crate) fn new(world: &Collective, size: usize) -> Result<Self, Error> {
        let num_ranks = world.world();
        if size == 0 || !num_ranks.is_multiple_of(size) {
            let problem = format!("is {size}: expected a divisor of the world of {num_ranks} ranks");
            return Err(Error::invalid("sequence_parallel", problem));
        }
        let first = world.rank() / size * size;
        let ranks = world.subgroup(&(first..first + size).collect::<Vec<_>>(), channel::SEQUENCE)?;
        Ok(SequenceGroup { ranks, failed: Mutex::default() })
    }

    /// What `exchange` gives, or zeros once anything has failed.
    fn or_zeros<T: Element>(
        &self,
        lens: &[usize],
        exchange: impl FnOnce() -> temper_collective::Result<Vec<Vec<T>>>,
    ) -> Vec<Vec<T>> {
        let zeros = || lens.iter().map(|len| vec![T::default(); *len]).collect();
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        if failed.is_some() {
            return zeros();
        }
        exchange().unwrap_or_else(|error| {
            *failed = Some(error);
            zeros()
        })
    }
}

impl SequenceExchange for SequenceGroup {
    fn rank(&self) -> usize {
        self.ranks.rank()
    }

    fn size(&self) -> usize {
        self.ranks.world()
    }

    fn all_to_all(&self, parts: Vec<Vec<f32>>, lens: &[usize]) -> Vec<Vec<f32>> {
        self.or_zeros(lens, || self.ranks.all_to_all(parts, lens))
    }

    fn all_gather(&self, own: &[f64], lens: &[usize]) -> Vec<Vec<f64>> {
        let parts = lens.iter().map(|_| own.to_vec()).collect();
        self.or_zeros(lens, || self.ranks.all_to_all(parts, lens))
    }
}

impl Ranks {
    /// Let groups of `size` consecutive ranks share the rows of every micro-batch.
    ///
    /// # Errors
    /// A size that does not divide the world.
    pub fn with_sequence_parallel(mut self, size: usize) -> Result<Self, Error> {
        let group = SequenceGroup::new(self.world_ranks(), size)?;
        self.sequence = (size > 1).then(|| Arc::new(group));
        Ok(self)
    }

    /// Ranks that share the rows of a micro-batch; 1 where none do.
    pub fn sequence_parallel(&self) -> usize {
        self.sequence.as_ref().map_or(1, |group| group.size())
    }

    /// The groups of ranks that share rows, in rank order: how many, and which is this rank's.
    pub(crate) fn row_groups(&self) -> RowGroups {
        let size = self.sequence_parallel();
        RowGroups { num_groups: self.world() / size, group: self.rank() / size, size }
    }

    /// Whether the heads of a model can be divided over the group; `what` names the model.
    pub(crate) fn check_heads(&self, config: &ModelConfig, what: &str) -> Result<(), Error> {
        match sequence_parallel_problem(config, self.sequence_parallel()) {
            Some(problem) => Err(Error::invalid(format!("sequence_parallel over {what}"), problem)),
            None => Ok(()),
        }
    }
}

/// Groups of ranks that share rows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowGroups {
    pub(crate) num_groups: usize,
    /// This rank's.
    pub(crate) group: usize,
    /// Ranks of each.
    pub(crate) size: usize,
}

/// Memory of passes, of a rank's group where it has one.
pub(crate) fn arena(ranks: Option<&Ranks>) -> TrainArena {
    match ranks.and_then(|ranks| ranks.sequence.clone()) {
        Some(group) => TrainArena::of_group(group),
        None => TrainArena::new(),
    }
}

/// Whether all that came from the group came: without it, what a pass gave means nothing.
pub(crate) fn check_exchange(ranks: Option<&Ranks>) -> Result<(), Error> {
    let Some(group) = ranks.and_then(|ranks| ranks.sequence.as_ref()) else { return Ok(()) };
    let failed = group.failed.lock().unwrap_or_else(PoisonError::into_inner).clone();
    failed.map_or(Ok(()), |error| Err(error.into()))
}

/// Tokens of a micro-batch, of which a rank runs `per_rank`.
pub(crate) fn micro_batch_tokens(ranks: Option<&Ranks>, per_rank: usize) -> usize {
    per_rank.saturating_mul(ranks.map_or(1, Ranks::sequence_parallel))
}
