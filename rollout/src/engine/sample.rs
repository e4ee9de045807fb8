//! One response while it grows.

use super::kept::KeptKv;
use super::prefix::Chain;
use super::reuse;
use super::rounds::most_new_tokens;
use crate::speculation::{DraftContext, Proposal, Speculation};
use crate::stop::{StopMatcher, StopState, TokenBytes};
use std::sync::Arc;
use std::time::Duration;
use temper_proto::{GeneratedSample, GroupRequest};
use temper_tensor::{SampleRow, Sampled};
use temper_types::{FinishReason, PolicyVersion, SampleIndex, SampleTimings, uniform53};

/// What all samples of a group share.
pub(super) struct GroupContext {
    pub request: GroupRequest,
    /// Stop token ids, ascending.
    pub stop_ids: Vec<u32>,
    /// The only ids that are drawn, ascending; empty allows all.
    pub allowed_ids: Vec<u32>,
    /// Added to raw logits, by ascending id.
    pub logit_bias: Vec<(u32, f32)>,
    /// Matcher of the stop strings and the bytes to feed it, where there are any.
    pub stop: Option<(StopMatcher, Arc<dyn TokenBytes>)>,
    pub submitted_at: Duration,
}

/// A sample that is queued or running.
pub(super) struct OpenSample {
    pub context: Arc<GroupContext>,
    /// When the first row that it draws from was computed.
    pub started_at: Option<Duration>,
    sample_index: u32,
    /// Tokens of earlier rounds, then those drawn in this one.
    token_ids: Vec<u32>,
    /// How many were drawn in earlier rounds; what follows is of the others.
    num_begun: usize,
    log_probs: Vec<f32>,
    sampled_log_probs: Vec<f32>,
    surviving_mass: Vec<f32>,
    policy_versions: Vec<(PolicyVersion, u32)>,
    stop_state: StopState,
    /// Ids of prompt and response with their occurrences in the response, ascending; only kept for penalties.
    seen: Vec<(u32, u32)>,
    /// Names of the full blocks of known tokens, as far as they were given.
    pub chain: Chain,
    /// What an earlier round kept of its K/V.
    pub kept: Option<KeptKv>,
    /// Blocks of its names that older weights stored, the first ones.
    pub num_old_blocks: usize,
    /// Tokens to verify in the next step.
    pub proposal: Proposal,
    /// Tokens that the drafters know.
    num_observed: usize,
    num_drafted: u32,
    num_accepted: u32,
    /// True while every token so far is the earlier response's, so that its next one may be taken again.
    is_reusing: bool,
    reused: Vec<u8>,
}

/// The draws of one sample in a step.
#[derive(Clone, Copy)]
pub(super) struct Drawn<'a> {
    /// The token after the known ones, then those after each drafted token.
    pub tokens: &'a [Sampled],
    /// The earlier response's tokens at the same places, as far as it reaches.
    pub scored: &'a [Sampled],
    /// The weights that drew.
    pub version: PolicyVersion,
}

/// What a step did to a sample.
pub(super) struct Verified {
    /// Tokens that count, at least one.
    pub num_kept: usize,
    /// Drafted tokens that were drawn.
    pub num_accepted: usize,
    /// Why the response ends, where it does.
    pub finish_reason: Option<FinishReason>,
}

impl OpenSample {
    pub fn new(context: &Arc<GroupContext>, sample_index: u32) -> Self {
        let GroupRequest { sampling, prompt_token_ids, .. } = &context.request;
        let mut seen = Vec::new();
        if sampling.has_penalties() {
            seen.extend(prompt_token_ids.iter().map(|&id| (id, 0)));
            seen.sort_unstable();
            seen.dedup();
        }
        OpenSample {
            context: Arc::clone(context),
            started_at: None,
            sample_index,
            token_ids: Vec::new(),
            num_begun: 0,
            log_probs: Vec::new(),
            sampled_log_probs: Vec::new(),
            surviving_mass: Vec::new(),
            policy_versions: Vec::new(),
            stop_state: StopState::default(),
            seen,
            chain: Chain::default(),
            kept: None,
            num_old_blocks: 0,
            proposal: Proposal::default(),
            num_observed: 0,
            num_drafted: 0,
            num_accepted: 0,
            is_reusing: reuse::earlier_token(context.request.reuse.as_ref(), sample_index as usize, 0).is_some(),
            reused: Vec::new(),
        }
    }

