//! Messages of generation.

use super::common::{finish_from_wire, finish_to_wire};
use super::{ConvertError, required, version_from_wire, version_to_wire};
use crate::grpc::v1;
use crate::{
    DraftCounts, GeneratedSample, GroupRequest, GroupResult, NUM_MATCH_BUCKETS, RolloutStats, SpeculationStats,
};
use temper_types::{GroupId, PromptId, SampleIndex, SampleTimings, SamplingParams};

impl From<SamplingParams> for v1::SamplingParams {
    fn from(p: SamplingParams) -> Self {
        v1::SamplingParams {
            temperature: p.temperature,
            top_p: p.top_p,
            top_k: p.top_k,
            min_p: p.min_p,
            repetition_penalty: p.repetition_penalty,
            presence_penalty: p.presence_penalty,
            frequency_penalty: p.frequency_penalty,
            max_new_tokens: p.max_new_tokens,
            min_new_tokens: p.min_new_tokens,
            stop_token_ids: p.stop_token_ids,
            stop: p.stop,
            logit_bias: p.logit_bias.into_iter().collect(),
            allowed_token_ids: p.allowed_token_ids,
            bad_words: p.bad_words,
            bad_words_ids: p.bad_words_ids.into_iter().map(|token_ids| v1::BadWord { token_ids }).collect(),
        }
    }
}

impl From<v1::SamplingParams> for SamplingParams {
    fn from(p: v1::SamplingParams) -> Self {
        SamplingParams {
            temperature: p.temperature,
            top_p: p.top_p,
            top_k: p.top_k,
            min_p: p.min_p,
            repetition_penalty: p.repetition_penalty,
            presence_penalty: p.presence_penalty,
            frequency_penalty: p.frequency_penalty,
            max_new_tokens: p.max_new_tokens,
            min_new_tokens: p.min_new_tokens,
            stop_token_ids: p.stop_token_ids,
            stop: p.stop,
            logit_bias: p.logit_bias.into_iter().collect(),
            allowed_token_ids: p.allowed_token_ids,
            bad_words: p.bad_words,
            bad_words_ids: p.bad_words_ids.into_iter().map(|word| word.token_ids).collect(),
        }
    }
}

impl From<GroupRequest> for v1::GroupRequest {
    fn from(group: GroupRequest) -> Self {
        v1::GroupRequest {
            group_id: group.group_id.0,
            prompt_id: group.prompt_id.0,
            epoch: group.epoch,
            prompt_token_ids: group.prompt_token_ids,
            seeds: group.seeds,
            sampling: Some(group.sampling.into()),
        }
    }
}

impl TryFrom<v1::GroupRequest> for GroupRequest {
    type Error = ConvertError;

    fn try_from(group: v1::GroupRequest) -> Result<Self, ConvertError> {
        Ok(GroupRequest {
            group_id: GroupId(group.group_id),
            prompt_id: PromptId(group.prompt_id),
            epoch: group.epoch,
            prompt_token_ids: group.prompt_token_ids,
            seeds: group.seeds,
            sampling: required(group.sampling, "groups.sampling")?.into(),
        })
    }
}

impl From<GeneratedSample> for v1::GeneratedSample {
    fn from(sample: GeneratedSample) -> Self {
        let run = |(version, num_tokens)| v1::VersionRun { version: Some(version_to_wire(version)), num_tokens };
        v1::GeneratedSample {
            sample_index: sample.sample_index.0,
            seed: sample.seed,
            token_ids: sample.token_ids,
            log_probs: sample.log_probs,
            sampled_log_probs: sample.sampled_log_probs,
            surviving_mass: sample.surviving_mass,
            policy_versions: sample.policy_versions.into_iter().map(run).collect(),
            finish_reason: finish_to_wire(sample.finish_reason),
            num_drafted: sample.num_drafted,
            num_accepted: sample.num_accepted,
            queue_seconds: sample.timings.queue_seconds,
            rollout_seconds: sample.timings.rollout_seconds,
        }
    }
}

impl TryFrom<v1::GeneratedSample> for GeneratedSample {
    type Error = ConvertError;

