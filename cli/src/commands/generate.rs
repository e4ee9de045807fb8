//! `temper generate`: answers to prompts, with their token ids and log-probs.

use super::common::beam::BeamArgs;
use super::common::compute::{ComputeArgs, WeightsArgs};
use super::common::engine::{Generator, Naming, Request, as_chat, write_dataset};
use super::common::output::{Output, prepare_dir, print};
use super::common::sampling::SamplingArgs;
use super::common::speculation::SpeculationArgs;
use crate::usage;
use anyhow::{Context, Result};
use clap::ValueEnum;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use temper_proto::{GroupRequest, GroupResult};
use temper_rollout::EngineConfig;
use temper_types::{PromptContent, PromptId, PromptRow, Sample};

/// Layout of the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// One JSON object a response.
    Jsonl,
    /// A directory that `datasets.load_from_disk` reads.
    Arrow,
}

/// Answer prompts, and keep the token ids with the log-prob of every token.
///
/// A prompts file has one prompt a row: JSONL, Parquet (plain, gzip, LZ4, Snappy or Zstandard) or Arrow (plain, LZ4 or
/// Zstandard) with "prompt" (text, or chat messages, which go through the chat template) or "prompt_token_ids"; in a
/// .txt file every line is a prompt. The result has --n rows for every prompt, in the prompts' order: prompt_token_ids,
/// response_token_ids (the stop token included), response (without it), rollout_log_probs, finish_reason.
/// rollout_log_probs is log_softmax(logits / temperature), never truncated; where --top-p, --top-k, --min-p, a
/// penalty, a bias or a ban acts, sampled_log_probs and surviving_mass stand beside it. Tokens and log-probs do not
/// depend on batch mates, threads, the order of prompts or speculation.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  temper generate --model models/smollm2-135m --prompt 'What is 2+2?' --chat --max-new-tokens 64\n  temper generate --model models/smollm2-135m --prompts prompts.jsonl --n 4 --seed 7 --max-new-tokens 128 --output out.jsonl\n  temper generate --model models/smollm2-135m --prompts prompts.jsonl --max-new-tokens 128 --format arrow --output out/\n  temper generate --model models/smollm2-135m --prompt '17 + 25 =' --beam-width 4 --n 2 --length-penalty 0.6 --max-new-tokens 16"
)]
pub struct Generate {
    /// Hugging Face model directory.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    #[command(flatten)]
    prompts: PromptArgs,
    /// Put text prompts through the chat template, as one user message.
    #[arg(long)]
    chat: bool,
    /// Longest response in tokens.
    #[arg(long, value_name = "N")]
    max_new_tokens: u32,
    /// Responses to each prompt.
    #[arg(long, value_name = "N", default_value_t = 1)]
    n: u32,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    #[command(flatten)]
    weights: WeightsArgs,
    #[command(flatten)]
    speculation: SpeculationArgs,
    #[command(flatten)]
    beam: BeamArgs,
    /// Longest wait for the next finished prompt, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    timeout: u64,
    /// Layout of the result; arrow needs --output.
    #[arg(long, value_enum, default_value_t = Format::Jsonl)]
    format: Format,
    /// Where the result goes; default: stdout.
    #[arg(long, value_name = "PATH")]
    output: Option<PathBuf>,
    /// Print the summary as JSON.
    #[arg(long)]
    json: bool,
}

/// Where the result goes.
enum Target<'a> {
    /// A line a response.
    Lines(Output),
    /// A dataset in this directory.
    Dir(&'a Path),
}

/// Where prompts come from.
#[derive(clap::Args)]
#[group(required = true, multiple = false, args = ["prompt", "prompts"])]
struct PromptArgs {
    /// One prompt as text.
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// File of prompts.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
}

impl PromptArgs {
    fn rows(&self) -> Result<Vec<PromptRow>> {
        match (&self.prompt, &self.prompts) {
            (Some(text), _) => Ok(vec![text_row(0, text)]),
            (None, Some(path)) if path.extension().is_some_and(|e| e == "txt") => read_lines(path),
            (None, Some(path)) => Ok(temper_data::prompts::read_prompts(&[path])?),
            (None, None) => Err(usage("expected --prompt or --prompts")),
        }
    }
}

fn read_lines(path: &Path) -> Result<Vec<PromptRow>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    let rows: Vec<PromptRow> = lines.zip(0..).map(|(line, index)| text_row(index, line)).collect();
    anyhow::ensure!(!rows.is_empty(), "{}: the file holds no prompt", path.display());
    Ok(rows)
}

fn text_row(index: u64, text: &str) -> PromptRow {
    PromptRow {
        prompt_id: PromptId(index),
        data_source: "prompt".to_owned(),
        prompt: PromptContent::Text(text.to_owned()),
        ability: None,
        ground_truth: None,
        extra_info: None,
        completion: None,
        chosen: None,
        rejected: None,
        label: None,
        margin: None,
    }
}

