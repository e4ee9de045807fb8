//! TRL's group advantages over several reward functions, each of which may leave a row unscored.
//!
//! A row's reward is the weighted sum of the scores it has; a row without any score is left out of all statistics and
//! gets advantage 0. grpo: `(R - mean_g) / (std + 1e-4)`, std over the group or the batch, or no division; with
//! normalize_then_sum every function's scores are normalised in their group first, and the weighted sums over the
//! batch (TRL's GDPO). rloo: the reward, clipped, less `beta` times a KL, less the mean of its scored siblings.
//!
//! # Source
//! TRL's GRPOTrainer and RLOOTrainer.

use crate::Error;
use crate::batch::expect_len;
use crate::math::Cut;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const EPSILON: f64 = 1e-4;

/// Over what the standard deviation is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScaleRewards {
    /// The group.
    #[default]
    Group,
    /// The whole batch.
    Batch,
    /// No division.
    None,
}

/// Order of adding up reward functions and normalising.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MultiObjective {
    /// Weighted sum, then group normalisation.
    #[default]
    SumThenNormalize,
    /// Group normalisation of each function, weighted sum, batch normalisation.
    NormalizeThenSum,
}

/// Scores of N rows by K functions, NaN where a function gave none.
#[derive(Debug, Clone, Copy)]
pub struct FunctionRewards<'a> {
    /// `[N * K]`, row by row.
    pub scores: &'a [f64],
    /// `[K]`.
    pub weights: &'a [f64],
    /// Size of a group; groups are consecutive rows.
    pub num_generations: usize,
}

/// Advantages, and where the deviation that divides them is 0.
#[derive(Debug, Clone, PartialEq)]
pub struct FunctionAdvantages {
    /// `[N]`.
    pub advantages: Vec<f64>,
    /// `[N]`.
    pub is_std_zero: Vec<bool>,
}

impl FunctionRewards<'_> {
    fn check(&self) -> Result<usize, Error> {
        let k = self.weights.len();
        let group = k.saturating_mul(self.num_generations);
        if group == 0 || !self.scores.len().is_multiple_of(group) {
            let cause =
                format!("{} scores are no whole groups of {} rows by {k}", self.scores.len(), self.num_generations);
            return Err(Error::batch("reward functions", cause));
        }
        Ok(self.scores.len() / k)
    }

    /// Weighted sum of a row's scores; NaN where it has none.
    fn totals(&self, scores: &[f64]) -> Vec<f64> {
        let k = self.weights.len();
        let row = |(row, scores): (&[f64], &[f64])| {
            if row.iter().all(|v| v.is_nan()) {
                return f64::NAN;
            }
            scores.iter().zip(self.weights).filter(|(v, _)| !v.is_nan()).map(|(v, w)| v * w).sum()
        };
        self.scores.chunks(k).zip(scores.chunks(k)).map(row).collect()
    }
}

/// Mean and deviation (n - 1) of the numbers that are not NaN; the deviation of one number is NaN.
pub(crate) fn nan_statistics(values: &[f64]) -> (f64, f64) {
    let scored: Vec<f64> = values.iter().copied().filter(|v| !v.is_nan()).collect();
    let n = scored.len() as f64;
    let first = scored.first().copied().unwrap_or(f64::NAN);
    let equal = scored.iter().all(|v| *v == first);
    let mean = if equal { first } else { scored.iter().sum::<f64>() / n };
    let squares: f64 = scored.iter().map(|v| (v - mean) * (v - mean)).sum();
    (mean, if scored.len() < 2 { f64::NAN } else { (squares / (n - 1.0)).sqrt() })
}

/// Statistics of every group, spread over its rows; a group of one row has deviation 0.
fn group_statistics(values: &[f64], size: usize) -> Vec<(f64, f64)> {
    let group = |group: &[f64]| {
        let (mean, std) = nan_statistics(group);
        vec![(mean, if size == 1 { 0.0 } else { std }); group.len()]
    };
    values.chunks(size).flat_map(group).collect()
}

