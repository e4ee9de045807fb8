//! `temper inspect`: what happened in a run.

mod groups;
mod metrics;

use super::common::output::{print, print_json};
use crate::usage;
use anyhow::Result;
use serde_json::{Map, Value, json};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use temper_controller::{CheckpointInfo, list_checkpoints, verify_checkpoint};
use temper_data::summary::{StepSummary, summarize};
use temper_data::trajectories::{Dataset, export_parquet};
use temper_telemetry::read_metrics;
use temper_types::{GroupId, Sample, Step};

/// Summarise a run: metrics by stage, checkpoints, generated responses; and show groups of responses.
///
/// Without --step the groups of the last step are shown. A directory that `generate --format arrow` or `eval --output`
/// wrote can be inspected too.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  temper inspect runs/quickstart\n  temper inspect runs/quickstart --step 120 --samples 3\n  temper inspect runs/quickstart --group 17\n  temper inspect runs/quickstart --verify --parquet rollouts.parquet\n  temper inspect runs/quickstart --json"
)]
pub struct Inspect {
    /// The run directory, or a directory of trajectories.
    run: PathBuf,
    /// Show groups of this step.
    #[arg(long, value_name = "N")]
    step: Option<u64>,
    /// Show this group.
    #[arg(long, value_name = "G")]
    group: Option<u64>,
    /// Most groups that are shown, and most responses of each.
    #[arg(long, value_name = "K", default_value_t = 2)]
    samples: usize,
    /// Check every file of every checkpoint against its manifest.
    #[arg(long)]
    verify: bool,
    /// Export all trajectories to a Parquet file.
    #[arg(long, value_name = "FILE")]
    parquet: Option<PathBuf>,
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

/// A checkpoint, and what is wrong with it.
struct Checkpoint {
    info: CheckpointInfo,
    /// `None` where it was not checked.
    problem: Option<Result<(), String>>,
}

/// Everything that is shown.
struct Findings<'a> {
    stages: Vec<metrics::StageTrend>,
    checkpoints: Vec<Checkpoint>,
    steps: Vec<StepSummary>,
    groups: Vec<Vec<&'a Sample>>,
    parquet: Option<(PathBuf, u64)>,
}

impl Inspect {
    /// Read the run and print.
    ///
    /// # Errors
    /// A directory that is no run (exit code 2); a damaged file; with --verify, a damaged checkpoint.
    pub fn run(self) -> Result<()> {
        let rollouts = self.rollouts()?;
        let metrics_path = self.run.join("metrics.jsonl");
        let rows = if metrics_path.is_file() { read_metrics(&metrics_path)? } else { Vec::new() };
        let samples = self.read_samples(rollouts.as_deref())?;
        let findings = Findings {
            stages: metrics::by_stage(&rows),
            checkpoints: self.checkpoints()?,
            steps: summarize(&samples),
            groups: self.choose(&samples)?,
            parquet: self.export(rollouts.as_deref())?,
        };
        if self.json {
            print_json(&self.to_json(&findings))?
        } else {
            print(&self.describe(&findings)?)?
        }
        let damaged = findings.checkpoints.iter().find_map(|c| c.problem.as_ref()?.as_ref().err());
        damaged.map_or(Ok(()), |problem| Err(anyhow::anyhow!("{problem}")))
    }

    /// The directory of trajectories, where there is one.
    fn rollouts(&self) -> Result<Option<PathBuf>> {
        let nested = self.run.join("rollouts");
        if self.run.join("state.json").is_file() {
            return Ok(Some(self.run.clone()));
        }
        if nested.join("state.json").is_file() {
            return Ok(Some(nested));
        }
        if self.run.join("metrics.jsonl").is_file() || self.run.join("checkpoints").is_dir() {
            return Ok(None);
        }
        Err(usage(format!("{} is no run: expected metrics.jsonl, checkpoints/ or rollouts/ in it", self.run.display())))
    }

    fn read_samples(&self, rollouts: Option<&Path>) -> Result<Vec<Sample>> {
        let Some(dir) = rollouts else { return Ok(Vec::new()) };
        let mut all = Vec::new();
        for shard in Dataset::open(dir)?.samples() {
            all.extend(shard?);
        }
        Ok(all)
    }

    fn checkpoints(&self) -> Result<Vec<Checkpoint>> {
        let check = |info: CheckpointInfo| {
            let problem = self.verify.then(|| verify_checkpoint(&info.path).map_err(|e| e.to_string()));
            Checkpoint { info, problem }
        };
        Ok(list_checkpoints(&self.run.join("checkpoints"))?.into_iter().map(check).collect())
    }

