//! `temper eval`: how good a model is on prompts with known answers.

use super::common::compute::{ComputeArgs, WeightsArgs};
use super::common::engine::{Generator, Naming, Request, as_chat, write_dataset};
use super::common::output::{prepare_dir, print, print_json};
use super::common::sampling::SamplingArgs;
use crate::reward_models::launcher;
use crate::usage;
use anyhow::{Result, anyhow};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;
use temper_algos::metrics::{best_at_k, maj_at_n, mean_at_n, pass_at_k};
use temper_proto::ScoreRequest;
use temper_reward::{LocalRewardService, RewardConfig, RewardKind, Scorer};
use temper_rollout::EngineConfig;
use temper_types::{RewardOutcome, Sample};

/// Score a model on prompts with known answers: mean@n, best@n, maj@n and pass@k, by data source.
///
/// Prompt files are JSONL, Parquet or Arrow in verl's columns (data_source, prompt, reward_model.ground_truth). A
/// sample whose scoring fails is left out, counted and named: it is never a score of 0. best@n is the expected best
/// score, maj@n the score of the most frequent answer (the last line of a response that is not blank), pass@k the
/// unbiased estimate that one of k samples reaches --correct-at.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  temper eval --model models/smollm2-135m --data recipes/data/chain_sum.parquet --reward number --temperature 0\n  temper eval --model runs/quickstart/checkpoints/step-190/model --data held_out.jsonl --reward exact_match --n 8\n  temper eval --model m --data d.jsonl --reward '{\"components\": [{\"kind\": \"math\", \"extract\": \"boxed\"}]}'"
)]
pub struct Eval {
    /// Hugging Face model directory.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Prompt file; may be given several times.
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<PathBuf>,
    /// Name of a reward, or a reward table as JSON.
    #[arg(long, value_name = "NAME")]
    reward: String,
    /// Responses to each prompt.
    #[arg(long, value_name = "N", default_value_t = 1)]
    n: u32,
    /// Longest response in tokens.
    #[arg(long, value_name = "N", default_value_t = 512)]
    max_new_tokens: u32,
    /// Take only the first rows.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Reward from which a response counts as right.
    #[arg(long, value_name = "R", default_value_t = 1.0, allow_negative_numbers = true)]
    correct_at: f64,
    /// Put text prompts through the chat template, as one user message.
    #[arg(long)]
    chat: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    #[command(flatten)]
    weights: WeightsArgs,
    /// Longest wait for the next finished prompt, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    timeout: u64,
    /// Also keep every response with its reward, as a directory that `datasets.load_from_disk` reads.
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

/// Metrics by name.
type Metrics = Vec<(String, f64)>;

/// Scored samples of one prompt.
struct Group {
    scores: Vec<f64>,
    answers: Vec<Option<String>>,
}

/// Samples of one data source.
#[derive(Default)]
struct Source {
    num_prompts: u64,
    num_samples: u64,
    num_tokens: u64,
    num_cut: u64,
    /// The scored samples of each prompt that has any.
    groups: Vec<Group>,
    /// Number of failed samples by cause.
    failures: BTreeMap<String, u64>,
}

impl Eval {
    /// Generate, score, report.
    ///
    /// # Errors
    /// A flag or reward that is wrong (exit code 2); a file that cannot be read; no sample that could be scored.
    pub fn run(self) -> Result<()> {
        if self.n == 0 {
            return Err(usage("--n 0: expected 1 or more"));
        }
        if !self.correct_at.is_finite() {
            return Err(usage(format!("--correct-at {}: expected a finite number", self.correct_at)));
        }
        let reward = self.reward()?;
        let mut rows = temper_data::prompts::read_prompts(&self.data)?;
        rows.truncate(self.limit.unwrap_or(usize::MAX));
        if rows.is_empty() {
            return Err(usage("--limit 0 leaves no prompt: expected 1 or more"));
        }
        if self.chat {
            as_chat(&mut rows);
        }
        if let Some(dir) = &self.output {
            prepare_dir(dir)?;
        }
        let naming = if self.output.is_some() { Naming::Hash } else { Naming::None };
        let engine = EngineConfig { weights: self.weights.format(), ..EngineConfig::default() };
        let generator = Generator::load(&self.model, &self.compute, naming, &engine)?;
        if generator.text.is_none() {
            return Err(anyhow!("{} has no tokenizer.json: responses have no text to score", self.model.display()));
        }
        let request = Request {
            num_samples: self.n,
            seed: self.sampling.seed,
            sampling: generator.sampling(&self.sampling, &self.model, self.max_new_tokens)?,
            timeout: Duration::from_secs(self.timeout),
        };
        let (mut sources, mut kept) = (BTreeMap::<String, Source>::new(), Vec::new());
        generator.run(&rows, &request, |row, group, result| {
            let worker = result.worker;
            let sample = |sample| generator.to_sample(row, group, &worker, sample);
            let mut samples: Vec<Sample> = result.samples.into_iter().map(sample).collect();
            let outcomes = reward.outcomes(&samples.iter().map(ScoreRequest::of).collect::<Vec<_>>())?;
            samples.iter_mut().zip(outcomes).for_each(|(sample, outcome)| sample.outcome = Some(outcome));
            sources.entry(row.data_source.clone()).or_default().add(&samples);
            if self.output.is_some() {
                kept.extend(samples);
            }
            Ok(())
        })?;
        if let Some(dir) = &self.output {
            write_dataset(dir, "eval", (&kept, generator.weights))?;
        }
        self.report(&sources)
    }

