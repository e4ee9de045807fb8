//! The edge between text and token ids.

use crate::ServiceResult;
use temper_types::PromptContent;

/// Tokenizer and chat template, for callers that hold neither.
pub trait TextService: Send + Sync {
    /// Ids of a prompt: text as it stands, messages through the chat template with a generation prompt, ids unchanged.
    ///
    /// # Errors
    /// `InvalidArgument` where the template refuses the messages or the model has no template.
    fn encode_prompt(&self, prompt: &PromptContent) -> ServiceResult<Vec<u32>>;
    /// Ids of a response that follows a prompt, with the end-of-sequence id that ends a demonstration.
    ///
    /// # Errors
    /// As [`TextService::encode_prompt`].
    fn encode_response(&self, response: &PromptContent) -> ServiceResult<Vec<u32>>;
    /// Ids of a piece of text, without special tokens.
    ///
    /// # Errors
    /// `InvalidArgument` where the vocabulary cannot express a character.
    fn encode_text(&self, text: &str) -> ServiceResult<Vec<u32>>;
    /// Text of response ids, special tokens (and thereby the stop token) left out.
    fn decode(&self, token_ids: &[u32]) -> String;
    /// Ids that end a response by default.
    fn stop_token_ids(&self) -> Vec<u32>;
}
