//! What the controller must remember to go on where it stopped.

use crate::{CarriedGroup, QueuedBatch};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use temper_algos::PassRates;
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
    #[serde(with = "decimals")]
    pub kl_coef: Option<f64>,
    /// Running pass rates of the stage's prompts, where a curriculum reads them.
    #[serde(default)]
    pub pass_rates: PassRates,
    /// Settings of the stage that were changed while it ran.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub settings: BTreeMap<String, String>,
    /// Version last published.
    pub version: PolicyVersion,
    /// Batches that were generated ahead and wait for their steps.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub queue: Vec<QueuedBatch>,
    /// Groups that the last batch left over.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub carried: Vec<CarriedGroup>,
    /// Value of the metric by which the best checkpoints are kept, where the last step had it.
    pub metric: Option<f64>,
}

/// What drawing prompts reads and changes.
pub(crate) struct Draws {
    pub(crate) cursor: PromptCursor,
    pub(crate) next_group_id: u64,
    pub(crate) pass_rates: PassRates,
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
            pass_rates: PassRates::default(),
            settings: BTreeMap::new(),
            version: PolicyVersion::default(),
            queue: Vec::new(),
            carried: Vec::new(),
            metric: None,
        }
    }

    /// Where the stage stands in its data.
    pub(crate) fn draws(&self) -> Draws {
        Draws { cursor: self.cursor, next_group_id: self.next_group_id, pass_rates: self.pass_rates.clone() }
    }

    /// The stage stands where a batch left it.
    pub(crate) fn set_draws(&mut self, draws: Draws) {
        (self.cursor, self.next_group_id, self.pass_rates) = (draws.cursor, draws.next_group_id, draws.pass_rates);
    }
}

/// A number as text in the shortest decimals that give the same bits back, which numbers in JSON do not promise.
mod decimals {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
        value.map(|v| v.to_string()).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
        let text: Option<String> = Option::deserialize(deserializer)?;
        text.map(|t| t.parse().map_err(|_| serde::de::Error::custom(format!("`{t}` is no number")))).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::RunState;

    #[test]
    fn a_moved_coefficient_comes_back_to_the_bit() {
        let mut state = RunState::new("id");
        for i in 1..500u32 {
            state.kl_coef = Some(1e-3 * (1.0 + 0.2 / f64::from(i)).powi(i as i32 % 40));
            let text = serde_json::to_string(&state).expect("plain data");
            assert_eq!(serde_json::from_str::<RunState>(&text).expect("reads back"), state);
        }
    }
}