    /// Go on behind the tokens of earlier rounds: penalties and stop strings have seen them.
    pub fn go_on(&mut self, begun: &[u32]) {
        let context = Arc::clone(&self.context);
        self.token_ids.extend_from_slice(begun);
        (self.num_begun, self.num_observed) = (begun.len(), begun.len());
        if context.request.sampling.has_penalties() {
            begun.iter().for_each(|id| count(&mut self.seen, *id));
        }
        if let Some((matcher, bytes)) = &context.stop {
            for id in begun {
                matcher.feed(&mut self.stop_state, bytes.token_bytes(*id));
            }
        }
    }

    /// Index in the group.
    pub fn sample_index(&self) -> usize {
        self.sample_index as usize
    }

    /// The token of the earlier response whose log-prob decides whether it is taken at `slot`; `None` where it is not
    /// the question.
    pub fn earlier_token(&self, slot: usize) -> Option<&u32> {
        let GroupRequest { reuse, prompt_token_ids, .. } = &self.context.request;
        let index = slot - prompt_token_ids.len();
        let reuse = reuse.as_ref().filter(|_| self.is_reusing);
        reuse::earlier_token(reuse, self.sample_index as usize, index)
    }

    /// Tokens taken from the earlier response.
    pub fn num_reused(&self) -> u64 {
        self.reused.iter().map(|flag| u64::from(*flag)).sum()
    }

    /// Number of known tokens, prompt and response.
    pub fn num_tokens(&self) -> usize {
        self.context.request.prompt_token_ids.len() + self.token_ids.len()
    }

