//! From prompts to responses: requests with their seeds, and results in the order of the requests.

use crate::accounts::{dropped, settled};
use crate::collect::Collector;
use crate::place::Place;
use crate::scoring::{ScoreLine, Scored, Scoring};
use crate::{Clock, Controller, Error, Phase, PolicyStage, ReplaySpec, Services};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use temper_proto::{
    Fate, GeneratedSample, GroupRequest, GroupResult, ScoreRequest, ServiceError, ServiceResult, Settled, Unused,
};
use temper_types::{ErrorCode, GroupId, PromptRow, Sample, SampleIndex, SamplingParams, Step, derive_seed};

/// Prompts with the pass over the data in which they were drawn.
pub(crate) type DrawnRows = Vec<(PromptRow, u64)>;

/// The samples of one prompt.
#[derive(Debug, Clone)]
pub(crate) struct Group {
    /// Row of the prompt in its dataset.
    pub(crate) row: u64,
    /// `num_generations` samples.
    pub(crate) samples: Vec<Sample>,
    /// The greedy response, where the algorithm needs one.
    pub(crate) baseline: Option<Sample>,
}

impl Group {
    /// Its samples, none of which is trained on.
    pub(crate) fn dropped(&self, reason: Unused) -> Vec<Settled> {
        self.samples.iter().map(|sample| settled(sample, Fate::Dropped(reason))).collect()
    }

    /// Everything that is scored.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Sample> {
        self.samples.iter().chain(&self.baseline)
    }

    /// The same, to change.
    pub(crate) fn all_mut(&mut self) -> impl Iterator<Item = &mut Sample> {
        self.samples.iter_mut().chain(&mut self.baseline)
    }

    /// What the scorer said of everything that is scored.
    pub(crate) fn take_outcomes(&mut self, scored: Scored) {
        for (sample, outcome) in self.all_mut().zip(scored.outcomes) {
            sample.outcome = Some(outcome);
            sample.timings.reward_seconds = scored.seconds_each;
        }
    }
}

impl Controller {
    /// What generates, at `place`.
    pub(crate) fn rollouts(&self, place: Place) -> Rollouts {
        Rollouts {
            services: self.services.clone(),
            clock: Arc::clone(&self.clock),
            timeout: Duration::from_secs_f64(self.spec.rollout_timeout_seconds),
            replay: self.spec.replay,
            scoring: self.spec.scoring,
            place,
        }
    }
}

impl Collector {
    /// Draw the next prompts of the stage, answer each `num_generations` times, and once greedily where the algorithm
    /// needs that, and score every group: while the others are generated, where the run scores so.
    pub(crate) fn generate(&mut self, num_prompts: usize) -> Result<Vec<Group>, Error> {
        self.rollouts.place.enter(Phase::Rollout);
        let begin = self.rollouts.clock.elapsed();
        let draws = self.draw_prompts(num_prompts);
        let rows: DrawnRows = draws.iter().map(|d| (self.rows[d.index as usize].clone(), d.epoch)).collect();
        let mut requests = self.rollouts.requests(&rows, (self.draws.next_group_id, self.seed), &self.stage)?;
        if let Some(offers) = &self.offers {
            offers.make(&mut requests)?;
        }
        if self.stage.algorithm.plan().greedy_baseline {
            let greedy: Vec<GroupRequest> = requests.iter().map(|r| greedy_request(r, rows.len() as u64)).collect();
            requests.extend(greedy);
        }
        self.draws.next_group_id += requests.len() as u64;
        let parts = draws.iter().map(|d| Group { row: d.index, samples: Vec::new(), baseline: None });
        let asked = Asked { rows, requests, groups: parts.collect(), greedy: Vec::new() };
        self.answer(asked, begin)
    }

