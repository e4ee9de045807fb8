//! Limits of the engine: as a recipe gives them, and resolved against a model.

use crate::speculation::{Replay, SpeculationConfig, Speculative};
use crate::{Error, ModelLimits};
use serde::{Deserialize, Serialize};
use temper_types::WeightFormat;

/// Engine limits as they stand in a recipe. None but `weights`, `replay` and `lenience` changes a bit of any response,
/// where no sample keeps K/V of older weights ([`temper_proto::GroupRequest::keep_kv`]): those are kept in blocks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct EngineConfig {
    /// Most sequences that hold K/V at once.
    pub max_num_seqs: usize,
    /// Most rows of one step, decode and prefill together; more than `max_num_seqs`, so that prefill always advances.
    pub max_batch_tokens: usize,
    /// Most prefill rows of one sequence in one step.
    pub prefill_chunk: usize,
    /// Slots in a K/V block; a multiple of 16.
    pub block_size: usize,
    /// Upper bound of the K/V pool in bytes. Less is taken where `max_num_seqs` sequences of full length need less.
    pub kv_cache_bytes: u64,
    /// Blocks in the K/V pool; 0 derives the number from `kv_cache_bytes`.
    pub num_blocks: usize,
    /// Share of the pool that starting a sequence leaves free for the growth of running ones, in [0, 1).
    pub watermark: f64,
    /// Response tokens for which a starting sequence must find room, or its `max_new_tokens` where that is less.
    pub reserve_tokens: usize,
    /// Most samples queued and running; a submit beyond it is refused.
    pub max_queued_samples: usize,
    /// Keep full blocks for later prompts and turns that begin the same, as long as the pool has room.
    pub prefix_cache: bool,
    /// In which form the engine holds its matrices: "exact", the numbers that train, or "int8", bytes quantised from
    /// every new set of weights, which are another policy: what it draws is off-policy, and needs rollout correction.
    /// Part of a run's identity.
    pub weights: WeightFormat,
    /// Which drafters guess tokens ahead; every guess is verified, so no choice changes a response.
    pub speculative: Speculative,
    /// What a later pass over a prompt has of the pass before: see [`Replay`]. With `lenience` part of what a run is.
    pub replay: Replay,
    /// l of `replay = "lenient"`: an earlier token is taken again with probability min(1, l p_new / p_old); from 1 on,
    /// where more reuses more.
    pub lenience: f32,
    /// Longest draft of one sequence in one step.
    pub max_draft_tokens: usize,
    /// Hugging Face directory of a smaller model of the same vocabulary that drafts, for `speculative = "model"` or
    /// `"auto"`; empty for none.
    pub draft_model: String,
    /// Earlier passes over a prompt whose responses the drafters remember.
    pub history_epochs: usize,
    /// Most response tokens remembered of earlier passes, all prompts together.
    pub history_tokens: usize,
    /// Directory of files in which they are remembered, across runs too; empty for `history/` of the run directory.
    pub history_dir: String,
}

impl Default for EngineConfig {
    fn default() -> Self {
        EngineConfig {
            max_num_seqs: 256,
            max_batch_tokens: 1024,
            prefill_chunk: 512,
            block_size: 32,
            kv_cache_bytes: 512 << 20,
            num_blocks: 0,
            watermark: 0.01,
            reserve_tokens: 256,
            max_queued_samples: 1 << 20,
            prefix_cache: true,
            weights: WeightFormat::Exact,
            speculative: Speculative::Auto,
            replay: Replay::Exact,
            lenience: 1.0,
            max_draft_tokens: 24,
            draft_model: String::new(),
            history_epochs: 2,
            history_tokens: 1 << 23,
            history_dir: String::new(),
        }
    }
}

/// Limits of the scheduler, with every choice made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerLimits {
    /// Most sequences that hold K/V at once.
    pub max_num_seqs: usize,
    /// Most rows of one step.
    pub max_batch_tokens: usize,
    /// Most prefill rows of one sequence in one step.
    pub prefill_chunk: usize,
    /// Slots in a block.
    pub block_size: usize,
    /// Blocks in the pool.
    pub num_blocks: usize,
    /// Blocks that starting a sequence leaves free.
    pub watermark_blocks: usize,
    /// Response tokens for which a starting sequence must find room.
    pub reserve_tokens: usize,
}

impl EngineConfig {
    /// Check every range.
    ///
    /// # Errors
    /// The first value out of range, by key.
    pub fn validate(&self) -> Result<(), Error> {
        let at_least_one = |key, value: usize| check(value >= 1, key, value, "1 or more");
        at_least_one("max_num_seqs", self.max_num_seqs)?;
        at_least_one("prefill_chunk", self.prefill_chunk)?;
        at_least_one("max_queued_samples", self.max_queued_samples)?;
        let more_rows = format!("more than max_num_seqs = {}", self.max_num_seqs);
        check(self.max_batch_tokens > self.max_num_seqs, "max_batch_tokens", self.max_batch_tokens, &more_rows)?;
        let is_multiple = self.block_size > 0 && self.block_size.is_multiple_of(16);
        check(is_multiple, "block_size", self.block_size, "a positive multiple of 16")?;
        check((0.0..1.0).contains(&self.watermark), "watermark", self.watermark, "0 or more, less than 1")?;
        check(self.lenience > 0.0 && self.lenience.is_finite(), "lenience", self.lenience, "more than 0")?;
        let (has_model, speculative) = (!self.draft_model.is_empty(), self.speculative);
        let takes_model = matches!(speculative, Speculative::Model | Speculative::Auto);
        let expected = "none where speculative is not \"model\" or \"auto\"";
        check(takes_model || !has_model, "draft_model", &self.draft_model, expected)?;
        let is_served = has_model || speculative != Speculative::Model;
        check(is_served, "speculative", "model", "a draft_model beside it, or another drafter")
    }