    /// The groups to show: one that is named, or the first of a step.
    fn choose<'a>(&self, samples: &'a [Sample]) -> Result<Vec<Vec<&'a Sample>>> {
        if let Some(group) = self.group {
            let members = temper_data::summary::group(samples, GroupId(group));
            if members.is_empty() {
                return Err(usage(format!("--group {group}: no such group among {} samples", samples.len())));
            }
            return Ok(vec![members]);
        }
        let last = samples.iter().map(|sample| sample.step).max();
        let Some(step) = self.step.map(Step).or(last) else { return Ok(Vec::new()) };
        let ids = temper_data::summary::group_ids(samples, step);
        if ids.is_empty() {
            let last = last.map_or_else(|| "there are none".to_owned(), |last| format!("the last one is {last}"));
            return Err(usage(format!("--step {step}: no responses of that step; {last}")));
        }
        let of_step = |id: &GroupId| samples.iter().filter(|s| s.group_id == *id && s.step == step).collect();
        Ok(ids.iter().take(self.samples).map(of_step).collect())
    }

    fn export(&self, rollouts: Option<&Path>) -> Result<Option<(PathBuf, u64)>> {
        match (&self.parquet, rollouts) {
            (None, _) => Ok(None),
            (Some(path), Some(dir)) => Ok(Some((path.clone(), export_parquet(dir, path)?))),
            (Some(_), None) => Err(usage(format!("--parquet: {} has no trajectories", self.run.display()))),
        }
    }

    fn to_json(&self, findings: &Findings<'_>) -> Value {
        let mut object = Map::new();
        object.insert("run".to_owned(), json!(self.run.display().to_string()));
        object.insert("stages".to_owned(), findings.stages.iter().map(metrics::StageTrend::to_json).collect());
        object.insert("checkpoints".to_owned(), findings.checkpoints.iter().map(Checkpoint::to_json).collect());
        object.insert("rollouts".to_owned(), json!(findings.steps));
        let group = |group: &Vec<&Sample>| groups::to_json(group);
        object.insert("groups".to_owned(), findings.groups.iter().map(group).collect());
        if let Some((path, num_rows)) = &findings.parquet {
            object.insert("parquet".to_owned(), json!({"path": path.display().to_string(), "num_rows": num_rows}));
        }
        Value::Object(object)
    }

    fn describe(&self, findings: &Findings<'_>) -> Result<String> {
        let mut text = format!("{}\n", self.run.display());
        for stage in &findings.stages {
            stage.describe(&mut text)?;
        }
        for checkpoint in &findings.checkpoints {
            checkpoint.describe(&mut text)?;
        }
        describe_rollouts(&findings.steps, &mut text)?;
        for group in &findings.groups {
            groups::describe(group, self.samples, &mut text)?;
        }
        if let Some((path, num_rows)) = &findings.parquet {
            writeln!(text, "\n{num_rows} rows written to {}", path.display())?;
        }
        Ok(text)
    }
}

impl Checkpoint {
    fn status(&self) -> String {
        match &self.problem {
            None => "not verified".to_owned(),
            Some(Ok(())) => "verified".to_owned(),
            Some(Err(problem)) => format!("DAMAGED: {problem}"),
        }
    }

    fn to_json(&self) -> Value {
        let verified = self.problem.as_ref().map(Result::is_ok);
        let problem = self.problem.as_ref().and_then(|p| p.as_ref().err());
        json!({
            "path": self.info.path.display().to_string(), "step": self.info.state.step,
            "policy_version": self.info.state.version, "metric": self.info.state.metric, "verified": verified, "problem": problem,
        })
    }

    fn describe(&self, text: &mut String) -> std::fmt::Result {
        let state = &self.info.state;
        let metric = state.metric.map_or_else(String::new, |metric| format!(", metric {metric:.4}"));
        writeln!(text, "checkpoint {}{metric}, {}", self.info.path.display(), self.status())
    }
}

/// Totals over all steps, and the reward of a few of them.
fn describe_rollouts(steps: &[StepSummary], text: &mut String) -> std::fmt::Result {
    let (Some(first), Some(last)) = (steps.first(), steps.last()) else { return Ok(()) };
    let total = |f: fn(&StepSummary) -> usize| steps.iter().map(f).sum::<usize>();
    writeln!(
        text,
        "rollouts   {} steps ({} to {}), {} samples in {} groups, {} not scored",
        steps.len(),
        first.step,
        last.step,
        total(|s| s.num_samples),
        total(|s| s.num_groups),
        total(|s| s.num_failed),
    )?;
    if let Some(gap) = steps.iter().filter_map(|s| s.log_prob_diff_max).reduce(f64::max) {
        writeln!(text, "           largest |rollout - old log-prob|: {gap:e}")?;
    }
    let every = steps.len().div_ceil(8).max(1);
    let shown = steps.iter().enumerate().filter(|(index, _)| index % every == 0 || *index + 1 == steps.len());
    for (_, step) in shown {
        let reward = step.reward_mean.map_or_else(|| "none".to_owned(), |r| format!("{r:.4}"));
        let std = step.reward_std.map_or_else(String::new, |s| format!(" +- {s:.4}"));
        let length = step.response_length_mean;
        writeln!(text, "  step {:>6}  reward {reward}{std}  length {length:.1}  {:?}", step.step, step.finish_reasons)?;
    }
    for (cause, count) in steps.iter().flat_map(|s| &s.failures) {
        writeln!(text, "  {count} not scored: {cause}")?;
    }
    Ok(())
}
