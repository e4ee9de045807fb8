//! Batches of the groups that are complete first; the others go on in later steps.
//!
//! Generation goes in rounds: every sample under way grows by at most `round_tokens` tokens, then complete groups are
//! scored and counted. Rounds stand for time: which groups are complete first is a function of their lengths, not of a
//! clock or of the order in which engines answer.
//!
//! consumes: groups that earlier batches left over, prompts of the stage's dataset
//! produces: scored samples of the first `prompts_per_step` complete groups, and the groups that are left over
//! waits for: every sample of a round

use crate::accounts::settled;
use crate::collect::{Collected, Collector};
use crate::partial_config::{PartialPolicy, PartialRollouts};
use crate::rollouts::{DrawnRows, Group, Rollouts};
use crate::{Error, Phase};
use temper_data::sampler::Draw;
use temper_proto::{
    BegunResponse, Fate, GeneratedSample, GroupRequest, GroupResult, ScoreRequest, ServiceError, ServiceResult,
    Settled, Unused,
};
use temper_types::{ErrorCode, FinishReason, Sample, SampleIndex, SampleTimings, SamplingParams, Step};

/// What the rounds of a batch did.
#[derive(Default)]
struct Rounds {
    num_rounds: u64,
    num_aborted_samples: u64,
    num_aborted_tokens: u64,
    /// Slots of K/V of older weights over which samples went on, in the first round.
    num_kept_tokens: u64,
}

impl Group {
    /// True where no sample goes on.
    fn is_complete(&self) -> bool {
        self.samples.iter().all(|sample| sample.finish_reason != FinishReason::Paused)
    }

    fn is_scored(&self) -> bool {
        self.samples.iter().all(|sample| sample.outcome.is_some())
    }

    /// The next round of its samples.
    fn request(&self, sampling: &SamplingParams, partial: &PartialRollouts) -> Option<GroupRequest> {
        let first = self.samples.first().filter(|_| !self.is_complete())?;
        let is_new = self.samples.iter().all(|sample| sample.response_token_ids.is_empty());
        let begun = |sample: &Sample| BegunResponse {
            token_ids: sample.response_token_ids.clone(),
            is_complete: sample.finish_reason != FinishReason::Paused,
        };
        Some(GroupRequest {
            group_id: first.group_id,
            prompt_id: first.prompt_id,
            epoch: first.epoch,
            prompt_token_ids: first.prompt_token_ids.clone(),
            seeds: self.samples.iter().map(|sample| sample.seed).collect(),
            sampling: sampling.clone(),
            round_tokens: partial.round(),
            keep_kv: partial.policy == PartialPolicy::KeepKv,
            begun: if is_new { Vec::new() } else { self.samples.iter().map(begun).collect() },
            ..GroupRequest::default()
        })
    }
}

impl Collector {
    /// Scored samples of the first `prompts_per_step` groups that are complete, the oldest of them first.
    pub(crate) fn run_in_rounds(mut self, partial: &PartialRollouts) -> Result<Collected, Error> {
        let wanted = self.stage.prompts_per_step;
        self.begin_groups(self.num_groups.saturating_sub(self.carried.len()))?;
        let mut rounds = Rounds::default();
        while self.goes_on(partial.policy, wanted) {
            self.round(partial, &mut rounds)?;
            self.score_complete()?;
            rounds.num_rounds += 1;
        }
        let mut num_taken = 0;
        let is_taken = |group: &Group| {
            num_taken += usize::from(group.is_complete());
            group.is_complete() && num_taken <= wanted
        };
        let (taken, left): (Vec<Group>, Vec<Group>) = self.carried.drain(..).partition(is_taken);
        self.carried = left;
        for mut group in taken {
            group.samples.iter_mut().for_each(|sample| sample.step = Step(self.batch.step));
            self.batch.add(group);
        }
        if partial.policy == PartialPolicy::Abort {
            self.abort_unfinished(&mut rounds)?;
        }
        self.batch.numbers.num_gen_batches = 1;
        self.batch.columns = self.curriculum_columns();
        self.batch.columns.extend(self.partial_columns(&rounds));
        Ok(Collected { batch: self.batch, draws: self.draws, carried: self.carried })
    }

