//! A prompt as it comes out of a dataset.

use crate::PromptId;
use serde::{Deserialize, Serialize};

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant` or another role that the chat template knows.
    pub role: String,
    /// Text of the message.
    pub content: String,
}

/// What a prompt consists of before tokenization.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PromptContent {
    /// Plain text, tokenized as it stands.
    Text(String),
    /// Chat messages, rendered by the chat template with a generation prompt.
    Messages(Vec<ChatMessage>),
    /// Token ids, used as they stand.
    TokenIds(Vec<u32>),
}

/// One row of a prompt dataset, in verl's terms.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptRow {
    /// Row number over all files of the dataset, in file order.
    pub prompt_id: PromptId,
    /// Where the row comes from; rewards and validation metrics are grouped by it.
    pub data_source: String,
    /// The prompt.
    pub prompt: PromptContent,
    /// verl's `ability`, where the row has it.
    pub ability: Option<String>,
    /// verl's `reward_model.ground_truth`, as text (non-string values as JSON).
    pub ground_truth: Option<String>,
    /// verl's `extra_info` as JSON text.
    pub extra_info: Option<String>,
    /// A demonstration (`completion`), where the row has one.
    pub completion: Option<PromptContent>,
    /// The preferred response, where the row has one.
    pub chosen: Option<PromptContent>,
    /// The other response, where the row has one.
    pub rejected: Option<PromptContent>,
    /// Whether `completion` is a desirable response, where the row says so.
    pub label: Option<bool>,
    /// By how much a reward model should prefer `chosen`, where the row says so.
    pub margin: Option<f64>,
}
