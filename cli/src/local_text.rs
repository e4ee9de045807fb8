//! The tokenizer of a model and its chat template, as the service that a run asks.

use anyhow::Result;
use std::path::Path;
use temper_actor::init::{InitConfig, init_tokenizer};
use temper_actor::{ModelConfig, SpecialTokens, Tokenizer};
use temper_proto::{ServiceError, ServiceResult, TextService};
use temper_rollout::TokenByteTable;
use temper_types::{ErrorCode, PromptContent};

/// Tokenizer and chat template behind the service trait.
pub struct LocalText {
    tokenizer: Tokenizer,
    stop_token_ids: Vec<u32>,
}

impl LocalText {
    /// Load the tokenizer of a model directory; `stop_token_ids` are the model's own.
    ///
    /// # Errors
    /// A file that is missing or damaged, by name.
    pub fn load(model_dir: &Path) -> Result<Self> {
        Ok(Self::new(Tokenizer::load(model_dir)?, &ModelConfig::load(model_dir)?))
    }

    /// The tokenizer of the model in a directory, or else of the one that is made with the run.
    ///
    /// # Errors
    /// As [`LocalText::load`]; no model, or one that cannot be made.
    pub fn of(model_dir: Option<&Path>, init: Option<&InitConfig>) -> Result<Self> {
        match (model_dir, init) {
            (Some(path), _) => Self::load(path),
            (None, Some(init)) => Ok(Self::new(init_tokenizer(init)?, &init.model_config()?)),
            (None, None) => anyhow::bail!("the recipe has no model"),
        }
    }

    /// A tokenizer and the model that it is of.
    pub fn new(tokenizer: Tokenizer, config: &ModelConfig) -> Self {
        let mut stop_token_ids: Vec<u32> =
            tokenizer.eos_token_id().into_iter().chain(config.eos_token_ids.iter().copied()).collect();
        stop_token_ids.sort_unstable();
        stop_token_ids.dedup();
        LocalText { tokenizer, stop_token_ids }
    }

    /// Bytes of every id, for stop strings.
    pub fn token_byte_table(&self, vocab_size: usize) -> TokenByteTable {
        let bytes = |id| self.tokenizer.token_bytes(id).unwrap_or_default().to_vec();
        TokenByteTable((0..vocab_size as u32).map(bytes).collect())
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }
}

fn text_error(operation: &'static str) -> impl FnOnce(temper_actor::Error) -> ServiceError {
    move |error| ServiceError::new(ErrorCode::InvalidArgument, "tokenizer", operation, error)
}

impl TextService for LocalText {
    fn encode_prompt(&self, prompt: &PromptContent) -> ServiceResult<Vec<u32>> {
        self.tokenizer.encode_prompt(prompt).map_err(text_error("encode_prompt"))
    }

    fn encode_response(&self, response: &PromptContent) -> ServiceResult<Vec<u32>> {
        let encode =
            |text: &str| self.tokenizer.encode(text, SpecialTokens::Omit).map_err(text_error("encode_response"));
        let mut ids = match response {
            PromptContent::TokenIds(ids) => return Ok(ids.clone()),
            PromptContent::Text(text) => encode(text)?,
            PromptContent::Messages(messages) => {
                encode(&messages.iter().map(|m| m.content.as_str()).collect::<Vec<_>>().join("\n"))?
            }
        };
        ids.extend(self.tokenizer.eos_token_id());
        Ok(ids)
    }

    fn encode_text(&self, text: &str) -> ServiceResult<Vec<u32>> {
        self.tokenizer.encode(text, SpecialTokens::Omit).map_err(text_error("encode_text"))
    }

    fn decode(&self, token_ids: &[u32]) -> String {
        self.tokenizer.decode(token_ids, SpecialTokens::Omit).unwrap_or_default()
    }

    fn stop_token_ids(&self) -> Vec<u32> {
        self.stop_token_ids.clone()
    }
}