    /// Groups with their samples and outcomes, in the order of the requests.
    fn answer(&mut self, mut asked: Asked, begin: Duration) -> Result<Vec<Group>, Error> {
        let (step, stage) = (self.batch.step, &self.stage);
        let line = self.rollouts.score_line();
        let scored = std::thread::scope(|scope| {
            let _closing = line.closing();
            let rollouts = &self.rollouts;
            rollouts.each_group(asked.requests.clone(), &mut |index, result| match asked.take_in(
                rollouts,
                (step, stage),
                index,
                result,
            ) {
                Some((place, requests)) => rollouts.score_beside(Phase::Reward, line.push(scope, place, requests)),
                None => Ok(()),
            })?;
            let (generated, overlap) = (self.rollouts.clock.elapsed(), line.busy());
            self.batch.numbers.rollout_seconds += (generated - begin).as_secs_f64();
            self.reward_overlap_seconds += overlap.as_secs_f64();
            self.rollouts.settle(&asked.greedy)?;
            self.rollouts.place.enter(Phase::Reward);
            let scored = self.rollouts.place.attribute(line.finish())?;
            self.batch.numbers.reward_seconds += (self.rollouts.clock.elapsed() - generated).as_secs_f64();
            Ok::<_, Error>(scored)
        })?;
        asked.groups.iter_mut().zip(scored).for_each(|(group, scored)| group.take_outcomes(scored));
        Ok(asked.groups)
    }
}

/// What was asked of the engines, and what of it is there.
struct Asked {
    rows: DrawnRows,
    /// One a row; greedy ones behind them, where there are any.
    requests: Vec<GroupRequest>,
    groups: Vec<Group>,
    /// Fates of greedy responses.
    greedy: Vec<Settled>,
}

impl Asked {
    /// Take in a finished request. Gives the place of the group that is whole now, and what is to be scored of it.
    fn take_in(
        &mut self,
        rollouts: &Rollouts,
        (step, stage): (u64, &PolicyStage),
        index: usize,
        result: GroupResult,
    ) -> Option<(usize, Vec<ScoreRequest>)> {
        let num_rows = self.rows.len();
        let place = index % num_rows;
        let (group, row) = (&mut self.groups[place], (&self.rows[place].0, step));
        if index < num_rows {
            group.samples = rollouts.to_samples(row, &self.requests[place], result);
        } else {
            self.greedy.extend(dropped(std::slice::from_ref(&result), Unused::Baseline));
            let mut samples = rollouts.to_samples(row, &self.requests[place], result);
            group.baseline = samples.pop().map(|sample| as_baseline(sample, stage));
        }
        let needs_baseline = self.requests.len() > num_rows;
        let is_whole = !group.samples.is_empty() && group.baseline.is_some() == needs_baseline;
        is_whole.then(|| (place, group.all().map(ScoreRequest::of).collect()))
    }
}

/// What turns prompts into responses.
pub(crate) struct Rollouts {
    pub(crate) services: Services,
    pub(crate) clock: Arc<dyn Clock>,
    /// Longest wait for one finished group.
    pub(crate) timeout: Duration,
    pub(crate) replay: ReplaySpec,
    pub(crate) scoring: Scoring,
    pub(crate) place: Place,
}

impl Rollouts {
    /// Samples that no step trains on have ended.
    pub(crate) fn settle(&self, samples: &[Settled]) -> Result<(), Error> {
        self.place.attribute(self.services.rollout.settle(0, samples))
    }

    pub(crate) fn requests(
        &self,
        rows: &[(PromptRow, u64)],
        (first_group, seed): (u64, u64),
        stage: &PolicyStage,
    ) -> Result<Vec<GroupRequest>, Error> {
        let sampling = self.resolve_sampling(&stage.sampling)?;
        let request = |(index, (row, epoch)): (usize, &(PromptRow, u64))| {
            let prompt_token_ids = self.place.attribute(self.services.text.encode_prompt(&row.prompt))?;
            let samples = 0..stage.num_generations as u32;
            let noise_epoch = if self.replay == ReplaySpec::Coupled { 0 } else { *epoch };
            Ok(GroupRequest {
                group_id: GroupId(first_group + index as u64),
                prompt_id: row.prompt_id,
                epoch: *epoch,
                prompt_token_ids,
                seeds: samples.map(|i| derive_seed(seed, row.prompt_id.0, i, noise_epoch)).collect(),
                sampling: sampling.clone(),
                ..GroupRequest::default()
            })
        };
        rows.iter().enumerate().map(request).collect()
    }

    /// Sampling parameters as engines take them: with the model's stop ids where none are named, bad words as ids.
    pub(crate) fn resolve_sampling(&self, sampling: &SamplingParams) -> Result<SamplingParams, Error> {
        let mut sampling = sampling.clone();
        if sampling.stop_token_ids.is_empty() {
            sampling.stop_token_ids = self.services.text.stop_token_ids();
        }
        self.place.attribute(sampling.resolve_bad_words(|word| self.services.text.encode_text(word)))?;
        Ok(sampling)
    }

