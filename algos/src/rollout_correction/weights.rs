//! Importance weights per token or per sequence, truncated (TIS) or cut to a range (IcePop).

use super::{RolloutCorrectionConfig, SAFETY_BOUND, Threshold};
use crate::masked::{masked_mean, masked_sum};
use crate::math::Cut;
use crate::{Error, TokenBatch};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Level at which importance weights are formed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum IsLevel {
    /// No weights.
    #[default]
    None,
    /// `e^lr` per token.
    Token,
    /// `e^(sum lr)` on every token of a sequence.
    Sequence,
}

/// Weights and their report.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightOutput {
    /// `[T]`, 0 where the mask is 0.
    pub weights: Vec<f64>,
    /// The report.
    pub metrics: WeightMetrics,
}

/// Report of importance weights: after truncation, before batch normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct WeightMetrics {
    /// Mean over unmasked tokens.
    pub mean: f64,
    /// Their standard deviation (n).
    pub std: f64,
    /// Largest weight; at sequence level the largest untruncated one.
    pub max: f64,
    /// Smallest weight; at sequence level the smallest untruncated one.
    pub min: f64,
    /// Share of tokens (sequence level: rows) above the upper bound before truncation.
    pub fraction_high: f64,
    /// Share below the lower bound, which is 1 / upper where only an upper bound is given.
    pub fraction_low: f64,
    /// Effective sample size as a share, `mean(w)^2 / mean(w^2)`; 0 where every weight is 0.
    pub eff_sample_size: f64,
    /// Mean of the rows' mean weights.
    pub seq_mean: f64,
    /// Their standard deviation (n - 1); 0 for one row.
    pub seq_std: f64,
    /// Largest row mean.
    pub seq_max: f64,
    /// Smallest row mean.
    pub seq_min: f64,
    /// Largest distance of a row mean from 1.
    pub seq_max_deviation: f64,
    /// Share of rows whose mean before truncation is above the upper bound.
    pub seq_fraction_high: f64,
    /// Share of rows whose mean before truncation is below the lower bound.
    pub seq_fraction_low: f64,
    /// Share of tokens whose weight was set to 0 by a range.
    pub oob_ratio: Option<f64>,
    /// Mean by which batch normalisation divided; 1 where it is too small to divide by.
    pub batch_norm_factor: Option<f64>,
}

/// What happens to weights out of bounds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Range {
    /// Weights above are cut to it.
    Truncate(f64),
    /// Weights outside become 0.
    Mask(f64, f64),
}

impl Range {
    fn bounds(self) -> (f64, f64) {
        match self {
            Range::Truncate(upper) => (1.0 / upper, upper),
            Range::Mask(lower, upper) => (lower, upper),
        }
    }

    pub(crate) fn apply(self, weight: f64) -> f64 {
        match self {
            Range::Truncate(upper) => weight.min(upper),
            Range::Mask(lower, upper) if weight < lower || weight > upper => 0.0,
            Range::Mask(..) => weight,
        }
    }
}

/// Read `2.0`, `"2.0"` or `"0.5_2.0"`.
pub(crate) fn parse_range(threshold: &Threshold) -> Result<Range, Error> {
    let positive = |v: f64| v > 0.0 && v.is_finite();
    let range = match threshold {
        Threshold::Upper(upper) => positive(*upper).then_some(Range::Truncate(*upper)),
        Threshold::Text(text) => match text.split_once('_') {
            None => text.trim().parse().ok().filter(|v| positive(*v)).map(Range::Truncate),
            Some((lower, upper)) => {
                let (lower, upper) = (lower.trim().parse::<f64>(), upper.trim().parse::<f64>());
                let ordered = |l: f64, u: f64| positive(l) && positive(u) && l <= u;
                lower.ok().zip(upper.ok()).filter(|(l, u)| ordered(*l, *u)).map(|(l, u)| Range::Mask(l, u))
            }
        },
    };
    range.ok_or_else(|| {
        let given = threshold.to_string();
        Error::setting("rollout_is_threshold", given, "a number above 0, or LOWER_UPPER with 0 < LOWER <= UPPER")
    })
}

/// Weights of a batch; `None` where `rollout_is` is none.
///
/// # Errors
/// A bound that cannot be used, or log-ratios of the wrong length or not finite.
pub fn importance_weights(
    config: &RolloutCorrectionConfig,
    batch: &TokenBatch,
    log_ratio: &[f64],
) -> Result<Option<WeightOutput>, Error> {
    if config.rollout_is == IsLevel::None {
        return Ok(None);
    }
    batch.expect_finite("rollout_is", "log_ratio", log_ratio)?;
    let range = parse_range(&config.rollout_is_threshold)?;
    let raw = raw_weights(config.rollout_is, batch, log_ratio);
    let mut weights: Vec<f64> = raw.iter().map(|w| range.apply(*w)).collect();
    weights.iter_mut().enumerate().filter(|(t, _)| !batch.is_active(*t)).for_each(|(_, w)| *w = 0.0);
    let mut metrics = report(batch, &raw, &weights, range);
    if config.rollout_is == IsLevel::Sequence {
        sequence_extremes(&mut metrics, batch, log_ratio, range);
    }
    if config.rollout_is_batch_normalize {
        let mean = batch_mean(config.rollout_is, batch, &weights);
        let factor = if mean > 1e-8 { mean } else { 1.0 };
        metrics.batch_norm_factor = Some(factor);
        weights.iter_mut().for_each(|w| *w /= factor);
    }
    Ok(Some(WeightOutput { weights, metrics }))
}

