//! Models with a scalar head: the critic of a policy stage, and the reward model.
//!
//! A reward model outlives its stage: later stages score with it, or start their critic from it. A critic is gone when
//! its stage ends.

use crate::{MiniBatch, OptimizerConfig, ServiceResult, TokenSequence};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// What a model with a scalar head is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScalarRole {
    /// A value for every response token: what is still to come at the position that predicts it.
    Critic,
    /// A score for a whole sequence, at its last token.
    RewardModel,
}

/// Which weights a model with a scalar head starts from. Its head is drawn with the seed where they have none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Backbone {
    /// The policy as it is when the stage begins.
    #[default]
    Policy,
    /// The reward model of an earlier stage, its head included.
    RewardModel,
    /// None of its own: a head on the policy's trunk, which learns in the policy's update.
    Shared,
}

/// What a stage asks for beside the policy.
#[derive(Debug, Clone, PartialEq)]
pub struct ScalarModelSpec {
    /// What it is for.
    pub role: ScalarRole,
    /// The loss as JSON: of `temper_algos::ValueLossConfig` for a critic (`SharedValueLossConfig` on the policy's
    /// trunk), of `temper_algos::preference::RewardModelConfig` for a reward model.
    pub loss_json: String,
    /// Optimizer; its state starts afresh with the stage.
    pub optimizer: OptimizerConfig,
    /// Where its weights come from.
    pub backbone: Backbone,
    /// Seed of what is drawn.
    pub seed: u64,
}

/// Two responses to one prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct PreferencePair {
    /// The preferred one.
    pub chosen: TokenSequence,
    /// The other one.
    pub rejected: TokenSequence,
    /// By how much the chosen score should at least be above the other; 0 where nobody said.
    pub margin: f64,
}

/// What an optimizer step of a model with a scalar head did.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct ScalarReport {
    /// The loss.
    pub loss: f64,
    /// Global gradient norm before clipping.
    pub grad_norm: f64,
    /// Tokens that passed through the model, prompts included.
    pub num_tokens: u64,
    /// Further numbers by name (`value_clipfrac`, `accuracy`, ...).
    pub metrics: BTreeMap<String, f64>,
}

/// Trains and asks the models with a scalar head. Part of a trainer.
pub trait ScalarModelService: Send + Sync {
    /// Ask for a critic or a reward model in the stage that has begun. It is made from its backbone when it is first
    /// needed, so that a stage can be resumed before its weights are restored.
    ///
    /// # Errors
    /// `InvalidArgument` for a loss that this trainer does not know.
    fn begin_scalar_model(&self, spec: ScalarModelSpec) -> ServiceResult<()>;
    /// The critic's values of every response token, one array per sequence.
    ///
    /// # Errors
    /// `InvalidArgument` for a bad sequence or without a critic, `NonFinite` where a value is.
    fn values(&self, sequences: &[TokenSequence]) -> ServiceResult<Vec<Vec<f32>>>;
    /// One optimizer step of the critic on `returns`, clipped around `values` (those at the start of the step).
    ///
    /// # Errors
    /// `NonFinite` where the loss or a gradient is: the weights are unchanged then.
    fn update_critic(&self, batch: MiniBatch) -> ServiceResult<ScalarReport>;
    /// One optimizer step of the reward model.
    ///
    /// # Errors
    /// As [`ScalarModelService::update_critic`].
    fn update_reward_model(&self, pairs: &[PreferencePair], learning_rate: f64) -> ServiceResult<ScalarReport>;
    /// The reward model's score of every sequence, at its last token. Scores that are not finite are given as they are.
    ///
    /// # Errors
    /// `InvalidArgument` for a bad sequence, or where no stage has trained a reward model.
    fn scores(&self, sequences: &[TokenSequence]) -> ServiceResult<Vec<f32>>;
    /// Write the reward model as a Hugging Face directory; gives false, and writes nothing, where there is none.
    ///
    /// # Errors
    /// `DataLoss` where writing fails; the directory is incomplete then.
    fn save_reward_model(&self, dir: &Path) -> ServiceResult<bool>;
    /// Load a reward model that [`ScalarModelService::save_reward_model`] wrote, before the trainer's own state.
    ///
    /// # Errors
    /// `DataLoss` where a file is damaged or of another model.
    fn restore_reward_model(&self, dir: &Path) -> ServiceResult<()>;
}
