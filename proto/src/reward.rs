//! Scoring.

use crate::ServiceResult;
use temper_types::{FinishReason, PromptContent, RewardOutcome, Sample, SampleKey};

/// One response to score.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoreRequest {
    /// Which sample it is.
    pub key: SampleKey,
    /// Where the prompt comes from.
    pub data_source: String,
    /// The prompt as the dataset has it.
    pub prompt: PromptContent,
    /// The response as text, the stop token left out.
    pub response: String,
    /// Length of the response in tokens.
    pub num_response_tokens: usize,
    /// Ids of the prompt, for reward models.
    pub prompt_token_ids: Vec<u32>,
    /// Ids of the response, the stop token included, for reward models.
    pub response_token_ids: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// The expected answer.
    pub ground_truth: Option<String>,
    /// Dataset's extra information as JSON text.
    pub extra_info: Option<String>,
}

impl ScoreRequest {
    /// The response of a sample.
    pub fn of(sample: &Sample) -> Self {
        ScoreRequest {
            key: sample.key(),
            data_source: sample.data_source.clone(),
            prompt: sample.prompt.clone(),
            response: sample.response.clone(),
            num_response_tokens: sample.response_token_ids.len(),
            prompt_token_ids: sample.prompt_token_ids.clone(),
            response_token_ids: sample.response_token_ids.clone(),
            finish_reason: sample.finish_reason,
            ground_truth: sample.ground_truth.clone(),
            extra_info: sample.extra_info.clone(),
        }
    }
}

/// Scores responses.
pub trait RewardService: Send + Sync {
    /// Score every request; outcomes stand in the requests' order. A sample that cannot be scored is a
    /// [`RewardOutcome::Failed`] in its place, not an error of the call.
    ///
    /// # Errors
    /// Where the service itself cannot answer.
    fn score(&self, requests: &[ScoreRequest]) -> ServiceResult<Vec<RewardOutcome>>;
}
