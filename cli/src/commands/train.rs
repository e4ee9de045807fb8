//! `temper train`: run a recipe.

use crate::commands::common::output::print;
use crate::commands::common::shell::quoted;
use crate::control::{LocalControl, forget_address};
use crate::kill::KillAt;
use crate::recipe::{CheckReport, Recipe, Source, check, render};
use crate::recovery::{Start, after_loss};
use crate::resume::require_same_run;
use crate::run_dirs;
use crate::runtime::{self, Runtime};
use crate::workers::Cluster;
use crate::{Interrupted, usage};
use anyhow::Context;
use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io::Write;
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
/// complete checkpoint, and the result is the same to the bit as without the interruption (but where a stage says
/// keep_kv).
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  temper train recipes/quickstart.toml\n  temper train recipes/quickstart.toml --resume\n  temper train recipes/quickstart.toml --run-dir runs/seed7 --set seed=7 --set stage.grpo.steps=50"
)]
pub struct Train {
    /// The recipe.
    recipe: PathBuf,
    /// Where the run is kept; default: runs/NAME, or runs/NAME-2, ... where that exists; with --resume that of them
    /// which was started last.
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
        if let Some(checkpoint) = &resume {
            require_same_run(checkpoint, &report.identity, (&recipe, &dir.recipe()))?;
        }
        // Whoever had the directory before is gone.
        forget_address(&root).context("removing where an earlier run was controlled")?;
        if !self.resume {
            dir.forget_changes()?;
        }
        if resume.is_none() {
            write_recipe(&dir, &render(&recipe, &source))?;
        }
        let outcome = self.drive(&recipe, (&source, &report), dir, resume)?;
        if let Err(error) = print(&self.report(&root, &outcome)?) {
            // The run is what it is, whether or not anybody reads of it.
            tracing::warn!("the report of the run is lost: {error:#}");
        }
        match outcome {
            RunOutcome::Completed { .. } => Ok(()),
            RunOutcome::Interrupted { .. } => Err(anyhow::Error::new(Interrupted)),
        }
    }

    fn run_dir(&self, recipe: &Recipe) -> anyhow::Result<PathBuf> {
        match &self.run_dir {
            Some(dir) => Ok(dir.clone()),
            None if self.resume => Ok(run_dirs::latest(&recipe.name)),
            None => run_dirs::free(&recipe.name),
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
        if let Some(checkpoint) = &resume {
            require_same_run(checkpoint, &runtime.spec.identity, (recipe, &dir.recipe()))?;
            // Settings that change no number may be others than before.
            write_recipe(&dir, &render(recipe, source))?;
        }
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

    /// What goes on with this run, as a shell reads it.
    fn resume_command(&self, root: &Path) -> String {
        let sets: String = self.set.iter().map(|set| format!(" --set {}", quoted(set))).collect();
        format!("temper train {}{sets} --run-dir {} --resume", quoted(&self.recipe), quoted(root))
    }

    fn report(&self, root: &Path, outcome: &RunOutcome) -> anyhow::Result<String> {
        let rows = read_metrics(&root.join("metrics.jsonl"))?;
        let (status, model) = match outcome {
            RunOutcome::Completed { model } => ("completed", model.clone()),
            RunOutcome::Interrupted { checkpoint } => ("interrupted", checkpoint.join("model")),
        };
        if self.json {
            let text = |path: &Path| path.display().to_string();
            let object = json!({
                "status": status, "run_dir": text(root), "model": text(&model),
                "rollouts": text(&root.join("rollouts")), "metrics": text(&root.join("metrics.jsonl")),
                "last": rows.last().map(MetricsRow::to_json),
            });
            return Ok(format!("{object:#}\n"));
        }
        let mut text = format!("{status}{}\n", change(&rows));
        text += &format!("  model     {}\n", model.display());
        text += &format!("  rollouts  {}\n", root.join("rollouts").display());
        text += &format!("  metrics   {}\n", root.join("metrics.jsonl").display());
        text += &format!("  look      temper inspect {}\n", quoted(root));
        if status == "interrupted" {
            text += &format!("  go on     {}\n", self.resume_command(root));
        }
        Ok(text)
    }
}

/// Replace the resolved recipe of the run directory. The directory is locked: nobody else writes there.
fn write_recipe(dir: &RunDir, text: &str) -> anyhow::Result<()> {
    let path = dir.recipe();
    let unfinished = path.with_extension("toml.tmp");
    let written = std::fs::write(&unfinished, text).and_then(|()| std::fs::rename(&unfinished, &path));
    written.with_context(|| format!("writing {}", path.display()))
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
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&flag))?;
        signal_hook::flag::register(signal, Arc::clone(&flag))?;
    }
    flag.store(false, Ordering::SeqCst);
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let say = move || {
        if signals.forever().next().is_some() {
            let text = "the run stops with a checkpoint behind the step under way; a second Ctrl-C ends it at once";
            // Nobody may be listening any more.
            let _ = writeln!(std::io::stderr(), "\n{text}");
        }
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(say)?;
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
