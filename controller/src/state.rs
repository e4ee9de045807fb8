//! What the controller must remember to go on where it stopped.

use serde::{Deserialize, Serialize};
use temper_data::sampler::PromptCursor;
use temper_types::PolicyVersion;

/// Version of the file format.
pub(crate) const STATE_FORMAT: u32 = 1;

/// The controller's part of a checkpoint (`state.json`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunState {
    /// Version of this format.
    pub format: u32,
    /// Hash of what decides the run's numbers.
    pub identity: String,
    /// Global steps completed, over all stages.
    pub step: u64,
    /// Index of the stage that comes next or goes on; the number of stages when the run is complete.
    pub stage: usize,
    /// Steps completed in that stage.
    pub stage_step: u64,
    /// Where the stage stands in its data.
    pub cursor: PromptCursor,
    /// Number of the next group.
    pub next_group_id: u64,
    /// Coefficient of the KL in the reward, where a controller moves it.
    pub kl_coef: Option<f64>,
    /// Version last published.
    pub version: PolicyVersion,
    /// Value of the metric by which the best checkpoints are kept, where the last step had it.
    pub metric: Option<f64>,
}

impl RunState {
    /// The state before the first step.
    pub fn new(identity: &str) -> Self {
        RunState {
            format: STATE_FORMAT,
            identity: identity.to_owned(),
            step: 0,
            stage: 0,
            stage_step: 0,
            cursor: PromptCursor::default(),
            next_group_id: 0,
            kl_coef: None,
            version: PolicyVersion::default(),
            metric: None,
        }
    }
}
