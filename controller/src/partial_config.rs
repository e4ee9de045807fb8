//! `partial_rollouts` of a policy stage: which groups a step trains on, and what becomes of the others.

use crate::{Error, PolicyStage};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use temper_types::Sample;

/// Most groups under way, in batches.
const MAX_OVER_SAMPLING: f64 = 16.0;

/// What becomes of a sample that has not ended when enough groups are complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PartialPolicy {
    /// It goes on to its end under the weights that began it; the step waits.
    Finish,
    /// It is thrown away, and drawn from its beginning under the weights of the next step.
    Abort,
    /// It goes on under the weights of the next step, which compute K/V of its beginning anew.
    #[default]
    Recompute,
    /// It goes on under the weights of the next step, over the K/V that older weights stored of its beginning, as far
    /// as its engine still has them. Lossy: such tokens follow no policy, and a run that is resumed draws others.
    KeepKv,
}

/// A step trains on the first groups that are complete, not on those that it began.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PartialRollouts {
    /// What becomes of samples that have not ended when enough groups are complete.
    pub policy: PartialPolicy,
    /// Groups under way at once, in batches of `prompts_per_step`.
    pub over_sampling: f64,
    /// Every so many tokens of all samples under way it is looked whether enough groups are complete.
    pub round_tokens: u32,
}

impl Default for PartialRollouts {
    fn default() -> Self {
        PartialRollouts { policy: PartialPolicy::Recompute, over_sampling: 1.5, round_tokens: 128 }
    }
}

impl PartialRollouts {
    /// Groups under way at once.
    pub fn num_groups(&self, prompts_per_step: usize) -> usize {
        (prompts_per_step as f64 * self.over_sampling).ceil() as usize
    }

    /// Tokens after which a round ends; 0: none does before its samples have.
    pub(crate) fn round(&self) -> u32 {
        if self.policy == PartialPolicy::Finish { 0 } else { self.round_tokens }
    }
}

impl PolicyStage {
    /// True where samples go on over K/V of older weights.
    pub fn keeps_kv(&self) -> bool {
        self.partial_rollouts.as_ref().is_some_and(|partial| partial.policy == PartialPolicy::KeepKv)
    }

    /// False where tokens of `sample` were drawn over K/V of other weights, so that no weights give their log-probs.
    pub(crate) fn is_of_its_versions(&self, sample: &Sample) -> bool {
        !self.keeps_kv() || sample.policy_versions.len() == 1
    }

    /// `key` is the stage's place in the recipe.
    pub(crate) fn check_partial_rollouts(&self, key: &str) -> Result<(), Error> {
        let Some(partial) = &self.partial_rollouts else { return Ok(()) };
        let refuse = |name: &str, problem: String| Err(Error::config(format!("{key}.partial_rollouts{name}"), problem));
        let (factor, prompts) = (partial.over_sampling, self.prompts_per_step);
        if !(1.0..=MAX_OVER_SAMPLING).contains(&factor) {
            return refuse(".over_sampling", format!("{factor} is out of range: expected 1 to {MAX_OVER_SAMPLING}"));
        }
        if partial.policy != PartialPolicy::Finish {
            if partial.num_groups(prompts) == prompts {
                let problem = format!("{factor} leaves {prompts} prompts a step as they are: expected more than 1");
                return refuse(".over_sampling", problem);
            }
            let (round, limit) = (partial.round_tokens, self.sampling.max_new_tokens);
            if !(1..limit).contains(&round) {
                let problem = format!(
                    "{round} is out of range: expected at least 1, and less than the {limit} tokens of \
                     sampling.max_new_tokens, or no response would ever be cut"
                );
                return refuse(".round_tokens", problem);
            }
        }
        if self.algorithm.plan().filter_groups {
            let problem = "dynamic sampling refills a step with whole batches: expected filter_groups.enable = false";
            return refuse("", problem.to_owned());
        }
        if self.algorithm.plan().greedy_baseline {
            let problem = "the greedy response that this estimator compares with is drawn in one piece: expected \
                           another adv_estimator";
            return refuse("", problem.to_owned());
        }
        Ok(())
    }
}
