//! Pass@k training: only the best row of a group gets an advantage, its lead over the second best.
//!
//! `A_best = (r_max - r_second) / (std_g + epsilon)`, or the bare lead. Among tied rows the first counts as best, and
//! its lead is 0.
//!
//! # Source
//! arXiv 2503.19595.

use super::groups::{group_rows, std_of};
use super::grpo::Scale;
use crate::Error;

/// Advantage of each row.
pub(crate) fn advantages(scores: &[f64], group_ids: &[u64], scale: Scale, epsilon: f64) -> Result<Vec<f64>, Error> {
    let mut out = vec![0.0; scores.len()];
    for mut rows in group_rows(group_ids) {
        if rows.len() < 2 {
            let cause = format!("expected two or more samples in every group, got 1 in that of row {}", rows[0]);
            return Err(Error::batch("grpo_passk", cause));
        }
        let std = std_of(scores, &rows);
        rows.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
        let lead = scores[rows[0]] - scores[rows[1]];
        out[rows[0]] = match scale {
            Scale::Std => lead / (std + epsilon),
            Scale::None => lead,
        };
    }
    Ok(out)
}
