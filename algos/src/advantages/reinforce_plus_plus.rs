//! REINFORCE++: discounted reward-to-go, whitened over the batch; and its variant with a group baseline.
//!
//! # Source
//! arXiv 2501.03262. Masked tokens carry the return through and get 0.

use super::AdvantageOutput;
use super::groups::{group_rows, mean_of};
use crate::masked::{Shift, broadcast, masked_whiten};
use crate::{Error, TokenBatch};

/// `G_t = r_t + gamma * G_{t+1}` over unmasked tokens; advantages are the whitened returns.
pub(crate) fn advantages(batch: &TokenBatch, rewards: &[f64], gamma: f64) -> Result<AdvantageOutput, Error> {
    let mut returns = vec![0.0; batch.num_slots()];
    for row in 0..batch.num_rows() {
        let mut to_go = 0.0;
        for t in batch.active(row).rev() {
            to_go = rewards[t] + gamma * to_go;
            returns[t] = to_go;
        }
    }
    let advantages = masked_whiten(&returns, batch.response_mask(), Shift::Center)?;
    Ok(AdvantageOutput { advantages, returns })
}

/// `s_i - mean_g` (a group of one keeps its score) on every token, whitened over the batch.
pub(crate) fn baseline_advantages(batch: &TokenBatch, scores: &[f64], group_ids: &[u64]) -> Result<Vec<f64>, Error> {
    let mut centred = scores.to_vec();
    for rows in group_rows(group_ids).iter().filter(|rows| rows.len() > 1) {
        let mean = mean_of(scores, rows);
        rows.iter().for_each(|row| centred[*row] -= mean);
    }
    masked_whiten(&broadcast(batch, &centred), batch.response_mask(), Shift::Center)
}
