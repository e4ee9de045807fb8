//! `temper algos`: the algorithms by name, and any of them on given arrays.

use super::common::output::{print, write_json};
use crate::usage;
use anyhow::{Context, Result};
use clap::Subcommand;
use schemars::{JsonSchema, schema_for};
use serde_json::{Value, json};
use std::fmt::Write;
use std::path::PathBuf;
use temper_algos::{AdvEstimator, KlType, LossAggMode, LossMode, SftLossType, eval};

/// List the algorithms, or run one on given arrays: the functions that training calls.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  temper algos list\n  temper algos eval vectors/grpo.json --output results.json")]
pub struct Algos {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    List(List),
    Eval(Eval),
}

/// List the algorithms that a recipe can name, by the key that names them.
#[derive(clap::Args)]
struct List {
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

/// Run every case of a document: {"source", "function", "cases": [{"name", "inputs", "params"}]}.
///
/// Out comes {"cases": [{"name", "outputs", "grads"}]}, same order, same keys. A case that the algorithm refuses gives
/// {"error": {"type", "message"}} as its outputs; parameters that a case did not read are named in "unread_params".
#[derive(clap::Args)]
struct Eval {
    /// The document.
    file: PathBuf,
    /// Where the result goes; default: stdout.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The result is JSON with or without this flag.
    #[arg(long)]
    json: bool,
}

impl Algos {
    /// Run the subcommand.
    ///
    /// # Errors
    /// A document that cannot be read or names no known function.
    pub fn run(self) -> Result<()> {
        match self.command {
            Command::List(command) => command.run(),
            Command::Eval(command) => command.run(),
        }
    }
}

/// One value of a key.
struct Entry {
    key: &'static str,
    name: String,
    description: String,
}

impl List {
    fn run(self) -> Result<()> {
        let mut entries = variants::<AdvEstimator>("adv_estimator")?;
        entries.extend(variants::<LossMode>("loss_mode")?);
        entries.extend(variants::<LossAggMode>("loss_agg_mode")?);
        entries.extend(variants::<KlType>("kl_penalty")?);
        entries.extend(variants::<SftLossType>("sft_loss")?);
        if self.json {
            let row = |e: &Entry| json!({"key": e.key, "name": e.name, "description": e.description});
            let mut rows: Vec<Value> = entries.iter().map(row).collect();
            rows.extend(eval::list().iter().map(|e| {
                json!({"key": e.kind, "name": e.name, "description": e.keys, "paper": e.paper, "recipe_keys": e.keys})
            }));
            return print(&format!("{}\n", serde_json::to_string_pretty(&rows)?));
        }
        let mut text = String::new();
        let mut last_key = "";
        for entry in &entries {
            if entry.key != last_key {
                writeln!(text, "{}", entry.key)?;
                last_key = entry.key;
            }
            writeln!(text, "  {:<28} {}", entry.name, entry.description)?;
        }
        writeln!(text, "all algorithms: name, paper (arXiv) or origin, recipe keys")?;
        for entry in eval::list() {
            writeln!(text, "  {:<40} {:<14} {}", entry.name, entry.paper, entry.keys)?;
        }
        print(&text)
    }
}

/// Names and first sentences of an enum's variants, out of its schema, so that the list cannot drift from the code.
fn variants<T: JsonSchema>(key: &'static str) -> Result<Vec<Entry>> {
    let schema = schema_for!(T);
    let list = schema.get("oneOf").and_then(Value::as_array).with_context(|| format!("{key}: no list of variants"))?;
    let entry = |variant: &Value| {
        let name = variant.get("const").or_else(|| variant.pointer("/enum/0")).and_then(Value::as_str)?;
        let description = variant.get("description").and_then(Value::as_str).unwrap_or_default();
        Some(Entry { key, name: name.to_owned(), description: description.replace('\n', " ") })
    };
    list.iter().map(|variant| entry(variant).with_context(|| format!("{key}: a variant without a name"))).collect()
}

impl Eval {
    fn run(self) -> Result<()> {
        let path = self.file.display();
        let text = std::fs::read_to_string(&self.file).map_err(|e| usage(format!("{path}: {e}")))?;
        let document: Value = serde_json::from_str(&text).map_err(|e| usage(format!("{path}: not JSON: {e}")))?;
        let result = eval::eval_file(&document).map_err(|e| usage(format!("{path}: {e}")))?;
        for case in result["cases"].as_array().into_iter().flatten() {
            // A refusal is a result; a case that cannot be read is worth a line where a person looks.
            if case["outputs"]["error"]["type"] == "KeyError" {
                let message = &case["outputs"]["error"]["message"];
                tracing::warn!(file = %path, case = %case["name"], error = %message, "a case that cannot be read");
            }
            if let Some(unread) = case.get("unread_params") {
                tracing::warn!(case = %case["name"], params = %unread, "parameters that the function does not read");
            }
        }
        write_json(self.output.as_deref(), &result)
    }
}
