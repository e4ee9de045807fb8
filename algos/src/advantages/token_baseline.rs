//! Optimal token baseline: at every position, the baseline that minimises the variance of the gradient.
//!
//! `w_t = 1 - 2 exp(old) + sum pi^2` (times the squared importance weight), `W_t` its running sum over unmasked tokens,
//! `G_t` the undiscounted reward-to-go, `b_t = sum_g(G W) / (sum_g W + epsilon)` over the rows of the group that have a
//! token at `t`; `A_t = G_t - b_t`. A group of one has baseline 0. Positions are those of the row, or with the `tir`
//! form (multi-turn) the number of the token among the row's unmasked ones, where rows without tokens are no members.

use super::AdvantageOutput;
use super::groups::group_rows;
use crate::TokenBatch;

/// What the estimator reads beside the batch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TokenBaseline<'a> {
    pub(crate) rewards: &'a [f64],
    pub(crate) old_log_probs: &'a [f64],
    pub(crate) sum_pi_squared: &'a [f64],
    pub(crate) rollout_is_weights: Option<&'a [f64]>,
    pub(crate) axis: TimeAxis,
    pub(crate) tail: ZeroTail,
    pub(crate) epsilon: f64,
}

/// What counts as the same position in two rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TimeAxis {
    /// The slot in the row.
    Slot,
    /// The number of the token among the row's unmasked ones.
    Compacted,
}

/// What happens where only the longest row of a group is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ZeroTail {
    /// The baseline of that row is 0 there.
    Zero,
    /// It is computed from the row alone.
    Keep,
}

/// Advantages and returns.
pub(crate) fn advantages(batch: &TokenBatch, group_ids: &[u64], input: TokenBaseline<'_>) -> AdvantageOutput {
    let (returns, energy) = returns_and_energy(batch, &input);
    let mut advantages = returns.clone();
    for mut rows in group_rows(group_ids) {
        if input.axis == TimeAxis::Compacted {
            rows.retain(|row| batch.row_len(*row) > 0);
        }
        if rows.len() > 1 {
            subtract_baseline(batch, &input, &rows, (&returns, &energy), &mut advantages);
        }
    }
    AdvantageOutput { advantages, returns }
}

fn returns_and_energy(batch: &TokenBatch, input: &TokenBaseline<'_>) -> (Vec<f64>, Vec<f64>) {
    let mut returns = vec![0.0; batch.num_slots()];
    let mut energy = vec![0.0; batch.num_slots()];
    for row in 0..batch.num_rows() {
        let mut to_go = 0.0;
        for t in batch.active(row).rev() {
            to_go += input.rewards[t];
            returns[t] = to_go;
        }
        let mut total = 0.0;
        for t in batch.active(row) {
            let importance = input.rollout_is_weights.map_or(1.0, |w| w[t] * w[t]);
            total += (1.0 - 2.0 * input.old_log_probs[t].exp() + input.sum_pi_squared[t]) * importance;
            energy[t] = total;
        }
    }
    (returns, energy)
}

/// Positions of a row's unmasked tokens on the shared time axis, beside their slots.
fn positions(batch: &TokenBatch, row: usize, axis: TimeAxis) -> impl Iterator<Item = (usize, usize)> {
    let start = batch.row(row).start;
    batch.active(row).enumerate().map(move |(number, t)| match axis {
        TimeAxis::Slot => (t - start, t),
        TimeAxis::Compacted => (number, t),
    })
}

fn subtract_baseline(
    batch: &TokenBatch,
    input: &TokenBaseline<'_>,
    rows: &[usize],
    (returns, energy): (&[f64], &[f64]),
    advantages: &mut [f64],
) {
    let width = rows.iter().map(|r| batch.row(*r).len()).max().unwrap_or(0);
    let (mut numerator, mut denominator) = (vec![0.0; width], vec![0.0; width]);
    for row in rows {
        for (position, t) in positions(batch, *row, input.axis) {
            numerator[position] += returns[t] * energy[t];
            denominator[position] += energy[t];
        }
    }
    let zero_from = zero_tail_start(batch, rows, input.tail);
    for row in rows {
        for (position, t) in positions(batch, *row, input.axis) {
            let alone = zero_from.is_some_and(|(longest, from)| longest == *row && position >= from);
            let baseline = numerator[position] / (denominator[position] + input.epsilon);
            advantages[t] -= if alone { 0.0 } else { baseline };
        }
    }
}

/// The longest row of a group and the position from which it is alone, where there is one.
fn zero_tail_start(batch: &TokenBatch, rows: &[usize], tail: ZeroTail) -> Option<(usize, usize)> {
    if tail == ZeroTail::Keep {
        return None;
    }
    let longest = rows.iter().copied().max_by_key(|r| batch.row_len(*r))?;
    let second = rows.iter().filter(|r| **r != longest).map(|r| batch.row_len(*r)).max()?;
    (batch.row_len(longest) > second).then_some((longest, second))
}
