//! `json`: the response is a JSON document with the required keys.

use super::pass;
use crate::error::Cause;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// Parameters of `json`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct JsonConfig {
    /// Keys that the top-level object must have; `a.b` looks inside the object at `a`.
    pub required: Vec<String>,
    /// Keys that the top-level object must have with a value of this type.
    pub types: BTreeMap<String, JsonType>,
}

/// The type of a JSON value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum JsonType {
    /// `null`.
    Null,
    /// `true` or `false`.
    Boolean,
    /// Any number.
    Number,
    /// A number without a fraction, written without one.
    Integer,
    /// A string.
    String,
    /// An array.
    Array,
    /// An object.
    Object,
}

impl JsonType {
    fn holds(self, value: &Value) -> bool {
        match self {
            JsonType::Null => value.is_null(),
            JsonType::Boolean => value.is_boolean(),
            JsonType::Number => value.is_number(),
            JsonType::Integer => value.is_i64() || value.is_u64(),
            JsonType::String => value.is_string(),
            JsonType::Array => value.is_array(),
            JsonType::Object => value.is_object(),
        }
    }
}

/// A document nested deeper than the parser's limit of 128 does not count as JSON.
pub(crate) fn verify(config: &JsonConfig, answer: &str) -> Result<f64, Cause> {
    let Ok(document) = serde_json::from_str::<Value>(answer.trim()) else {
        return pass(false);
    };
    let has_keys = config.required.iter().all(|path| look_up(&document, path).is_some());
    let has_types = config.types.iter().all(|(path, kind)| look_up(&document, path).is_some_and(|v| kind.holds(v)));
    pass(has_keys && has_types)
}

fn look_up<'a>(document: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.').try_fold(document, |value, key| value.as_object()?.get(key))
}
