//! The engine: groups of requests in, groups of responses out, one step at a time.
//!
//! Owns: the tokens of every queued and running sample, the scheduler, and the model with its K/V pool. Knows token
//! ids only, no text, no transport and no thread: whoever calls [`Engine::step`] computes.
//!
//! # What a response depends on
//! The token at slot t (prompt and response together) is drawn by the pure sampling function from the logits of the
//! row at slot t-1 with the noise `uniform53(seed, t)`. The row's bits depend on the weights and its own sequence
//! alone, so tokens and log-prob bits do not depend on batch mates, arrival order, chunking, block size, preemption
//! or threads; tests pin this down with a model that hashes what it reads and with random policies.
//!
//! # Speculation
//! A decoding sequence may take rows for drafted tokens behind its last one. The token after each of these rows is
//! drawn as if the draft were right, by the same function with the same noise; the draws count as far as the draft is
//! what was drawn, and the first one that differs counts too. So a draft moves work between steps and nothing else.
//!
//! # Rounds
//! A request may bring the beginnings of its responses and limit what is drawn now; a sample that has not ended by then
//! is paused, and goes on when a later request brings what there is of it. Rounds change no bit, like preemption.
//!
//! # When weights change between steps
//! Every token is tagged with the version that drew it. K/V of running sequences are kept: a token drawn after a
//! change attends to K/V that older weights stored. A sequence that is preempted after a change is recomputed under
//! the weights of the day, but for what it shares of its prompt with a running sibling. Callers who want neither change
//! weights only while the engine is idle. Cached prefixes are forgotten at every change (but what a paused sample
//! keeps), their names begin with the version, and what a sequence stored across a change is never cached: no later
//! prompt attends to K/V of older weights. Only a sample of a request that says so ([`GroupRequest::keep_kv`]) goes on
//! over what it kept itself.
//!
//! # Invariants
//! Every group that was accepted ends with exactly one [`GroupResult`], from [`Engine::pop_finished`] or
//! [`Engine::abort`] · a refused submit queues nothing · an open sample has a key in the scheduler, a finished one has
//! none.

mod admission;
mod batch;
mod kept;
mod lengths;
mod measure;
mod prefix;
mod refits;
mod reuse;
mod rounds;
mod sample;
mod sleep;

use crate::beam::{BeamHypothesis, BeamSpec, beam_search};
use crate::clock::Clock;
use crate::model::{Model, StepOutput};
use crate::scheduler::{Scheduler, SeqKey};
use crate::speculation::{Speculation, SpeculationConfig};
use crate::stop::{StopMatcher, TokenBytes};
use crate::{Error, SchedulerLimits};
use batch::StepBuffers;
use kept::KeptSamples;
use lengths::LengthHistory;
use prefix::{BlockNamer, Chain};
use refits::RefitClock;
use sample::{Drawn, GroupContext, OpenSample};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use temper_proto::{GeneratedSample, GroupRequest, GroupResult, RolloutStats};
use temper_types::{FinishReason, GroupId, PolicyVersion};

/// What an engine is made with, beside its model.
#[derive(Clone)]
pub struct EngineOptions {
    /// Limits of the scheduler.
    pub limits: SchedulerLimits,
    /// Most samples queued and running.
    pub max_queued_samples: usize,
    /// Bytes of tokens; without them stop strings are refused.
    pub token_bytes: Option<Arc<dyn TokenBytes>>,
    /// Clock of the timings.
    pub clock: Arc<dyn Clock>,
    /// Name under which results are reported.
    pub worker: String,
    /// Drafters, and how much they may guess.
    pub speculation: SpeculationConfig,
    /// Whether full blocks are kept for later prompts and turns that begin the same.
    pub prefix_cache: bool,
}

/// A group of which at least one sample is open.
struct OpenGroup {
    context: Arc<GroupContext>,
    /// Keys of the samples; those of finished ones are stale.
    keys: Vec<SeqKey>,
    finished: Vec<Option<GeneratedSample>>,
    num_open: usize,
}

