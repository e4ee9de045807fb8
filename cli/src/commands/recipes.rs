//! `temper recipes`: what there is to run.

use crate::commands::common::output::{print, print_json};
use crate::recipe::{Recipe, Source};
use anyhow::Context;
use serde_json::{Value, json};
use std::path::PathBuf;

/// List the recipes of a folder, with what each shows.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  temper recipes --json")]
pub struct Recipes {
    /// The folder.
    #[arg(long, default_value = "recipes")]
    dir: PathBuf,
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

impl Recipes {
    /// List.
    ///
    /// # Errors
    /// A folder that cannot be read.
    pub fn run(self) -> anyhow::Result<()> {
        let entries = std::fs::read_dir(&self.dir).with_context(|| format!("reading {}", self.dir.display()))?;
        let mut paths: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
        paths.retain(|path| path.extension().is_some_and(|e| e == "toml"));
        paths.sort();
        let mut rows = Vec::new();
        for path in &paths {
            let recipe = Source::read(path, &[]).and_then(|source| Recipe::from_source(&source));
            let description = recipe.map_or_else(|error| format!("broken: {error}"), |recipe| recipe.description);
            rows.push(json!({"recipe": path.display().to_string(), "description": description}));
        }
        if self.json {
            return print_json(&rows);
        }
        let text = |row: &Value| {
            format!("{}\n    {}\n", row["recipe"].as_str().unwrap_or(""), row["description"].as_str().unwrap_or(""))
        };
        print(&rows.iter().map(text).collect::<String>())
    }
}