    fn reward(&self) -> Result<LocalRewardService> {
        let config = if self.reward.trim_start().starts_with('{') {
            serde_json::from_str::<RewardConfig>(&self.reward).map_err(|e| usage(format!("--reward: {e}")))?
        } else {
            RewardConfig::from_name(&self.reward).map_err(|e| usage(format!("--reward: {e}")))?
        };
        if let Some(component) = config.components.iter().find(|c| matches!(c.kind, RewardKind::RewardModel(_))) {
            return Err(usage(format!(
                "--reward: component `{}` is a reward model, which only a run has at hand: expected rewards that score \
                 by rules or by code of your own",
                component.name()
            )));
        }
        let scorer = Scorer::new(config).map_err(|e| usage(format!("--reward: {e}")))?;
        let service = LocalRewardService::new(scorer, NonZeroUsize::MIN);
        service.with_external(&launcher()).map_err(|e| usage(format!("--reward: {e}")))
    }

    fn report(&self, sources: &BTreeMap<String, Source>) -> Result<()> {
        let n = self.n as usize;
        let metrics: Vec<Metrics> = sources.values().map(|source| source.metrics(n, self.correct_at)).collect();
        let rows = || sources.iter().zip(&metrics);
        if self.json {
            let mut object = Map::new();
            for ((name, source), metrics) in rows() {
                object.insert(name.clone(), source.to_json(metrics));
            }
            let model = self.model.display().to_string();
            print_json(&json!({"model": model, "n": n, "reward": self.reward, "sources": object}))?;
        } else {
            let mut text = String::new();
            for ((name, source), metrics) in rows() {
                source.describe(name, metrics, &mut text)?;
            }
            print(&text)?;
        }
        if sources.values().all(|source| source.groups.is_empty()) {
            let cause = sources.values().find_map(|source| source.failures.keys().next());
            return Err(anyhow!("no sample could be scored: {}", cause.map_or("no cause is known", String::as_str)));
        }
        Ok(())
    }
}

/// What votes in maj@n: the last line that is not blank.
fn answer(response: &str) -> Option<String> {
    response.lines().rev().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned)
}

impl Source {
    fn add(&mut self, samples: &[Sample]) {
        self.num_prompts += 1;
        let (mut scores, mut answers) = (Vec::new(), Vec::new());
        for sample in samples {
            self.num_samples += 1;
            self.num_tokens += sample.response_token_ids.len() as u64;
            self.num_cut += u64::from(sample.finish_reason == temper_types::FinishReason::Length);
            match &sample.outcome {
                Some(RewardOutcome::Scored { reward, .. }) => {
                    scores.push(*reward);
                    answers.push(answer(&sample.response));
                }
                Some(RewardOutcome::Failed(failure)) => *self.failures.entry(failure.to_string()).or_default() += 1,
                None => {}
            }
        }
        if !scores.is_empty() {
            self.groups.push(Group { scores, answers });
        }
    }

