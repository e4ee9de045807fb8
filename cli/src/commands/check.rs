//! `temper check`: what a recipe would do, and whether it can.

use crate::commands::common::output::{print, print_json};
use crate::recipe::{Recipe, Source, check, render};
use crate::usage;
use serde_json::json;
use std::path::PathBuf;

/// Check a recipe without running it: keys, types, batch arithmetic, data, model, reward.
///
/// Says in words what would be done; exits with 2 and one message where it cannot be.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  temper check recipes/quickstart.toml\n  temper check recipes/quickstart.toml --set stage.grpo.num_generations=8 --resolved"
)]
pub struct Check {
    /// The recipe.
    recipe: PathBuf,
    /// Override a key: `seed=7`, `stage.grpo.steps=50` (a stage by its name or index).
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print the resolved recipe, every value with its origin.
    #[arg(long)]
    resolved: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

impl Check {
    /// Check and report.
    ///
    /// # Errors
    /// What is wrong with the recipe.
    pub fn run(self) -> anyhow::Result<()> {
        let source = Source::read(&self.recipe, &self.set).map_err(usage)?;
        let recipe = Recipe::from_source(&source).map_err(usage)?;
        let report = check(&recipe, &source).map_err(usage)?;
        if self.json {
            let object = json!({
                "recipe": self.recipe.display().to_string(), "name": recipe.name, "ok": true,
                "identity": report.identity, "num_rows": report.num_rows, "summary": report.summary,
            });
            print_json(&object)
        } else if self.resolved {
            print(&render(&recipe, &source))
        } else {
            print(&format!("{}\nok\n", report.summary))
        }
    }
}