    /// Submit groups and wait for all of them; results stand in the requests' order, whatever order they finish in.
    pub(crate) fn run_groups(&self, requests: Vec<GroupRequest>) -> Result<Vec<GroupResult>, Error> {
        let mut finished: BTreeMap<usize, GroupResult> = BTreeMap::new();
        self.each_group(requests, &mut |index, result| {
            finished.insert(index, result);
            Ok(())
        })?;
        Ok(finished.into_values().collect())
    }

    /// Submit groups and hand each on as it finishes, with its place among the requests.
    pub(crate) fn each_group(
        &self,
        requests: Vec<GroupRequest>,
        take_in: &mut dyn FnMut(usize, GroupResult) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let failed = |cause| self.place.error(ServiceError::new(ErrorCode::Internal, "rollout", "next_group", cause));
        let mut open: BTreeMap<GroupId, usize> = requests.iter().enumerate().map(|(i, r)| (r.group_id, i)).collect();
        self.place.attribute(self.services.rollout.submit(requests))?;
        while !open.is_empty() {
            let Some(result) = self.place.attribute(self.services.rollout.next_group(self.timeout))? else { break };
            let id = result.group_id;
            let index = open.remove(&id).ok_or_else(|| failed(format!("group {id} came and is not waited for")))?;
            take_in(index, result)?;
        }
        match open.keys().next() {
            Some(id) => Err(failed(format!("group {id} was submitted and never came back"))),
            None => Ok(()),
        }
    }

    /// The calls that score the groups of one batch.
    pub(crate) fn score_line(&self) -> ScoreLine {
        ScoreLine::new(Arc::clone(&self.services.reward), Arc::clone(&self.clock), self.scoring)
    }

    /// Where a reward failed while groups are generated, they are given up: the run ends.
    pub(crate) fn score_beside(&self, phase: Phase, pushed: ServiceResult<()>) -> Result<(), Error> {
        pushed.map_err(|failure| {
            // What is reported is why the reward failed.
            let _ = self.services.rollout.abort_all();
            self.place.error_in(phase, failure)
        })
    }

    /// The samples of a group for the step that trains on them.
    pub(crate) fn to_samples(
        &self,
        (row, step): (&PromptRow, u64),
        request: &GroupRequest,
        result: GroupResult,
    ) -> Vec<Sample> {
        let worker = result.worker;
        let sample = |s: GeneratedSample| Sample {
            step: Step(step),
            prompt_id: row.prompt_id,
            group_id: request.group_id,
            sample_index: s.sample_index,
            epoch: request.epoch,
            seed: s.seed,
            data_source: row.data_source.clone(),
            prompt: row.prompt.clone(),
            response: self.services.text.decode(s.finish_reason.text_ids(&s.token_ids)),
            prompt_token_ids: request.prompt_token_ids.clone(),
            response_mask: vec![1; s.token_ids.len()],
            response_token_ids: s.token_ids,
            response_reused: s.reused,
            rollout_log_probs: s.log_probs,
            sampled_log_probs: s.sampled_log_probs,
            surviving_mass: s.surviving_mass,
            old_log_probs: Vec::new(),
            ref_log_probs: Vec::new(),
            values: Vec::new(),
            advantages: Vec::new(),
            returns: Vec::new(),
            outcome: None,
            ground_truth: row.ground_truth.clone(),
            extra_info: row.extra_info.clone(),
            finish_reason: s.finish_reason,
            policy_versions: s.policy_versions,
            staleness: 0,
            num_drafted: s.num_drafted,
            num_accepted: s.num_accepted,
            worker: worker.clone(),
            timings: s.timings,
        };
        result.samples.into_iter().map(sample).collect()
    }
}

/// One greedy response to the same prompt, as a group of its own.
fn greedy_request(request: &GroupRequest, offset: u64) -> GroupRequest {
    GroupRequest {
        group_id: GroupId(request.group_id.0 + offset),
        seeds: request.seeds.iter().copied().take(1).collect(),
        sampling: SamplingParams { temperature: 0.0, ..request.sampling.clone() },
        reuse: None,
        ..request.clone()
    }
}

/// A greedy response stands behind the samples of its group and is not trained on.
fn as_baseline(mut sample: Sample, stage: &PolicyStage) -> Sample {
    sample.sample_index = SampleIndex(stage.num_generations as u32);
    sample.response_mask.fill(0);
    sample
}