    /// True where another round is needed: too few groups are complete, or one has to be.
    fn goes_on(&self, policy: PartialPolicy, wanted: usize) -> bool {
        let num_complete = self.carried.iter().filter(|group| group.is_complete()).count();
        num_complete < wanted || (policy == PartialPolicy::Finish && num_complete < self.carried.len())
    }

    /// Draw prompts; nothing of their responses is there yet.
    fn begin_groups(&mut self, num_prompts: usize) -> Result<(), Error> {
        let draws: Vec<Draw> = self.draw_prompts(num_prompts);
        let rows: DrawnRows = draws.iter().map(|d| (self.rows[d.index as usize].clone(), d.epoch)).collect();
        let requests = self.rollouts.requests(&rows, (self.draws.next_group_id, self.seed), &self.stage)?;
        self.draws.next_group_id += requests.len() as u64;
        for ((draw, (row, _)), request) in draws.iter().zip(&rows).zip(&requests) {
            let samples = self.rollouts.to_samples((row, self.batch.step), request, unbegun(request));
            self.carried.push(Group { row: draw.index, samples, baseline: None });
        }
        Ok(())
    }

    /// Let every sample under way grow.
    fn round(&mut self, partial: &PartialRollouts, rounds: &mut Rounds) -> Result<(), Error> {
        self.rollouts.place.enter(Phase::Rollout);
        let begin = self.rollouts.clock.elapsed();
        let sampling = self.rollouts.resolve_sampling(&self.stage.sampling)?;
        let requests = self.carried.iter().filter_map(|group| group.request(&sampling, partial)).collect();
        let results = self.rollouts.run_groups(requests)?;
        let Rollouts { place, services, .. } = &self.rollouts;
        for (group, result) in self.carried.iter_mut().filter(|group| !group.is_complete()).zip(results) {
            let open =
                group.samples.iter_mut().zip(result.samples).filter(|(s, _)| s.finish_reason == FinishReason::Paused);
            for (sample, new) in open {
                place.attribute(check_round(sample, &new))?;
                rounds.num_kept_tokens += if rounds.num_rounds == 0 { u64::from(new.num_kept) } else { 0 };
                append(sample, new);
                let text_ids = sample.finish_reason.text_ids(&sample.response_token_ids);
                sample.response = services.text.decode(text_ids);
                sample.worker.clone_from(&result.worker);
            }
        }
        self.batch.numbers.rollout_seconds += (self.rollouts.clock.elapsed() - begin).as_secs_f64();
        Ok(())
    }

    /// Score the groups that a round has completed.
    fn score_complete(&mut self) -> Result<(), Error> {
        let is_new = |group: &Group| group.is_complete() && !group.is_scored();
        let (new, known): (Vec<Group>, Vec<Group>) = self.carried.drain(..).partition(is_new);
        self.carried = known;
        if new.is_empty() {
            return Ok(());
        }
        for group in self.score(new)? {
            self.batch.numbers.count_generated(&group.samples);
            self.carried.push(group);
        }
        self.carried.sort_by_key(|group| group.samples.first().map(|sample| sample.group_id));
        Ok(())
    }

    fn score(&mut self, mut groups: Vec<Group>) -> Result<Vec<Group>, Error> {
        self.rollouts.place.enter(Phase::Reward);
        let begin = self.rollouts.clock.elapsed();
        let requests = groups.iter().map(|group| group.all().map(ScoreRequest::of).collect()).collect();
        let scored = self.rollouts.place.attribute(self.rollouts.score_line().score_groups(requests))?;
        self.batch.numbers.reward_seconds += (self.rollouts.clock.elapsed() - begin).as_secs_f64();
        groups.iter_mut().zip(scored).for_each(|(group, scored)| group.take_outcomes(scored));
        groups.iter_mut().for_each(|group| self.weigh(group));
        Ok(groups)
    }

    /// Throw away what there is of samples that have not ended.
    fn abort_unfinished(&mut self, rounds: &mut Rounds) -> Result<(), Error> {
        let mut aborted: Vec<Settled> = Vec::new();
        let is_unfinished = |sample: &&mut Sample| {
            sample.finish_reason == FinishReason::Paused && !sample.response_token_ids.is_empty()
        };
        for sample in self.carried.iter_mut().flat_map(|group| &mut group.samples).filter(is_unfinished) {
            rounds.num_aborted_samples += 1;
            rounds.num_aborted_tokens += sample.response_token_ids.len() as u64;
            aborted.push(settled(sample, Fate::Dropped(Unused::Unfinished)));
            forget_response(sample);
        }
        self.rollouts.settle(&aborted)
    }

