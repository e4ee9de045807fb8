//! Generation.

use crate::{FleetCounts, ServiceResult, Settled};
use std::time::Duration;
use temper_types::{FinishReason, GroupId, PolicyVersion, PromptId, SampleIndex, SampleTimings, SamplingParams};

/// A prompt of which `seeds.len()` samples are wanted.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GroupRequest {
    /// Unique within the run.
    pub group_id: GroupId,
    /// The prompt.
    pub prompt_id: PromptId,
    /// Pass over the data.
    pub epoch: u64,
    /// Ids of the prompt; at least one.
    pub prompt_token_ids: Vec<u32>,
    /// Seed of each sample's noise; sample i uses `seeds[i]`.
    pub seeds: Vec<u64>,
    /// How to draw.
    pub sampling: SamplingParams,
    /// Served before groups of a lower one. It decides when a response is computed and changes none.
    pub priority: i32,
    /// Earlier responses whose tokens may be taken again.
    pub reuse: Option<Reuse>,
    /// Tokens that each sample may draw now; one that has not ended by then comes back as
    /// [`FinishReason::Paused`]. 0: no limit.
    pub round_tokens: u32,
    /// What there is of each sample already, one for each seed; empty where all begin anew.
    pub begun: Vec<BegunResponse>,
    /// Whether a sample that pauses keeps the K/V of its full blocks, and one that goes on attends to what was kept of
    /// it, whatever weights stored that. Where nothing was kept, by this engine, it is computed anew.
    pub keep_kv: bool,
}

/// The beginning of a response, drawn in earlier rounds. What follows is drawn as if it had never been interrupted:
/// with the noise of its slots, and with penalties, stop strings and `max_new_tokens` over the whole response. Its K/V
/// are computed anew under the weights of the day, unless the prefix cache has them under these very weights, or they
/// were kept ([`GroupRequest::keep_kv`]).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BegunResponse {
    /// Ids drawn so far; may be none.
    pub token_ids: Vec<u32>,
    /// Nothing more is drawn: the sample comes back without tokens. Its ids help drafters.
    pub is_complete: bool,
}

/// Lenient replay of earlier responses to the same prompt: from its beginning on, a token of sample i's earlier
/// response is taken again with probability `min(1, lenience * p_new / p_old)`, until one is not; from there on the
/// sample is drawn as ever.
///
/// This is no sample of the policy: at `lenience` 1 the law of the first token is
/// `min(p_old, p_new) + (1 - sum of min(p_old, p_new)) p_new`, and it moves further towards `p_old` the higher
/// `lenience` is.
///
/// # Source
/// SPEC-RL, arXiv 2509.23232. Departure: reused tokens keep the log-probs and versions of the policy that drew them, so
/// that rollout correction sees whose they are.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Reuse {
    /// l, more than 0.
    pub lenience: f32,
    /// One for each seed.
    pub responses: Vec<EarlierResponse>,
}

/// A response that may be reused. One without tokens stands for none.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct EarlierResponse {
    /// Its ids.
    pub token_ids: Vec<u32>,
    /// log softmax(logits / T) of each id under the policy that drew it.
    pub log_probs: Vec<f32>,
    /// The versions that drew it, as runs: (version, number of tokens).
    pub policy_versions: Vec<(PolicyVersion, u32)>,
}

/// One finished response.
#[derive(Debug, Clone, PartialEq)]
pub struct GeneratedSample {
    /// Index in the group.
    pub sample_index: SampleIndex,
    /// Seed of its noise.
    pub seed: u64,
    /// Tokens of the response that the request brought ([`GroupRequest::begun`]); what follows is of those behind them.
    pub num_begun: u32,
    /// Slots of prompt and response whose K/V older weights had stored when tokens of this answer were drawn
    /// ([`GroupRequest::keep_kv`]). The log-probs of such tokens are of a law that no weights have alone.
    pub num_kept: u32,
    /// Ids, the stop token included.
    pub token_ids: Vec<u32>,
    /// 1 where the token is of an earlier response ([`GroupRequest::reuse`]); empty where there was none.
    pub reused: Vec<u8>,
    /// log softmax(logits / T) of each id after the vocabulary mask; that of a reused token is its earlier one.
    pub log_probs: Vec<f32>,
    /// Log-prob under the law drawn from; empty where nothing was truncated.
    pub sampled_log_probs: Vec<f32>,
    /// Mass that survived truncation; empty where nothing was truncated.
    pub surviving_mass: Vec<f32>,
    /// Version that produced each token, as runs: (version, number of tokens).
    pub policy_versions: Vec<(PolicyVersion, u32)>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Tokens proposed by a drafter: as many as paid by the clock.
    pub num_drafted: u32,
    /// Proposed tokens kept.
    pub num_accepted: u32,
    /// Where its time went.
    pub timings: SampleTimings,
}

/// All samples of one group, by sample index.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupResult {
    /// The group.
    pub group_id: GroupId,
    /// The prompt.
    pub prompt_id: PromptId,
    /// Name of the engine.
    pub worker: String,
    /// Samples in ascending index, all of them.
    pub samples: Vec<GeneratedSample>,
}

