//! Rejection: tokens or whole rows whose statistic of the log-ratio is out of bounds leave the mask.
//!
//! With `lr` clamped to +-20: k1 = `-lr`, k2 = `lr^2 / 2`, k3 = `e^lr - 1 - lr`; per token, or summed, averaged or
//! maximised over a row. k1 stays where `ln(lower) <= stat <= ln(upper)` (one number x means `[1/x, x]`); k2 and k3
//! where `stat <= upper`. Several options are joined by "and".

use super::weights::mean_and_std;
use super::{SAFETY_BOUND, Threshold};
use crate::masked::masked_mean;
use crate::math::Cut;
use crate::{Error, TokenBatch};

/// Statistic of a log-ratio.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Statistic {
    /// `-lr`.
    K1,
    /// `lr^2 / 2`.
    K2,
    /// `e^lr - 1 - lr`.
    K3,
}

/// What the statistic is taken over, and what is rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Single tokens.
    Token,
    /// The sum over a row.
    SeqSum,
    /// The mean over a row.
    SeqMean,
    /// The maximum over a row.
    SeqMax,
}

/// One rejection option with its bounds.
#[derive(Debug, Clone, PartialEq)]
pub struct RejectionOption {
    /// Its name.
    pub name: String,
    /// Its level.
    pub level: Level,
    /// Its statistic.
    pub statistic: Statistic,
    /// Lower bound of the statistic (k1).
    pub lower: Option<f64>,
    /// Upper bound of the statistic.
    pub upper: f64,
}

impl RejectionOption {
    /// True where a value of the statistic is out of bounds.
    pub fn rejects(&self, value: f64) -> bool {
        value > self.upper || self.lower.is_some_and(|lower| value < lower)
    }
}

/// Report of one option, in verl's terms.
#[derive(Debug, Clone, PartialEq)]
pub struct OptionReport {
    /// The option.
    pub option: RejectionOption,
    /// Mean of the statistic over unmasked tokens.
    pub mean: f64,
    /// Largest value.
    pub max: f64,
    /// Smallest value.
    pub min: f64,
    /// Share of tokens (row options: rows) above the upper bound.
    pub fraction_high: f64,
    /// Share below the lower bound.
    pub fraction_low: f64,
    /// Standard deviation over tokens of the statistic cut to its bounds.
    pub std: f64,
    /// Mean over rows.
    pub seq_mean: f64,
    /// Standard deviation over rows (n - 1).
    pub seq_std: f64,
    /// Largest row.
    pub seq_max: f64,
    /// Smallest row.
    pub seq_min: f64,
    /// Largest absolute row.
    pub seq_max_deviation: f64,
    /// Share of rows above the upper bound.
    pub seq_fraction_high: f64,
    /// Share of rows below the lower bound (k1).
    pub seq_fraction_low: Option<f64>,
    /// Share of tokens that this option rejects.
    pub masked_fraction: f64,
    /// Share of non-empty rows with a token that this option rejects.
    pub seq_masked_fraction: f64,
}

/// Report of the rejection.
#[derive(Debug, Clone, PartialEq)]
pub struct RejectionReport {
    /// One report per option.
    pub options: Vec<OptionReport>,
    /// Share of tokens that some option rejects.
    pub masked_fraction: f64,
    /// Share of all rows with a rejected token.
    pub seq_masked_fraction: f64,
}

/// The mask that is left, and its report.
#[derive(Debug, Clone, PartialEq)]
pub struct RejectionOutput {
    /// `[T]`.
    pub response_mask: Vec<u8>,
    /// The report.
    pub report: RejectionReport,
}

fn parse_name(name: &str) -> Option<(Level, Statistic)> {
    Some(match name {
        "token_k1" => (Level::Token, Statistic::K1),
        "token_k2" => (Level::Token, Statistic::K2),
        "token_k3" => (Level::Token, Statistic::K3),
        "seq_sum_k1" => (Level::SeqSum, Statistic::K1),
        "seq_sum_k2" => (Level::SeqSum, Statistic::K2),
        "seq_sum_k3" => (Level::SeqSum, Statistic::K3),
        "seq_mean_k1" => (Level::SeqMean, Statistic::K1),
        "seq_mean_k2" => (Level::SeqMean, Statistic::K2),
        "seq_mean_k3" => (Level::SeqMean, Statistic::K3),
        "seq_max_k2" => (Level::SeqMax, Statistic::K2),
        "seq_max_k3" => (Level::SeqMax, Statistic::K3),
        _ => return None,
    })
}

