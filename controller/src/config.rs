//! What a run does, resolved: the controller's own part of a recipe.

use crate::{
    CriticConfig, DistillStage, Error, OnlinePreferenceStage, PartialRollouts, PreferenceStage, ReferenceConfig,
    RewardModelStage, Scoring,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use temper_algos::filters::OverlongConfig;
use temper_algos::{AlgorithmConfig, CurriculumConfig, Grouping, LrScheduleConfig, SftLossType};
use temper_data::tasks::TaskConfig;
use temper_proto::OptimizerConfig;
use temper_types::{SamplingParams, WeightFormat};

/// A named dataset: files, or a generator of the project's own.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DatasetConfig {
    /// JSONL, Parquet or Arrow files, in this order.
    pub files: Vec<PathBuf>,
    /// A generated task; excludes `files`.
    pub generate: Option<TaskConfig>,
    /// Only the first so many rows; absent: all.
    pub max_rows: Option<u64>,
    /// Put before the messages of every prompt as a system message; the prompts must be chats.
    pub system_prompt: Option<String>,
    /// Leave out rows whose prompts have more tokens, the chat template's included; absent: none.
    pub max_prompt_tokens: Option<u32>,
}

/// How much a trainer keeps in memory at once. Never changes a number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MemoryConfig {
    /// Most tokens (prompts and responses) in one micro-batch; one longer sequence still goes alone.
    pub max_micro_batch_tokens: usize,
    /// Recompute activations in the backward instead of keeping them.
    pub recompute_activations: bool,
}

impl Default for MemoryConfig {
    fn default() -> Self {
        MemoryConfig { max_micro_batch_tokens: 4096, recompute_activations: false }
    }
}

/// A supervised stage: demonstrations (`completion` columns), token-mean loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SftStage {
    /// Name in metrics; absent: the kind.
    pub name: String,
    /// Name of the dataset.
    pub data: String,
    /// Optimizer steps.
    pub steps: u64,
    /// Demonstrations in one optimizer step.
    pub batch_size: usize,
    /// Weight of a token.
    pub loss_type: SftLossType,
    /// Optimizer.
    pub optimizer: OptimizerConfig,
    /// Learning rate over the stage's optimizer steps.
    pub schedule: LrScheduleConfig,
    /// Memory.
    pub memory: MemoryConfig,
}

impl Default for SftStage {
    fn default() -> Self {
        SftStage {
            name: "sft".to_owned(),
            data: "train".to_owned(),
            steps: 100,
            batch_size: 32,
            loss_type: SftLossType::Nll,
            optimizer: OptimizerConfig { learning_rate: 1e-5, ..OptimizerConfig::default() },
            schedule: LrScheduleConfig::default(),
            memory: MemoryConfig::default(),
        }
    }
}

/// A stage of policy optimisation from rewards.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyStage {
    /// Name in metrics; absent: the kind.
    pub name: String,
    /// Name of the dataset.
    pub data: String,
    /// Steps: one batch of rollouts each.
    pub steps: u64,
    /// Prompts per step.
    pub prompts_per_step: usize,
    /// Samples per prompt.
    pub num_generations: usize,
    /// Optimizer steps into which a step's prompts are split.
    pub mini_batches: usize,
    /// Passes over a step's samples.
    pub epochs: usize,
    /// The algorithm.
    pub algorithm: AlgorithmConfig,
    /// How the reference policy moves.
    pub reference: ReferenceConfig,
    /// Prompts by their pass rates.
    pub curriculum: CurriculumConfig,
    /// The critic; exactly where the algorithm reads values.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub critic: Option<CriticConfig>,
    /// How responses are drawn.
    pub sampling: SamplingParams,
    /// Which groups a step trains on where more are under way; absent: those that it began, all of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partial_rollouts: Option<PartialRollouts>,
    /// Optimizer.
    pub optimizer: OptimizerConfig,
    /// Learning rate over the stage's steps.
    pub schedule: LrScheduleConfig,
    /// Memory.
    pub memory: MemoryConfig,
}

impl Default for PolicyStage {
    fn default() -> Self {
        PolicyStage {
            name: "grpo".to_owned(),
            data: "train".to_owned(),
            steps: 100,
            prompts_per_step: 8,
            num_generations: 8,
            mini_batches: 1,
            epochs: 1,
            algorithm: AlgorithmConfig::default(),
            reference: ReferenceConfig::default(),
            curriculum: CurriculumConfig::default(),
            critic: None,
            sampling: SamplingParams::default(),
            partial_rollouts: None,
            optimizer: OptimizerConfig::default(),
            schedule: LrScheduleConfig::default(),
            memory: MemoryConfig::default(),
        }
    }
}

