//! GDPO (decoupled normalisation): each reward component is normalised in its group before they are added up.
//!
//! `A_k = GRPO(component k)`, `A = sum_k w_k A_k` on every token, then whitened over the batch (token-weighted). The
//! preference loss of the same name is another method: see `preference::gdpo`.
//!
//! # Source
//! arXiv 2601.05242, as verl computes it.

use super::grpo::{self, Scale};
use crate::masked::{Shift, broadcast, masked_whiten};
use crate::{Error, TokenBatch};

/// Normalisation and weights of the components.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Components<'a> {
    /// One slice of `[B]` per component.
    pub(crate) rewards: &'a [&'a [f64]],
    /// One weight per component; `None` is all ones.
    pub(crate) weights: Option<&'a [f64]>,
    pub(crate) scale: Scale,
    pub(crate) epsilon: f64,
}

/// Token-level advantages.
pub(crate) fn advantages(batch: &TokenBatch, group_ids: &[u64], components: Components<'_>) -> Result<Vec<f64>, Error> {
    if let Some(weights) = components.weights {
        crate::batch::expect_len("gdpo_reward_weights", components.rewards.len(), weights.len())?;
    }
    let mut total = vec![0.0; batch.num_rows()];
    for (k, rewards) in components.rewards.iter().enumerate() {
        batch.expect_finite_rows("gdpo", "reward_components", rewards)?;
        let weight = components.weights.map_or(1.0, |w| w[k]);
        let normalised = grpo::advantages(rewards, group_ids, components.scale, components.epsilon);
        total.iter_mut().zip(normalised).for_each(|(sum, a)| *sum += weight * a);
    }
    masked_whiten(&broadcast(batch, &total), batch.response_mask(), Shift::Center)
}