    fn partial_columns(&self, rounds: &Rounds) -> Vec<(String, f64)> {
        let unfinished =
            || self.carried.iter().flat_map(|g| &g.samples).filter(|s| s.finish_reason == FinishReason::Paused);
        let num_tokens: usize = unfinished().map(|sample| sample.response_token_ids.len()).sum();
        let num_waiting = self.carried.iter().filter(|group| group.is_complete()).count();
        let named = [
            ("num_rounds", rounds.num_rounds as f64),
            ("num_unfinished_samples", unfinished().count() as f64),
            ("num_carried_tokens", num_tokens as f64),
            ("num_waiting_groups", num_waiting as f64),
            ("num_aborted_samples", rounds.num_aborted_samples as f64),
            ("num_aborted_tokens", rounds.num_aborted_tokens as f64),
            ("num_kept_tokens", rounds.num_kept_tokens as f64),
        ];
        named.into_iter().map(|(name, value)| (format!("partial/{name}"), value)).collect()
    }
}

/// Samples of which nothing is drawn yet.
fn unbegun(request: &GroupRequest) -> GroupResult {
    let sample = |(index, seed): (u32, &u64)| GeneratedSample {
        sample_index: SampleIndex(index),
        seed: *seed,
        num_begun: 0,
        num_kept: 0,
        token_ids: Vec::new(),
        reused: Vec::new(),
        log_probs: Vec::new(),
        sampled_log_probs: Vec::new(),
        surviving_mass: Vec::new(),
        policy_versions: Vec::new(),
        finish_reason: FinishReason::Paused,
        num_drafted: 0,
        num_accepted: 0,
        timings: SampleTimings::default(),
    };
    GroupResult {
        group_id: request.group_id,
        prompt_id: request.prompt_id,
        worker: String::new(),
        samples: (0..).zip(&request.seeds).map(sample).collect(),
    }
}

/// An answer that does not go on where the sample stands comes from a broken engine.
fn check_round(sample: &Sample, new: &GeneratedSample) -> ServiceResult<()> {
    let (known, found) = (sample.response_token_ids.len(), new.num_begun as usize);
    if known == found && sample.seed == new.seed {
        return Ok(());
    }
    let key = sample.key();
    let cause = format!("sample {key:?} goes on behind {known} tokens, and the answer is of what follows {found}");
    Err(ServiceError::new(ErrorCode::Internal, "rollout", "next_group", cause))
}

/// Put what a round drew behind what there is of a sample. The tokens of earlier rounds keep the log-probs and versions
/// of the weights that drew them.
fn append(sample: &mut Sample, new: GeneratedSample) {
    sample.response_mask.extend(new.token_ids.iter().map(|_| 1));
    sample.response_token_ids.extend(new.token_ids);
    sample.rollout_log_probs.extend(new.log_probs);
    sample.sampled_log_probs.extend(new.sampled_log_probs);
    sample.surviving_mass.extend(new.surviving_mass);
    for (version, num_tokens) in new.policy_versions {
        match sample.policy_versions.last_mut() {
            Some((last, known)) if *last == version => *known += num_tokens,
            _ => sample.policy_versions.push((version, num_tokens)),
        }
    }
    sample.finish_reason = new.finish_reason;
    sample.num_drafted += new.num_drafted;
    sample.num_accepted += new.num_accepted;
    sample.timings.queue_seconds += new.timings.queue_seconds;
    sample.timings.rollout_seconds += new.timings.rollout_seconds;
}

/// Let a sample begin anew.
fn forget_response(sample: &mut Sample) {
    sample.response.clear();
    sample.response_token_ids.clear();
    sample.response_mask.clear();
    sample.rollout_log_probs.clear();
    sample.sampled_log_probs.clear();
    sample.surviving_mass.clear();
    sample.policy_versions.clear();
    (sample.num_drafted, sample.num_accepted) = (0, 0);
    sample.timings = SampleTimings::default();
}
