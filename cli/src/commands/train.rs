//! `temper train`: run a recipe.

use crate::control::{LocalControl, forget_address};
use crate::kill::KillAt;
use crate::recipe::{CheckReport, Recipe, Source, check, render};
use crate::recovery::{Start, after_loss};
use crate::runtime::{self, Runtime};
use crate::workers::Cluster;
use crate::{Interrupted, usage};
use anyhow::Context;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use temper_controller::{CheckpointInfo, Controller, RunDir, RunOutcome, SystemClock, latest_checkpoint};
use temper_telemetry::{MetricsRow, Progress, read_metrics};

/// A trainer that is lost more often than this ends the run.
const MAX_RECOVERIES: usize = 1000;

/// Run a recipe: the model gets better, and everything that happened is kept in the run directory.
///
/// Ctrl-C ends the run after the current step with a checkpoint (exit code 130); `--resume` goes on from the last
/// complete checkpoint, and the result is the same to the bit as without the interruption.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  temper train recipes/quickstart.toml\n  temper train recipes/quickstart.toml --resume\n  temper train recipes/quickstart.toml --run-dir runs/seed7 --set seed=7 --set stage.grpo.steps=50"
)]
pub struct Train {
    /// The recipe.
    recipe: PathBuf,
    /// Where the run is kept; default: runs/NAME, or runs/NAME-2, ... where that exists.
    #[arg(long)]
    run_dir: Option<PathBuf>,
    /// Go on from the last complete checkpoint of the run directory.
    #[arg(long)]
    resume: bool,
    /// Override a key: `seed=7`, `stage.grpo.steps=50` (a stage by its name or index).
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print the final report as JSON.
    #[arg(long)]
    json: bool,
}

impl Train {
    /// Check, run, report.
    ///
    /// # Errors
    /// A recipe that cannot be run (exit code 2), a failure during the run (1), an interruption (130).
    pub fn run(self) -> anyhow::Result<()> {
        let source = Source::read(&self.recipe, &self.set).map_err(usage)?;
        let recipe = Recipe::from_source(&source).map_err(usage)?;
        let report = check(&recipe, &source).map_err(usage)?;
        let root = self.run_dir(&recipe)?;
        let dir = RunDir::open(&root)?;
        let resume = self.checkpoint(&dir)?;
        // Whoever had the directory before is gone.
        forget_address(&root).context("removing where an earlier run was controlled")?;
        if !self.resume {
            dir.forget_changes()?;
        }
        if resume.is_none() {
            std::fs::write(dir.recipe(), render(&recipe, &source)).context("writing the resolved recipe")?;
        }
        let outcome = self.drive(&recipe, (&source, &report), dir, resume)?;
        self.report(&root, &outcome)?;
        match outcome {
            RunOutcome::Completed { .. } => Ok(()),
            RunOutcome::Interrupted { .. } => Err(anyhow::Error::new(Interrupted)),
        }
    }

    fn run_dir(&self, recipe: &Recipe) -> anyhow::Result<PathBuf> {
        let first = Path::new("runs").join(&recipe.name);
        match &self.run_dir {
            Some(dir) => Ok(dir.clone()),
            None if self.resume || !first.exists() => Ok(first),
            None => {
                let numbered = |n: u32| Path::new("runs").join(format!("{}-{n}", recipe.name));
                let free = (2..10_000).map(numbered).find(|dir| !dir.exists());
                free.ok_or_else(|| usage("runs/ is full of runs of this name: give --run-dir"))
            }
        }
    }

    fn checkpoint(&self, dir: &RunDir) -> anyhow::Result<Option<CheckpointInfo>> {
        let latest = latest_checkpoint(&dir.checkpoints())?;
        match (self.resume, latest) {
            (true, Some(checkpoint)) => Ok(Some(checkpoint)),
            (true, None) => {
                eprintln!("{} has no complete checkpoint yet: starting from the beginning", dir.root().display());
                Ok(None)
            }
            (false, Some(_)) => Err(usage(format!(
                "{} holds a run already: pass --resume to go on with it, or another --run-dir",
                dir.root().display()
            ))),
            (false, None) => Ok(None),
        }
    }

