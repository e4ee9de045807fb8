//! Responses that are drawn in rounds: how a sample goes on where an earlier round left it, and how a round ends.
//!
//! A sample that goes on ([`temper_proto::BegunResponse`]) is to the scheduler what a preempted one is: it waits with
//! tokens of its own, which are computed anew when it starts. So a response does not depend on how it was cut into
//! rounds, as it does not depend on preemption. Nothing of a round stays in the engine but its cached blocks, whose
//! names begin with the version: under other weights nothing old is found, but what a sample kept itself
//! ([`super::kept`]).

use super::{Engine, SeqKey};
use crate::model::Model;
use std::borrow::Cow;
use std::sync::Arc;
use temper_proto::{GeneratedSample, GroupRequest};
use temper_types::FinishReason;

/// Most tokens that a sample with `num_begun` tokens may draw in the round of `request`.
pub(super) fn most_new_tokens(request: &GroupRequest, num_begun: usize) -> usize {
    let rest = (request.sampling.max_new_tokens as usize).saturating_sub(num_begun);
    if request.round_tokens == 0 { rest } else { rest.min(request.round_tokens as usize) }
}

/// What is wrong with the beginnings of responses that `request` brings, if anything.
pub(super) fn problem(request: &GroupRequest) -> Option<String> {
    let GroupRequest { begun, seeds, reuse, sampling, .. } = request;
    if begun.is_empty() {
        return None;
    }
    if reuse.is_some() {
        return Some("begun: expected no earlier responses to reuse beside a response that goes on".to_owned());
    }
    if begun.len() != seeds.len() {
        return Some(format!("begun: {} beginnings for {} seeds: expected one for each", begun.len(), seeds.len()));
    }
    if begun.iter().all(|response| response.is_complete) {
        return Some("begun: every response is complete: expected one that goes on".to_owned());
    }
    let limit = sampling.max_new_tokens as usize;
    let full = begun.iter().position(|response| !response.is_complete && response.token_ids.len() >= limit)?;
    let found = begun[full].token_ids.len();
    Some(format!("begun: response {full} has {found} of {limit} tokens and is not complete: expected fewer"))
}

/// The whole responses of a group that has ended; none while one of them is paused.
pub(super) fn whole<'a>(request: &GroupRequest, samples: &'a [GeneratedSample]) -> Cow<'a, [GeneratedSample]> {
    if samples.iter().any(|sample| sample.finish_reason == FinishReason::Paused) {
        return Cow::Borrowed(&[]);
    }
    if request.begun.is_empty() {
        return Cow::Borrowed(samples);
    }
    let mut samples = samples.to_vec();
    for (sample, begun) in samples.iter_mut().zip(&request.begun) {
        sample.token_ids = [begun.token_ids.as_slice(), &sample.token_ids].concat();
    }
    Cow::Owned(samples)
}

impl<M: Model> Engine<M> {
    /// Let the sample behind `key`, which has just been queued, go on where it was, and draw no more than its round
    /// allows.
    pub(super) fn go_on(&mut self, key: SeqKey) {
        let Some(sample) = self.samples[key.index()].as_mut() else { return };
        let context = Arc::clone(&sample.context);
        let begun = context.request.begun.get(sample.sample_index());
        if begun.is_some_and(|begun| begun.is_complete) {
            return;
        }
        let begun = begun.map_or(&[][..], |begun| begun.token_ids.as_slice());
        sample.go_on(begun);
        self.scheduler.go_on(key, begun.len(), most_new_tokens(&context.request, begun.len()));
    }

    /// End the samples of a group that were complete when it came.
    pub(super) fn skip_complete(&mut self, request: &GroupRequest, keys: &[SeqKey]) {
        for (key, begun) in keys.iter().zip(&request.begun) {
            if begun.is_complete {
                self.finish(*key, FinishReason::Stop);
            }
        }
    }
}
