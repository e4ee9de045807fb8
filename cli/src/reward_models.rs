//! Assembly of the reward service: verifiers, the user's own code, and reward models from directories or from the
//! trainer.

use crate::env;
use crate::recipe::Recipe;
use crate::teachers::same_tokenizer;
use anyhow::{Context, Result};
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use temper_proto::{ScalarModelService, TokenSequence};
use temper_reward::{
    Launcher, LocalRewardService, ModelScorer, RewardModelConfig, RewardModelSource, Scorer, SequenceScorer,
};
use temper_tensor::Device;
use temper_types::DType;

/// How the processes of external rewards are started.
pub fn launcher() -> Launcher {
    Launcher::this_binary(env::read(env::PATH).unwrap_or_default())
}

/// What reward models are made from.
pub struct RewardModels<'a> {
    /// Holds the reward model that a stage trains.
    pub trainer: Arc<dyn ScalarModelService>,
    /// What computes.
    pub device: &'a Arc<dyn Device>,
    /// The policy's first directory, for its tokenizer.
    pub policy_dir: &'a Path,
    /// Number format of matrix products.
    pub dtype: DType,
}

impl RewardModels<'_> {
    /// The reward service of a recipe.
    ///
    /// # Errors
    /// A reward that cannot be compiled, a model that cannot be loaded, or one with another tokenizer.
    pub fn reward_service(&self, recipe: &Recipe) -> Result<LocalRewardService> {
        let threads = NonZeroUsize::new(recipe.placement.reward_threads).unwrap_or(NonZeroUsize::MIN);
        LocalRewardService::new(Scorer::new(recipe.reward.clone())?, threads)
            .with_external(&launcher())?
            .with_models(|config| self.find(config))
    }

    fn find(&self, config: &RewardModelConfig) -> Result<Arc<dyn SequenceScorer>> {
        match &config.model {
            RewardModelSource::Trained => Ok(Arc::new(Trained(Arc::clone(&self.trainer)))),
            RewardModelSource::Path(dir) => {
                same_tokenizer(dir, self.policy_dir).context("reward model")?;
                Ok(Arc::new(ModelScorer::load(self.device, dir, self.dtype)?))
            }
        }
    }
}

/// The reward model that the trainer holds.
struct Trained(Arc<dyn ScalarModelService>);

impl SequenceScorer for Trained {
    fn scores(&self, sequences: &[(&[u32], &[u32])]) -> Result<Vec<f32>, String> {
        let sequence = |(prompt, response): &(&[u32], &[u32])| TokenSequence {
            prompt_token_ids: prompt.to_vec(),
            response_token_ids: response.to_vec(),
            response_mask: vec![1; response.len()],
        };
        let sequences: Vec<TokenSequence> = sequences.iter().map(sequence).collect();
        self.0.scores(&sequences).map_err(|e| e.to_string())
    }
}
