//! OPO: a reward less the length-weighted mean reward of its group.
//!
//! `b_g = sum(len_i * s_i) / sum(len_i)`, `len_i` = number of unmasked tokens; 0 for a group of one, and for a group
//! without any token (verl gives NaN there; no token would carry it).
//!
//! # Source
//! arXiv 2505.23585.

use super::groups::group_rows;
use crate::TokenBatch;

/// Advantage of each row.
pub(crate) fn advantages(batch: &TokenBatch, scores: &[f64], group_ids: &[u64]) -> Vec<f64> {
    let mut out = scores.to_vec();
    for rows in group_rows(group_ids).iter().filter(|rows| rows.len() > 1) {
        let length: f64 = rows.iter().map(|r| batch.row_len(*r) as f64).sum();
        let weighted: f64 = rows.iter().map(|r| batch.row_len(*r) as f64 * scores[*r]).sum();
        let baseline = if length > 0.0 { weighted / length } else { 0.0 };
        rows.iter().for_each(|r| out[*r] -= baseline);
    }
    out
}