    fn drive(
        &self,
        recipe: &Recipe,
        (source, report): (&Source, &CheckReport),
        dir: RunDir,
        resume: Option<CheckpointInfo>,
    ) -> anyhow::Result<RunOutcome> {
        let model_dir = runtime::initial_model(recipe, dir.root())?;
        let control = Arc::new(LocalControl::default());
        let mut runtime = runtime::start(recipe, (source, report), (&model_dir, dir.root()), &control)?;
        announce(&runtime, &report.summary, dir.root());
        let num_steps = recipe.stages.iter().map(temper_controller::Stage::steps).sum();
        let stop = stop_flag()?;
        let kill_at = KillAt::from_environment(runtime.cluster.as_ref().and_then(Cluster::killer))?;
        let mut start = Start::Checkpoint(resume.map(Box::new));
        for _ in 0..MAX_RECOVERIES {
            let (spec, services) = (runtime.spec.clone(), runtime.services.clone());
            let mut controller = Controller::new(spec, services, dir.clone(), Arc::new(SystemClock::default()))?;
            if let Some(kill_at) = kill_at.clone() {
                controller.observe_phases(Box::new(kill_at));
            }
            let mut progress = Progress::stderr(num_steps);
            controller.observe_steps(Box::new(move |row| {
                if let Err(error) = progress.step(row) {
                    tracing::warn!(%error, "progress cannot be shown");
                }
            }));
            controller.stop_on(Arc::clone(&stop));
            control.drive(controller.control());
            match (start.run(&mut controller), &runtime.cluster) {
                (Err(error), Some(cluster)) if error.is_lost_worker() || error.is_failed_recovery() => {
                    let kept = controller.take_kept();
                    drop(controller);
                    (start, runtime.services.trainer) = after_loss(cluster, (&error, kept), &dir)?;
                    runtime.services.rollout = cluster.rollout();
                    runtime.services.reward = cluster.reward();
                }
                (result, _) => return Ok(result?),
            }
        }
        anyhow::bail!(
            "the trainer was lost {MAX_RECOVERIES} times: giving up; --resume goes on from the last checkpoint"
        )
    }

    fn report(&self, root: &Path, outcome: &RunOutcome) -> anyhow::Result<()> {
        let rows = read_metrics(&root.join("metrics.jsonl"))?;
        let (status, model) = match outcome {
            RunOutcome::Completed { model } => ("completed", model.clone()),
            RunOutcome::Interrupted { checkpoint } => ("interrupted", checkpoint.join("model")),
        };
        if self.json {
            let object = json!({
                "status": status, "run_dir": root, "model": model, "rollouts": root.join("rollouts"),
                "metrics": root.join("metrics.jsonl"), "last": rows.last().map(MetricsRow::to_json),
            });
            println!("{}", serde_json::to_string_pretty(&object)?);
            return Ok(());
        }
        println!("{status}{}", change(&rows));
        println!("  model     {}", model.display());
        println!("  rollouts  {}", root.join("rollouts").display());
        println!("  metrics   {}", root.join("metrics.jsonl").display());
        println!("  look      temper inspect {}", root.display());
        if status == "interrupted" {
            println!("  go on     temper train {} --run-dir {} --resume", self.recipe.display(), root.display());
        }
        Ok(())
    }
}

fn announce(runtime: &Runtime, summary: &str, root: &Path) {
    let info = runtime.device.info();
    eprintln!("{summary}");
    eprintln!("compute: {} ({}), {} threads, {}", info.name, info.instruction_set, info.num_threads, runtime.dtype);
    if let Some(cluster) = &runtime.cluster {
        eprintln!("workers and control: {}", cluster.address());
    }
    eprintln!("run directory: {}", root.display());
}

/// A flag that Ctrl-C and SIGTERM set; a second Ctrl-C ends the process at once.
fn stop_flag() -> anyhow::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&flag))?;
        signal_hook::flag::register(signal, Arc::clone(&flag))?;
    }
    flag.store(false, Ordering::SeqCst);
    Ok(flag)
}

/// How reward and held-out metrics moved, in words.
fn change(rows: &[MetricsRow]) -> String {
    let rewards: Vec<f64> = rows.iter().filter_map(|row| row.get("reward_mean")).collect();
    let mut text = String::new();
    if let (Some(first), Some(last)) = (rewards.first(), rewards.last()) {
        text.push_str(&format!(": mean reward {first:.3} -> {last:.3}"));
    }
    let held_out = |prefix: &str, row: &MetricsRow| {
        let object = row.to_json();
        object.iter().find(|(k, _)| k.starts_with(prefix) && k.contains("/mean@")).and_then(|(_, v)| v.as_f64())
    };
    let first = rows.iter().find_map(|row| held_out("val_start/", row));
    let last = rows.iter().rev().find_map(|row| held_out("val/", row));
    if let (Some(first), Some(last)) = (first, last) {
        text.push_str(&format!(", held-out {first:.3} -> {last:.3}"));
    }
    text
}