/// The engine. See the module.
pub struct Engine<M> {
    model: M,
    options: EngineOptions,
    scheduler: Scheduler,
    /// Open samples by [`SeqKey::index`].
    samples: Vec<Option<OpenSample>>,
    groups: BTreeMap<GroupId, OpenGroup>,
    finished: VecDeque<GroupResult>,
    buffers: StepBuffers,
    speculation: Option<Speculation>,
    /// Names blocks for the prefix cache; `None` where there is none.
    namer: Option<BlockNamer>,
    /// K/V of paused samples.
    kept: KeptSamples,
    num_queued: usize,
    num_steps: u64,
    num_rows: u64,
    num_prompt_tokens: u64,
    step_micros: u64,
    tail_micros: u64,
    /// Most sequences that drew in one step since the engine was idle.
    widest: usize,
    num_generated_tokens: u64,
    num_reused_tokens: u64,
    refits: RefitClock,
    lengths: LengthHistory,
}

impl<M: Model> Engine<M> {
    /// An idle engine. The model's pool holds the blocks that `options.limits` names.
    pub fn new(model: M, options: EngineOptions) -> Self {
        Engine {
            model,
            scheduler: Scheduler::new(options.limits),
            speculation: Speculation::new(options.speculation),
            namer: options.prefix_cache.then(|| BlockNamer::new(options.limits.block_size)),
            options,
            samples: Vec::new(),
            groups: BTreeMap::new(),
            finished: VecDeque::new(),
            kept: KeptSamples::default(),
            buffers: StepBuffers::default(),
            num_queued: 0,
            num_steps: 0,
            num_rows: 0,
            num_prompt_tokens: 0,
            step_micros: 0,
            tail_micros: 0,
            widest: 0,
            num_generated_tokens: 0,
            num_reused_tokens: 0,
            refits: RefitClock::default(),
            lengths: LengthHistory::default(),
        }
    }

    /// Sign results with this name from now on.
    pub(crate) fn set_worker(&mut self, worker: &str) {
        worker.clone_into(&mut self.options.worker);
    }

    /// Use these drafters from now on; what others remember is dropped.
    pub fn set_speculation(&mut self, speculation: Option<Speculation>) {
        self.speculation = speculation;
    }

    /// Keep what drafters know of earlier responses in the file at `path`.
    pub(crate) fn keep_history(&mut self, path: &std::path::Path) {
        let Some(speculation) = &mut self.speculation else { return };
        let mut vocabulary = blake3::Hasher::new();
        let vocab_size = self.model.limits().vocab_size as u32;
        vocabulary.update(&vocab_size.to_le_bytes());
        for id in 0..vocab_size {
            let bytes = self.options.token_bytes.as_ref().map_or(&[][..], |table| table.token_bytes(id));
            vocabulary.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
        }
        speculation.keep_history(path, &vocabulary.finalize().to_hex());
    }

    /// The drafters, to change while the engine is idle.
    pub fn speculation_mut(&mut self) -> Option<&mut Speculation> {
        self.speculation.as_mut()
    }

    /// Search for the best responses to `prompt`, best first, and tell the weights that were searched with.
    ///
    /// # Errors
    /// Where groups are open, prompt and responses do not fit the pool, or the model fails.
    pub fn beam_search(
        &mut self,
        prompt: &[u32],
        spec: &BeamSpec,
    ) -> Result<(Vec<BeamHypothesis>, PolicyVersion), Error> {
        if !self.is_idle() {
            return Err(Error::Model(format!(
                "beam search needs an idle engine: {} groups are open",
                self.groups.len()
            )));
        }
        self.clear_prefix_cache();
        beam_search(&mut self.model, self.options.limits, prompt, spec)
    }

    /// Queue groups behind those already queued.
    ///
    /// # Errors
    /// For the first group that is wrong or can never fit; nothing of the call is queued then.
    pub fn submit(&mut self, requests: Vec<GroupRequest>) -> Result<(), Error> {
        self.check(&requests)?;
        requests.into_iter().for_each(|request| self.enqueue(request));
        Ok(())
    }

