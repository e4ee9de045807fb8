//! Training.

use crate::{DistillService, MirrorService, ScalarModelService, ServiceResult};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use temper_types::PolicyVersion;

/// One sequence: prompt, response, and which response tokens count.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenSequence {
    /// Ids of the prompt; at least one.
    pub prompt_token_ids: Vec<u32>,
    /// Ids of the response.
    pub response_token_ids: Vec<u32>,
    /// 1 where a response token takes part in the loss.
    pub response_mask: Vec<u8>,
}

/// One sequence of a mini-batch with the per-token numbers that its objective reads. Arrays have the response's
/// length, or are empty where the objective does not need them.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainRow {
    /// The tokens.
    pub sequence: TokenSequence,
    /// log-probs at the start of the step; empty where no update came since, so that the trainer's own forward gives
    /// them.
    pub old_log_probs: Vec<f32>,
    /// log-probs by the engine.
    pub rollout_log_probs: Vec<f32>,
    /// log-probs under the reference.
    pub ref_log_probs: Vec<f32>,
    /// Advantages.
    pub advantages: Vec<f64>,
    /// Returns (critic).
    pub returns: Vec<f64>,
    /// Values at the start of the step (critic).
    pub values: Vec<f32>,
    /// Importance weights of rollout correction.
    pub rollout_weights: Vec<f64>,
}

impl TrainRow {
    /// A row whose objective reads nothing but the tokens.
    pub fn demonstration(sequence: TokenSequence) -> Self {
        TrainRow {
            sequence,
            old_log_probs: Vec::new(),
            rollout_log_probs: Vec::new(),
            ref_log_probs: Vec::new(),
            advantages: Vec::new(),
            returns: Vec::new(),
            values: Vec::new(),
            rollout_weights: Vec::new(),
        }
    }
}

/// Counts over the whole mini-batch of all ranks, by which losses are normalised.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct GlobalCounts {
    /// Tokens with mask 1.
    pub num_tokens: u64,
    /// Sequences with at least one such token.
    pub num_sequences: u64,
    /// All sequences.
    pub num_rows: u64,
    /// Divisor of seq-mean-token-sum-norm: longest response in tokens.
    pub loss_scale_factor: f64,
}

/// One optimizer step's data.
#[derive(Debug, Clone, PartialEq)]
pub struct MiniBatch {
    /// The rows, in an order fixed by (prompt, sample).
    pub rows: Vec<TrainRow>,
    /// Counts over all ranks.
    pub global: GlobalCounts,
    /// Divides the logits, as in generation.
    pub temperature: f32,
    /// Learning rate of this step.
    pub learning_rate: f64,
}

/// What an optimizer step did.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct UpdateReport {
    /// The objective.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Mean entropy over the mini-batch's tokens, where it was computed.
    pub entropy: f64,
    /// Tokens that passed through the model, prompts included.
    pub num_tokens: u64,
    /// Further numbers by name (`pg_clipfrac`, `ppo_kl`, `kl_loss`, ...).
    pub metrics: BTreeMap<String, f64>,
    /// log-probs of every row's response under the weights before this step.
    pub log_probs: Vec<Vec<f32>>,
}

/// Whose log-probs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PolicyRole {
    /// The weights being trained.
    Policy,
    /// The reference weights.
    Reference,
}

/// What a policy says of response tokens, sequence by sequence.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LogProbs {
    /// One array per sequence.
    pub log_probs: Vec<Vec<f32>>,
    /// One array per sequence.
    pub entropies: Vec<Vec<f32>>,
    /// Sum of the squared probabilities of the whole vocabulary, one array per sequence.
    pub sum_pi_squared: Vec<Vec<f32>>,
}

/// AdamW and its surroundings. Defaults follow the field's RL practice.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerConfig {
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, on all parameters.
    pub weight_decay: f64,
    /// Gradients are scaled down to this global norm; 0 turns clipping off.
    pub max_grad_norm: f64,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        OptimizerConfig {
            learning_rate: 1e-6,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
        }
    }
}

/// What a stage asks of the trainer.
#[derive(Debug, Clone, PartialEq)]
pub struct StageSpec {
    /// Name of the stage in the recipe.
    pub name: String,
    /// The objective as JSON of `temper_algos::Objective`; checked when the stage begins.
    pub objective_json: String,
    /// Optimizer; its state starts afresh with the stage.
    pub optimizer: OptimizerConfig,
    /// True where reference log-probs are needed: the policy at the start of the stage is kept frozen.
    pub needs_reference: bool,
    /// Most tokens (prompts and responses) in one micro-batch.
    pub max_micro_batch_tokens: usize,
    /// Recompute each layer's activations in the backward instead of keeping them.
    pub recompute_activations: bool,
}

/// Trains. The only owner of weights that change.
pub trait TrainerService: ScalarModelService + DistillService + MirrorService + Send + Sync {
    /// Begin a stage: new optimizer state, new objective, and, where needed, the current weights as the reference.
    ///
    /// # Errors
    /// `InvalidArgument` for an objective that this trainer does not know.
    fn begin_stage(&self, spec: StageSpec) -> ServiceResult<()>;
    /// Log-probs of response tokens under one policy at one temperature.
    ///
    /// # Errors
    /// `InvalidArgument` for an empty prompt or a missing reference, `NonFinite` where a log-prob is.
    fn log_probs(&self, role: PolicyRole, sequences: &[TokenSequence], temperature: f32) -> ServiceResult<LogProbs>;
    /// Move the reference towards the policy: `reference = alpha * policy + (1 - alpha) * reference`.
    ///
    /// # Errors
    /// `InvalidArgument` where the stage keeps no reference, or `alpha` is not above 0 and at most 1.
    fn mix_reference(&self, alpha: f64) -> ServiceResult<()>;
    /// One optimizer step.
    ///
    /// # Errors
    /// `NonFinite` where the loss or a gradient is: the weights are unchanged then.
    fn update(&self, batch: MiniBatch) -> ServiceResult<UpdateReport>;
    /// Repack the weights for generation, hash them and name them `number` and hash.
    ///
    /// # Errors
    /// Where hashing or packing fails.
    fn publish(&self, number: u64) -> ServiceResult<PolicyVersion>;
    /// The version last published.
    fn version(&self) -> PolicyVersion;
    /// Write the weights as a Hugging Face directory.
    ///
    /// # Errors
    /// `DataLoss` where writing fails; the directory is incomplete then.
    fn save_model(&self, dir: &Path) -> ServiceResult<()>;
    /// Write all that resume needs beside the model: optimizer moments and counters, reference weights.
    ///
    /// # Errors
    /// As [`TrainerService::save_model`].
    fn save_state(&self, dir: &Path) -> ServiceResult<()>;
    /// Load weights (`model_dir`) and state (`state_dir`) of a checkpoint into a stage that has begun.
    ///
    /// # Errors
    /// `DataLoss` where a file is damaged or of another model.
    fn restore(&self, model_dir: &Path, state_dir: &Path, version: PolicyVersion) -> ServiceResult<()>;
}