    /// Means over prompts; empty where no sample was scored.
    fn metrics(&self, n: usize, correct_at: f64) -> Metrics {
        if self.groups.is_empty() {
            return Vec::new();
        }
        let over = |f: &dyn Fn(&Group) -> f64| self.groups.iter().map(f).sum::<f64>() / self.groups.len() as f64;
        let correct = |group: &Group| group.scores.iter().map(|s| *s >= correct_at).collect::<Vec<_>>();
        let mut metrics = vec![(format!("mean@{n}"), over(&|group| mean_at_n(&group.scores)))];
        if n > 1 {
            metrics.push((format!("best@{n}"), over(&|group| best_at_k(&group.scores, group.scores.len()))));
            metrics.push((format!("maj@{n}"), over(&|group| maj_at_n(&group.answers, &group.scores))));
        }
        let mut ks: Vec<usize> = (0..).map(|i| 1 << i).take_while(|k| *k < n).collect();
        ks.push(n);
        metrics.extend(ks.iter().map(|k| (format!("pass@{k}"), over(&|group| pass_at_k(&correct(group), *k)))));
        metrics
    }

    fn num_failed(&self) -> u64 {
        self.failures.values().sum()
    }

    fn length_mean(&self) -> f64 {
        self.num_tokens as f64 / self.num_samples.max(1) as f64
    }

    fn to_json(&self, metrics: &[(String, f64)]) -> Value {
        let mut object = Map::new();
        object.extend(metrics.iter().map(|(name, value)| (name.clone(), json!(value))));
        object.insert("num_prompts".to_owned(), json!(self.num_prompts));
        object.insert("num_samples".to_owned(), json!(self.num_samples));
        object.insert("num_failed".to_owned(), json!(self.num_failed()));
        object.insert("failures".to_owned(), json!(self.failures));
        object.insert("response_length_mean".to_owned(), json!(self.length_mean()));
        object.insert("num_cut".to_owned(), json!(self.num_cut));
        Value::Object(object)
    }

    fn describe(&self, name: &str, metrics: &[(String, f64)], text: &mut String) -> Result<()> {
        writeln!(
            text,
            "{name}: {} prompts, {} samples, {:.1} tokens a response, {} cut at the limit",
            self.num_prompts,
            self.num_samples,
            self.length_mean(),
            self.num_cut
        )?;
        for (metric, value) in metrics {
            writeln!(text, "  {metric:<10} {value:.4}")?;
        }
        for (cause, count) in &self.failures {
            writeln!(text, "  {count} samples not scored: {cause}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_is_the_last_line_that_is_not_blank() {
        assert_eq!(answer("so\n 42 \n\n").as_deref(), Some("42"));
        assert_eq!(answer(" \n"), None);
    }

    #[test]
    fn metrics_are_means_over_prompts() {
        let answers = |list: &[&str]| list.iter().map(|a| Some((*a).to_owned())).collect::<Vec<_>>();
        let groups = vec![
            Group { scores: vec![1.0, 0.0, 0.0, 0.0], answers: answers(&["a", "b", "b", "c"]) },
            Group { scores: vec![1.0, 1.0, 0.0, 1.0], answers: answers(&["a", "a", "d", "a"]) },
        ];
        let source = Source { groups, ..Source::default() };
        let metrics: BTreeMap<String, f64> = source.metrics(4, 1.0).into_iter().collect();
        let expect =
            [("mean@4", 0.5), ("best@4", 1.0), ("maj@4", 0.5), ("pass@1", 0.5), ("pass@2", 0.75), ("pass@4", 1.0)];
        for (name, want) in expect {
            assert!((metrics[name] - want).abs() < 1e-12, "{name}: {}", metrics[name]);
        }
        assert_eq!(metrics.len(), expect.len());
    }
}