    /// Compute one step: plan, forward, draw, and append or finish. Does nothing where the engine is idle.
    ///
    /// # Errors
    /// Where the model fails; the step can be tried again.
    pub fn step(&mut self) -> Result<(), Error> {
        if self.scheduler.is_idle() {
            return Ok(());
        }
        self.measure_steps()?;
        let begin = self.options.clock.now();
        let version = self.model.version()?;
        self.refits.begin_step(version, begin);
        self.follow_version(version);
        let drafting = self.draft(begin);
        self.scheduler.schedule();
        self.model.copy_blocks(&self.scheduler.plan().copies);
        let output = self.buffers.run(&mut self.model, &self.scheduler, &self.samples)?;
        self.check_finite(&output)?;
        self.follow_version(output.version);
        self.note_starts();
        self.scheduler.commit();
        self.record(&output);
        self.buffers.output = output;
        self.note_step(begin, drafting);
        Ok(())
    }

    /// The next finished group, in order of completion.
    pub fn pop_finished(&mut self) -> Option<GroupResult> {
        self.finished.pop_front()
    }

    /// End a group now and free exactly its blocks. Its unfinished samples come back as far as they got, with
    /// [`FinishReason::Abort`]. `None` where no such group is open.
    pub fn abort(&mut self, group_id: GroupId) -> Option<GroupResult> {
        let keys = self.groups.get(&group_id)?.keys.clone();
        for (index, key) in keys.into_iter().enumerate() {
            if self.groups.get(&group_id).is_some_and(|group| group.finished[index].is_none()) {
                self.finish(key, FinishReason::Abort);
            }
        }
        self.finished.pop_back()
    }

    /// Ids of the open groups, ascending.
    pub fn open_groups(&self) -> Vec<GroupId> {
        self.groups.keys().copied().collect()
    }

    /// Number of open groups.
    pub fn num_open_groups(&self) -> usize {
        self.groups.len()
    }

    /// True where no group is open. Finished ones may still wait to be taken.
    pub fn is_idle(&self) -> bool {
        self.groups.is_empty()
    }

    /// Counters.
    pub fn stats(&self) -> RolloutStats {
        let (blocks, scheduler) = (self.scheduler.blocks(), self.scheduler.stats());
        RolloutStats {
            num_steps: self.num_steps,
            num_prefill_tokens: scheduler.num_prefill_tokens,
            num_generated_tokens: self.num_generated_tokens,
            num_preemptions: scheduler.num_preemptions,
            peak_kv_blocks: blocks.peak_used() as u64,
            kv_blocks_in_use: blocks.num_used() as u64,
            num_rows: self.num_rows,
            kv_blocks: blocks.num_blocks() as u64,
            num_requests_running: self.scheduler.num_running() as u64,
            num_requests_waiting: self.scheduler.num_waiting() as u64,
            prompt_tokens: self.num_prompt_tokens,
            prefix_cache_queries: scheduler.prefix_cache_queries,
            prefix_cache_hits: scheduler.prefix_cache_hits,
            step_micros: self.step_micros,
            tail_micros: self.tail_micros,
            num_reused_tokens: self.num_reused_tokens,
            weight_version: self.refits.version.map_or(0, |version| version.number),
            num_refits: self.refits.num_refits,
            refit_micros: 0,
            shared_weight_bytes: 0,
            streamed_weight_bytes: 0,
            pause_micros: self.refits.pause_micros,
            speculation: self.speculation.as_ref().map(Speculation::stats).unwrap_or_default(),
        }
    }

    /// The model.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// Forget cached prefixes, because the pool loses its contents or to measure without them.
    pub fn clear_prefix_cache(&mut self) {
        self.kept.clear();
        self.scheduler.invalidate_cache(|_| false);
    }

    /// The model, to change between steps.
    pub fn model_mut(&mut self) -> &mut M {
        &mut self.model
    }

    fn check(&self, requests: &[GroupRequest]) -> Result<(), Error> {
        let mut new_ids = BTreeSet::new();
        let mut submitted = 0;
        for request in requests {
            let group_id = request.group_id;
            if self.groups.contains_key(&group_id) || !new_ids.insert(group_id) {
                let cause = "the id is already queued: expected one that is unique in the run".to_owned();
                return Err(Error::InvalidRequest { group_id, cause });
            }
            self.check_fit(request)?;
            submitted += request.seeds.len();
        }
        let (queued, limit) = (self.num_queued, self.options.max_queued_samples);
        if queued + submitted > limit { Err(Error::QueueFull { queued, submitted, limit }) } else { Ok(()) }
    }

