//! What user code is told about a sample: one JSON object.

use serde_json::{Value, json};
use temper_proto::ScoreRequest;
use temper_types::PromptContent;

/// A request as it is sent.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Request {
    /// Names the sample in the answer.
    pub(crate) id: String,
    /// The JSON object, on one line and without its end.
    pub(crate) line: String,
}

impl Request {
    /// Everything that a reward may depend on, and the names of the sample.
    pub(crate) fn new(request: &ScoreRequest) -> Self {
        let key = request.key;
        let id = format!("{}-{}-{}-{}", key.prompt_id, key.group_id, key.sample_index, key.epoch);
        let prompt = match &request.prompt {
            PromptContent::Text(text) => json!(text),
            PromptContent::Messages(messages) => json!(messages),
            PromptContent::TokenIds(_) => Value::Null,
        };
        let extra_info = request
            .extra_info
            .as_deref()
            .map(|text| serde_json::from_str::<Value>(text).unwrap_or_else(|_| Value::String(text.to_owned())));
        let object = json!({
            "id": id,
            "data_source": request.data_source,
            "prompt": prompt,
            "response": request.response,
            "ground_truth": request.ground_truth,
            "extra_info": extra_info,
            "finish_reason": request.finish_reason,
            "num_response_tokens": request.num_response_tokens,
            "prompt_id": key.prompt_id,
            "sample_index": key.sample_index,
            "epoch": key.epoch,
        });
        Request { id, line: object.to_string() }
    }
}
