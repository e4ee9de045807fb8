//! Messages of generation.

use super::common::{finish_from_wire, finish_to_wire};
use super::{ConvertError, required, version_from_wire, version_to_wire};
use crate::grpc::v1;
use crate::{
    BegunResponse, DraftCounts, EarlierResponse, GeneratedSample, GroupRequest, GroupResult, NUM_MATCH_BUCKETS, Reuse,
    RolloutStats, SpeculationStats,
};
use temper_types::{GroupId, PolicyVersion, PromptId, SampleIndex, SampleTimings, SamplingParams};

same_fields!(SamplingParams, v1::SamplingParams, p => {
    temperature, top_p, top_k, min_p, repetition_penalty, presence_penalty, frequency_penalty, max_new_tokens,
    min_new_tokens, stop_token_ids, stop, allowed_token_ids, bad_words
}
to {
    logit_bias: p.logit_bias.into_iter().collect(),
    bad_words_ids: p.bad_words_ids.into_iter().map(|token_ids| v1::BadWord { token_ids }).collect(),
}
from {
    logit_bias: p.logit_bias.into_iter().collect(),
    bad_words_ids: p.bad_words_ids.into_iter().map(|word| word.token_ids).collect(),
});

same_fields!(GroupRequest, v1::GroupRequest, group => {
    epoch, prompt_token_ids, seeds, priority, round_tokens, keep_kv
}
to {
    group_id: group.group_id.0,
    prompt_id: group.prompt_id.0,
    sampling: Some(group.sampling.into()),
    reuse: group.reuse.map(Into::into),
    begun: group.begun.into_iter().map(Into::into).collect(),
}
try_from {
    group_id: GroupId(group.group_id),
    prompt_id: PromptId(group.prompt_id),
    sampling: required(group.sampling, "groups.sampling")?.into(),
    reuse: group.reuse.map(TryInto::try_into).transpose()?,
    begun: group.begun.into_iter().map(Into::into).collect(),
});

same_fields!(BegunResponse, v1::BegunResponse, begun => { token_ids, is_complete });

same_fields!(Reuse, v1::Reuse, reuse => { lenience }
to { responses: reuse.responses.into_iter().map(Into::into).collect() }
try_from { responses: reuse.responses.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()? });

same_fields!(EarlierResponse, v1::EarlierResponse, response => { token_ids, log_probs }
to { policy_versions: response.policy_versions.into_iter().map(run_to_wire).collect() }
try_from {
    policy_versions: response.policy_versions.into_iter().map(run_from_wire).collect::<Result<_, _>>()?,
});

type VersionRun = (PolicyVersion, u32);

fn run_to_wire((version, num_tokens): VersionRun) -> v1::VersionRun {
    v1::VersionRun { version: Some(version_to_wire(version)), num_tokens }
}

fn run_from_wire(run: v1::VersionRun) -> Result<VersionRun, ConvertError> {
    Ok((version_from_wire(run.version)?, run.num_tokens))
}

/// A value for every token, or none at all.
fn per_token<T>(values: Vec<T>, num_tokens: usize, field: &'static str) -> Result<Vec<T>, ConvertError> {
    match values.len() {
        n if n == num_tokens || n == 0 => Ok(values),
        n => Err(ConvertError::new(field, "as many entries as token_ids, or none", n)),
    }
}

same_fields!(GeneratedSample, v1::GeneratedSample, s => {
    seed, num_begun, num_kept, token_ids, num_drafted, num_accepted
}
to {
    sample_index: s.sample_index.0,
    reused: s.reused,
    log_probs: s.log_probs,
    sampled_log_probs: s.sampled_log_probs,
    surviving_mass: s.surviving_mass,
    policy_versions: s.policy_versions.into_iter().map(run_to_wire).collect(),
    finish_reason: finish_to_wire(s.finish_reason),
    queue_seconds: s.timings.queue_seconds,
    rollout_seconds: s.timings.rollout_seconds,
}
try_from {
    sample_index: SampleIndex(s.sample_index),
    reused: per_token(s.reused, s.token_ids.len(), "reused")?,
    log_probs: per_token(s.log_probs, s.token_ids.len(), "log_probs")?,
    sampled_log_probs: per_token(s.sampled_log_probs, s.token_ids.len(), "sampled_log_probs")?,
    surviving_mass: per_token(s.surviving_mass, s.token_ids.len(), "surviving_mass")?,
    policy_versions: s.policy_versions.into_iter().map(run_from_wire).collect::<Result<_, _>>()?,
    finish_reason: finish_from_wire(s.finish_reason)?,
    timings: SampleTimings {
        queue_seconds: s.queue_seconds,
        rollout_seconds: s.rollout_seconds,
        reward_seconds: 0.0,
    },
});

same_fields!(GroupResult, v1::GroupResult, group => { worker }
to {
    group_id: group.group_id.0,
    prompt_id: group.prompt_id.0,
    samples: group.samples.into_iter().map(Into::into).collect(),
}
try_from {
    group_id: GroupId(group.group_id),
    prompt_id: PromptId(group.prompt_id),
    samples: group.samples.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
});

same_fields!(DraftCounts, v1::DraftCounts, c => { num_draft_tokens, num_accepted_tokens });

/// Buckets that this build does not have are left out.
fn drafts_from_wire(counts: Vec<v1::DraftCounts>) -> [DraftCounts; NUM_MATCH_BUCKETS] {
    let mut out = [DraftCounts::default(); NUM_MATCH_BUCKETS];
    for (to, from) in out.iter_mut().zip(counts) {
        *to = from.into();
    }
    out
}

same_fields!(RolloutStats, v1::RolloutStats, s => {
    num_steps, num_prefill_tokens, num_generated_tokens, num_preemptions, peak_kv_blocks, kv_blocks_in_use, num_rows,
    kv_blocks, num_requests_running, num_requests_waiting, prompt_tokens, prefix_cache_queries, prefix_cache_hits,
    step_micros, tail_micros, num_reused_tokens, weight_version, num_refits, refit_micros, pause_micros,
    shared_weight_bytes, streamed_weight_bytes
}
to {
    num_drafts: s.speculation.num_drafts,
    model_drafts: s.speculation.model.map(Into::into).to_vec(),
    suffix_drafts: s.speculation.suffix.map(Into::into).to_vec(),
    replay_drafts: s.speculation.replay.map(Into::into).to_vec(),
}
from {
    speculation: SpeculationStats {
        num_drafts: s.num_drafts,
        model: drafts_from_wire(s.model_drafts),
        suffix: drafts_from_wire(s.suffix_drafts),
        replay: drafts_from_wire(s.replay_drafts),
    },
});