/// One stage of a run.
#[derive(Debug, Clone, PartialEq)]
pub enum Stage {
    /// Supervised fine-tuning.
    Sft(SftStage),
    /// Policy optimisation.
    Policy(Box<PolicyStage>),
    /// Training of a reward model.
    RewardModel(RewardModelStage),
    /// Preferences of a dataset.
    Preference(Box<PreferenceStage>),
    /// Preferences between samples.
    OnlinePreference(Box<OnlinePreferenceStage>),
    /// Distillation from a teacher.
    Distill(Box<DistillStage>),
}

impl Stage {
    /// What of the stage draws responses of the policy's own, where it does.
    pub fn policy(&self) -> Option<&PolicyStage> {
        match self {
            Stage::Policy(stage) => Some(stage),
            Stage::OnlinePreference(stage) => Some(&stage.policy),
            Stage::Sft(_) | Stage::RewardModel(_) | Stage::Preference(_) | Stage::Distill(_) => None,
        }
    }

    /// Name in metrics.
    pub fn name(&self) -> &str {
        match self {
            Stage::Sft(stage) => &stage.name,
            Stage::Policy(stage) => &stage.name,
            Stage::RewardModel(stage) => &stage.name,
            Stage::Preference(stage) => &stage.name,
            Stage::OnlinePreference(stage) => &stage.policy.name,
            Stage::Distill(stage) => &stage.name,
        }
    }

    /// Steps of the stage.
    pub fn steps(&self) -> u64 {
        match self {
            Stage::Sft(stage) => stage.steps,
            Stage::Policy(stage) => stage.steps,
            Stage::RewardModel(stage) => stage.steps,
            Stage::Preference(stage) => stage.steps,
            Stage::OnlinePreference(stage) => stage.policy.steps,
            Stage::Distill(stage) => stage.steps,
        }
    }

    /// Name of its dataset.
    pub fn data(&self) -> &str {
        match self {
            Stage::Sft(stage) => &stage.data,
            Stage::Policy(stage) => &stage.data,
            Stage::RewardModel(stage) => &stage.data,
            Stage::Preference(stage) => &stage.data,
            Stage::OnlinePreference(stage) => &stage.policy.data,
            Stage::Distill(stage) => &stage.data,
        }
    }

    /// Optimizer of the policy, or of what the stage trains in its place.
    pub fn optimizer(&self) -> &OptimizerConfig {
        match self {
            Stage::Sft(stage) => &stage.optimizer,
            Stage::Policy(stage) => &stage.optimizer,
            Stage::RewardModel(stage) => &stage.optimizer,
            Stage::Preference(stage) => &stage.optimizer,
            Stage::OnlinePreference(stage) => &stage.policy.optimizer,
            Stage::Distill(stage) => &stage.optimizer,
        }
    }

    /// The same, to change.
    pub fn optimizer_mut(&mut self) -> &mut OptimizerConfig {
        match self {
            Stage::Sft(stage) => &mut stage.optimizer,
            Stage::Policy(stage) => &mut stage.optimizer,
            Stage::RewardModel(stage) => &mut stage.optimizer,
            Stage::Preference(stage) => &mut stage.optimizer,
            Stage::OnlinePreference(stage) => &mut stage.policy.optimizer,
            Stage::Distill(stage) => &mut stage.optimizer,
        }
    }

    /// Check everything that needs no data; `key` is the stage's place in the recipe.
    ///
    /// # Errors
    /// The first key that cannot work, with what would be right.
    pub fn validate(&self, key: &str) -> Result<(), Error> {
        match self {
            Stage::Sft(stage) => {
                at_least_one(key, "batch_size", stage.batch_size)?;
                check_common(key, stage.steps, &stage.optimizer, &stage.schedule, &stage.memory)
            }
            Stage::Policy(stage) => stage.validate(key),
            Stage::RewardModel(stage) => {
                stage.validate(key)?;
                check_common(key, stage.steps, &stage.optimizer, &stage.schedule, &stage.memory)
            }
            Stage::Preference(stage) => stage.validate(key),
            Stage::OnlinePreference(stage) => stage.validate(key),
            Stage::Distill(stage) => stage.validate(key),
        }
    }
}

