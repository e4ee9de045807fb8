//! Generation.

use crate::{FleetCounts, ServiceResult, Settled};
use std::time::Duration;
use temper_types::{FinishReason, GroupId, PolicyVersion, PromptId, SampleIndex, SampleTimings, SamplingParams};

/// A prompt of which `seeds.len()` samples are wanted.
#[derive(Debug, Clone, PartialEq)]
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
}

/// One finished response.
#[derive(Debug, Clone, PartialEq)]
pub struct GeneratedSample {
    /// Index in the group.
    pub sample_index: SampleIndex,
    /// Seed of its noise.
    pub seed: u64,
    /// Ids, the stop token included.
    pub token_ids: Vec<u32>,
    /// log softmax(logits / T) of each id after the vocabulary mask.
    pub log_probs: Vec<f32>,
    /// Log-prob under the law drawn from; empty where nothing was truncated.
    pub sampled_log_probs: Vec<f32>,
    /// Mass that survived truncation; empty where nothing was truncated.
    pub surviving_mass: Vec<f32>,
    /// Version that produced each token, as runs: (version, number of tokens).
    pub policy_versions: Vec<(PolicyVersion, u32)>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Tokens proposed by a drafter.
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
}

impl SpeculationStats {
    /// All drafters and buckets together.
    pub fn total(&self) -> DraftCounts {
        self.suffix.iter().chain(&self.replay).fold(DraftCounts::default(), |sum, counts| DraftCounts {
            num_draft_tokens: sum.num_draft_tokens + counts.num_draft_tokens,
            num_accepted_tokens: sum.num_accepted_tokens + counts.num_accepted_tokens,
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
    /// Drafted tokens.
    pub speculation: SpeculationStats,
}

impl RolloutStats {
    /// The counters as a flat table, under the names of vLLM's metrics where it has them.
    pub fn metrics(&self) -> Vec<(&'static str, f64)> {
        let total = self.speculation.total();
        let share = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
        vec![
            ("num_requests_running", self.num_requests_running as f64),
            ("num_requests_waiting", self.num_requests_waiting as f64),
            ("kv_cache_usage_perc", share(self.kv_blocks_in_use, self.kv_blocks)),
            ("prefix_cache_queries", self.prefix_cache_queries as f64),
            ("prefix_cache_hits", self.prefix_cache_hits as f64),
            ("spec_decode_num_draft_tokens", total.num_draft_tokens as f64),
            ("spec_decode_num_accepted_tokens", total.num_accepted_tokens as f64),
            ("num_preemptions", self.num_preemptions as f64),
            ("prompt_tokens", self.prompt_tokens as f64),
            ("generation_tokens", self.num_generated_tokens as f64),
            ("num_steps", self.num_steps as f64),
            ("rows_per_step", share(self.num_rows, self.num_steps)),
            ("step_seconds", self.step_micros as f64 / 1e6),
            ("tail_seconds", self.tail_micros as f64 / 1e6),
        ]
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