fn parse_bounds(statistic: Statistic, text: &str) -> Option<(Option<f64>, f64)> {
    let positive = |text: &str| text.trim().parse::<f64>().ok().filter(|v| *v > 0.0 && v.is_finite());
    match (statistic, text.split_once('_')) {
        (Statistic::K1, Some((lower, upper))) => {
            let (lower, upper) = (positive(lower)?, positive(upper)?);
            (lower <= upper).then_some((Some(lower.ln()), upper.ln()))
        }
        (Statistic::K1, None) => {
            let bound = positive(text)?;
            (bound >= 1.0).then_some((Some((1.0 / bound).ln()), bound.ln()))
        }
        (Statistic::K2 | Statistic::K3, Some(_)) => None,
        (Statistic::K2 | Statistic::K3, None) => positive(text).map(|upper| (None, upper)),
    }
}

/// Read the options and their bounds; an option named twice counts once.
pub(super) fn parse_options(names: &str, threshold: Option<&Threshold>) -> Result<Vec<RejectionOption>, Error> {
    let mut unique: Vec<&str> = Vec::new();
    for name in names.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        if !unique.contains(&name) {
            unique.push(name);
        }
    }
    let text = match threshold {
        None => return Err(Error::Missing { operation: "rollout_rs", name: "rollout_rs_threshold" }),
        Some(threshold) => threshold.to_string(),
    };
    let bounds: Vec<&str> = text.split(',').map(str::trim).collect();
    if bounds.len() != 1 && bounds.len() != unique.len() {
        return Err(Error::setting("rollout_rs_threshold", &text, "one bound for all options or one per option"));
    }
    let option = |(i, name): (usize, &&str)| {
        let known = "token_k1..3, seq_sum_k1..3, seq_mean_k1..3, seq_max_k2 or seq_max_k3, joined by commas";
        let (level, statistic) = parse_name(name).ok_or_else(|| Error::setting("rollout_rs", *name, known))?;
        let bound = bounds[if bounds.len() == 1 { 0 } else { i }];
        let expected =
            "LOWER_UPPER with 0 < LOWER <= UPPER (or x >= 1 for 1/x_x) for k1, one number above 0 for k2, k3";
        let (lower, upper) =
            parse_bounds(statistic, bound).ok_or_else(|| Error::setting("rollout_rs_threshold", bound, expected))?;
        Ok(RejectionOption { name: (*name).to_owned(), level, statistic, lower, upper })
    };
    unique.iter().enumerate().map(option).collect()
}

/// Mask of a batch after rejection.
///
/// # Errors
/// An option or bound that is not known; log-ratios of the wrong length or not finite.
pub fn rejection_mask(
    options: &str,
    threshold: Option<&Threshold>,
    batch: &TokenBatch,
    log_ratio: &[f64],
) -> Result<RejectionOutput, Error> {
    batch.expect_finite("rollout_rs", "log_ratio", log_ratio)?;
    let options = parse_options(options, threshold)?;
    let mut mask = batch.response_mask().to_vec();
    let mut reports = Vec::with_capacity(options.len());
    for option in options {
        let (statistics, rows) = statistics(&option, batch, log_ratio);
        let rejected = |t: usize| batch.is_active(t) && option.rejects(statistics[t]);
        let hit: Vec<bool> = (0..batch.num_slots()).map(rejected).collect();
        mask.iter_mut().zip(&hit).filter(|(_, hit)| **hit).for_each(|(m, _)| *m = 0);
        reports.push(report(option, batch, &statistics, &rows, &hit));
    }
    let lost: Vec<bool> = mask.iter().zip(batch.response_mask()).map(|(new, old)| new != old).collect();
    let report = RejectionReport {
        options: reports,
        masked_fraction: token_share(batch, &lost),
        seq_masked_fraction: rows_hit(batch, &lost) as f64 / batch.num_rows().max(1) as f64,
    };
    Ok(RejectionOutput { response_mask: mask, report })
}

