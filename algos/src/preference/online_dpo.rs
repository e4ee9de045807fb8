//! Online DPO: two samples of a prompt become a pair by their rewards.
//!
//! The higher reward is chosen; on a tie the first. The loss on the pair is DPO's or, as `ipo_sum`, IPO's on sums.
//!
//! # Source
//! arXiv 2402.04792; pairing as in TRL.

use super::Pair;
use crate::Error;
use crate::batch::expect_len;

/// Pairs made from samples, and how many groups gave none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OnlinePairs {
    /// The pairs, in order of the groups.
    pub pairs: Vec<Pair>,
    /// Groups with fewer than two samples.
    pub num_skipped: usize,
}

/// Pair the best with the worst sample of every group; a group of two gives its two samples, ties by row order.
///
/// Rows of one group have the same id and need not be neighbours.
///
/// # Errors
/// Arrays of different lengths, or a reward that is not finite.
pub fn online_pairs(rewards: &[f64], group_ids: &[u64]) -> Result<OnlinePairs, Error> {
    expect_len("group_ids", rewards.len(), group_ids.len())?;
    if let Some(row) = rewards.iter().position(|r| !r.is_finite()) {
        let value = rewards[row];
        return Err(Error::NonFinite { operation: "online_pairs", name: "rewards", row, token: 0, value });
    }
    let mut out = OnlinePairs { pairs: Vec::new(), num_skipped: 0 };
    for rows in crate::advantages::group_rows(group_ids) {
        let better = |best: usize, row: usize| if rewards[row] > rewards[best] { row } else { best };
        let worse = |worst: usize, row: usize| if rewards[row] <= rewards[worst] { row } else { worst };
        let chosen = rows.iter().copied().reduce(better);
        let rest = rows.iter().copied().filter(|row| Some(*row) != chosen);
        match (chosen, rest.reduce(worse)) {
            (Some(chosen), Some(rejected)) => out.pairs.push(Pair { chosen, rejected }),
            _ => out.num_skipped += 1,
        }
    }
    Ok(out)
}