    /// Whether a group can be answered at all: its values are in range, and it fits an idle engine.
    ///
    /// # Errors
    /// What [`Engine::submit`] would refuse it for, whatever is queued.
    pub fn check_fit(&self, request: &GroupRequest) -> Result<(), Error> {
        let shape = admission::check_request(request, &self.model, self.options.token_bytes.is_some())?;
        match self.scheduler.excess_blocks(shape) {
            None => Ok(()),
            Some(needed) => Err(Error::NeverFits {
                group_id: request.group_id,
                prompt_len: shape.prompt_len,
                max_new_tokens: shape.max_new_tokens,
                needed,
                available: self.scheduler.blocks().num_blocks(),
                unit: "kv blocks",
            }),
        }
    }

    fn enqueue(&mut self, request: GroupRequest) {
        let shape = crate::GroupShape {
            prompt_len: request.prompt_token_ids.len(),
            max_new_tokens: request.sampling.max_new_tokens as usize,
            num_samples: request.seeds.len(),
            priority: request.priority,
            reserve_tokens: self.lengths.reserve(&request.prompt_token_ids),
        };
        let group_id = request.group_id;
        let context = Arc::new(self.context(request));
        let keys = self.scheduler.submit(shape);
        for (key, sample_index) in keys.iter().zip(0..) {
            if self.samples.len() <= key.index() {
                self.samples.resize_with(key.index() + 1, || None);
            }
            self.samples[key.index()] = Some(OpenSample::new(&context, sample_index));
            self.go_on(*key);
            self.take_kept_kv(*key);
            self.name_blocks(*key);
        }
        let finished = keys.iter().map(|_| None).collect();
        self.num_queued += keys.len();
        self.num_prompt_tokens += shape.prompt_len as u64;
        let group = OpenGroup { context: Arc::clone(&context), num_open: keys.len(), keys: keys.clone(), finished };
        self.groups.insert(group_id, group);
        self.skip_complete(&context.request, &keys);
    }

    fn context(&self, request: GroupRequest) -> GroupContext {
        let ascending = |ids: &[u32]| ids.iter().copied().collect::<BTreeSet<u32>>().into_iter().collect::<Vec<u32>>();
        let stop_ids = ascending(&request.sampling.stop_token_ids);
        let allowed_ids = ascending(&request.sampling.allowed_token_ids);
        let logit_bias = request.sampling.logit_bias.iter().map(|(id, bias)| (*id, *bias)).collect();
        let token_bytes = self.options.token_bytes.as_ref().filter(|_| !request.sampling.stop.is_empty());
        let stop = token_bytes.map(|bytes| {
            let stops = request.sampling.stop.iter().map(String::as_bytes);
            (StopMatcher::new(stops), Arc::clone(bytes))
        });
        let submitted_at = self.options.clock.now();
        GroupContext { request, stop_ids, allowed_ids, logit_bias, stop, submitted_at }
    }

    /// Remember when each sample's first row was computed, its own or the one that it draws from.
    fn note_starts(&mut self) {
        self.num_steps += 1;
        let mut now = None;
        let plan = self.scheduler.plan();
        for key in plan.work.iter().map(|work| work.key).chain(plan.draws.iter().map(|draw| draw.key)) {
            if let Some(sample) = self.samples[key.index()].as_mut().filter(|sample| sample.started_at.is_none()) {
                sample.started_at = Some(*now.get_or_insert_with(|| self.options.clock.now()));
            }
        }
    }

    /// Name blocks after `version` from now on; where it is a new one, nothing stored before is a prefix any more.
    fn follow_version(&mut self, version: PolicyVersion) {
        let limits = self.model.limits();
        let Some(namer) = self.namer.as_mut() else { return };
        let before = namer.version();
        if !namer.follow(version, limits) {
            return;
        }
        if before.is_some_and(|before| before.number > version.number) {
            // A run that went back draws again what these were drawn behind.
            self.kept.clear();
            self.samples.iter_mut().flatten().for_each(|sample| sample.kept = None);
        }
        self.forget_prefixes();
        let is_open = |group: &OpenGroup, at: usize| group.finished[at].is_none();
        let of = |group: &OpenGroup| {
            let keys = group.keys.iter().enumerate();
            keys.filter(|(at, _)| is_open(group, *at)).map(|(_, key)| *key).collect::<Vec<_>>()
        };
        let keys: Vec<SeqKey> = self.groups.values().flat_map(of).collect();
        for key in keys {
            if let Some(sample) = &mut self.samples[key.index()] {
                sample.chain = Chain::default();
            }
            self.scheduler.clear_hashes(key);
            self.name_kept_blocks(key);
            self.name_blocks(key);
        }
    }