/// Classes of drafted tokens by the length of the context that matched: 0..=2, 3..=4, 5..=8, 9..=16, 17..=31, 32 and
/// more tokens.
pub const NUM_MATCH_BUCKETS: usize = 6;

/// Names of the classes: the length of the match.
const MATCH_BUCKETS: [&str; NUM_MATCH_BUCKETS] = ["0-2", "3-4", "5-8", "9-16", "17-31", "32+"];

/// Drafted tokens that were verified, and those of them that were what the sampler drew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct DraftCounts {
    /// Tokens computed as drafts.
    pub num_draft_tokens: u64,
    /// Those that were kept.
    pub num_accepted_tokens: u64,
}

/// Drafted tokens by drafter and match bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct SpeculationStats {
    /// Of the group's suffix drafter.
    pub suffix: [DraftCounts; NUM_MATCH_BUCKETS],
    /// Of the replay of the previous pass.
    pub replay: [DraftCounts; NUM_MATCH_BUCKETS],
    /// Of the draft model.
    pub model: [DraftCounts; NUM_MATCH_BUCKETS],
    /// Drafts of at least one token, all drafters together.
    pub num_drafts: u64,
}

impl SpeculationStats {
    /// Buckets of every drafter, by its name.
    pub fn by_drafter(&self) -> [(&'static str, &[DraftCounts; NUM_MATCH_BUCKETS]); 3] {
        [("suffix", &self.suffix), ("replay", &self.replay), ("model", &self.model)]
    }

    /// All drafters and buckets together.
    pub fn total(&self) -> DraftCounts {
        self.suffix.iter().chain(&self.replay).chain(&self.model).fold(DraftCounts::default(), |sum, counts| {
            DraftCounts {
                num_draft_tokens: sum.num_draft_tokens + counts.num_draft_tokens,
                num_accepted_tokens: sum.num_accepted_tokens + counts.num_accepted_tokens,
            }
        })
    }
}

/// Counters of an engine since its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct RolloutStats {
    /// Engine steps.
    pub num_steps: u64,
    /// Prompt rows computed (shared prefixes count once).
    pub num_prefill_tokens: u64,
    /// Response tokens generated.
    pub num_generated_tokens: u64,
    /// Sequences preempted and recomputed.
    pub num_preemptions: u64,
    /// Most K/V blocks in use at once.
    pub peak_kv_blocks: u64,
    /// K/V blocks in use now.
    pub kv_blocks_in_use: u64,
    /// Rows computed, prompts and drafted tokens included.
    pub num_rows: u64,
    /// K/V blocks in the pool.
    pub kv_blocks: u64,
    /// Samples that hold K/V blocks now.
    pub num_requests_running: u64,
    /// Samples that wait for their first step, or for their next after a preemption, now.
    pub num_requests_waiting: u64,
    /// Prompt tokens of groups that were accepted, once a group.
    pub prompt_tokens: u64,
    /// Tokens looked up in the prefix cache.
    pub prefix_cache_queries: u64,
    /// Those whose K/V it had.
    pub prefix_cache_hits: u64,
    /// Microseconds of steps.
    pub step_micros: u64,
    /// Microseconds of steps in which nothing waited and at most a quarter of the engine's widest step so far ran.
    pub tail_micros: u64,
    /// Tokens taken from earlier responses by lenient replay.
    pub num_reused_tokens: u64,
    /// Number of the version of the weights that the last step ran.
    pub weight_version: u64,
    /// Changes of weights after the first.
    pub num_refits: u64,
    /// Microseconds spent on fetching and loading weights.
    pub refit_micros: u64,
    /// Microseconds between the end of the last step under old weights and the beginning of the first under new ones,
    /// while samples were open.
    pub pause_micros: u64,
    /// Bytes of new weights that were read from memory shared with the trainer.
    pub shared_weight_bytes: u64,
    /// Bytes of new weights that came over the connection to the trainer.
    pub streamed_weight_bytes: u64,
    /// Drafted tokens.
    pub speculation: SpeculationStats,
}