impl Generate {
    /// Answer the prompts.
    ///
    /// # Errors
    /// A flag out of range (exit code 2); a model or prompt that cannot be read, by file and line.
    pub fn run(self) -> Result<()> {
        if self.n == 0 {
            return Err(usage("--n 0: expected 1 or more"));
        }
        let mut rows = self.prompts.rows()?;
        if self.chat {
            as_chat(&mut rows);
        }
        let naming = if self.format == Format::Arrow { Naming::Hash } else { Naming::None };
        let engine = EngineConfig { weights: self.weights.format(), ..self.speculation.engine()? };
        let target = self.target()?;
        let generator = Generator::load(&self.model, &self.compute, naming, &engine)?;
        let request = Request {
            num_samples: self.n,
            seed: self.sampling.seed,
            sampling: generator.sampling(&self.sampling, &self.model, self.max_new_tokens)?,
            timeout: Duration::from_secs(self.timeout),
        };
        let begin = Instant::now();
        let summary = match target {
            Target::Lines(output) => self.jsonl(&generator, (&rows, &request), output)?,
            Target::Dir(dir) => self.arrow(&generator, (&rows, &request), dir)?,
        };
        self.report(&summary, begin.elapsed(), &generator)
    }

    /// Where the result goes, known to be writable before anything is generated.
    fn target(&self) -> Result<Target<'_>> {
        match (self.format, self.output.as_deref()) {
            (Format::Jsonl, path) => Ok(Target::Lines(Output::create(path)?)),
            (Format::Arrow, Some(dir)) => {
                prepare_dir(dir)?;
                Ok(Target::Dir(dir))
            }
            (Format::Arrow, None) => Err(usage("--format arrow writes a directory: expected --output DIR")),
        }
    }

    /// Answer every prompt by drawing or by searching; `each` gets the samples of a prompt, with their scores where
    /// they were searched for.
    fn answer(
        &self,
        generator: &Generator,
        (rows, request): (&[PromptRow], &Request),
        mut each: impl FnMut(Vec<Sample>, &[f64]) -> Result<()>,
    ) -> Result<()> {
        let samples = |row: &PromptRow, group: &GroupRequest, result: GroupResult| -> Vec<Sample> {
            let sample = |s| generator.to_sample(row, group, &result.worker, s);
            result.samples.into_iter().map(sample).collect()
        };
        match self.beam.resolve(request)? {
            None => generator.run(rows, request, |row, group, result| each(samples(row, group, result), &[])),
            Some(spec) => generator
                .search(rows, (request, &spec), |row, group, result, scores| each(samples(row, group, result), scores)),
        }
    }

    fn jsonl(&self, generator: &Generator, work: (&[PromptRow], &Request), mut output: Output) -> Result<Summary> {
        let mut summary = Summary::default();
        self.answer(generator, work, |samples, scores| {
            for (index, sample) in samples.iter().enumerate() {
                summary.add(sample);
                output.json_line(&to_json(sample, scores.get(index).copied()))?;
            }
            Ok(())
        })?;
        output.finish()?;
        Ok(summary)
    }

    fn arrow(&self, generator: &Generator, work: (&[PromptRow], &Request), dir: &Path) -> Result<Summary> {
        let mut summary = Summary::default();
        let mut all = Vec::new();
        self.answer(generator, work, |samples, _| {
            all.extend(samples);
            Ok(())
        })?;
        all.iter().for_each(|sample| summary.add(sample));
        write_dataset(dir, "generate", (&all, generator.weights))?;
        Ok(summary)
    }

    fn report(&self, summary: &Summary, elapsed: Duration, generator: &Generator) -> Result<()> {
        let seconds = elapsed.as_secs_f64();
        let rate = summary.num_tokens as f64 / seconds.max(1e-9);
        let text = if self.json {
            let object = json!({
                "num_samples": summary.num_samples, "num_response_tokens": summary.num_tokens,
                "finish_reasons": summary.finish_reasons, "seconds": seconds, "tokens_per_second": rate,
                "dtype": generator.dtype, "weights": generator.weights, "policy_version": generator.version,
            });
            format!("{object}\n")
        } else {
            let (samples, tokens) = (summary.num_samples, summary.num_tokens);
            format!(
                "{samples} responses, {tokens} tokens in {seconds:.2} s ({rate:.0} tokens/s, {})\n",
                generator.dtype
            )
        };
        if self.output.is_some() {
            return print(&text);
        }
        eprint!("{text}");
        Ok(())
    }
}

/// The columns of a response. `sampled_log_probs` and `surviving_mass` are there where the law was truncated,
/// `beam_score` where it was searched for.
fn to_json(sample: &Sample, beam_score: Option<f64>) -> Value {
    let mut row = Map::new();
    row.insert("prompt_token_ids".to_owned(), json!(sample.prompt_token_ids));
    row.insert("response_token_ids".to_owned(), json!(sample.response_token_ids));
    row.insert("response".to_owned(), json!(sample.response));
    row.insert("rollout_log_probs".to_owned(), json!(sample.rollout_log_probs));
    row.insert("finish_reason".to_owned(), json!(sample.finish_reason.name()));
    if let Some(score) = beam_score {
        row.insert("beam_score".to_owned(), json!(score));
    }
    for (name, values) in [("sampled_log_probs", &sample.sampled_log_probs), ("surviving_mass", &sample.surviving_mass)]
    {
        if !values.is_empty() {
            row.insert(name.to_owned(), json!(values));
        }
    }
    Value::Object(row)
}

/// Counts over all responses.
#[derive(Default)]
struct Summary {
    num_samples: u64,
    num_tokens: u64,
    finish_reasons: std::collections::BTreeMap<&'static str, u64>,
}

impl Summary {
    fn add(&mut self, sample: &Sample) {
        self.num_samples += 1;
        self.num_tokens += sample.response_token_ids.len() as u64;
        *self.finish_reasons.entry(sample.finish_reason.name()).or_default() += 1;
    }
}