    /// Tell the scheduler the names of the blocks that became full.
    fn name_blocks(&mut self, key: SeqKey) {
        if let (Some(namer), Some(sample)) = (&mut self.namer, &mut self.samples[key.index()]) {
            namer.extend(sample, |hash| self.scheduler.push_hash(key, hash));
        }
    }

    /// Ask the drafters where it may pay; says how long that took since `begin`.
    fn draft(&mut self, begin: Duration) -> Duration {
        if !self.propose_drafts() {
            return Duration::ZERO;
        }
        let elapsed = self.options.clock.now().saturating_sub(begin);
        self.speculation.iter_mut().for_each(|speculation| speculation.note_look(elapsed));
        elapsed
    }

    /// Ask the drafters, and tell the scheduler and the samples what to verify. False where nobody was asked.
    fn propose_drafts(&mut self) -> bool {
        let Some(speculation) = &mut self.speculation else { return false };
        let (scheduler, samples) = (&mut self.scheduler, &mut self.samples);
        // A step that failed has left its drafts.
        scheduler.clear_drafts();
        let num_rows = scheduler.running().iter().filter(|key| scheduler.draft_room(**key) > 0).count();
        if num_rows == 0 || !speculation.begin_step(num_rows) {
            return false;
        }
        let vocab_size = self.model.limits().vocab_size;
        for key in scheduler.running() {
            if let Some(sample) = samples[key.index()].as_mut() {
                sample.show_new_tokens(speculation, vocab_size);
            }
        }
        if speculation.wants_all() {
            let room = |key: &SeqKey| scheduler.draft_room(*key);
            let drafting = scheduler.running().iter().filter(|key| room(key) > 0);
            let open = drafting.filter_map(|key| Some((samples[key.index()].as_ref()?, room(key))));
            let contexts: Vec<_> = open.map(|(sample, room)| sample.draft_context(vocab_size, room)).collect();
            speculation.prepare(&contexts);
        }
        for &key in scheduler.running() {
            let room = scheduler.draft_room(key);
            if let Some(sample) = samples[key.index()].as_ref().filter(|_| room > 0) {
                speculation.propose(key, &sample.draft_context(vocab_size, room));
            }
        }
        speculation.choose(|key, proposal| {
            let sample = samples[key.index()].as_mut().expect("a running sample is open");
            scheduler.propose(key, proposal.draft.token_ids.len());
            std::mem::swap(&mut sample.proposal, proposal);
        });
        true
    }

    /// Weights that are not finite numbers draw nothing that could be used.
    fn check_finite(&self, output: &StepOutput) -> Result<(), Error> {
        let mut drawn = self.scheduler.plan().draws.iter().zip(&output.sampled);
        let Some((draw, token)) = drawn.find(|(_, token)| !token.log_prob.is_finite()) else { return Ok(()) };
        let sample = self.samples[draw.key.index()].as_ref().expect("a drawing sample is open");
        Err(Error::Model(format!(
            "the log-prob of token {} of group {} is {}: the weights of version {} give logits that are no finite numbers",
            draw.slot, sample.context.request.group_id, token.log_prob, output.version
        )))
    }

    fn record(&mut self, output: &StepOutput) {
        let num_draws = self.scheduler.plan().draws.len();
        let (mut drawn, mut scored) = output.sampled.split_at(num_draws);
        while !drawn.is_empty() {
            let draws = &self.scheduler.plan().draws[num_draws - drawn.len()..];
            let key = draws[0].key;
            let draws = draws.iter().take_while(|draw| draw.key == key);
            let sample = self.samples[key.index()].as_ref().expect("a drawing sample is open");
            let (num_scored, num_own) =
                draws.fold((0, 0), |(s, n), draw| (s + usize::from(sample.earlier_token(draw.slot).is_some()), n + 1));
            let tokens = Drawn { tokens: &drawn[..num_own], scored: &scored[..num_scored], version: output.version };
            (drawn, scored) = (&drawn[num_own..], &scored[num_scored..]);
            self.verify(key, tokens);
        }
    }

