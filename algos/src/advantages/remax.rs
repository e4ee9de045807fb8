//! ReMax: undiscounted reward-to-go less the reward of the greedy response to the same prompt.
//!
//! # Source
//! arXiv 2310.10505.

use super::AdvantageOutput;
use crate::TokenBatch;

/// Advantages and returns; `reward_baselines` is `[B]`.
pub(crate) fn advantages(batch: &TokenBatch, rewards: &[f64], reward_baselines: &[f64]) -> AdvantageOutput {
    let mut returns = vec![0.0; batch.num_slots()];
    let mut advantages = vec![0.0; batch.num_slots()];
    for (row, baseline) in reward_baselines.iter().enumerate() {
        let mut to_go = 0.0;
        for t in batch.active(row).rev() {
            to_go += rewards[t];
            returns[t] = to_go;
            advantages[t] = to_go - baseline;
        }
    }
    AdvantageOutput { advantages, returns }
}
