//! What ranks tell each other of a mini-batch: whether all is well, and what their rows add up to.

use crate::division::divide;
use crate::micro_batch::split;
use crate::sequence::{RowGroups, micro_batch_tokens};
use crate::{Error, Ranks, Trainer};
use std::borrow::Cow;
use std::ops::Range;
use temper_algos::LossMetrics;
use temper_proto::{PreferencePair, TokenSequence, TrainRow};

/// Which part of how many.
#[derive(Debug, Clone, Copy)]
struct Place {
    index: usize,
    of: usize,
}

/// That of this rank's group.
fn place(ranks: Option<&Ranks>) -> Option<Place> {
    let RowGroups { num_groups, group, .. } = ranks?.row_groups();
    Some(Place { index: group, of: num_groups })
}

/// This rank's part of a list, or its group's where ranks share rows.
#[derive(Debug)]
pub(crate) struct Own<'a, T: Clone> {
    pub(crate) items: Cow<'a, [T]>,
    /// Where they stand in the list.
    pub(crate) indices: Vec<usize>,
    /// Micro-batches of those that have the most: every rank goes through as many backwards.
    pub(crate) num_rounds: usize,
    /// This rank's micro-batches.
    pub(crate) micro_batches: Vec<Range<usize>>,
}

/// The part at `place` of a division into so many parts, or all where there is none.
fn own<'a, T: Clone>(
    place: Option<Place>,
    all: &'a [T],
    divide: impl Fn(usize) -> Vec<Vec<usize>>,
    split: impl Fn(&[T]) -> Vec<Range<usize>>,
) -> Own<'a, T> {
    let Some(Place { index, of }) = place else {
        let micro_batches = split(all);
        let (indices, num_rounds) = ((0..all.len()).collect(), micro_batches.len());
        return Own { items: Cow::Borrowed(all), indices, num_rounds, micro_batches };
    };
    let mut divided = divide(of);
    let pick = |indices: &[usize]| -> Vec<T> { indices.iter().map(|index| all[*index].clone()).collect() };
    let num_rounds = divided.iter().map(|indices| split(&pick(indices)).len()).max().unwrap_or(0);
    let indices = std::mem::take(&mut divided[index]);
    let items = pick(&indices);
    Own { micro_batches: split(&items), items: Cow::Owned(items), indices, num_rounds }
}

/// This rank's sequences.
pub(crate) fn own_sequences<'a>(
    ranks: Option<&Ranks>,
    all: &'a [TokenSequence],
    max_tokens: usize,
) -> Own<'a, TokenSequence> {
    let max_tokens = micro_batch_tokens(ranks, max_tokens);
    own(place(ranks), all, |num| divide(all.iter(), num), |part| split(part.iter(), max_tokens))
}

/// The sequences that this rank runs alone, whether ranks share rows or not: for calls that come to ranks in any order,
/// in which they cannot talk.
pub(crate) fn lone_sequences<'a>(
    ranks: Option<&Ranks>,
    all: &'a [TokenSequence],
    max_tokens: usize,
) -> Own<'a, TokenSequence> {
    let place = ranks.map(|ranks| Place { index: ranks.rank(), of: ranks.world() });
    own(place, all, |num| divide(all.iter(), num), |part| split(part.iter(), max_tokens))
}

/// This rank's rows.
pub(crate) fn own_rows<'a>(ranks: Option<&Ranks>, all: &'a [TrainRow], max_tokens: usize) -> Own<'a, TrainRow> {
    let max_tokens = micro_batch_tokens(ranks, max_tokens);
    let divide = |num| divide(all.iter().map(|row| &row.sequence), num);
    own(place(ranks), all, divide, |part| split(part.iter().map(|row| &row.sequence), max_tokens))
}

/// This rank's pairs: every rank, or group that shares rows, has every `world`-th one.
pub(crate) fn own_pairs<'a>(
    ranks: Option<&Ranks>,
    all: &'a [PreferencePair],
    split: impl Fn(&[PreferencePair]) -> Vec<Range<usize>>,
) -> Own<'a, PreferencePair> {
    let divide = |world: usize| (0..world).map(|rank| (rank..all.len()).step_by(world).collect()).collect();
    own(place(ranks), all, divide, split)
}

