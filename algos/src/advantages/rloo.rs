//! RLOO: a reward less the mean of its siblings, `n / (n - 1) * (s_i - mean_g)`.
//!
//! # Source
//! arXiv 2402.14740. For a group of one, verl's `rloo` keeps the raw score and its `rloo_vectorized` gives 0.

use super::groups::{group_rows, mean_of};

/// What a group of one gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Singleton {
    /// The raw score.
    Score,
    /// Nothing.
    Zero,
}

/// Advantage of each row.
pub(crate) fn advantages(scores: &[f64], group_ids: &[u64], singleton: Singleton) -> Vec<f64> {
    let mut out = vec![0.0; scores.len()];
    for rows in group_rows(group_ids) {
        if let [row] = rows[..] {
            out[row] = if singleton == Singleton::Score { scores[row] } else { 0.0 };
            continue;
        }
        let n = rows.len() as f64;
        let mean = mean_of(scores, &rows);
        for row in rows {
            out[row] = n / (n - 1.0) * (scores[row] - mean);
        }
    }
    out
}
