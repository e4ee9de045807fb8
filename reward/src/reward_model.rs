//! Reward models as components: a sequence classifier with one label scores prompt and response, at the last token.
//!
//! A model reads the ids that were generated, never text that is tokenized again, so it must have the policy's
//! tokenizer. What it cannot score is a failure of the sample, never a score of 0.

use crate::Error;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use temper_actor::{CheckpointReader, Head, ModelConfig, PackedPolicy, TrainArena, TrainBatch};
use temper_tensor::{DType, Device};

/// Tokens (prompts and responses) that pass through a model together. Changes no bit of a score.
const MICRO_BATCH_TOKENS: usize = 4096;

/// Parameters of a `reward_model` component.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RewardModelConfig {
    /// Which model.
    pub model: RewardModelSource,
}

/// Where a reward model comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RewardModelSource {
    /// The one that an earlier stage of this run trained.
    Trained,
    /// A Hugging Face directory of a sequence classifier with one label and the policy's tokenizer.
    Path(PathBuf),
}

/// Scores sequences of ids: (prompt, response) each.
pub trait SequenceScorer: Send + Sync {
    /// One score per sequence, finite or not.
    ///
    /// # Errors
    /// Why none of them can be scored, in words.
    fn scores(&self, sequences: &[(&[u32], &[u32])]) -> Result<Vec<f32>, String>;
}

/// A reward model from a directory, frozen.
#[derive(Debug)]
pub struct ModelScorer {
    policy: PackedPolicy,
    arena: Mutex<TrainArena>,
}

impl ModelScorer {
    /// Load and pack a model directory; its head is computed in f32.
    ///
    /// # Errors
    /// A file that is missing or damaged, by name; a model with another head.
    pub fn load(device: &Arc<dyn Device>, dir: &Path, dtype: DType) -> Result<Self, Error> {
        let fail = |cause: temper_actor::Error| Error::Model { path: dir.to_path_buf(), cause: cause.to_string() };
        let config = Self::config(dir)?;
        let reader = CheckpointReader::open(dir).map_err(fail)?;
        reader.validate(&config).map_err(fail)?;
        let policy = PackedPolicy::load(device, &config, &reader, dtype).map_err(fail)?;
        Ok(ModelScorer { policy, arena: Mutex::default() })
    }

    /// The configuration of a reward model's directory.
    ///
    /// # Errors
    /// As [`ModelScorer::load`], before any weight is read.
    pub fn config(dir: &Path) -> Result<ModelConfig, Error> {
        let fail = |cause: String| Error::Model { path: dir.to_path_buf(), cause };
        let config = ModelConfig::load(dir).map_err(|e| fail(e.to_string()))?;
        if config.head == Head::SequenceScore {
            return Ok(config);
        }
        let expected = format!("{}{}", config.family.class_prefix(), Head::SequenceScore.class_suffix());
        Err(fail(format!("has a head for {:?}: expected the architecture {expected} with one label", config.head)))
    }

    fn check(&self, (prompt, response): (&[u32], &[u32])) -> Result<(), String> {
        let config = self.policy.config();
        let (len, longest) = (prompt.len() + response.len(), config.max_position_embeddings);
        if len == 0 || len > longest {
            return Err(format!("{len} tokens: the reward model takes 1 to {longest}"));
        }
        match prompt.iter().chain(response).find(|id| **id as usize >= config.vocab_size) {
            Some(id) => Err(format!("token id {id} is outside the reward model's vocabulary of {}", config.vocab_size)),
            None => Ok(()),
        }
    }
}

impl SequenceScorer for ModelScorer {
    fn scores(&self, sequences: &[(&[u32], &[u32])]) -> Result<Vec<f32>, String> {
        sequences.iter().try_for_each(|sequence| self.check(*sequence))?;
        let mut arena = self.arena.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut out, mut batch) = (Vec::with_capacity(sequences.len()), TrainBatch::new());
        for (prompt, response) in sequences {
            let ids = [*prompt, *response].concat();
            if batch.num_rows() > 0 && batch.num_rows() + ids.len() > MICRO_BATCH_TOKENS {
                out.extend(self.policy.values_only(&std::mem::take(&mut batch), &mut arena));
            }
            let positions: Vec<u32> = (0..ids.len() as u32).collect();
            batch.push_values(&ids, &positions, ids.len() - 1..ids.len());
        }
        if batch.num_rows() > 0 {
            out.extend(self.policy.values_only(&batch, &mut arena));
        }
        Ok(out)
    }
}
