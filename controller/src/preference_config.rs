//! Stages that learn from preferences: offline from rows of a dataset, online from sampled pairs.

use crate::config::{at_least_one, check_common};
use crate::{Error, MemoryConfig, PolicyStage};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use temper_algos::preference::{DpoConfig, PreferenceForm};
use temper_algos::{LrScheduleConfig, Objective};
use temper_proto::OptimizerConfig;

/// A stage that learns from the `chosen` and `rejected` responses of a dataset, or from labelled ones.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PreferenceStage {
    /// Name in metrics; absent: the kind.
    pub name: String,
    /// Name of the dataset. Every row has `chosen` and `rejected`; a stage of labels takes rows of `completion` and
    /// `label` too; a stage of beliefs reads `belief` and `belief_probs` of `extra_info` besides.
    pub data: String,
    /// Name of a dataset of pairs on which the accuracy of the implied reward is measured before the first step,
    /// every `validation.every_steps`, and after the last; empty: none.
    pub held_out: String,
    /// Optimizer steps.
    pub steps: u64,
    /// Pairs, or labelled responses, in one optimizer step.
    pub batch_size: usize,
    /// Compute the reference's log-probs of the whole dataset once when the stage begins, instead of those of every
    /// step in the step. Never changes a number; pays off where a row is visited more than once.
    pub precompute_ref_log_probs: bool,
    /// Optimizer.
    pub optimizer: OptimizerConfig,
    /// Learning rate over the stage's optimizer steps.
    pub schedule: LrScheduleConfig,
    /// Memory.
    pub memory: MemoryConfig,
    /// The loss, which the kind of the stage and its `loss` table decide.
    #[serde(skip, default = "default_objective")]
    pub objective: Objective,
}

fn default_objective() -> Objective {
    Objective::Dpo(DpoConfig::default())
}

impl Default for PreferenceStage {
    fn default() -> Self {
        PreferenceStage {
            name: "dpo".to_owned(),
            data: "train".to_owned(),
            held_out: String::new(),
            steps: 100,
            batch_size: 32,
            precompute_ref_log_probs: false,
            optimizer: OptimizerConfig::default(),
            schedule: LrScheduleConfig::default(),
            memory: MemoryConfig::default(),
            objective: default_objective(),
        }
    }
}

impl PreferenceStage {
    pub(crate) fn validate(&self, key: &str) -> Result<(), Error> {
        at_least_one(key, "batch_size", self.batch_size)?;
        check_loss(key, &self.objective)?;
        if self.form(key)? == (PreferenceForm::Labels { mismatched: true }) && self.batch_size < 2 {
            let problem = "1 is out of range: the reference point pairs every prompt with another row's response, \
                           which takes at least 2";
            return Err(Error::config(format!("{key}.batch_size"), problem));
        }
        check_common(key, self.steps, &self.optimizer, &self.schedule, &self.memory)
    }

    /// How the stage's rows hang together.
    pub(crate) fn form(&self, key: &str) -> Result<PreferenceForm, Error> {
        let problem = "this objective is not one over preferences: expected dpo, cpo, simpo, orpo, kto or gdpo";
        self.objective.preference_form().ok_or_else(|| Error::config(format!("{key}.kind"), problem))
    }
}

/// A stage that samples responses, pairs the best with the worst of a prompt by their rewards, and learns from the
/// pairs.
#[derive(Debug, Clone, PartialEq)]
pub struct OnlinePreferenceStage {
    /// How responses are drawn and in which portions they are learned from. Its `algorithm` is not used.
    pub policy: PolicyStage,
    /// The loss over pairs.
    pub objective: Objective,
}

impl OnlinePreferenceStage {
    pub(crate) fn validate(&self, key: &str) -> Result<(), Error> {
        check_loss(key, &self.objective)?;
        if self.objective.preference_form() != Some(PreferenceForm::Pairs) {
            return Err(Error::config(format!("{key}.loss"), "sampled pairs need a loss over pairs"));
        }
        self.policy.validate(key)
    }
}

fn check_loss(key: &str, objective: &Objective) -> Result<(), Error> {
    objective.validate().map_err(|e| Error::config(format!("{key}.loss"), e))
}