impl PolicyStage {
    pub(crate) fn validate(&self, key: &str) -> Result<(), Error> {
        at_least_one(key, "prompts_per_step", self.prompts_per_step)?;
        at_least_one(key, "num_generations", self.num_generations)?;
        at_least_one(key, "mini_batches", self.mini_batches)?;
        at_least_one(key, "epochs", self.epochs)?;
        if !self.prompts_per_step.is_multiple_of(self.mini_batches) {
            let (prompts, parts) = (self.prompts_per_step, self.mini_batches);
            return Err(Error::config(
                format!("{key}.mini_batches"),
                format!(
                    "{prompts} prompts cannot be split into {parts} equal mini-batches: expected a divisor of prompts_per_step"
                ),
            ));
        }
        self.algorithm.validate().map_err(|e| Error::config(format!("{key}.algorithm"), e))?;
        self.overlong().map_err(|e| Error::config(format!("{key}.algorithm"), e))?;
        self.sampling.validate().map_err(|e| Error::config(format!("{key}.sampling"), e))?;
        self.check_grouping(key)?;
        self.check_critic(key)?;
        self.check_best_of_n(key)?;
        self.check_partial_rollouts(key)?;
        self.reference.validate(key, &self.algorithm.plan())?;
        self.curriculum.validate().map_err(|e| Error::config(format!("{key}.curriculum"), e))?;
        check_common(key, self.steps, &self.optimizer, &self.schedule, &self.memory)
    }

    /// The penalty of responses that come near the longest.
    pub(crate) fn overlong(&self) -> Result<OverlongConfig, temper_algos::Error> {
        self.algorithm.overlong.of_stage(self.sampling.max_new_tokens)
    }

    fn check_best_of_n(&self, key: &str) -> Result<(), Error> {
        let (kept, drawn) = (self.algorithm.best_of_n.num_kept(), self.num_generations);
        if kept <= drawn {
            return Ok(());
        }
        let problem = format!("best + worst keep {kept} of {drawn} samples per prompt: expected at most {drawn}");
        Err(Error::config(format!("{key}.algorithm.best_of_n"), problem))
    }

    fn check_critic(&self, key: &str) -> Result<(), Error> {
        let estimator = self.algorithm.advantage.adv_estimator;
        match (&self.critic, self.algorithm.plan().values) {
            (None, false) => Ok(()),
            (Some(critic), true) => {
                let key = format!("{key}.critic");
                critic.validate(&key, self.steps)?;
                check_common(&key, self.steps, &critic.optimizer, &critic.schedule, &self.memory)
            }
            (Some(_), false) => {
                let problem = format!("{estimator:?} reads no values: expected no critic, or adv_estimator = \"gae\"");
                Err(Error::config(format!("{key}.critic"), problem))
            }
            (None, true) => {
                let problem =
                    format!("{estimator:?} needs a critic: expected kind = \"ppo\", or a table [stage.critic]");
                Err(Error::config(format!("{key}.algorithm.advantage.adv_estimator"), problem))
            }
        }
    }

    fn check_grouping(&self, key: &str) -> Result<(), Error> {
        match self.algorithm.plan().grouping {
            Grouping::Group { min_size } if self.num_generations < min_size as usize => Err(Error::config(
                format!("{key}.num_generations"),
                format!(
                    "{} sample(s) per prompt give this advantage estimator no group: expected at least {min_size}",
                    self.num_generations
                ),
            )),
            _ => Ok(()),
        }
    }
}

pub(crate) fn at_least_one(key: &str, name: &str, value: usize) -> Result<(), Error> {
    if value > 0 {
        Ok(())
    } else {
        Err(Error::config(format!("{key}.{name}"), "0 is out of range: expected at least 1"))
    }
}

