//! Generalised advantage estimation over the unmasked tokens of a row.
//!
//! Going back over tokens with mask 1: `delta = r_t + gamma * V_next - V_t`, `l = delta + gamma * lam * l`;
//! `A_t = l`, `R_t = A_t + V_t`. Masked tokens (observations) are skipped: value and trace carry over them. Advantages
//! are then whitened over the batch, which needs two unmasked tokens.
//!
//! # Source
//! Schulman et al., arXiv 1506.02438; the skipping and the whitening are verl's.

use super::AdvantageOutput;
use crate::masked::{Shift, masked_whiten};
use crate::{Error, TokenBatch};

/// Discounts of the estimator.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Discounts {
    pub(crate) gamma: f64,
    pub(crate) lam: f64,
}

/// Advantages before whitening, and returns.
pub(crate) fn unwhitened(batch: &TokenBatch, rewards: &[f64], values: &[f64], discounts: Discounts) -> AdvantageOutput {
    let mut advantages = vec![0.0; batch.num_slots()];
    let mut returns = vec![0.0; batch.num_slots()];
    for row in 0..batch.num_rows() {
        let (mut next_value, mut trace) = (0.0, 0.0);
        for t in batch.active(row).rev() {
            let delta = rewards[t] + discounts.gamma * next_value - values[t];
            trace = delta + discounts.gamma * discounts.lam * trace;
            next_value = values[t];
            advantages[t] = trace;
            returns[t] = trace + values[t];
        }
    }
    AdvantageOutput { advantages, returns }
}

/// Whitened advantages, and returns.
pub(crate) fn advantages(
    batch: &TokenBatch,
    rewards: &[f64],
    values: &[f64],
    discounts: Discounts,
) -> Result<AdvantageOutput, Error> {
    let AdvantageOutput { advantages, returns } = unwhitened(batch, rewards, values, discounts);
    let advantages = masked_whiten(&advantages, batch.response_mask(), Shift::Center)?;
    Ok(AdvantageOutput { advantages, returns })
}