fn batch_statistics(values: &[f64]) -> (f64, f64) {
    let (mean, std) = nan_statistics(values);
    (mean, if values.len() == 1 { 0.0 } else { std })
}

fn or_zero(value: f64) -> f64 {
    if value.is_nan() { 0.0 } else { value }
}

/// GRPO's advantages.
///
/// # Errors
/// Scores that do not form whole groups.
pub fn function_advantages(
    rewards: &FunctionRewards<'_>,
    scale: ScaleRewards,
    aggregation: MultiObjective,
) -> Result<FunctionAdvantages, Error> {
    let n = rewards.check()?;
    if aggregation == MultiObjective::NormalizeThenSum {
        let totals = rewards.totals(&normalise_functions(rewards));
        let (mean, std) = batch_statistics(&totals);
        let advantages = totals.iter().map(|r| or_zero((r - mean) / (std + EPSILON))).collect();
        return Ok(FunctionAdvantages { advantages, is_std_zero: vec![std.abs() <= 1e-8; n] });
    }
    let totals = rewards.totals(rewards.scores);
    let groups = group_statistics(&totals, rewards.num_generations);
    let batch = batch_statistics(&totals).1;
    let deviation = |i: usize| if scale == ScaleRewards::Batch { batch } else { groups[i].1 };
    let advantage = |i: usize| {
        let centred = totals[i] - groups[i].0;
        or_zero(if scale == ScaleRewards::None { centred } else { centred / (deviation(i) + EPSILON) })
    };
    Ok(FunctionAdvantages {
        advantages: (0..n).map(advantage).collect(),
        is_std_zero: (0..n).map(|i| deviation(i).abs() <= 1e-8).collect(),
    })
}

fn normalise_functions(rewards: &FunctionRewards<'_>) -> Vec<f64> {
    let k = rewards.weights.len();
    let mut out = rewards.scores.to_vec();
    for function in 0..k {
        let column: Vec<f64> = rewards.scores.iter().skip(function).step_by(k).copied().collect();
        for (row, (mean, std)) in group_statistics(&column, rewards.num_generations).into_iter().enumerate() {
            out[row * k + function] = (column[row] - mean) / (std + EPSILON);
        }
    }
    out
}

/// Settings of RLOO's advantages.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RlooOptions {
    /// Weight of the KL in the reward.
    pub beta: f64,
    /// Rewards are clipped to this range before the KL.
    pub reward_clip_range: Option<(f64, f64)>,
    /// Scale the advantages to the batch's deviation.
    pub normalize: bool,
}

/// RLOO's advantages; `kl` is `[N]`, the sum over tokens of old less reference log-prob.
///
/// # Errors
/// Scores that do not form whole groups, or a KL of the wrong length.
pub fn function_rloo(rewards: &FunctionRewards<'_>, options: &RlooOptions, kl: &[f64]) -> Result<Vec<f64>, Error> {
    let n = rewards.check()?;
    expect_len("kl", n, kl.len())?;
    let clip = |r: f64| match options.reward_clip_range {
        Some((low, high)) if !r.is_nan() => r.cut(low, high),
        _ => r,
    };
    let totals: Vec<f64> =
        rewards.totals(rewards.scores).iter().zip(kl).map(|(r, kl)| clip(*r) - options.beta * kl).collect();
    let mut advantages = Vec::with_capacity(n);
    for group in totals.chunks(rewards.num_generations) {
        let scored = group.iter().filter(|r| !r.is_nan()).count() as f64;
        let sum: f64 = group.iter().filter(|r| !r.is_nan()).sum();
        let one = |r: &f64| if scored > 1.0 { r - (sum - r) / (scored - 1.0) } else { f64::NAN };
        advantages.extend(group.iter().map(|r| if r.is_nan() { f64::NAN } else { one(r) }));
    }
    if options.normalize {
        let (mean, std) = nan_statistics(&advantages);
        advantages.iter_mut().for_each(|a| *a = (*a - mean) / (std + EPSILON));
    }
    Ok(advantages.into_iter().map(or_zero).collect())
}
