//! Messages of scoring.

use super::common::{finish_from_wire, finish_to_wire};
use super::{ConvertError, count, required};
use crate::ScoreRequest;
use crate::grpc::v1;
use temper_types::{ChatMessage, PromptContent, RewardComponent, RewardFailure, RewardOutcome};

impl From<ScoreRequest> for v1::ScoreRequest {
    fn from(request: ScoreRequest) -> Self {
        v1::ScoreRequest {
            key: Some(request.key.into()),
            data_source: request.data_source,
            prompt: Some(request.prompt.into()),
            response: request.response,
            num_response_tokens: request.num_response_tokens as u64,
            prompt_token_ids: request.prompt_token_ids,
            response_token_ids: request.response_token_ids,
            finish_reason: finish_to_wire(request.finish_reason),
            ground_truth: request.ground_truth,
            extra_info: request.extra_info,
        }
    }
}

impl TryFrom<v1::ScoreRequest> for ScoreRequest {
    type Error = ConvertError;

    fn try_from(request: v1::ScoreRequest) -> Result<Self, ConvertError> {
        Ok(ScoreRequest {
            key: required(request.key, "key")?.into(),
            data_source: request.data_source,
            prompt: required(request.prompt, "prompt")?.try_into()?,
            response: request.response,
            num_response_tokens: count(request.num_response_tokens, "num_response_tokens")?,
            prompt_token_ids: request.prompt_token_ids,
            response_token_ids: request.response_token_ids,
            finish_reason: finish_from_wire(request.finish_reason)?,
            ground_truth: request.ground_truth,
            extra_info: request.extra_info,
        })
    }
}

impl From<PromptContent> for v1::Prompt {
    fn from(prompt: PromptContent) -> Self {
        use v1::prompt::Content;
        let message = |m: ChatMessage| v1::ChatMessage { role: m.role, content: m.content };
        let content = match prompt {
            PromptContent::Text(text) => Content::Text(text),
            PromptContent::Messages(messages) => {
                Content::Messages(v1::ChatMessages { messages: messages.into_iter().map(message).collect() })
            }
            PromptContent::TokenIds(ids) => Content::TokenIds(v1::TokenIds { ids }),
        };
        v1::Prompt { content: Some(content) }
    }
}

impl TryFrom<v1::Prompt> for PromptContent {
    type Error = ConvertError;

    fn try_from(prompt: v1::Prompt) -> Result<Self, ConvertError> {
        use v1::prompt::Content;
        let message = |m: v1::ChatMessage| ChatMessage { role: m.role, content: m.content };
        Ok(match required(prompt.content, "prompt.content")? {
            Content::Text(text) => PromptContent::Text(text),
            Content::Messages(all) => PromptContent::Messages(all.messages.into_iter().map(message).collect()),
            Content::TokenIds(all) => PromptContent::TokenIds(all.ids),
        })
    }
}

impl From<RewardOutcome> for v1::RewardOutcome {
    fn from(outcome: RewardOutcome) -> Self {
        use v1::reward_outcome::Outcome;
        let component = |c: RewardComponent| v1::RewardComponent { name: c.name, value: c.value };
        let outcome = match outcome {
            RewardOutcome::Scored { reward, components } => {
                Outcome::Scored(v1::Scored { reward, components: components.into_iter().map(component).collect() })
            }
            RewardOutcome::Failed(f) => Outcome::Failed(v1::RewardFailure { scorer: f.scorer, cause: f.cause }),
        };
        v1::RewardOutcome { outcome: Some(outcome) }
    }
}

/// A reward that is not finite is refused: it is no reward.
impl TryFrom<v1::RewardOutcome> for RewardOutcome {
    type Error = ConvertError;

    fn try_from(outcome: v1::RewardOutcome) -> Result<Self, ConvertError> {
        use v1::reward_outcome::Outcome;
        match required(outcome.outcome, "outcome")? {
            Outcome::Scored(scored) => {
                let values = scored.components.iter().map(|c| c.value).chain([scored.reward]);
                if let Some(bad) = values.into_iter().find(|v| !v.is_finite()) {
                    return Err(ConvertError::new("reward", "a finite number", bad));
                }
                let component = |c: v1::RewardComponent| RewardComponent { name: c.name, value: c.value };
                let components = scored.components.into_iter().map(component).collect();
                Ok(RewardOutcome::Scored { reward: scored.reward, components })
            }
            Outcome::Failed(f) => Ok(RewardOutcome::Failed(RewardFailure { scorer: f.scorer, cause: f.cause })),
        }
    }
}