fn token_share(batch: &TokenBatch, hit: &[bool]) -> f64 {
    hit.iter().filter(|h| **h).count() as f64 / batch.num_tokens().max(1) as f64
}

fn rows_hit(batch: &TokenBatch, hit: &[bool]) -> usize {
    batch.rows().filter(|row| hit[row.clone()].contains(&true)).count()
}

/// Statistic of every token (`[T]`; a row's statistic on all its tokens) and of every non-empty row.
fn statistics(option: &RejectionOption, batch: &TokenBatch, log_ratio: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let single = |t: usize| {
        let lr = log_ratio[t].cut(-SAFETY_BOUND, SAFETY_BOUND);
        match option.statistic {
            Statistic::K1 => -lr,
            Statistic::K2 => 0.5 * lr * lr,
            Statistic::K3 => lr.exp() - 1.0 - lr,
        }
    };
    let mut tokens = vec![0.0; batch.num_slots()];
    let mut rows = Vec::new();
    for row in (0..batch.num_rows()).filter(|row| batch.row_len(*row) > 0) {
        let len = batch.row_len(row) as f64;
        let sum: f64 = batch.active(row).map(single).sum();
        let of_row = match option.level {
            Level::Token | Level::SeqMean => sum / len,
            Level::SeqSum => sum,
            Level::SeqMax => batch.active(row).map(single).fold(f64::NEG_INFINITY, f64::max),
        };
        rows.push(of_row);
        batch.active(row).for_each(|t| tokens[t] = if option.level == Level::Token { single(t) } else { of_row });
    }
    (tokens, rows)
}

fn report(option: RejectionOption, batch: &TokenBatch, tokens: &[f64], rows: &[f64], hit: &[bool]) -> OptionReport {
    let mask = batch.response_mask();
    let lower = option.lower.unwrap_or(f64::NEG_INFINITY);
    let cut: Vec<f64> = tokens.iter().map(|v| v.cut(lower, option.upper)).collect();
    let squares: Vec<f64> = cut.iter().map(|v| v * v).collect();
    let variance = masked_mean(&squares, mask) - masked_mean(&cut, mask).powi(2);
    let units: Vec<f64> = match option.level {
        Level::Token => (0..batch.num_slots()).filter(|t| batch.is_active(*t)).map(|t| tokens[t]).collect(),
        Level::SeqSum | Level::SeqMean | Level::SeqMax => rows.to_vec(),
    };
    let share = |values: &[f64], hit: &dyn Fn(f64) -> bool| {
        values.iter().filter(|v| hit(**v)).count() as f64 / values.len().max(1) as f64
    };
    let (high, low) = (|v: f64| v > option.upper, |v: f64| v < lower);
    let largest = |values: &[f64]| values.iter().copied().reduce(f64::max).unwrap_or(0.0);
    let smallest = |values: &[f64]| values.iter().copied().reduce(f64::min).unwrap_or(0.0);
    let (seq_mean, seq_std) = mean_and_std(rows);
    OptionReport {
        mean: masked_mean(tokens, mask),
        max: largest(&units),
        min: smallest(&units),
        fraction_high: share(&units, &high),
        fraction_low: share(&units, &low),
        std: variance.max(0.0).sqrt(),
        seq_mean,
        seq_std,
        seq_max: largest(rows),
        seq_min: smallest(rows),
        seq_max_deviation: rows.iter().map(|v| v.abs()).fold(0.0, f64::max),
        seq_fraction_high: share(rows, &high),
        seq_fraction_low: option.lower.map(|_| share(rows, &low)),
        masked_fraction: token_share(batch, hit),
        seq_masked_fraction: rows_hit(batch, hit) as f64 / rows.len().max(1) as f64,
        option,
    }
}