pub(crate) fn check_common(
    key: &str,
    steps: u64,
    optimizer: &OptimizerConfig,
    schedule: &LrScheduleConfig,
    memory: &MemoryConfig,
) -> Result<(), Error> {
    at_least_one(key, "steps", usize::try_from(steps).unwrap_or(usize::MAX))?;
    at_least_one(key, "memory.max_micro_batch_tokens", memory.max_micro_batch_tokens)?;
    schedule.validate().map_err(|e| Error::config(format!("{key}.schedule"), e))?;
    let range = |name: &str, value: f64, ok: bool, expected: &str| {
        let problem = format!("{value} is out of range: expected {expected}");
        if ok { Ok(()) } else { Err(Error::config(format!("{key}.optimizer.{name}"), problem)) }
    };
    let o = optimizer;
    range("learning_rate", o.learning_rate, o.learning_rate >= 0.0 && o.learning_rate.is_finite(), "0 or more")?;
    range("beta1", o.beta1, (0.0..1.0).contains(&o.beta1), "0 or more, less than 1")?;
    range("beta2", o.beta2, (0.0..1.0).contains(&o.beta2), "0 or more, less than 1")?;
    range("eps", o.eps, o.eps > 0.0 && o.eps.is_finite(), "more than 0")?;
    range("weight_decay", o.weight_decay, o.weight_decay >= 0.0 && o.weight_decay.is_finite(), "0 or more")?;
    range("max_grad_norm", o.max_grad_norm, o.max_grad_norm >= 0.0, "0 (off) or more")
}

/// When and how held-out prompts are answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ValidationConfig {
    /// Name of the dataset; empty: no validation.
    pub data: String,
    /// Every so many steps of a policy stage, besides before its first and after its last; 0: only those two.
    pub every_steps: u64,
    /// Samples per prompt.
    pub num_samples: usize,
    /// A response counts as correct (pass@k, maj@n) at this reward or more.
    pub correct_at: f64,
    /// How responses are drawn; absent: as in the stage, greedily.
    pub sampling: Option<SamplingParams>,
}

impl Default for ValidationConfig {
    fn default() -> Self {
        ValidationConfig { data: String::new(), every_steps: 0, num_samples: 1, correct_at: 1.0, sampling: None }
    }
}

/// When checkpoints are written and which are kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointConfig {
    /// Every so many steps, besides at the end of every stage; 0: only there.
    pub every_steps: u64,
    /// How many of the latest are kept; at least 1.
    pub keep_last: usize,
    /// How many of the best by `best_metric` are kept besides.
    pub keep_best: usize,
    /// Key of metrics.jsonl, higher is better.
    pub best_metric: String,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        CheckpointConfig { every_steps: 20, keep_last: 2, keep_best: 1, best_metric: "reward_mean".to_owned() }
    }
}

/// Most batches that may be generated ahead.
pub const MAX_STALENESS: u32 = 8;

/// When the next batch is generated. Never changes a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Generation {
    /// Whole, before the trainer begins: the engine shares the trainer's weights.
    #[default]
    BeforeTraining,
    /// While the trainer trains: engines have weights of their own.
    DuringTraining,
}

/// A whole run, resolved.
#[derive(Debug, Clone, PartialEq)]
pub struct RunSpec {
    /// Name of the run.
    pub name: String,
    /// Seed of everything.
    pub seed: u64,
    /// Hash of what decides the run's numbers; a run directory is resumed only with an equal one.
    pub identity: String,
    /// Datasets by name.
    pub data: BTreeMap<String, DatasetConfig>,
    /// Stages in order.
    pub stages: Vec<Stage>,
    /// Validation.
    pub validation: ValidationConfig,
    /// Checkpoints.
    pub checkpoint: CheckpointConfig,
    /// Longest wait for one finished group, in seconds.
    pub rollout_timeout_seconds: f64,
    /// How many updates may lie between the weights that generate a batch and those that train on it.
    pub staleness: u32,
    /// When the next batch is generated where `staleness` lets it be generated ahead.
    pub generation: Generation,
    /// When responses are scored.
    pub scoring: Scoring,
    /// Whether engines give their K/V memory back while the trainer trains. Only where `staleness` is 0.
    pub sleep: bool,
    /// What a later pass over a prompt has of the pass before.
    pub replay: ReplaySpec,
    /// Whether trainer and loop keep the state after every step in memory, for the loss of a trainer rank.
    pub mirror_shards: bool,
    /// In which form engines hold their weights; of other weights than those that train the dataset says so.
    pub weights: WeightFormat,
}

/// What a later pass over a prompt has of the pass before.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum ReplaySpec {
    /// Nothing that changes a token.
    #[default]
    Exact,
    /// The noise of the first pass.
    Coupled,
    /// Its tokens, each with probability min(1, lenience p_new / p_old) until one is not taken.
    Lenient {
        /// l, more than 0.
        lenience: f32,
    },
}
