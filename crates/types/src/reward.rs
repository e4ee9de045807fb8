//! What scoring one sample gives: components, or a named failure. Never a silent 0.

use serde::{Deserialize, Serialize};

/// One part of a reward, before weighting.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RewardComponent {
    /// Name of the verifier that gave it.
    pub name: String,
    /// Its unweighted value; finite.
    pub value: f64,
}

/// Why a sample could not be scored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("reward `{scorer}` failed: {cause}")]
pub struct RewardFailure {
    /// Name of the verifier that failed.
    pub scorer: String,
    /// What happened, in words.
    pub cause: String,
}

/// The result of scoring one sample. A failure masks the sample out of training and is counted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum RewardOutcome {
    /// All components were computed; `reward` is their weighted sum.
    Scored {
        /// Weighted sum of the components; finite.
        reward: f64,
        /// The components, in the recipe's order.
        components: Vec<RewardComponent>,
    },
    /// At least one component failed.
    Failed(RewardFailure),
}

impl RewardOutcome {
    /// The reward, or `None` where scoring failed.
    pub fn reward(&self) -> Option<f64> {
        match self {
            RewardOutcome::Scored { reward, .. } => Some(*reward),
            RewardOutcome::Failed(_) => None,
        }
    }
}
