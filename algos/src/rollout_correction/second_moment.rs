//! M2PO's rejection: the tokens with the largest squared log-ratios leave until the mean of the rest is small enough.
//!
//! The last token always stays. Of tokens with equal squares the first in the batch leaves first. Needs the whole
//! batch.
//!
//! # Source
//! arXiv 2510.01161, as in AReaL.

use crate::TokenBatch;
use crate::loss::m2po_mask;

/// The mask that is left, and the share of unmasked tokens that it leaves out.
pub(super) fn reject(batch: &TokenBatch, log_ratio: &[f64], threshold: f64) -> (Vec<u8>, f64) {
    let mut active: Vec<usize> = (0..batch.num_slots()).filter(|t| batch.is_active(*t)).collect();
    let square = |t: usize| log_ratio[t] * log_ratio[t];
    active.sort_by(|a, b| square(*b).total_cmp(&square(*a)));
    let sorted: Vec<f64> = active.iter().map(|t| square(*t)).collect();
    let mut mask = batch.response_mask().to_vec();
    let mut num_rejected = 0usize;
    for (t, kept) in active.iter().zip(m2po_mask(&sorted, threshold)) {
        if !kept {
            mask[*t] = 0;
            num_rejected += 1;
        }
    }
    (mask, num_rejected as f64 / active.len().max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_squares_leave_until_the_mean_is_small_enough() {
        let mask = [1, 1, 1, 0, 1];
        let batch = TokenBatch::new(&[0, 3, 5], &mask).expect("two rows");
        let log_ratio = [0.1, -0.5, 0.3, 9.0, -0.1];
        // Means of the squares: .09, then .11 / 3, then .01.
        for (threshold, left, share) in
            [(0.1, [1, 1, 1, 0, 1], 0.0), (0.04, [1, 0, 1, 0, 1], 0.25), (0.02, [1, 0, 0, 0, 1], 0.5)]
        {
            assert_eq!(reject(&batch, &log_ratio, threshold), (left.to_vec(), share), "{threshold}");
        }
        assert_eq!(reject(&batch, &[0.0; 5], 0.0), (mask.to_vec(), 0.0), "on-policy nothing leaves");
        assert_eq!(reject(&batch, &[1.0; 5], 0.0), (vec![0, 0, 0, 0, 1], 0.75), "one token stays");
    }
}
