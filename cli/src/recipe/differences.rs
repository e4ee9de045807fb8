//! Which keys make two recipes two runs.

use super::check::deciding_table;
use super::render::to_table;
use super::{Recipe, check_partial};
use std::collections::{BTreeMap, BTreeSet};
use temper_rollout::Replay;
use toml::{Table, Value};

/// The keys that decide a run's numbers and are not the same in both, each with its values: "`seed` is 5 there and 6
/// here". The contents of files are not compared.
pub fn differences(there: &Recipe, here: &Recipe) -> Vec<String> {
    let (there, here) = (deciding(there), deciding(here));
    let keys: BTreeSet<&String> = there.keys().chain(here.keys()).collect();
    let value = |of: &BTreeMap<String, String>, key: &str| of.get(key).cloned().unwrap_or_else(|| "not set".to_owned());
    let differing = keys.into_iter().filter(|key| there.get(*key) != here.get(*key));
    differing.map(|key| format!("`{key}` is {} there and {} here", value(&there, key), value(&here, key))).collect()
}

/// Every value that decides a number, by dotted key.
fn deciding(recipe: &Recipe) -> BTreeMap<String, String> {
    let mut leaves = BTreeMap::new();
    collect(&deciding_table(recipe), "", &mut leaves);
    leaves.insert("placement.staleness".to_owned(), recipe.placement.staleness.to_string());
    let all = to_table(recipe);
    let of_engine = |key: &str| all.get("engine").and_then(|engine| engine.get(key)).map(Value::to_string);
    let is_lenient = recipe.engine.replay == Replay::Lenient;
    let keeps_kv = check_partial::keeps_kv(recipe);
    let lossy = is_lenient.then_some("lenience").into_iter().chain(keeps_kv.then_some("block_size"));
    for key in ["replay", "weights"].into_iter().chain(lossy) {
        leaves.extend(of_engine(key).map(|value| (format!("engine.{key}"), value)));
    }
    leaves
}

fn collect(table: &Table, prefix: &str, leaves: &mut BTreeMap<String, String>) {
    for (key, value) in table {
        collect_value(value, format!("{prefix}{key}"), leaves);
    }
}

fn collect_value(value: &Value, key: String, leaves: &mut BTreeMap<String, String>) {
    match value {
        Value::Table(inner) => collect(inner, &format!("{key}."), leaves),
        Value::Array(items) if items.iter().any(Value::is_table) => {
            for (index, item) in items.iter().enumerate() {
                collect_value(item, format!("{key}.{index}"), leaves);
            }
        }
        plain => {
            leaves.insert(key, plain.to_string());
        }
    }
}
