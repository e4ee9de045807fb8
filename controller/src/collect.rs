//! From prompts to scored samples: groups are generated, scored, filtered, and refilled where too few are left.
//!
//! consumes: prompts of the stage's dataset
//! produces: scored samples of at most `prompts_per_step` groups, and a greedy response per prompt where it is needed

use crate::components::{OVERLONG_PENALTY, STOP_PROPERLY_PENALTY};
use crate::record_row::StepNumbers;
use crate::rollouts::Group;
use crate::{Controller, Error, Phase, PolicyStage};
use serde_json::json;
use temper_algos::{Plan, filters};
use temper_proto::{ScoreRequest, Unused};
use temper_types::{FinishReason, RewardComponent, RewardOutcome, Sample};

/// What a step has gathered.
#[derive(Default)]
pub(crate) struct Collected {
    /// The samples, group by group.
    pub(crate) samples: Vec<Sample>,
    /// Greedy responses, one per group where the algorithm needs them: recorded, never trained on.
    pub(crate) baselines: Vec<Sample>,
}

impl Controller {
    /// Scored samples of `prompts_per_step` groups; with dynamic sampling, groups without spread are drawn anew.
    pub(crate) fn collect(
        &mut self,
        stage: &PolicyStage,
        plan: &Plan,
        numbers: &mut StepNumbers,
    ) -> Result<Collected, Error> {
        let filter = &stage.algorithm.filter_groups;
        let mut collected = Collected::default();
        let mut num_groups = 0;
        while num_groups < stage.prompts_per_step {
            let groups = self.generate(stage, stage.prompts_per_step - num_groups, numbers)?;
            let groups = self.score(stage, groups, numbers)?;
            numbers.num_gen_batches += 1;
            for group in groups {
                numbers.count_generated(&group.samples);
                if plan.filter_groups && !filters::keep_group(&metric_values(&group.samples, &filter.metric)) {
                    numbers.num_filtered_groups += 1;
                    self.attribute(self.services.rollout.settle(0, &group.dropped(Unused::Filtered)))?;
                    continue;
                }
                num_groups += 1;
                collected.add(group, numbers);
            }
            if filter.max_num_gen_batches > 0 && numbers.num_gen_batches >= u64::from(filter.max_num_gen_batches) {
                break;
            }
        }
        numbers.num_missing_groups = (stage.prompts_per_step - num_groups) as u64;
        self.say_what_is_missing(stage, num_groups, numbers)?;
        Ok(collected)
    }

    /// Dynamic sampling may run out of batches: a smaller step is announced, an empty one is an error.
    fn say_what_is_missing(&self, stage: &PolicyStage, found: usize, numbers: &StepNumbers) -> Result<(), Error> {
        let (step, batches, metric) =
            (self.state.step + 1, numbers.num_gen_batches, &stage.algorithm.filter_groups.metric);
        if numbers.num_missing_groups == 0 {
            return Ok(());
        }
        if found == 0 {
            let cause = format!(
                "{batches} batches of prompts gave no group with two different values of `{metric}`: they are too easy \
                 or too hard; raise filter_groups.max_num_gen_batches (0: no limit) or change the prompts"
            );
            return Err(Error::NothingToTrain { step, cause });
        }
        let wanted = stage.prompts_per_step;
        tracing::warn!(step, batches, found, wanted, "dynamic sampling ran out of batches: the step is smaller");
        let fields = [("step", json!(step)), ("groups", json!(found)), ("wanted", json!(wanted))];
        self.record.event("dynamic_sampling_ran_out", &fields)
    }

    fn score(
        &mut self,
        stage: &PolicyStage,
        mut groups: Vec<Group>,
        numbers: &mut StepNumbers,
    ) -> Result<Vec<Group>, Error> {
        self.enter(Phase::Reward);
        let begin = self.clock.elapsed();
        let requests: Vec<ScoreRequest> = groups.iter().flat_map(Group::all).map(ScoreRequest::of).collect();
        let outcomes = self.attribute(self.services.reward.score(&requests))?;
        let seconds = (self.clock.elapsed() - begin).as_secs_f64();
        numbers.reward_seconds += seconds;
        let share = seconds / requests.len().max(1) as f64;
        for (sample, outcome) in groups.iter_mut().flat_map(Group::all_mut).zip(outcomes) {
            sample.outcome = Some(outcome);
            sample.timings.reward_seconds = share;
        }
        for group in &mut groups {
            self.observe_pass_rate(stage, group);
            group.all_mut().for_each(|sample| penalise_length(stage, sample));
        }
        Ok(groups)
    }
}

impl Collected {
    /// Take in a group. Where its greedy response could not be scored its samples are masked out and counted: they
    /// have no baseline.
    fn add(&mut self, mut group: Group, numbers: &mut StepNumbers) {
        if group.baseline.as_ref().is_some_and(|b| reward_of(b).is_none()) {
            numbers.num_baseline_errors += 1;
            group.samples.iter_mut().for_each(|sample| sample.response_mask.fill(0));
        }
        self.samples.extend(group.samples);
        self.baselines.extend(group.baseline);
    }

    /// Everything that is recorded.
    pub(crate) fn into_record(self) -> Vec<Sample> {
        self.samples.into_iter().chain(self.baselines).collect()
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
    if algorithm.overlong.enable {
        penalties.push((OVERLONG_PENALTY, algorithm.overlong.penalty(length)));
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
