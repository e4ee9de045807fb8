//! From prompts to scored samples: groups are generated and scored, filtered, and refilled where too few are left.
//!
//! consumes: prompts of the stage's dataset
//! produces: scored samples of at most `prompts_per_step` groups, and a greedy response per prompt where it is needed

use crate::batch::Batch;
use crate::components::{OVERLONG_PENALTY, STOP_PROPERLY_PENALTY};
use crate::reuse::Offers;
use crate::rollouts::{Group, Rollouts};
use crate::state::Draws;
use crate::{Error, PolicyStage};
use std::sync::Arc;
use temper_algos::filters;
use temper_proto::Unused;
use temper_types::{FinishReason, PromptRow, RewardComponent, RewardOutcome, Sample};

/// Generates one batch, with all that it needs: the loop goes on beside it or waits.
pub(crate) struct Collector {
    pub(crate) rollouts: Rollouts,
    /// The stage with the settings of the batch.
    pub(crate) stage: PolicyStage,
    /// Of the stage.
    pub(crate) seed: u64,
    /// The stage's dataset.
    pub(crate) rows: Arc<Vec<PromptRow>>,
    /// Where the stage stands in it.
    pub(crate) draws: Draws,
    /// Responses of earlier passes, where the batch may reuse them.
    pub(crate) offers: Option<Offers>,
    /// Groups that earlier batches left over, the oldest first.
    pub(crate) carried: Vec<Group>,
    /// Groups that may be under way at once, where some are left over.
    pub(crate) num_groups: usize,
    /// What is there so far.
    pub(crate) batch: Batch,
    /// Time in which responses were scored while others were generated.
    pub(crate) reward_overlap_seconds: f64,
}

/// A batch, where its stage stands after it, and the groups that it left over.
pub(crate) struct Collected {
    pub(crate) batch: Batch,
    pub(crate) draws: Draws,
    pub(crate) carried: Vec<Group>,
}

impl Collector {
    /// Generate and score the batch as its stage wants it.
    pub(crate) fn run(self) -> Result<Collected, Error> {
        match self.stage.partial_rollouts.clone() {
            Some(partial) => self.run_in_rounds(&partial),
            None => self.run_whole(),
        }
    }

    /// Scored samples of `prompts_per_step` groups; with dynamic sampling, groups without spread are drawn anew.
    fn run_whole(mut self) -> Result<Collected, Error> {
        let filter = self.stage.algorithm.filter_groups.clone();
        let is_filtered = self.stage.algorithm.plan().filter_groups;
        let mut num_groups = 0;
        while num_groups < self.stage.prompts_per_step {
            let mut groups = self.generate(self.stage.prompts_per_step - num_groups)?;
            groups.iter_mut().for_each(|group| self.weigh(group));
            self.batch.numbers.num_gen_batches += 1;
            for group in groups {
                self.batch.numbers.count_generated(&group.samples);
                if is_filtered && !filters::keep_group(&metric_values(&group.samples, &filter.metric)) {
                    self.batch.numbers.num_filtered_groups += 1;
                    self.rollouts.settle(&group.dropped(Unused::Filtered))?;
                    continue;
                }
                num_groups += 1;
                self.batch.add(group);
            }
            let num_batches = self.batch.numbers.num_gen_batches;
            if filter.max_num_gen_batches > 0 && num_batches >= u64::from(filter.max_num_gen_batches) {
                break;
            }
        }
        self.batch.numbers.num_missing_groups = (self.stage.prompts_per_step - num_groups) as u64;
        if num_groups == 0 {
            return Err(self.nothing_found());
        }
        self.batch.columns = self.curriculum_columns();
        self.batch.columns.push(("reward_overlap_seconds".to_owned(), self.reward_overlap_seconds));
        Ok(Collected { batch: self.batch, draws: self.draws, carried: self.carried })
    }

    /// Dynamic sampling ran out of batches without a single group.
    fn nothing_found(&self) -> Error {
        let (batches, metric) = (self.batch.numbers.num_gen_batches, &self.stage.algorithm.filter_groups.metric);
        let cause = format!(
            "{batches} batches of prompts gave no group with two different values of `{metric}`: they are too easy \
             or too hard; raise filter_groups.max_num_gen_batches (0: no limit) or change the prompts"
        );
        Error::NothingToTrain { step: self.batch.step, cause }
    }

    /// What follows from the outcomes of a group: its prompt's pass rate, and penalties of length.
    pub(crate) fn weigh(&mut self, group: &mut Group) {
        self.observe_pass_rate(group);
        group.all_mut().for_each(|sample| penalise_length(&self.stage, sample));
    }
}

/// Reward of a sample, or `None` where it failed.
pub(crate) fn reward_of(sample: &Sample) -> Option<f64> {
    sample.outcome.as_ref().and_then(RewardOutcome::reward)
}

/// What the response's length does to its reward, each as a component of its own: first what becomes of a response
/// that the limit cut off, then the penalty of a long one.
fn penalise_length(stage: &PolicyStage, sample: &mut Sample) {
    let algorithm = &stage.algorithm;
    let is_cut = sample.finish_reason == FinishReason::Length;
    let length = sample.response_token_ids.len() as u64;
    let Some(RewardOutcome::Scored { reward, components }) = &mut sample.outcome else { return };
    let mut penalties = Vec::new();
    if let Some(coef) = algorithm.stop_properly_penalty_coef {
        let value = if is_cut { filters::stop_properly_reward(*reward, coef) - *reward } else { 0.0 };
        penalties.push((STOP_PROPERLY_PENALTY, value));
    }
    // A setting that is out of range was refused when the run began.
    if let Some(overlong) = stage.overlong().ok().filter(|overlong| overlong.enable) {
        penalties.push((OVERLONG_PENALTY, overlong.penalty(length)));
    }
    for (name, value) in penalties {
        components.push(RewardComponent { name: name.to_owned(), value });
        *reward += value;
    }
}

/// Values of the metric that dynamic sampling looks at; samples whose reward failed have none.
fn metric_values(group: &[Sample], metric: &str) -> Vec<f64> {
    let value = |sample: &Sample| match sample.outcome.as_ref()? {
        RewardOutcome::Scored { reward, .. } if metric == "reward" => Some(*reward),
        RewardOutcome::Scored { components, .. } => components.iter().find(|c| c.name == metric).map(|c| c.value),
        RewardOutcome::Failed(_) => None,
    };
    group.iter().filter_map(value).collect()
}
