//! Recipe keys of models with a scalar head: the critic of a policy stage, and the stage that trains a reward model.

use crate::{Error, MemoryConfig};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use temper_algos::preference::RewardModelConfig;
use temper_algos::{LrScheduleConfig, SharedValueLossConfig, ValueLossConfig};
use temper_proto::{Backbone, OptimizerConfig, ScalarModelSpec, ScalarRole};

/// Weight of the value loss of a head on the policy's trunk, where the recipe names none.
const VF_COEF: f64 = 0.1;

/// The critic of a policy stage: a value head on a backbone of its own, or on the policy's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CriticConfig {
    /// Steps at the start of the stage in which only the critic learns.
    pub warmup_steps: u64,
    /// Passes over a step's samples, in the stage's mini-batches.
    pub epochs: usize,
    /// Which weights it starts from; `shared`: it is a head on the policy's trunk and learns in the policy's update.
    pub backbone: Backbone,
    /// Weight of the value loss in that update; absent: 0.1. Only with `backbone = "shared"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vf_coef: Option<f64>,
    /// Its loss.
    pub value_loss: ValueLossConfig,
    /// Its optimizer.
    pub optimizer: OptimizerConfig,
    /// Its learning rate over the stage's steps.
    pub schedule: LrScheduleConfig,
}

impl Default for CriticConfig {
    fn default() -> Self {
        CriticConfig {
            warmup_steps: 0,
            epochs: 1,
            backbone: Backbone::Policy,
            vf_coef: None,
            value_loss: ValueLossConfig::default(),
            optimizer: OptimizerConfig { learning_rate: 1e-5, ..OptimizerConfig::default() },
            schedule: LrScheduleConfig::default(),
        }
    }
}

impl CriticConfig {
    /// Check every range; `key` is its place in the recipe, `steps` the stage's length.
    pub(crate) fn validate(&self, key: &str, steps: u64) -> Result<(), Error> {
        self.check_shared(key)?;
        if self.epochs == 0 {
            return Err(Error::config(format!("{key}.epochs"), "0 is out of range: expected at least 1"));
        }
        if self.warmup_steps >= steps {
            let problem = format!(
                "{} of the stage's {steps} steps: the policy would learn nothing; expected fewer",
                self.warmup_steps
            );
            return Err(Error::config(format!("{key}.warmup_steps"), problem));
        }
        self.value_loss.validate().map_err(|e| Error::config(format!("{key}.value_loss"), e))
    }

    /// True where the value head stands on the policy's trunk.
    pub(crate) fn is_shared(&self) -> bool {
        self.backbone == Backbone::Shared
    }

    /// A head on the policy's trunk has nothing of its own to step; a critic has no part in the policy's loss.
    fn check_shared(&self, key: &str) -> Result<(), Error> {
        if !self.is_shared() {
            let problem = "the critic's loss is one of its own: expected `backbone = \"shared\"`, or no vf_coef";
            return match self.vf_coef {
                Some(_) => Err(Error::config(format!("{key}.vf_coef"), problem)),
                None => Ok(()),
            };
        }
        let own = CriticConfig::default();
        let is_given = [
            ("warmup_steps", self.warmup_steps != own.warmup_steps),
            ("epochs", self.epochs != own.epochs),
            ("optimizer", self.optimizer != own.optimizer),
            ("schedule", self.schedule != own.schedule),
        ];
        if let Some((name, _)) = is_given.into_iter().find(|(_, is_given)| *is_given) {
            let problem = "the value head shares the policy's trunk and update: expected none, or another backbone";
            return Err(Error::config(format!("{key}.{name}"), problem));
        }
        self.shared_loss().validate().map_err(|e| Error::config(key, e))
    }

    fn shared_loss(&self) -> SharedValueLossConfig {
        SharedValueLossConfig { vf_coef: self.vf_coef.unwrap_or(VF_COEF), value_loss: self.value_loss.clone() }
    }

    /// What the trainer is asked for.
    pub(crate) fn spec(&self, seed: u64) -> ScalarModelSpec {
        let loss_json = match self.is_shared() {
            true => serde_json::to_string(&self.shared_loss()),
            false => serde_json::to_string(&self.value_loss),
        };
        ScalarModelSpec {
            role: ScalarRole::Critic,
            loss_json: loss_json.expect("a loss is plain data"),
            optimizer: self.optimizer.clone(),
            backbone: self.backbone,
            seed,
        }
    }
}

/// A stage that trains a reward model on pairs (`chosen` and `rejected` columns, `margin` where there is one). The
/// policy is its backbone, and stays as it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RewardModelStage {
    /// Name in metrics; absent: the kind.
    pub name: String,
    /// Name of the dataset of pairs.
    pub data: String,
    /// Name of a dataset of pairs on which accuracy is measured; empty: none.
    pub held_out: String,
    /// Optimizer steps.
    pub steps: u64,
    /// Pairs in one optimizer step.
    pub batch_size: usize,
    /// Weight of the pull of a pair's mean score towards 0; 0 is off.
    pub center_rewards_coefficient: f64,
    /// Optimizer.
    pub optimizer: OptimizerConfig,
    /// Learning rate over the stage's steps.
    pub schedule: LrScheduleConfig,
    /// Memory.
    pub memory: MemoryConfig,
}

impl Default for RewardModelStage {
    fn default() -> Self {
        RewardModelStage {
            name: "reward_model".to_owned(),
            data: "train".to_owned(),
            held_out: String::new(),
            steps: 100,
            batch_size: 32,
            center_rewards_coefficient: 0.0,
            optimizer: OptimizerConfig { learning_rate: 1e-5, ..OptimizerConfig::default() },
            schedule: LrScheduleConfig::default(),
            memory: MemoryConfig::default(),
        }
    }
}

impl RewardModelStage {
    /// Check what is this stage's own; `key` is its place in the recipe.
    pub(crate) fn validate(&self, key: &str) -> Result<(), Error> {
        if self.batch_size == 0 {
            return Err(Error::config(format!("{key}.batch_size"), "0 is out of range: expected at least 1"));
        }
        let coefficient = self.center_rewards_coefficient;
        if coefficient >= 0.0 && coefficient.is_finite() {
            return Ok(());
        }
        let problem = format!("{coefficient} is out of range: expected 0 or more");
        Err(Error::config(format!("{key}.center_rewards_coefficient"), problem))
    }

    /// What the trainer is asked for.
    pub(crate) fn spec(&self, seed: u64) -> ScalarModelSpec {
        let loss = RewardModelConfig { center_rewards_coefficient: self.center_rewards_coefficient };
        ScalarModelSpec {
            role: ScalarRole::RewardModel,
            loss_json: serde_json::to_string(&loss).expect("a loss is plain data"),
            optimizer: self.optimizer.clone(),
            backbone: Backbone::Policy,
            seed,
        }
    }
}