    fn verify(&mut self, key: SeqKey, drawn: Drawn<'_>) {
        let sample = self.samples[key.index()].as_mut().expect("a drawing sample is open");
        let verified = sample.verify(drawn);
        self.num_generated_tokens += verified.num_kept as u64;
        if let Some(speculation) = &mut self.speculation {
            let vocab_size = self.model.limits().vocab_size;
            speculation.settle(&sample.proposal, drawn.tokens.len() - 1, verified.num_accepted);
            if verified.finish_reason.is_some() {
                sample.show_new_tokens(speculation, vocab_size);
            }
        }
        self.name_blocks(key);
        self.scheduler.append(key, verified.num_kept);
        if let Some(reason) = verified.finish_reason {
            self.finish(key, reason);
        }
    }

    /// Count the step, of which `drafting` went into looking for drafts; what it cost by rows where all its rows draw.
    fn note_step(&mut self, begin: Duration, drafting: Duration) {
        let elapsed = self.options.clock.now().saturating_sub(begin);
        self.refits.end_step(begin + elapsed, !self.groups.is_empty());
        let plan = self.scheduler.plan();
        let num_rows = plan.num_rows();
        self.num_rows += num_rows as u64;
        self.step_micros += elapsed.as_micros() as u64;
        let (num_drawing, has_prompt_rows) = (plan.draws_by_sequence().count(), plan.draws.len() != num_rows);
        self.widest = self.widest.max(num_drawing);
        if self.scheduler.num_waiting() == 0 && !has_prompt_rows && 4 * num_drawing <= self.widest {
            self.tail_micros += elapsed.as_micros() as u64;
        }
        if self.groups.is_empty() {
            self.widest = 0;
        }
        if let Some(speculation) = self.speculation.as_mut().filter(|_| !has_prompt_rows) {
            speculation.note_step(num_rows, elapsed.saturating_sub(drafting));
        }
    }

    fn finish(&mut self, key: SeqKey, reason: FinishReason) {
        if reason == FinishReason::Paused {
            self.keep_kv(key);
        }
        let num_found = self.scheduler.num_kept_found(key);
        self.scheduler.remove(key);
        let sample = self.samples[key.index()].take().expect("a sample finishes once");
        self.num_reused_tokens += sample.num_reused();
        let group_id = sample.context.request.group_id;
        let group = self.groups.get_mut(&group_id).expect("an open sample's group is open");
        let num_kept = num_found.min(sample.num_old_blocks) * self.options.limits.block_size;
        let sample = sample.finish(reason, num_kept, self.options.clock.now());
        let index = sample.sample_index.0 as usize;
        group.finished[index] = Some(sample);
        group.num_open -= 1;
        self.num_queued -= 1;
        if group.num_open == 0 {
            self.close(group_id);
        }
    }

    fn close(&mut self, group_id: GroupId) {
        let Some(group) = self.groups.remove(&group_id) else { return };
        let samples: Vec<GeneratedSample> = group.finished.into_iter().flatten().collect();
        let whole = rounds::whole(&group.context.request, &samples);
        self.lengths.note(&group.context.request, &whole);
        if let Some(speculation) = &mut self.speculation {
            // What was cut off says nothing of how the next pass goes on behind it, and would take a real pass's place.
            let is_aborted = whole.iter().any(|sample| sample.finish_reason == FinishReason::Abort);
            speculation.close_group(&group.context.request, if is_aborted { &[] } else { &whole });
        }
        drop(whole);
        self.finished.push_back(GroupResult {
            group_id,
            prompt_id: group.context.request.prompt_id,
            worker: self.options.worker.clone(),
            samples,
        });
    }
}

#[cfg(test)]
mod draft_model_tests;
#[cfg(test)]
pub(crate) mod fake_model;
#[cfg(test)]
mod kept_tests;
#[cfg(test)]
mod life_tests;
#[cfg(test)]
mod reuse_tests;
#[cfg(test)]
mod rounds_tests;
#[cfg(test)]
mod sleep_tests;
#[cfg(test)]
mod speculation_tests;
#[cfg(test)]
mod tests;