    /// What the drafters need of it.
    pub fn speculation(&self) -> SpeculationConfig {
        SpeculationConfig {
            speculative: self.speculative,
            max_draft_tokens: self.max_draft_tokens,
            history_epochs: self.history_epochs,
            history_tokens: self.history_tokens,
        }
    }

    /// Fix the size of the pool for a model whose block takes `block_bytes` bytes over all layers.
    ///
    /// # Errors
    /// Where a value is out of range or the pool would not hold a single block.
    pub fn resolve(&self, limits: ModelLimits, block_bytes: usize) -> Result<SchedulerLimits, Error> {
        self.validate()?;
        let num_blocks =
            if self.num_blocks > 0 { self.num_blocks } else { self.derive_num_blocks(limits, block_bytes) };
        let needed = format!("at least {block_bytes} bytes, one block of this model");
        check(num_blocks > 0, "kv_cache_bytes", self.kv_cache_bytes, &needed)?;
        check(u32::try_from(num_blocks).is_ok(), "num_blocks", num_blocks, "at most 2^32 - 1 blocks")?;
        Ok(SchedulerLimits {
            max_num_seqs: self.max_num_seqs,
            max_batch_tokens: self.max_batch_tokens,
            prefill_chunk: self.prefill_chunk,
            block_size: self.block_size,
            num_blocks,
            watermark_blocks: (num_blocks as f64 * self.watermark) as usize,
            reserve_tokens: self.reserve_tokens,
        })
    }

    fn derive_num_blocks(&self, limits: ModelLimits, block_bytes: usize) -> usize {
        let affordable = usize::try_from(self.kv_cache_bytes).unwrap_or(usize::MAX) / block_bytes.max(1);
        let useful = self.max_num_seqs.saturating_mul(limits.max_positions.div_ceil(self.block_size));
        affordable.min(useful)
    }
}

fn check(ok: bool, key: &'static str, value: impl ToString, expected: &str) -> Result<(), Error> {
    if ok { Ok(()) } else { Err(Error::InvalidConfig { key, value: value.to_string(), expected: expected.to_owned() }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: ModelLimits =
        ModelLimits { vocab_size: 10, num_drawable_ids: 10, max_positions: 100, kv_dtype: temper_types::DType::F32 };

    /// The keys are public: adding one is a decision, not an accident.
    #[test]
    fn the_keys_are_frozen() {
        let value = serde_json::to_value(EngineConfig::default()).unwrap();
        let keys: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
        let expected = [
            "max_num_seqs",
            "max_batch_tokens",
            "prefill_chunk",
            "block_size",
            "kv_cache_bytes",
            "num_blocks",
            "watermark",
            "reserve_tokens",
            "max_queued_samples",
            "prefix_cache",
            "weights",
            "speculative",
            "replay",
            "lenience",
            "max_draft_tokens",
            "draft_model",
            "history_epochs",
            "history_tokens",
            "history_dir",
        ];
        assert_eq!(keys, expected);
        assert!(serde_json::from_str::<EngineConfig>(r#"{"max_num_seq": 3}"#).is_err());
    }

    #[test]
    fn the_pool_is_bounded_by_bytes_and_by_what_sequences_can_use() {
        let config = EngineConfig { max_num_seqs: 2, block_size: 16, ..EngineConfig::default() };
        assert_eq!(config.resolve(LIMITS, 1000).unwrap().num_blocks, 2 * 7);
        let poor = EngineConfig { kv_cache_bytes: 5_999, ..config.clone() };
        assert_eq!(poor.resolve(LIMITS, 1000).unwrap().num_blocks, 5);
        let fixed = EngineConfig { num_blocks: 3, ..config };
        assert_eq!(fixed.resolve(LIMITS, 1000).unwrap().num_blocks, 3);
    }

    #[test]
    fn values_out_of_range_are_refused_by_key() {
        let broken = |change: fn(&mut EngineConfig)| {
            let mut config = EngineConfig::default();
            change(&mut config);
            config.resolve(LIMITS, 1000).unwrap_err().to_string()
        };
        for (message, key) in [
            (broken(|c| c.max_num_seqs = 0), "max_num_seqs"),
            (broken(|c| c.max_batch_tokens = c.max_num_seqs), "max_batch_tokens"),
            (broken(|c| c.block_size = 24), "block_size"),
            (broken(|c| c.watermark = 1.0), "watermark"),
            (broken(|c| c.kv_cache_bytes = 999), "kv_cache_bytes"),
            (broken(|c| c.lenience = 0.0), "lenience"),
            (broken(|c| (c.speculative, c.draft_model) = (Speculative::Suffix, "small".to_owned())), "draft_model"),
            (broken(|c| c.speculative = Speculative::Model), "speculative"),
        ] {
            assert!(message.starts_with(&format!("rollout.{key} = ")), "{message}");
        }
    }
}
