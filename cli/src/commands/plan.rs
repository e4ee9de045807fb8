//! `temper plan`: where the parts of a run best live.

use crate::commands::bench::calibrate::calibrate;
use crate::commands::common::output::{print, write_json};
use crate::plan::{Calibration, Cluster, Detail, Subject, Workload, search, to_json, to_text};
use crate::planned::{Lengths, Planned};
use crate::usage;
use anyhow::Result;
use std::path::PathBuf;

/// Search placements of a recipe, predict seconds and memory of a step for each, and print them best first, each with
/// the --set flags that select it.
///
/// What is searched: one process, or processes with so many rollout workers and trainer ranks on the same or on other
/// hosts; tensor-parallel ranks of an engine; what trainer ranks divide (zero1, zero2, zero3, hybrid) and how many of
/// them share sequences; tokens of a micro-batch; recomputation; staleness. What does not fit into memory is dropped,
/// with the reason. The seconds come from a measurement of this machine with the
/// recipe's model, of less than a minute: it is made where --calibration names no file. Without --cluster the plan is
/// for this machine.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  temper plan recipes/quickstart.toml --response-tokens 6\n  temper bench calibrate recipes/quickstart.toml --output quickstart.calibration.json\n  temper plan recipes/quickstart.toml --calibration quickstart.calibration.json --cluster docs/examples/cluster.toml\n  temper plan recipes/quickstart.toml --calibration quickstart.calibration.json --json --all\n\ndocs/planning.md has the cluster file key by key, what is predicted how, and what it is worth."
)]
pub struct Plan {
    /// The recipe.
    recipe: PathBuf,
    /// Override a key of the recipe, as in `temper train`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Hosts and devices, as TOML; without it this machine.
    #[arg(long, value_name = "FILE")]
    cluster: Option<PathBuf>,
    /// What `temper bench calibrate` measured; without it the measurement is made now.
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// The stage to plan for, by its name; without it the first that learns from samples.
    #[arg(long, value_name = "NAME")]
    stage: Option<String>,
    #[command(flatten)]
    lengths: Lengths,
    /// Most rows that are printed.
    #[arg(long, value_name = "N", default_value_t = 10)]
    limit: usize,
    /// Print every layout that fits, not only the best of each kind.
    #[arg(long)]
    all: bool,
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

impl Plan {
    /// Plan and print.
    ///
    /// # Errors
    /// A recipe, cluster file or calibration that cannot be (exit code 2), or a measurement that fails.
    pub fn run(self) -> Result<()> {
        if self.limit == 0 {
            return Err(usage("--limit 0: expected 1 or more"));
        }
        let planned = Planned::load((&self.recipe, &self.set), self.stage.as_deref(), &self.lengths)?;
        let cluster = match &self.cluster {
            Some(path) => Cluster::read(path).map_err(|error| usage(cluster_error(&error, path)))?,
            None => this_machine(),
        };
        let cal = match &self.calibration {
            Some(path) => Calibration::read(path).map_err(usage)?,
            None => calibrate(&planned)?,
        };
        if cal.dtype != planned.work.dtype {
            let (was, is) = (cal.dtype, planned.work.dtype);
            return Err(usage(format!("the calibration is of {was}, the recipe computes in {is}: measure again")));
        }
        let work: &Workload = &planned.work;
        let found = search(work, &cal, &cluster);
        let recipe = self.recipe.display().to_string();
        let subject = Subject { recipe: &recipe, work, cal: &cal, cluster: &cluster, search: &found };
        let detail = if self.all { Detail::All } else { Detail::Kinds(self.limit) };
        if self.json { write_json(None, &to_json(&subject, detail)) } else { print(&to_text(&subject, detail)) }
    }
}

/// A cluster file is read as a recipe is; only its name differs.
fn cluster_error(error: &crate::recipe::RecipeError, path: &std::path::Path) -> String {
    match error {
        crate::recipe::RecipeError::Read { source, .. } => {
            format!("cannot read cluster file {}: {source}", path.display())
        }
        other => other.to_string(),
    }
}

fn this_machine() -> Cluster {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Cluster::this_machine(cores, memory_bytes().unwrap_or(u64::MAX))
}

/// Memory of this machine in bytes, where the system tells.
fn memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}