impl Trainer {
    /// Run `work` on every micro-batch of this rank, and `idle` in its place where this rank has no more of them or has
    /// failed: the others wait for its part of every backward. Gives the first failure of this rank's own rows.
    ///
    /// # Errors
    /// A lost rank: nothing can go on then.
    pub(crate) fn each_round<T: Clone>(
        &mut self,
        own: &Own<'_, T>,
        mut work: impl FnMut(&mut Self, Range<usize>) -> Result<(), Error>,
        mut idle: impl FnMut(&mut Self) -> Result<(), Error>,
    ) -> Result<Result<(), Error>, Error> {
        let mut failed = Ok(());
        for round in 0..own.num_rounds {
            let before = self.num_passes();
            let result = match own.micro_batches.get(round) {
                Some(range) if failed.is_ok() => work(self, range.clone()),
                _ => idle(self),
            };
            match result {
                Err(Error::Collective(lost)) => return Err(lost.into()),
                Err(error) if self.ranks.is_none() => return Ok(Err(error)),
                Err(error) => {
                    failed = Err(error);
                    if self.num_passes() == before {
                        idle(self)?;
                    }
                }
                Ok(()) => {}
            }
        }
        Ok(failed)
    }

    fn num_passes(&self) -> u64 {
        self.ranks.as_ref().map_or(0, Ranks::num_passes)
    }

    /// Tell the others how this rank's rows went, and what they add up to; the numbers of all ranks, in rank order. Of
    /// ranks that share rows and have the same numbers, those of the first.
    ///
    /// # Errors
    /// This rank's failure, or that others failed.
    pub(crate) fn settle(&self, own: Result<Vec<f64>, Error>) -> Result<Vec<Vec<f64>>, Error> {
        let Some(ranks) = &self.ranks else { return own.map(|numbers| vec![numbers]) };
        let told = match &own {
            Ok(numbers) => [&[0.0], &numbers[..]].concat(),
            Err(Error::Collective(_)) => return own.map(|_| Vec::new()),
            Err(_) => vec![1.0],
        };
        let lists = ranks.world_lists(&told)?;
        let failed: Vec<usize> = (0..lists.len()).filter(|rank| lists[*rank].first() != Some(&0.0)).collect();
        own?;
        match failed.is_empty() {
            true => Ok(lists.iter().step_by(ranks.sequence_parallel()).map(|list| list[1..].to_vec()).collect()),
            false => Err(Error::OtherRanks { ranks: failed }),
        }
    }
}

/// Sums over ranks, in rank order.
pub(crate) fn add_up(lists: &[Vec<f64>]) -> Vec<f64> {
    let Some((first, rest)) = lists.split_first() else { return Vec::new() };
    let mut sums = first.clone();
    for list in rest {
        sums.iter_mut().zip(list).for_each(|(sum, x)| *sum += x);
    }
    sums
}

/// The sums of a loss whose scope is less than a mini-batch: those over pairs have none.
pub(crate) fn metric_numbers(metrics: &LossMetrics) -> Vec<f64> {
    let m = metrics;
    let opsm = m.num_opsm.map_or([0.0, 0.0], |count| [1.0, count]);
    let sums = [m.num_tokens, m.num_pg_tokens, m.pg_loss, m.kl_loss, m.entropy_agg, m.num_clipped];
    [&sums[..], &[m.num_clipped_lower, m.ppo_kl_sum, m.entropy_sum, m.log_ratio_max], &opsm].concat()
}

/// [`metric_numbers`] of all ranks, merged.
pub(crate) fn merge_metrics<'a>(lists: impl Iterator<Item = &'a [f64]>) -> LossMetrics {
    let one = |numbers: &[f64]| {
        let at = |index: usize| numbers.get(index).copied().unwrap_or(0.0);
        LossMetrics {
            num_tokens: at(0),
            num_pg_tokens: at(1),
            pg_loss: at(2),
            kl_loss: at(3),
            entropy_agg: at(4),
            num_clipped: at(5),
            num_clipped_lower: at(6),
            ppo_kl_sum: at(7),
            entropy_sum: at(8),
            log_ratio_max: at(9),
            num_opsm: (at(10) == 1.0).then(|| at(11)),
            ..LossMetrics::default()
        }
    };
    lists
        .map(one)
        .reduce(|mut sum, next| {
            sum.merge(&next);
            sum
        })
        .unwrap_or_default()
}
