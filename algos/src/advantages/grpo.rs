//! GRPO: a reward relative to its group, divided by the group's standard deviation or not (Dr.GRPO).
//!
//! `A_i = (s_i - mean_g) / (std_g + epsilon)`, or `s_i - mean_g`. A group of one keeps its score (mean 0, std 1); a
//! group without variance gives 0.
//!
//! # Source
//! DeepSeekMath, arXiv 2402.03300; Dr.GRPO, arXiv 2503.20783. The epsilon and the group of one are verl's.

use super::groups::{group_rows, mean_of, std_of};

/// Whether a group's standard deviation divides its advantages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scale {
    /// Divide by `std + epsilon`.
    Std,
    /// Leave the difference as it is.
    None,
}

impl Scale {
    pub(crate) fn from_flag(norm_by_std: bool) -> Self {
        if norm_by_std { Scale::Std } else { Scale::None }
    }
}

/// Advantage of each row.
pub(crate) fn advantages(scores: &[f64], group_ids: &[u64], scale: Scale, epsilon: f64) -> Vec<f64> {
    let mut out = vec![0.0; scores.len()];
    for rows in group_rows(group_ids) {
        let (mean, std) = if rows.len() == 1 { (0.0, 1.0) } else { (mean_of(scores, &rows), std_of(scores, &rows)) };
        for row in rows {
            let centred = scores[row] - mean;
            out[row] = match scale {
                Scale::Std => centred / (std + epsilon),
                Scale::None => centred,
            };
        }
    }
    out
}
