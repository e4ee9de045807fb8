//! `temper bench rollout`: generation through the rollout service.

use super::group::GroupTimes;
use super::roofline::Roofline;
use super::samples::{at_least_one, median, peak_rss_mb, random_ids, round, spread};
use crate::commands::common::compute::{ComputeArgs, WeightsArgs};
use crate::commands::common::engine::{Generator, Naming};
use crate::commands::common::output::print;
use crate::commands::common::speculation::SpeculationArgs;
use anyhow::{Context, Result};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use temper_actor::ModelConfig;
use temper_proto::{GroupRequest, RolloutService};
use temper_rollout::EngineConfig;
use temper_types::{GroupId, PromptId, SamplingParams, WeightFormat, derive_seed};

/// Tokens generated per second: a batch of random prompts, every response of full length, temperature 1.
///
/// A run is timed from the submission of all prompts to the last finished response. decode_tok_s is
/// batch * (new - 1) / (time of a whole run - time of a run with one new token), prefill_tok_s is batch * prompt / time
/// of a run with one new token, tokens_per_second is batch * new / time of a whole run. roofline is what decoding
/// could reach where every step reads each weight, key and value once at the rate of this machine's memory, or
/// computes at its peak, whichever takes longer.
#[derive(clap::Args)]
pub struct Rollout {
    /// Hugging Face model directory.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Prompts at once.
    #[arg(long, value_name = "B", default_value_t = 32)]
    batch: usize,
    /// Tokens of every prompt.
    #[arg(long, value_name = "P", default_value_t = 64)]
    prompt_len: usize,
    /// Tokens of every response.
    #[arg(long, value_name = "N", default_value_t = 128)]
    new_tokens: u32,
    /// Timed runs, after one that is not.
    #[arg(long, value_name = "R", default_value_t = 3)]
    runs: usize,
    /// Also time groups of one prompt of --prompt-len tokens that end with their first token: of one sample and of N.
    #[arg(long, value_name = "N")]
    group: Option<usize>,
    // Prompts and noise differ from run to run, so that little can be guessed but by a draft model.
    #[command(flatten)]
    speculation: SpeculationArgs,
    #[command(flatten)]
    compute: ComputeArgs,
    #[command(flatten)]
    weights: WeightsArgs,
    /// Print as JSON, every sample included.
    #[arg(long)]
    json: bool,
}

impl Rollout {
    pub(super) fn run(self) -> Result<()> {
        let new_tokens = self.new_tokens as usize;
        at_least_one(&[("--batch", self.batch), ("--prompt-len", self.prompt_len), ("--new-tokens", new_tokens)])?;
        at_least_one(&[("--runs", self.runs), ("--group", self.group.unwrap_or(1))])?;
        let config = ModelConfig::load(&self.model)?;
        let vocab_size = config.vocab_size;
        let engine = EngineConfig { weights: self.weights.format(), ..self.speculation.engine()? };
        let generator = Generator::load(&self.model, &self.compute, Naming::None, &engine)?;
        self.time(&generator, vocab_size, 0, self.new_tokens)?;
        let timed = |new_tokens, first: u64| {
            (0..self.runs as u64)
                .map(|r| self.time(&generator, vocab_size, first + r, new_tokens))
                .collect::<Result<Vec<f64>>>()
        };
        let short = timed(1, 1)?;
        let whole = timed(self.new_tokens, 1 + self.runs as u64)?;
        let lens = (vocab_size, self.prompt_len);
        let group = self.group.map(|n| GroupTimes::measure(&generator, n, lens, self.runs)).transpose()?;
        let roofline = Roofline::measure(&config, &generator, self.compute.threads);
        self.report(&generator, (&short, &whole), (&roofline, group.as_ref()))
    }

    /// Seconds of one run.
    fn time(&self, generator: &Generator, vocab_size: usize, run: u64, new_tokens: u32) -> Result<f64> {
        let sampling = SamplingParams { max_new_tokens: new_tokens, ..SamplingParams::default() };
        let group = |index: u64| GroupRequest {
            group_id: GroupId((run << 32) + index),
            prompt_id: PromptId(index),
            epoch: run,
            prompt_token_ids: random_ids(vocab_size, self.prompt_len, (run << 32) + index),
            seeds: vec![derive_seed(run, index, 0, 0)],
            sampling: sampling.clone(),
            ..GroupRequest::default()
        };
        let groups = (0..self.batch as u64).map(group).collect();
        let begin = Instant::now();
        generator.service.submit(groups)?;
        for _ in 0..self.batch {
            let result =
                generator.service.next_group(Duration::from_secs(3600))?.context("a prompt never came back")?;
            let num_tokens = result.samples[0].token_ids.len();
            anyhow::ensure!(num_tokens == new_tokens as usize, "a response of {num_tokens} tokens, not {new_tokens}");
        }
        Ok(begin.elapsed().as_secs_f64())
    }

    fn report(
        &self,
        generator: &Generator,
        (short, whole): (&[f64], &[f64]),
        (roofline, group): (&Roofline, Option<&GroupTimes>),
    ) -> Result<()> {
        let (batch, new_tokens) = (self.batch as f64, f64::from(self.new_tokens));
        let (prefill_s, total_s) = (median(short), median(whole));
        let decode = (new_tokens > 1.0).then(|| batch * (new_tokens - 1.0) / (total_s - prefill_s));
        let rate = batch * new_tokens / total_s;
        let prefill = batch * self.prompt_len as f64 / prefill_s;
        let bound = roofline.decode_tok_s(batch, self.prompt_len as f64 + new_tokens / 2.0);
        let rss = peak_rss_mb();
        let stats = generator.service.stats();
        if self.json {
            let rates: Vec<f64> = whole.iter().map(|s| round(batch * new_tokens / s)).collect();
            let object = json!({
                "peer": "temper", "bench": "rollout", "dtype": generator.dtype, "weights": generator.weights, "batch": self.batch,
                "prompt": self.prompt_len, "new": self.new_tokens, "tokens_per_second": round(rate),
                "decode_tok_s": decode.map(round), "prefill_tok_s": round(prefill), "total_s": round(total_s),
                "spread": round(spread(whole)), "samples_s": whole, "samples_tok_s": rates,
                "prefill_samples_s": short, "rss_mb": rss,
                "metrics": stats.metrics().into_iter().collect::<BTreeMap<_, _>>(), "speculation": stats.speculation,
                "group": group.map(GroupTimes::to_json), "roofline": roofline.to_json(bound, decode),
            });
            return print(&format!("{object}\n"));
        }
        let roofline = roofline.to_text(bound, decode);
        let decode = decode.map_or_else(String::new, |d| format!(", decode {d:.0}"));
        let memory = rss.map_or_else(String::new, |mb| format!(", peak memory {mb} MiB"));
        let group = group.map_or_else(String::new, |group| format!("{}\n", group.to_text()));
        let format = match generator.weights {
            WeightFormat::Exact => generator.dtype.to_string(),
            weights => format!("{}, {weights} weights", generator.dtype),
        };
        let (prompt_len, spread, runs) = (self.prompt_len, spread(whole), whole.len());
        let line = format!("{batch} x ({prompt_len} + {new_tokens}), {format}: {rate:.0} tokens/s{decode}");
        let line = format!("{line}, prefill {prefill:.0}, spread {spread:.2} over {runs} runs{memory}");
        print(&format!("{line}\n{roofline}\n{group}"))
    }
}
