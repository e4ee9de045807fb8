//! GPG: group-centred rewards, scaled up by the share of rewards that are not 0.
//!
//! `A_i = alpha * (s_i - mean_g) / f_norm`, `alpha = B / max(#{s_i != 0}, 1)` over the whole batch; a group of one has
//! mean 0.
//!
//! # Source
//! arXiv 2504.02546.

use super::groups::{group_rows, mean_of};

/// Advantage of each row.
pub(crate) fn advantages(scores: &[f64], group_ids: &[u64], f_norm: f64) -> Vec<f64> {
    let nonzero = scores.iter().filter(|s| **s != 0.0).count().max(1);
    let alpha = scores.len() as f64 / nonzero as f64;
    let mut out = vec![0.0; scores.len()];
    for rows in group_rows(group_ids) {
        let mean = if rows.len() == 1 { 0.0 } else { mean_of(scores, &rows) };
        rows.iter().for_each(|r| out[*r] = alpha * (scores[*r] - mean) / f_norm);
    }
    out
}
