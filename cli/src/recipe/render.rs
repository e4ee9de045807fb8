//! The resolved recipe as TOML, every value with its origin.

use super::preference_stage::rendered;
use super::{Recipe, Source};
use std::fmt::Write;
use temper_controller::Stage;
use toml::{Table, Value};

/// The recipe with every default filled in, as a recipe that gives the same run; each value names its origin in a
/// comment.
pub fn render(recipe: &Recipe, source: &Source) -> String {
    let mut out = String::from("# The resolved recipe of this run. Behind each value: where it was given.\n");
    write_table(&mut out, &to_table(recipe), "", source);
    out
}

/// The recipe as one table, in the keys that a recipe file has.
pub(super) fn to_table(recipe: &Recipe) -> Table {
    let mut table = Table::new();
    let mut put = |key: &str, value: Result<Value, toml::ser::Error>| {
        table.insert(key.to_owned(), value.expect("a recipe is plain data"));
    };
    put("name", Ok(Value::String(recipe.name.clone())));
    put("description", Ok(Value::String(recipe.description.clone())));
    put("seed", Value::try_from(recipe.seed));
    put("dtype", Value::try_from(recipe.dtype));
    put("rollout_timeout_seconds", Value::try_from(recipe.rollout_timeout_seconds));
    put("model", Value::try_from(&recipe.model));
    put("data", Value::try_from(&recipe.data));
    if !recipe.reward.components.is_empty() {
        put("reward", Value::try_from(&recipe.reward));
    }
    put("engine", Value::try_from(&recipe.engine));
    put("validation", Value::try_from(&recipe.validation));
    put("checkpoint", Value::try_from(&recipe.checkpoint));
    put("placement", Value::try_from(&recipe.placement));
    put("stage", Ok(Value::Array(recipe.stages.iter().map(stage_table).collect())));
    table
}

fn stage_table(stage: &Stage) -> Value {
    let loss = match stage {
        Stage::Preference(stage) => Some(rendered(&stage.objective, false)),
        Stage::OnlinePreference(stage) => Some(rendered(&stage.objective, true)),
        _ => None,
    };
    let (kind, value) = match stage {
        Stage::Preference(stage) => ("dpo", Value::try_from(stage)),
        Stage::OnlinePreference(stage) => ("online_dpo", Value::try_from(&stage.policy)),
        Stage::Sft(stage) => ("sft", Value::try_from(stage)),
        Stage::Policy(stage) => ("grpo", Value::try_from(stage)),
        Stage::Distill(stage) => ("distill", Value::try_from(stage)),
        Stage::RewardModel(stage) => ("reward_model", Value::try_from(stage)),
    };
    let mut value = value.expect("a stage is plain data");
    if let Value::Table(table) = &mut value {
        table.insert("kind".to_owned(), Value::String(kind.to_owned()));
        if let Some((kind, Some(settings))) = loss {
            table.remove("algorithm");
            table.insert("kind".to_owned(), Value::String(kind.to_owned()));
            table.insert("loss".to_owned(), settings);
        }
    }
    value
}

/// Plain values first, then tables, then arrays of tables, as TOML wants them.
fn write_table(out: &mut String, table: &Table, prefix: &str, source: &Source) {
    let path = |key: &str| if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") };
    for (key, value) in table.iter().filter(|(_, v)| !is_nested(v)) {
        // Writing to a String cannot fail.
        let _infallible = writeln!(out, "{} = {value}  # {}", quoted(key), source.exact_origin(&path(key)));
    }
    for (key, value) in table {
        match value {
            Value::Table(inner) => {
                let _infallible = writeln!(out, "\n[{}]", header(&path(key)));
                write_table(out, inner, &path(key), source);
            }
            Value::Array(items) if is_nested(value) => {
                for (index, item) in items.iter().filter_map(Value::as_table).enumerate() {
                    let _infallible = writeln!(out, "\n[[{}]]", header(&path(key)));
                    write_table(out, item, &format!("{}.{index}", path(key)), source);
                }
            }
            _ => {}
        }
    }
}

fn is_nested(value: &Value) -> bool {
    match value {
        Value::Table(_) => true,
        Value::Array(items) => !items.is_empty() && items.iter().all(Value::is_table),
        _ => false,
    }
}

/// A dotted path without the indices of arrays, as a header has it.
fn header(path: &str) -> String {
    let parts = path.split('.').filter(|part| part.parse::<usize>().is_err());
    parts.map(quoted).collect::<Vec<_>>().join(".")
}

fn quoted(key: &str) -> String {
    let is_bare = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    if is_bare { key.to_owned() } else { Value::String(key.to_owned()).to_string() }
}