    /// What a drafter may know, for a draft of at most `max_tokens`.
    pub fn draft_context(&self, vocab_size: usize, max_tokens: usize) -> DraftContext<'_> {
        DraftContext {
            group_id: self.context.request.group_id,
            sample_index: self.sample_index as usize,
            request: &self.context.request,
            stop_ids: &self.context.stop_ids,
            vocab_size,
            response: &self.token_ids,
            max_tokens,
        }
    }

    /// Show the drafters what they do not know.
    pub fn show_new_tokens(&mut self, speculation: &mut Speculation, vocab_size: usize) {
        let num_new = self.token_ids.len() - self.num_observed;
        if num_new > 0 {
            speculation.observe(&self.draft_context(vocab_size, 0), num_new);
            self.num_observed = self.token_ids.len();
        }
    }

    /// Append the tokens at `slots` of prompt, response and draft to `out`.
    pub fn extend_with_tokens(&self, slots: std::ops::Range<usize>, out: &mut Vec<u32>) {
        let prompt = &self.context.request.prompt_token_ids;
        let split = |slot: usize| (slot.min(prompt.len()), slot.saturating_sub(prompt.len()));
        let ((prompt_start, start), (prompt_end, end)) = (split(slots.start), split(slots.end));
        out.extend_from_slice(&prompt[prompt_start..prompt_end]);
        let known = self.token_ids.len();
        out.extend_from_slice(&self.token_ids[start..end.min(known)]);
        out.extend_from_slice(&self.proposal.draft.token_ids[..end.saturating_sub(known)]);
    }

    /// Append to `out` what penalties have seen after each of the first `num_drafted` drafted tokens; nothing where
    /// there are no penalties.
    pub fn extend_with_seen(&self, num_drafted: usize, out: &mut Vec<Vec<(u32, u32)>>) {
        if !self.context.request.sampling.has_penalties() {
            return;
        }
        for (index, &token_id) in self.proposal.draft.token_ids[..num_drafted].iter().enumerate() {
            let mut seen = if index == 0 { self.seen.clone() } else { out[out.len() - 1].clone() };
            count(&mut seen, token_id);
            out.push(seen);
        }
    }

    /// Ids that penalties read before the first draw of a step.
    pub fn seen(&self) -> &[(u32, u32)] {
        &self.seen
    }

    /// True where what may be drawn depends on the tokens before.
    pub fn has_bad_words(&self) -> bool {
        !self.context.request.sampling.bad_words_ids.is_empty()
    }

    /// Ids that may not be drawn at `slot`, those that would complete a bad word left out.
    pub fn banned_stops(&self, slot: usize) -> &[u32] {
        let GroupRequest { sampling, prompt_token_ids, .. } = &self.context.request;
        let bans_stops = slot - prompt_token_ids.len() < sampling.min_new_tokens as usize;
        if bans_stops { &self.context.stop_ids } else { &[] }
    }

    /// Append the ids that may not be drawn at `slot`, behind known and drafted tokens.
    pub fn extend_with_banned(&self, slot: usize, out: &mut Vec<u32>) {
        let ends_with = |head: &[u32]| {
            head.len() <= slot && head.iter().zip(slot - head.len()..).all(|(id, at)| self.token_at(at) == *id)
        };
        let words = &self.context.request.sampling.bad_words_ids;
        let split = words.iter().filter_map(|word| word.split_last());
        let completing = split.filter(|(_, head)| ends_with(head)).map(|(last, _)| *last);
        out.extend(self.banned_stops(slot).iter().copied().chain(completing));
    }

    fn token_at(&self, slot: usize) -> u32 {
        let prompt = &self.context.request.prompt_token_ids;
        let known = prompt.len() + self.token_ids.len();
        match slot {
            slot if slot < prompt.len() => prompt[slot],
            slot if slot < known => self.token_ids[slot - prompt.len()],
            slot => self.proposal.draft.token_ids[slot - known],
        }
    }

    /// How the token at `slot` is drawn: a function of the request, the seed and the tokens before, of which `seen`
    /// is what penalties read and `banned_ids` what they rule out.
    pub fn draw<'a>(&'a self, slot: usize, seen: &'a [(u32, u32)], banned_ids: &'a [u32]) -> SampleRow<'a> {
        let GroupRequest { sampling, seeds, .. } = &self.context.request;
        SampleRow {
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: sampling.top_k,
            min_p: sampling.min_p,
            repetition_penalty: sampling.repetition_penalty,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            seen,
            logit_bias: &self.context.logit_bias,
            allowed_ids: &self.context.allowed_ids,
            banned_ids,
            uniform: uniform53(seeds[self.sample_index as usize], slot as u64),
        }
    }

    /// Add what was drawn in a step: the token after the known ones, then those after each drafted token, as long as
    /// the drafted ones are what was drawn. A token of the earlier response goes before the drawn one where it is
    /// taken.
    pub fn verify(&mut self, drawn: Drawn<'_>) -> Verified {
        let num_drafted = drawn.tokens.len() - 1;
        let (mut num_kept, mut num_accepted, mut finish_reason) = (0, 0, None);
        for (index, token) in drawn.tokens.iter().enumerate() {
            let taken = self.take_earlier(drawn.scored.get(index), drawn.version);
            let (token, version) = taken.unwrap_or((*token, drawn.version));
            finish_reason = self.push(&token, version);
            num_kept += 1;
            let is_accepted = index < num_drafted && self.proposal.draft.token_ids[index] == token.token_id;
            num_accepted += usize::from(is_accepted);
            if finish_reason.is_some() || !is_accepted {
                break;
            }
        }
        self.num_drafted += num_drafted as u32;
        self.num_accepted += num_accepted as u32;
        Verified { num_kept, num_accepted, finish_reason }
    }

    /// The next token of the earlier response and the version that drew it, where it is taken.
    fn take_earlier(&mut self, scored: Option<&Sampled>, today: PolicyVersion) -> Option<(Sampled, PolicyVersion)> {
        let context = Arc::clone(&self.context);
        let GroupRequest { reuse, seeds, .. } = &context.request;
        let reuse = reuse.as_ref()?;
        let (sample_index, index) = (self.sample_index as usize, self.token_ids.len());
        let noise = (seeds[sample_index], self.num_tokens() as u64);
        let earlier = &reuse.responses[sample_index];
        let scored = scored.filter(|_| self.is_reusing);
        self.is_reusing = scored.is_some_and(|scored| reuse::is_taken(earlier, (index, scored), reuse.lenience, noise));
        self.reused.push(u8::from(self.is_reusing));
        self.is_reusing.then(|| (reuse::as_drawn(earlier, index), reuse::version_of(earlier, index, today)))
    }

    /// Add a drawn token; says why the response ends, where it does.
    fn push(&mut self, drawn: &Sampled, version: PolicyVersion) -> Option<FinishReason> {
        if self.log_probs.is_empty() {
            self.reserve();
        }
        let sampling = &self.context.request.sampling;
        self.token_ids.push(drawn.token_id);
        self.log_probs.push(drawn.log_prob);
        if sampling.is_truncated() {
            self.sampled_log_probs.push(drawn.sampled_log_prob);
            self.surviving_mass.push(drawn.surviving_mass);
        }
        if sampling.has_penalties() {
            count(&mut self.seen, drawn.token_id);
        }
        match self.policy_versions.last_mut() {
            Some((last, num_tokens)) if *last == version => *num_tokens += 1,
            _ => self.policy_versions.push((version, 1)),
        }
        self.finish_reason(drawn.token_id)
    }

    /// Take room for the whole response, so that its later tokens do not allocate.
    fn reserve(&mut self) {
        let sampling = &self.context.request.sampling;
        let room = most_new_tokens(&self.context.request, self.num_begun);
        self.token_ids.reserve(room);
        self.log_probs.reserve(room);
        if self.context.request.reuse.is_some() {
            self.reused.reserve(room);
        }
        if sampling.is_truncated() {
            self.sampled_log_probs.reserve(room);
            self.surviving_mass.reserve(room);
        }
        if sampling.has_penalties() {
            self.seen.reserve(room);
        }
    }

    fn finish_reason(&mut self, token_id: u32) -> Option<FinishReason> {
        let sampling = &self.context.request.sampling;
        let len = self.token_ids.len();
        if self.context.stop_ids.binary_search(&token_id).is_ok() {
            return Some(FinishReason::Stop);
        }
        if let Some((matcher, bytes)) = &self.context.stop {
            let completed = matcher.feed(&mut self.stop_state, bytes.token_bytes(token_id));
            if completed && len >= sampling.min_new_tokens as usize {
                return Some(FinishReason::StopString);
            }
        }
        if len >= sampling.max_new_tokens as usize {
            return Some(FinishReason::Length);
        }
        let round = self.context.request.round_tokens as usize;
        (round > 0 && self.log_probs.len() >= round).then_some(FinishReason::Paused)
    }

    /// The finished sample: what was drawn in this round, over `num_kept` slots of K/V of older weights.
    pub fn finish(mut self, finish_reason: FinishReason, num_kept: usize, now: Duration) -> GeneratedSample {
        let context = &self.context;
        let started_at = self.started_at.unwrap_or(now);
        GeneratedSample {
            sample_index: SampleIndex(self.sample_index),
            seed: context.request.seeds[self.sample_index as usize],
            num_begun: context.request.begun.get(self.sample_index as usize).map_or(0, |b| b.token_ids.len() as u32),
            num_kept: num_kept as u32,
            token_ids: self.token_ids.split_off(self.num_begun),
            reused: self.reused,
            log_probs: self.log_probs,
            sampled_log_probs: self.sampled_log_probs,
            surviving_mass: self.surviving_mass,
            policy_versions: self.policy_versions,
            finish_reason,
            num_drafted: self.num_drafted,
            num_accepted: self.num_accepted,
            timings: SampleTimings {
                queue_seconds: started_at.saturating_sub(context.submitted_at).as_secs_f64(),
                rollout_seconds: now.saturating_sub(started_at).as_secs_f64(),
                reward_seconds: 0.0,
            },
        }
    }
}

/// Count one more occurrence of `id`; `seen` stays ascending.
fn count(seen: &mut Vec<(u32, u32)>, id: u32) {
    match seen.binary_search_by_key(&id, |entry| entry.0) {
        Ok(at) => seen[at].1 += 1,
        Err(at) => seen.insert(at, (id, 1)),
    }
}
