//! A smaller model of the same vocabulary that drafts for the policy.

use crate::local_text::LocalText;
use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::sync::{Arc, RwLock};
use temper_actor::tokenizer::TOKENIZER_FILE;
use temper_actor::{CheckpointReader, ModelConfig, PackedPolicy};
use temper_rollout::{EngineConfig, LocalRolloutService};
use temper_tensor::Device;
use temper_types::DType;

/// Let the draft model that `engine` names, if any, draft in `service`. `text` is the policy's tokenizer.
///
/// # Errors
/// A model that cannot be read, or one of another vocabulary, by directory.
pub fn attach(
    service: LocalRolloutService,
    (device, dtype): (&Arc<dyn Device>, DType),
    text: Option<&LocalText>,
    engine: &EngineConfig,
) -> Result<LocalRolloutService> {
    if engine.draft_model.is_empty() {
        return Ok(service);
    }
    let dir = Path::new(&engine.draft_model);
    let load = || -> Result<PackedPolicy> {
        let (config, reader) = open(dir, text)?;
        let mut policy = PackedPolicy::load(device, &config, &reader, dtype)?;
        if let Some(text) = text {
            policy.set_masked_ids(text.tokenizer().missing_ids(config.vocab_size));
        }
        Ok(policy)
    };
    let policy = load().with_context(|| format!("the draft model {}", dir.display()))?;
    service
        .with_draft_model(Arc::clone(device), Arc::new(RwLock::new(policy)), engine)
        .with_context(|| format!("the draft model {}", dir.display()))
}

/// Check that the model in `dir` can draft for one with the tokenizer `text` and `vocab_size` ids.
///
/// # Errors
/// A model that cannot be read, or one of another vocabulary.
pub fn check(dir: &Path, text: &LocalText, vocab_size: usize) -> Result<()> {
    let (config, _) = open(dir, Some(text)).with_context(|| format!("the draft model {}", dir.display()))?;
    ensure!(
        config.vocab_size == vocab_size,
        "the draft model {} has {} token ids, the model it drafts for has {vocab_size}: expected one vocabulary",
        dir.display(),
        config.vocab_size
    );
    Ok(())
}

fn open(dir: &Path, text: Option<&LocalText>) -> Result<(ModelConfig, CheckpointReader)> {
    let config = ModelConfig::load(dir)?;
    let reader = CheckpointReader::open(dir)?;
    reader.validate(&config)?;
    if let Some(text) = text.filter(|_| dir.join(TOKENIZER_FILE).is_file()) {
        check_words(text, &LocalText::load(dir)?, config.vocab_size)?;
    }
    Ok((config, reader))
}

/// Every id means the same bytes to both.
fn check_words(target: &LocalText, draft: &LocalText, vocab_size: usize) -> Result<()> {
    let bytes = |text: &LocalText, id| text.tokenizer().token_bytes(id).map(<[u8]>::to_vec).unwrap_or_default();
    let other = (0..vocab_size as u32).find(|id| bytes(target, *id) != bytes(draft, *id));
    ensure!(
        other.is_none(),
        "token id {} means other bytes than in the model it drafts for: expected one vocabulary",
        other.unwrap_or_default()
    );
    Ok(())
}
