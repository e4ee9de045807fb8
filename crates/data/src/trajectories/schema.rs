//! The columns of a trajectory, their types and the schema's version.

use arrow_schema::{DataType, Field, Fields, Schema, SchemaRef};
use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

/// Version of [`schema`]; raised with every change of a column.
pub const SCHEMA_VERSION: &str = "2";

/// Key of the schema's metadata under which [`SCHEMA_VERSION`] stands.
pub const SCHEMA_VERSION_KEY: &str = "temper.trajectory_version";

/// The schema of the trajectory dataset. Every column may be null; a per-token list has one entry per
/// `response_token_ids` and is null where the quantity was not computed.
///
/// | column | holds |
/// |---|---|
/// | `run`, `step`, `prompt_id`, `group_id`, `sample_index`, `epoch` | which sample |
/// | `data_source`, `prompt`, `response` | texts; `prompt` is null where only its ids are known |
/// | `prompt_format` | `text`, `messages` (`prompt` is their JSON text) or `token_ids` |
/// | `prompt_token_ids`, `response_token_ids`, `response_mask` | token ids, and 1 where a token is trained on |
/// | `response_reused` | 1 where a token was reused from an earlier response (lossy); null where none could be |
/// | `rollout_log_probs` to `returns` | per-token quantities |
/// | `reward`, `reward_components` | null where scoring failed or has not taken place |
/// | `reward_error_scorer`, `reward_error` | which verifier failed, and why |
/// | `policy_version`, `policy_version_hashes` | number per token, and the hash of each number |
/// | `queue_seconds`, `rollout_seconds`, `reward_seconds`, `worker` | may differ between equal runs |
pub fn schema() -> SchemaRef {
    static SCHEMA: LazyLock<SchemaRef> = LazyLock::new(build);
    SCHEMA.clone()
}

fn build() -> SchemaRef {
    let text = |name| Field::new(name, DataType::Utf8, true);
    let number = |name| Field::new(name, DataType::UInt64, true);
    let count = |name| Field::new(name, DataType::UInt32, true);
    let seconds = |name| Field::new(name, DataType::Float64, true);
    let list = |name, item| Field::new(name, DataType::new_list(item, true), true);
    let floats = |name| Field::new(name, DataType::new_list(DataType::Float32, true), true);
    let fields = vec![
        text("run"),
        number("step"),
        number("prompt_id"),
        number("group_id"),
        count("sample_index"),
        number("epoch"),
        text("data_source"),
        text("prompt"),
        text("prompt_format"),
        text("response"),
        list("prompt_token_ids", DataType::UInt32),
        list("response_token_ids", DataType::UInt32),
        list("response_mask", DataType::UInt8),
        list("response_reused", DataType::UInt8),
        floats("rollout_log_probs"),
        floats("sampled_log_probs"),
        floats("surviving_mass"),
        floats("old_log_probs"),
        floats("ref_log_probs"),
        floats("values"),
        floats("advantages"),
        floats("returns"),
        Field::new("reward", DataType::Float64, true),
        list("reward_components", DataType::Struct(component_fields())),
        text("reward_error_scorer"),
        text("reward_error"),
        text("ground_truth"),
        text("extra_info"),
        text("finish_reason"),
        list("policy_version", DataType::UInt64),
        list("policy_version_hashes", DataType::Struct(version_fields())),
        count("staleness"),
        number("seed"),
        text("worker"),
        seconds("queue_seconds"),
        seconds("rollout_seconds"),
        seconds("reward_seconds"),
        count("num_drafted"),
        count("num_accepted"),
    ];
    let metadata = HashMap::from([(SCHEMA_VERSION_KEY.to_owned(), SCHEMA_VERSION.to_owned())]);
    Arc::new(Schema::new_with_metadata(fields, metadata))
}

/// One reward component.
pub(super) fn component_fields() -> Fields {
    Fields::from(vec![Field::new("name", DataType::Utf8, true), Field::new("value", DataType::Float64, true)])
}

/// One policy version.
pub(super) fn version_fields() -> Fields {
    Fields::from(vec![Field::new("number", DataType::UInt64, true), Field::new("hash", DataType::Utf8, true)])
}
