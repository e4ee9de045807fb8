//! From the JSON object of one row to a typed row.

use super::PROMPT_COLUMNS;
use serde_json::{Map, Value};
use temper_types::{ChatMessage, PromptContent, PromptId, PromptRow};

/// What is wrong with a row, and in which column.
#[derive(Debug)]
pub(super) struct Problem {
    pub column: String,
    pub problem: String,
}

fn problem<T>(column: impl Into<String>, problem: impl Into<String>) -> Result<T, Problem> {
    Err(Problem { column: column.into(), problem: problem.into() })
}

/// What a value is, in words.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Turn the known columns of one row into a [`PromptRow`].
pub(super) fn parse(
    fields: &Map<String, Value>,
    prompt_id: PromptId,
    default_source: &str,
) -> Result<PromptRow, Problem> {
    let mut chosen = content(fields, "chosen")?;
    let mut rejected = content(fields, "rejected")?;
    let given = match token_ids(fields)? {
        Some(ids) => Some(ids),
        None => content(fields, "prompt")?,
    };
    let implicit = if given.is_none() { split_common_prefix(&mut chosen, &mut rejected) } else { None };
    let Some(prompt) = given.or(implicit) else {
        return problem("prompt", format!("missing: expected {PROMPT_COLUMNS}"));
    };
    Ok(PromptRow {
        prompt_id,
        data_source: text(fields, "data_source")?.unwrap_or_else(|| default_source.to_owned()),
        prompt,
        ability: text(fields, "ability")?,
        ground_truth: ground_truth(fields)?,
        extra_info: present(fields, "extra_info").map(json_text),
        completion: content(fields, "completion")?,
        chosen,
        rejected,
        label: label(fields)?,
        margin: number(fields, "margin")?,
    })
}

/// The value of a column, or `None` where it is missing or null.
fn present<'a>(fields: &'a Map<String, Value>, column: &str) -> Option<&'a Value> {
    fields.get(column).filter(|value| !value.is_null())
}

fn text(fields: &Map<String, Value>, column: &str) -> Result<Option<String>, Problem> {
    match present(fields, column) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => problem(column, format!("{} where a string is expected", kind(other))),
    }
}

fn label(fields: &Map<String, Value>) -> Result<Option<bool>, Problem> {
    match present(fields, "label") {
        None => Ok(None),
        Some(Value::Bool(label)) => Ok(Some(*label)),
        // Classification datasets number their labels; such a column is no preference.
        Some(_) => Ok(None),
    }
}

fn number(fields: &Map<String, Value>, column: &str) -> Result<Option<f64>, Problem> {
    match present(fields, column) {
        None => Ok(None),
        Some(value) => match value.as_f64() {
            Some(number) => Ok(Some(number)),
            None => problem(column, format!("{} where a number is expected", kind(value))),
        },
    }
}

fn ground_truth(fields: &Map<String, Value>) -> Result<Option<String>, Problem> {
    let nested = match present(fields, "reward_model") {
        None => None,
        Some(Value::Object(reward_model)) => present(reward_model, "ground_truth"),
        Some(other) => {
            let found = kind(other);
            return problem("reward_model", format!("{found} where an object with `ground_truth` is expected"));
        }
    };
    let value = nested.or_else(|| present(fields, "ground_truth")).or_else(|| present(fields, "answer"));
    Ok(value.map(|value| match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }))
}

/// JSON text of a value; a string that already is the JSON text of an object or list stays as it stands.
fn json_text(value: &Value) -> String {
    if let Value::String(text) = value
        && matches!(serde_json::from_str(text), Ok(Value::Object(_) | Value::Array(_)))
    {
        return text.clone();
    }
    value.to_string()
}

fn token_ids(fields: &Map<String, Value>) -> Result<Option<PromptContent>, Problem> {
    let column = "prompt_token_ids";
    let Some(value) = present(fields, column) else { return Ok(None) };
    let Value::Array(items) = value else {
        return problem(column, format!("{} where a list of token ids is expected", kind(value)));
    };
    if items.is_empty() {
        return problem(column, "an empty list: expected at least one token id");
    }
    let id = |(index, item): (usize, &Value)| match item.as_u64().and_then(|id| u32::try_from(id).ok()) {
        Some(id) => Ok(id),
        None => problem(format!("{column}[{index}]"), format!("{item}: expected a token id (0 to 4294967295)")),
    };
    Ok(Some(PromptContent::TokenIds(items.iter().enumerate().map(id).collect::<Result<_, _>>()?)))
}

fn content(fields: &Map<String, Value>, column: &str) -> Result<Option<PromptContent>, Problem> {
    match present(fields, column) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(PromptContent::Text(text.clone()))),
        Some(Value::Array(items)) if items.is_empty() => {
            problem(column, "an empty list: expected at least one chat message")
        }
        Some(Value::Array(items)) => {
            let messages = items.iter().enumerate().map(|(index, item)| message(column, index, item));
            Ok(Some(PromptContent::Messages(messages.collect::<Result<_, _>>()?)))
        }
        Some(other) => problem(column, format!("{} where text or a list of chat messages is expected", kind(other))),
    }
}

fn message(column: &str, index: usize, item: &Value) -> Result<ChatMessage, Problem> {
    let place = format!("{column}[{index}]");
    let Value::Object(fields) = item else {
        return problem(place, format!("{} where a chat message {{role, content}} is expected", kind(item)));
    };
    if let Some((key, _)) = fields.iter().find(|(k, v)| !matches!(k.as_str(), "role" | "content") && !v.is_null()) {
        return problem(format!("{place}.{key}"), "not supported: expected chat messages of role and content only");
    }
    let part = |key: &str| match fields.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => problem(format!("{place}.{key}"), format!("{} where a string is expected", kind(other))),
        None => problem(format!("{place}.{key}"), "missing: a chat message has role and content"),
    };
    Ok(ChatMessage { role: part("role")?, content: part("content")? })
}

/// Cut the messages that both conversations begin with off them. `None` where there is no such pair, nothing in common,
/// or nothing left of one of them.
fn split_common_prefix(
    chosen: &mut Option<PromptContent>,
    rejected: &mut Option<PromptContent>,
) -> Option<PromptContent> {
    let (Some(PromptContent::Messages(chosen)), Some(PromptContent::Messages(rejected))) = (chosen, rejected) else {
        return None;
    };
    let common = chosen.iter().zip(rejected.iter()).take_while(|(a, b)| a == b).count();
    if common == 0 || common == chosen.len() || common == rejected.len() {
        return None;
    }
    rejected.drain(..common);
    Some(PromptContent::Messages(chosen.drain(..common).collect()))
}
