//! Recipe keys of a stage that distils a teacher into the policy.

use crate::config::{at_least_one, check_common};
use crate::{Error, MemoryConfig, PolicyStage};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use temper_algos::LrScheduleConfig;
use temper_algos::distill::DistillConfig;
use temper_proto::{DistillSpec, OptimizerConfig};
use temper_types::SamplingParams;

/// Who teaches.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TeacherConfig {
    /// A Hugging Face directory of a language model with the policy's tokenizer and vocabulary size.
    pub path: PathBuf,
}

/// A stage that learns from the whole distributions of a frozen teacher, on responses that the policy samples, on the
/// dataset's completions, or on a mixture of both.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DistillStage {
    /// Name in metrics; absent: the kind.
    pub name: String,
    /// Name of the dataset.
    pub data: String,
    /// Optimizer steps.
    pub steps: u64,
    /// Prompts per step.
    pub prompts_per_step: usize,
    /// Samples per prompt that the policy answers.
    pub num_generations: usize,
    /// The teacher.
    pub teacher: TeacherConfig,
    /// The divergence.
    pub loss: DistillConfig,
    /// Probability with which the policy answers a prompt; else its row's `completion` stands. 1: always, 0: never.
    pub on_policy_fraction: f64,
    /// How responses are drawn.
    pub sampling: SamplingParams,
    /// Optimizer.
    pub optimizer: OptimizerConfig,
    /// Learning rate over the stage's steps.
    pub schedule: LrScheduleConfig,
    /// Memory.
    pub memory: MemoryConfig,
}

impl Default for DistillStage {
    fn default() -> Self {
        DistillStage {
            name: "distill".to_owned(),
            data: "train".to_owned(),
            steps: 100,
            prompts_per_step: 32,
            num_generations: 1,
            teacher: TeacherConfig::default(),
            loss: DistillConfig::default(),
            on_policy_fraction: 1.0,
            sampling: SamplingParams::default(),
            optimizer: OptimizerConfig { learning_rate: 1e-5, ..OptimizerConfig::default() },
            schedule: LrScheduleConfig::default(),
            memory: MemoryConfig::default(),
        }
    }
}

impl DistillStage {
    pub(crate) fn validate(&self, key: &str) -> Result<(), Error> {
        at_least_one(key, "prompts_per_step", self.prompts_per_step)?;
        at_least_one(key, "num_generations", self.num_generations)?;
        if self.teacher.path.as_os_str().is_empty() {
            let problem = "there is no teacher: expected teacher = { path = \"...\" }, a Hugging Face directory";
            return Err(Error::config(format!("{key}.teacher"), problem));
        }
        self.loss.validate().map_err(|e| Error::config(format!("{key}.loss"), e))?;
        if !(0.0..=1.0).contains(&self.on_policy_fraction) {
            let problem = format!("{} is out of range: expected a number from 0 to 1", self.on_policy_fraction);
            return Err(Error::config(format!("{key}.on_policy_fraction"), problem));
        }
        self.sampling.validate().map_err(|e| Error::config(format!("{key}.sampling"), e))?;
        check_common(key, self.steps, &self.optimizer, &self.schedule, &self.memory)
    }

    /// How the stage generates, as a policy stage says it.
    #[must_use]
    pub fn rollout(&self) -> PolicyStage {
        PolicyStage {
            name: self.name.clone(),
            data: self.data.clone(),
            steps: self.steps,
            prompts_per_step: self.prompts_per_step,
            num_generations: self.num_generations,
            sampling: self.sampling.clone(),
            ..PolicyStage::default()
        }
    }

    /// What the trainer is asked for.
    pub(crate) fn spec(&self) -> DistillSpec {
        DistillSpec {
            teacher: self.teacher.path.clone(),
            loss_json: serde_json::to_string(&self.loss).expect("a loss is plain data"),
        }
    }
}
