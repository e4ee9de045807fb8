//! `temper bench train`: whole optimizer steps.

use super::samples::{at_least_one, median, peak_rss_mb, random_ids, round, spread};
use crate::commands::common::compute::ComputeArgs;
use crate::commands::common::output::print;
use crate::usage;
use anyhow::Result;
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;
use temper_actor::ModelConfig;
use temper_algos::{Objective, SftLossType};
use temper_proto::{GlobalCounts, MiniBatch, OptimizerConfig, StageSpec, TokenSequence, TrainRow};
use temper_trainer::Trainer;

/// Seconds of an optimizer step on random tokens: forward, negative log-likelihood, backward, clipping, AdamW, and
/// packing the new weights for generation.
#[derive(clap::Args)]
pub struct Train {
    /// Hugging Face model directory.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Sequences of a step.
    #[arg(long, value_name = "B", default_value_t = 8)]
    batch: usize,
    /// Tokens of every sequence.
    #[arg(long, value_name = "T", default_value_t = 256)]
    seq: usize,
    /// Timed steps, after two that are not.
    #[arg(long, value_name = "R", default_value_t = 5)]
    runs: usize,
    /// Most tokens that pass through the model together.
    #[arg(long, value_name = "N", default_value_t = 2048)]
    micro_batch_tokens: usize,
    /// Recompute activations in the backward instead of keeping them.
    #[arg(long)]
    recompute: bool,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Print as JSON, every sample included.
    #[arg(long)]
    json: bool,
}

/// Steps that warm caches and allocate optimizer state.
const WARM_UP_STEPS: usize = 2;

impl Train {
    pub(super) fn run(self) -> Result<()> {
        at_least_one(&[
            ("--batch", self.batch),
            ("--runs", self.runs),
            ("--micro-batch-tokens", self.micro_batch_tokens),
        ])?;
        if self.seq < 2 {
            return Err(usage(format!("--seq {}: expected 2 or more", self.seq)));
        }
        let vocab_size = ModelConfig::load(&self.model)?.vocab_size;
        let (device, dtype) = self.compute.resolve();
        let mut trainer = Trainer::load(device, &self.model, dtype, Vec::new())?;
        trainer.begin_stage(StageSpec {
            name: "bench".to_owned(),
            objective_json: serde_json::to_string(&Objective::Sft(SftLossType::Nll))?,
            optimizer: OptimizerConfig::default(),
            needs_reference: false,
            max_micro_batch_tokens: self.micro_batch_tokens,
            recompute_activations: self.recompute,
        })?;
        let batch = self.mini_batch(vocab_size);
        let (mut seconds, mut loss) = (Vec::new(), 0.0);
        for run in 0..self.runs + WARM_UP_STEPS {
            let begin = Instant::now();
            loss = trainer.update(&batch)?.loss;
            if run >= WARM_UP_STEPS {
                seconds.push(begin.elapsed().as_secs_f64());
            }
        }
        let tokens = (self.batch * self.seq) as f64;
        let (step_s, rss) = (median(&seconds), peak_rss_mb());
        if self.json {
            let object = json!({
                "peer": "temper", "bench": "train", "dtype": dtype, "batch": self.batch, "seq": self.seq,
                "recompute": self.recompute, "step_s": round(step_s), "step_tok_s": round(tokens / step_s),
                "spread": round(spread(&seconds)), "samples_s": seconds, "loss": loss, "rss_mb": rss,
            });
            return print(&format!("{object}\n"));
        }
        let memory = rss.map_or_else(String::new, |mb| format!(", peak memory {mb} MiB"));
        print(&format!(
            "{} x {}, {dtype}: {step_s:.3} s a step, {:.0} tokens/s, spread {:.2} over {} steps{memory}\n",
            self.batch,
            self.seq,
            tokens / step_s,
            spread(&seconds),
            seconds.len()
        ))
    }

    fn mini_batch(&self, vocab_size: usize) -> MiniBatch {
        let row = |index: usize| {
            let mut ids = random_ids(vocab_size, self.seq, index as u64);
            let response_token_ids = ids.split_off(1);
            let response_mask = vec![1; response_token_ids.len()];
            TrainRow::demonstration(TokenSequence { prompt_token_ids: ids, response_token_ids, response_mask })
        };
        let num_tokens = (self.batch * (self.seq - 1)) as u64;
        let num_rows = self.batch as u64;
        MiniBatch {
            rows: (0..self.batch).map(row).collect(),
            global: GlobalCounts { num_tokens, num_sequences: num_rows, num_rows, loss_scale_factor: self.seq as f64 },
            temperature: 1.0,
            learning_rate: OptimizerConfig::default().learning_rate,
        }
    }
}
