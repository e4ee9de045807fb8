//! What a trainer minimises in one stage: one enum over all losses, so that the trainer names no algorithm.

use crate::{
    Error, GlobalCounts, LossMetrics, PolicyLossConfig, PolicyLossInput, Scope, SftLossType, TokenBatch, policy_loss,
    sft_loss,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The loss of a stage, with its settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[expect(clippy::large_enum_variant, reason = "there is one per stage")]
#[serde(tag = "objective", content = "settings", rename_all = "snake_case")]
pub enum Objective {
    /// Negative log-likelihood of demonstrations.
    Sft(SftLossType),
    /// A policy-gradient loss.
    Policy(PolicyLossConfig),
}

/// Everything an objective may read; per-token arrays are `[T]`.
#[derive(Debug, Clone, Copy, Default)]
pub struct ObjectiveInput<'a> {
    /// Rows and mask.
    pub batch: TokenBatch<'a>,
    /// Log-probs under the policy now.
    pub log_probs: &'a [f64],
    /// Entropies under the policy now.
    pub entropies: &'a [f64],
    /// Log-probs at the start of the step.
    pub old_log_probs: &'a [f64],
    /// Log-probs under the reference.
    pub ref_log_probs: Option<&'a [f64]>,
    /// Advantages.
    pub advantages: &'a [f64],
    /// Importance weights of rollout correction.
    pub rollout_is_weights: Option<&'a [f64]>,
}

/// This call's share of the loss, its gradients and its sums.
#[derive(Debug, Clone, PartialEq)]
pub struct ObjectiveOutput {
    /// Shares add up over micro-batches.
    pub loss: f64,
    /// `[T]`: d loss / d log_prob.
    pub d_log_probs: Vec<f64>,
    /// `[T]`: d loss / d entropy, or empty where the loss does not read entropies.
    pub d_entropies: Vec<f64>,
    /// Sums to add up over micro-batches.
    pub metrics: LossMetrics,
}

impl Objective {
    /// Check the settings.
    ///
    /// # Errors
    /// The first setting out of range, by name.
    pub fn validate(&self) -> Result<(), Error> {
        match self {
            Objective::Sft(_) => Ok(()),
            Objective::Policy(config) => config.validate(),
        }
    }

    /// What a call has to see at once.
    pub fn scope(&self) -> Scope {
        match self {
            Objective::Sft(_) => Scope::Token,
            Objective::Policy(config) => config.scope(),
        }
    }

    /// The loss of a part of a mini-batch with its gradients; `counts` are those of the whole mini-batch.
    ///
    /// # Errors
    /// Those of the loss: arrays missing, of the wrong length or not finite.
    pub fn evaluate(&self, input: &ObjectiveInput<'_>, counts: &GlobalCounts) -> Result<ObjectiveOutput, Error> {
        match self {
            Objective::Sft(kind) => {
                let out = sft_loss(*kind, &input.batch, input.log_probs, counts.num_tokens)?;
                let metrics = LossMetrics {
                    num_tokens: input.batch.num_tokens() as f64,
                    entropy_sum: masked_sum(&input.batch, input.entropies),
                    ..LossMetrics::default()
                };
                Ok(ObjectiveOutput { loss: out.loss, d_log_probs: out.d_log_probs, d_entropies: Vec::new(), metrics })
            }
            Objective::Policy(config) => {
                let policy_input = PolicyLossInput {
                    batch: input.batch,
                    log_probs: input.log_probs,
                    old_log_probs: input.old_log_probs,
                    advantages: input.advantages,
                    ref_log_probs: input.ref_log_probs,
                    entropies: Some(input.entropies),
                    rollout_is_weights: input.rollout_is_weights,
                    rollout_log_probs: None,
                    noise_seed: noise_seed(input.log_probs),
                };
                let out = policy_loss(config, &policy_input, counts)?;
                let d_entropies = if config.entropy_coeff > 0.0 { out.d_entropies } else { Vec::new() };
                Ok(ObjectiveOutput { loss: out.loss, d_log_probs: out.d_log_probs, d_entropies, metrics: out.metrics })
            }
        }
    }
}

/// Seed of a loss's random choices: a function of the numbers it reads, so that a resumed run repeats them.
fn noise_seed(log_probs: &[f64]) -> u64 {
    log_probs.iter().fold(0x9E37_79B9_7F4A_7C15, |seed, v| (seed ^ v.to_bits()).wrapping_mul(0x0000_0100_0000_01B3))
}

fn masked_sum(batch: &TokenBatch<'_>, values: &[f64]) -> f64 {
    values.iter().enumerate().filter(|(t, _)| batch.is_active(*t)).map(|(_, v)| v).sum()
}
