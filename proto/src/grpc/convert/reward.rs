//! Messages of scoring.

use super::common::{finish_from_wire, finish_to_wire};
use super::{ConvertError, count, required};
use crate::ScoreRequest;
use crate::grpc::v1;
use temper_types::{ChatMessage, PromptContent, RewardComponent, RewardFailure, RewardOutcome};

same_fields!(ScoreRequest, v1::ScoreRequest, r => {
    data_source, response, prompt_token_ids, response_token_ids, ground_truth, extra_info
}
to {
    key: Some(r.key.into()),
    prompt: Some(r.prompt.into()),
    num_response_tokens: r.num_response_tokens as u64,
    finish_reason: finish_to_wire(r.finish_reason),
}
try_from {
    key: required(r.key, "key")?.into(),
    prompt: required(r.prompt, "prompt")?.try_into()?,
    num_response_tokens: count(r.num_response_tokens, "num_response_tokens")?,
    finish_reason: finish_from_wire(r.finish_reason)?,
});

same_fields!(ChatMessage, v1::ChatMessage, m => { role, content });
same_fields!(RewardComponent, v1::RewardComponent, c => { name, value });
same_fields!(RewardFailure, v1::RewardFailure, f => { scorer, cause });

impl From<PromptContent> for v1::Prompt {
    fn from(prompt: PromptContent) -> Self {
        use v1::prompt::Content;
        let content = match prompt {
            PromptContent::Text(text) => Content::Text(text),
            PromptContent::Messages(messages) => {
                Content::Messages(v1::ChatMessages { messages: messages.into_iter().map(Into::into).collect() })
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
        Ok(match required(prompt.content, "prompt.content")? {
            Content::Text(text) => PromptContent::Text(text),
            Content::Messages(all) => PromptContent::Messages(all.messages.into_iter().map(Into::into).collect()),
            Content::TokenIds(all) => PromptContent::TokenIds(all.ids),
        })
    }
}

impl From<RewardOutcome> for v1::RewardOutcome {
    fn from(outcome: RewardOutcome) -> Self {
        use v1::reward_outcome::Outcome;
        let outcome = match outcome {
            RewardOutcome::Scored { reward, components } => {
                Outcome::Scored(v1::Scored { reward, components: components.into_iter().map(Into::into).collect() })
            }
            RewardOutcome::Failed(f) => Outcome::Failed(f.into()),
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
                let components = scored.components.into_iter().map(Into::into).collect();
                Ok(RewardOutcome::Scored { reward: scored.reward, components })
            }
            Outcome::Failed(f) => Ok(RewardOutcome::Failed(f.into())),
        }
    }
}