fn raw_weights(level: IsLevel, batch: &TokenBatch, log_ratio: &[f64]) -> Vec<f64> {
    let bounded = |x: f64| x.cut(-SAFETY_BOUND, SAFETY_BOUND).exp();
    let mut raw = vec![0.0; batch.num_slots()];
    for row in 0..batch.num_rows() {
        let sum: f64 = batch.active(row).map(|t| log_ratio[t]).sum();
        for t in batch.active(row) {
            raw[t] = if level == IsLevel::Sequence { bounded(sum) } else { bounded(log_ratio[t]) };
        }
    }
    raw
}

fn row_means(batch: &TokenBatch, values: &[f64]) -> Vec<f64> {
    let mask = batch.response_mask();
    batch.rows().map(|row| masked_mean(&values[row.clone()], &mask[row])).collect()
}

fn share(values: impl Iterator<Item = bool>) -> f64 {
    let (mut count, mut total) = (0usize, 0usize);
    values.for_each(|hit| {
        count += usize::from(hit);
        total += 1;
    });
    count as f64 / total.max(1) as f64
}

fn extremes(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let fold = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    if fold.0 > fold.1 { (0.0, 0.0) } else { fold }
}

fn report(batch: &TokenBatch, raw: &[f64], weights: &[f64], range: Range) -> WeightMetrics {
    let mask = batch.response_mask();
    let (lower, upper) = range.bounds();
    let active = || (0..batch.num_slots()).filter(|t| batch.is_active(*t));
    let squares: Vec<f64> = weights.iter().map(|w| w * w).collect();
    let (mean, mean_square) = (masked_mean(weights, mask), masked_mean(&squares, mask));
    let (min, max) = extremes(active().map(|t| weights[t]));
    let (raw_means, means) = (row_means(batch, raw), row_means(batch, weights));
    let (seq_min, seq_max) = extremes(means.iter().copied());
    let (seq_mean, seq_std) = mean_and_std(&means);
    WeightMetrics {
        mean,
        std: if batch.num_tokens() > 1 { (mean_square - mean * mean).max(0.0).sqrt() } else { 0.0 },
        max,
        min,
        fraction_high: share(active().map(|t| raw[t] > upper)),
        fraction_low: share(active().map(|t| raw[t] < lower)),
        eff_sample_size: if mean_square > 0.0 { (mean + 1e-8).powi(2) / mean_square } else { 0.0 },
        seq_mean,
        seq_std,
        seq_max,
        seq_min,
        seq_max_deviation: means.iter().map(|m| (m - 1.0).abs()).fold(0.0, f64::max),
        seq_fraction_high: share(raw_means.iter().map(|m| *m > upper)),
        seq_fraction_low: share(raw_means.iter().map(|m| *m < lower)),
        oob_ratio: match range {
            Range::Truncate(_) => None,
            Range::Mask(..) => Some(share(active().map(|t| raw[t] < lower || raw[t] > upper))),
        },
        batch_norm_factor: None,
    }
}

/// At sequence level extremes and shares are those of the rows' untruncated weights.
fn sequence_extremes(metrics: &mut WeightMetrics, batch: &TokenBatch, log_ratio: &[f64], range: Range) {
    let mask = batch.response_mask();
    let sums: Vec<f64> = batch.rows().map(|row| masked_sum(&log_ratio[row.clone()], &mask[row])).collect();
    let (low, high) = extremes(sums.iter().copied());
    let (lower, upper) = range.bounds();
    // As in verl only the largest is bounded; the other bound keeps a finite number.
    metrics.min = low.min(700.0).exp();
    metrics.max = high.min(SAFETY_BOUND).exp();
    metrics.fraction_high = share(sums.iter().map(|s| *s > upper.ln()));
    metrics.fraction_low = share(sums.iter().map(|s| *s < lower.ln()));
}

/// Mean over unmasked tokens, or over the rows that have any.
fn batch_mean(level: IsLevel, batch: &TokenBatch, weights: &[f64]) -> f64 {
    if level == IsLevel::Token {
        return masked_mean(weights, batch.response_mask());
    }
    let rows = (0..batch.num_rows()).filter(|i| batch.row_len(*i) > 0);
    let total: f64 = rows.filter_map(|i| batch.active(i).next()).map(|t| weights[t]).sum();
    total / batch.num_sequences().max(1) as f64
}

/// Mean and standard deviation (n - 1; 0 for fewer than two values).
pub(super) fn mean_and_std(values: &[f64]) -> (f64, f64) {
    let n = values.len();
    let mean = values.iter().sum::<f64>() / n.max(1) as f64;
    if n < 2 {
        return (mean, 0.0);
    }
    let squares: f64 = values.iter().map(|v| (v - mean) * (v - mean)).sum();
    (mean, (squares / (n - 1) as f64).sqrt())
}