impl RolloutStats {
    /// The counters as a flat table, under the names of vLLM's metrics where it has them.
    pub fn metrics(&self) -> Vec<(String, f64)> {
        let total = self.speculation.total();
        let share = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
        let seconds = |micros: u64| micros as f64 / 1e6;
        let plain = [
            ("num_requests_running", self.num_requests_running as f64),
            ("num_requests_waiting", self.num_requests_waiting as f64),
            ("kv_cache_usage_perc", share(self.kv_blocks_in_use, self.kv_blocks)),
            ("prefix_cache_queries_total", self.prefix_cache_queries as f64),
            ("prefix_cache_hits_total", self.prefix_cache_hits as f64),
            ("spec_decode_num_drafts_total", self.speculation.num_drafts as f64),
            ("spec_decode_num_draft_tokens_total", total.num_draft_tokens as f64),
            ("spec_decode_num_accepted_tokens_total", total.num_accepted_tokens as f64),
            ("num_preemptions_total", self.num_preemptions as f64),
            ("prompt_tokens_total", self.prompt_tokens as f64),
            ("generation_tokens_total", self.num_generated_tokens as f64),
            ("prefill_tokens_total", self.num_prefill_tokens as f64),
            ("reused_prefix_tokens_total", self.num_reused_tokens as f64),
            ("num_steps_total", self.num_steps as f64),
            ("rows_per_step", share(self.num_rows, self.num_steps)),
            ("step_seconds_total", seconds(self.step_micros)),
            ("tail_seconds_total", seconds(self.tail_micros)),
            ("refit_seconds_total", seconds(self.refit_micros)),
            ("pause_seconds_total", seconds(self.pause_micros)),
            ("num_refits_total", self.num_refits as f64),
            ("weight_version", self.weight_version as f64),
            ("refit_shared_bytes_total", self.shared_weight_bytes as f64),
            ("refit_streamed_bytes_total", self.streamed_weight_bytes as f64),
        ];
        let drafts = self.speculation.by_drafter().into_iter().flat_map(|(drafter, buckets)| {
            buckets.iter().zip(MATCH_BUCKETS).flat_map(move |(counts, bucket)| {
                let name = |what: &str| format!("spec_decode_num_{what}_tokens_total/{drafter}/{bucket}");
                [(name("draft"), counts.num_draft_tokens), (name("accepted"), counts.num_accepted_tokens)]
            })
        });
        let drafts = drafts.filter(|(_, count)| *count > 0).map(|(name, count)| (name, count as f64));
        plain.into_iter().map(|(name, value)| (name.to_owned(), value)).chain(drafts).collect()
    }
}

/// Generates. Groups finish in any order; their contents do not depend on it.
pub trait RolloutService: Send + Sync {
    /// Queue groups.
    ///
    /// # Errors
    /// `InvalidArgument` for a bad prompt or sampling parameter, `ResourceExhausted` for a group that can never fit;
    /// nothing of the call is queued then.
    fn submit(&self, groups: Vec<GroupRequest>) -> ServiceResult<()>;
    /// The next finished group, or `None` where none is queued or running.
    ///
    /// # Errors
    /// `DeadlineExceeded` where none finished within `timeout`; the groups go on.
    fn next_group(&self, timeout: Duration) -> ServiceResult<Option<GroupResult>>;
    /// Drop every queued and running group and free its blocks; returns how many groups were dropped.
    ///
    /// # Errors
    /// Where the service cannot answer.
    fn abort_all(&self) -> ServiceResult<usize>;
    /// Serve `version` from now on. In one process the weights are shared and this only proves what they are.
    ///
    /// # Errors
    /// `VersionMismatch` where the engine holds other weights.
    fn set_version(&self, version: PolicyVersion) -> ServiceResult<()>;
    /// Give the memory of K/V back until the next group comes, which wakes the engine. Changes no response. Gives the
    /// number of bytes.
    ///
    /// # Errors
    /// `InvalidArgument` where a group is open.
    fn sleep(&self) -> ServiceResult<u64> {
        Ok(0)
    }
    /// Counters.
    fn stats(&self) -> RolloutStats;
    /// Say what became of samples of groups that were handed on, each once: `step` trained on those that it trained on.
    /// An engine has no use for it; whoever keeps account of what it issued does.
    ///
    /// # Errors
    /// `InvalidArgument` or `Internal` where a sample is not open.
    fn settle(&self, _step: u64, _samples: &[Settled]) -> ServiceResult<()> {
        Ok(())
    }
    /// What many workers did besides answering once; `None` of a single one.
    fn fleet_counts(&self) -> Option<FleetCounts> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names are public: others draw them. vLLM's are its own, without the prefix `vllm:`.
    #[test]
    fn the_names_of_metrics_are_frozen() {
        let mut stats = RolloutStats { num_rows: 9, num_steps: 3, pause_micros: 250_000, ..RolloutStats::default() };
        stats.speculation.num_drafts = 2;
        stats.speculation.model[1] = DraftCounts { num_draft_tokens: 5, num_accepted_tokens: 4 };
        let metrics = stats.metrics();
        let names: Vec<&str> = metrics.iter().map(|(name, _)| name.as_str()).collect();
        let expected = "num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_queries_total \
            prefix_cache_hits_total spec_decode_num_drafts_total spec_decode_num_draft_tokens_total \
            spec_decode_num_accepted_tokens_total num_preemptions_total prompt_tokens_total generation_tokens_total \
            prefill_tokens_total reused_prefix_tokens_total num_steps_total rows_per_step step_seconds_total \
            tail_seconds_total refit_seconds_total pause_seconds_total num_refits_total weight_version \
            refit_shared_bytes_total refit_streamed_bytes_total \
            spec_decode_num_draft_tokens_total/model/3-4 spec_decode_num_accepted_tokens_total/model/3-4";
        assert_eq!(names.join(" "), expected);
        let value = |name: &str| metrics.iter().find(|(other, _)| other == name).expect("it is there").1;
        assert_eq!((value("rows_per_step"), value("pause_seconds_total")), (3.0, 0.25));
        assert_eq!(value("spec_decode_num_accepted_tokens_total"), 4.0);
    }
}