    fn try_from(sample: v1::GeneratedSample) -> Result<Self, ConvertError> {
        let len = sample.token_ids.len();
        let of_len = |values: Vec<f32>, field| match values.len() {
            n if n == len || n == 0 => Ok(values),
            n => Err(ConvertError::new(field, "as many entries as token_ids, or none", n)),
        };
        let run = |run: v1::VersionRun| Ok((version_from_wire(run.version)?, run.num_tokens));
        let policy_versions = sample.policy_versions.into_iter().map(run).collect::<Result<Vec<_>, ConvertError>>()?;
        Ok(GeneratedSample {
            sample_index: SampleIndex(sample.sample_index),
            seed: sample.seed,
            log_probs: of_len(sample.log_probs, "log_probs")?,
            sampled_log_probs: of_len(sample.sampled_log_probs, "sampled_log_probs")?,
            surviving_mass: of_len(sample.surviving_mass, "surviving_mass")?,
            token_ids: sample.token_ids,
            policy_versions,
            finish_reason: finish_from_wire(sample.finish_reason)?,
            num_drafted: sample.num_drafted,
            num_accepted: sample.num_accepted,
            timings: SampleTimings {
                queue_seconds: sample.queue_seconds,
                rollout_seconds: sample.rollout_seconds,
                reward_seconds: 0.0,
            },
        })
    }
}

impl From<GroupResult> for v1::GroupResult {
    fn from(group: GroupResult) -> Self {
        v1::GroupResult {
            group_id: group.group_id.0,
            prompt_id: group.prompt_id.0,
            worker: group.worker,
            samples: group.samples.into_iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<v1::GroupResult> for GroupResult {
    type Error = ConvertError;

    fn try_from(group: v1::GroupResult) -> Result<Self, ConvertError> {
        Ok(GroupResult {
            group_id: GroupId(group.group_id),
            prompt_id: PromptId(group.prompt_id),
            worker: group.worker,
            samples: group.samples.into_iter().map(TryInto::try_into).collect::<Result<_, _>>()?,
        })
    }
}

fn drafts_to_wire(counts: &[DraftCounts]) -> Vec<v1::DraftCounts> {
    let one = |c: &DraftCounts| v1::DraftCounts {
        num_draft_tokens: c.num_draft_tokens,
        num_accepted_tokens: c.num_accepted_tokens,
    };
    counts.iter().map(one).collect()
}

/// Buckets that this build does not have are left out.
fn drafts_from_wire(counts: &[v1::DraftCounts]) -> [DraftCounts; NUM_MATCH_BUCKETS] {
    let mut out = [DraftCounts::default(); NUM_MATCH_BUCKETS];
    for (to, from) in out.iter_mut().zip(counts) {
        *to = DraftCounts { num_draft_tokens: from.num_draft_tokens, num_accepted_tokens: from.num_accepted_tokens };
    }
    out
}

impl From<RolloutStats> for v1::RolloutStats {
    fn from(s: RolloutStats) -> Self {
        v1::RolloutStats {
            num_steps: s.num_steps,
            num_prefill_tokens: s.num_prefill_tokens,
            num_generated_tokens: s.num_generated_tokens,
            num_preemptions: s.num_preemptions,
            peak_kv_blocks: s.peak_kv_blocks,
            kv_blocks_in_use: s.kv_blocks_in_use,
            num_rows: s.num_rows,
            kv_blocks: s.kv_blocks,
            num_requests_running: s.num_requests_running,
            num_requests_waiting: s.num_requests_waiting,
            prompt_tokens: s.prompt_tokens,
            prefix_cache_queries: s.prefix_cache_queries,
            prefix_cache_hits: s.prefix_cache_hits,
            step_micros: s.step_micros,
            tail_micros: s.tail_micros,
            suffix_drafts: drafts_to_wire(&s.speculation.suffix),
            replay_drafts: drafts_to_wire(&s.speculation.replay),
        }
    }
}

impl From<v1::RolloutStats> for RolloutStats {
    fn from(s: v1::RolloutStats) -> Self {
        RolloutStats {
            num_steps: s.num_steps,
            num_prefill_tokens: s.num_prefill_tokens,
            num_generated_tokens: s.num_generated_tokens,
            num_preemptions: s.num_preemptions,
            peak_kv_blocks: s.peak_kv_blocks,
            kv_blocks_in_use: s.kv_blocks_in_use,
            num_rows: s.num_rows,
            kv_blocks: s.kv_blocks,
            num_requests_running: s.num_requests_running,
            num_requests_waiting: s.num_requests_waiting,
            prompt_tokens: s.prompt_tokens,
            prefix_cache_queries: s.prefix_cache_queries,
            prefix_cache_hits: s.prefix_cache_hits,
            step_micros: s.step_micros,
            tail_micros: s.tail_micros,
            speculation: SpeculationStats {
                suffix: drafts_from_wire(&s.suffix_drafts),
                replay: drafts_from_wire(&s.replay_drafts),
            },
        }
    }
}
