//! `temper score`: log-probs, values or scores of given token ids, and norms of gradients.

use super::common::compute::{ComputeArgs, WeightsArgs, open_model};
use super::common::output::{Output, print};
use crate::usage;
use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use temper_actor::{
    Head, ModelConfig, OutputGrads, PackedPolicy, ParamStore, PolicyFormat, Recompute, TrainArena, TrainBatch,
};
use temper_tensor::{Device, TokenStats};
use temper_types::{DType, WeightFormat};

/// Log-probs and entropies of given token ids, by the forward that trains and generates.
///
/// Every line of the input is a JSON object with "input_ids" and, where positions do not start at 0,
/// "position_ids". Every line of the output has "log_probs" and "entropies" for positions 1 and later: entry i
/// belongs to input_ids[i + 1]. A model with a value head gives "values" (one a token) instead, a reward model
/// "score" (one a line). No vocabulary id is masked, and no tokenizer is needed.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  temper score --model models/smollm2-135m --input ids.jsonl --output scored.jsonl\n  echo '{\"input_ids\": [1, 2, 3]}' | temper score --model models/smollm2-135m --input /dev/stdin\n  temper score --model models/smollm2-135m --input ids.jsonl --output scored.jsonl --grad-norms norms.json"
)]
pub struct Score {
    /// Hugging Face model directory.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// JSONL file of token ids.
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// Where the result goes; default: stdout.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Divides the logits; 0 is read as 1, as in the log-probs of greedy generation.
    #[arg(long, value_name = "T", default_value_t = 1.0, allow_negative_numbers = true)]
    temperature: f32,
    /// Also write {tensor name: L2 norm of d(mean negative log-likelihood over all scored tokens) / d(tensor)}.
    #[arg(long, value_name = "FILE")]
    grad_norms: Option<PathBuf>,
    /// Most tokens that pass through the model together; a longer line passes alone. Changes no log-prob.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    micro_batch_tokens: usize,
    #[command(flatten)]
    compute: ComputeArgs,
    #[command(flatten)]
    weights: WeightsArgs,
    /// Print the summary as JSON: what was "scored" (log_probs, values or scores), how much of it, and, of log-probs
    /// alone, "mean_nll".
    #[arg(long)]
    json: bool,
}

impl Score {
    /// Score the file.
    ///
    /// # Errors
    /// A flag out of range (exit code 2); a model or line that cannot be read, by file and line.
    pub fn run(self) -> Result<()> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(usage(format!("--temperature {}: expected a number, 0 or more", self.temperature)));
        }
        let output = Output::create(self.output.as_deref())?;
        let norms = self.grad_norms.as_deref().map(|path| Output::create(Some(path))).transpose()?;
        let (config, reader) = open_model(&self.model)?;
        if self.grad_norms.is_some() && config.head != Head::CausalLm {
            return Err(usage(format!(
                "--grad-norms: {} has a value or reward head and no log-likelihood: expected a causal language model",
                self.model.display()
            )));
        }
        let (device, dtype) = self.compute.resolve();
        let weights = self.weights.format();
        if self.grad_norms.is_some() && weights != WeightFormat::Exact {
            return Err(usage("--grad-norms: gradients are those of --weights exact"));
        }
        let temperature = if self.temperature == 0.0 { 1.0 } else { self.temperature };
        let (policy, gradients) = if self.grad_norms.is_some() {
            let masters = ParamStore::load(&*device, &config, &reader)?;
            let grads = masters.zeros_like(&*device);
            (PackedPolicy::new(&device, &masters, &config, dtype), Some((masters, grads)))
        } else {
            (PackedPolicy::load(&device, &config, &reader, PolicyFormat { dtype, weights })?, None)
        };
        let mut scorer =
            Scorer { device, policy, gradients, temperature, arena: TrainArena::new(), totals: Totals::default() };
        self.stream(&mut scorer, &config, output)?;
        if let Some(output) = norms {
            output.document(&scorer.grad_norms(&self.input)?)?;
        }
        self.report(&scorer.totals, config.head, (dtype, weights))
    }

    fn stream(&self, scorer: &mut Scorer, config: &ModelConfig, mut output: Output) -> Result<()> {
        let file = File::open(&self.input).with_context(|| format!("opening {}", self.input.display()))?;
        let mut waiting: Vec<Sequence> = Vec::new();
        let mut num_waiting = 0;
        let mut flush = |waiting: &mut Vec<Sequence>| -> Result<()> {
            for row in scorer.score(waiting).with_context(|| self.input.display().to_string())? {
                output.json_line(&row)?;
            }
            waiting.clear();
            Ok(())
        };
        for (index, line) in BufReader::new(file).lines().enumerate() {
            let place = || format!("{}, line {}", self.input.display(), index + 1);
            let line = line.with_context(place)?;
            if line.trim().is_empty() {
                continue;
            }
            let sequence = parse_line(&line, index + 1, config).with_context(place)?;
            if !waiting.is_empty() && num_waiting + sequence.token_ids.len() > self.micro_batch_tokens {
                flush(&mut waiting)?;
                num_waiting = 0;
            }
            num_waiting += sequence.token_ids.len();
            waiting.push(sequence);
        }
        flush(&mut waiting)?;
        output.finish()
    }

    fn report(&self, totals: &Totals, head: Head, (dtype, weights): (DType, WeightFormat)) -> Result<()> {
        let Totals { num_sequences, num_tokens, num_scored, log_prob_sum } = *totals;
        ensure!(num_sequences > 0, "{}: no line to score", self.input.display());
        let (scored, of_what) = match head {
            Head::CausalLm => ("log_probs", "tokens scored"),
            Head::TokenValue => ("values", "values of tokens"),
            Head::SequenceScore => ("scores", "scores of whole lines"),
        };
        let mut object = json!({
            "num_sequences": num_sequences, "num_tokens": num_tokens, "num_scored": num_scored, "scored": scored,
            "dtype": dtype, "weights": weights,
        });
        let mut text = format!("{num_sequences} lines, {num_scored} {of_what}");
        if head == Head::CausalLm {
            let mean_nll = (num_scored > 0).then(|| -log_prob_sum / num_scored as f64);
            object["mean_nll"] = json!(mean_nll);
            text += &mean_nll.map_or_else(String::new, |nll| format!(", mean negative log-likelihood {nll:.6}"));
        }
        text.push('\n');
        let text = if self.json { format!("{object}\n") } else { text };
        if self.output.is_some() {
            return print(&text);
        }
        eprint!("{text}");
        Ok(())
    }
}

/// One line of the input.
struct Sequence {
    line: usize,
    token_ids: Vec<u32>,
    positions: Vec<u32>,
}

fn parse_line(line: &str, number: usize, config: &ModelConfig) -> Result<Sequence> {
    let row: Value = serde_json::from_str(line).map_err(|e| anyhow!("not JSON: {e}"))?;
    let object = row.as_object().ok_or_else(|| anyhow!("expected an object with \"input_ids\", got {row}"))?;
    let token_ids = numbers(object, "input_ids", config.vocab_size, "vocab_size")?
        .ok_or_else(|| anyhow!("no \"input_ids\": expected an object with \"input_ids\": [ids]"))?;
    ensure!(!token_ids.is_empty(), "\"input_ids\" is empty: expected at least one id");
    let longest = config.max_position_embeddings;
    let positions = match numbers(object, "position_ids", longest, "max_position_embeddings")? {
        Some(positions) => positions,
        None => (0..token_ids.len() as u32).collect(),
    };
    let (num_ids, num_positions) = (token_ids.len(), positions.len());
    ensure!(num_ids == num_positions, "{num_positions} \"position_ids\" for {num_ids} \"input_ids\": expected as many");
    ensure!(num_ids <= longest, "{num_ids} tokens: expected at most max_position_embeddings = {longest}");
    let is_padded = object.get("attention_mask").and_then(Value::as_array).is_some_and(|m| m.iter().any(|v| *v != 1));
    ensure!(!is_padded, "\"attention_mask\" masks tokens: expected sequences without padding");
    Ok(Sequence { line: number, token_ids, positions })
}

/// The list of integers below `bound` under `key`, or `None` where there is none.
fn numbers(object: &Map<String, Value>, key: &str, bound: usize, bound_name: &str) -> Result<Option<Vec<u32>>> {
    let Some(value) = object.get(key).filter(|v| !v.is_null()) else { return Ok(None) };
    let list = value.as_array().ok_or_else(|| anyhow!("\"{key}\" is {value}: expected a list of integers"))?;
    let number = |(index, value): (usize, &Value)| match value.as_u64() {
        Some(number) if number < bound as u64 => Ok(number as u32),
        _ => Err(anyhow!("\"{key}\"[{index}] is {value}: expected an integer from 0 below {bound_name} = {bound}")),
    };
    list.iter().enumerate().map(number).collect::<Result<_>>().map(Some)
}

/// Sums over the file.
#[derive(Default)]
struct Totals {
    num_sequences: u64,
    num_tokens: u64,
    num_scored: u64,
    log_prob_sum: f64,
}

/// A model, and, where gradients are wanted, its masters and their gradients.
struct Scorer {
    device: Arc<dyn Device>,
    policy: PackedPolicy,
    gradients: Option<(ParamStore, ParamStore)>,
    temperature: f32,
    arena: TrainArena,
    totals: Totals,
}

impl Scorer {
    /// One object for each sequence.
    fn score(&mut self, sequences: &[Sequence]) -> Result<Vec<Value>> {
        self.totals.num_sequences += sequences.len() as u64;
        self.totals.num_tokens += sequences.iter().map(|s| s.token_ids.len() as u64).sum::<u64>();
        match self.policy.config().head {
            Head::CausalLm => self.log_probs(sequences),
            Head::TokenValue => {
                let values = self.values(sequences, |s| 0..s.token_ids.len())?;
                Ok(values.into_iter().map(|values| json!({ "values": values })).collect())
            }
            Head::SequenceScore => {
                let scores = self.values(sequences, |s| s.token_ids.len() - 1..s.token_ids.len())?;
                Ok(scores.into_iter().map(|scores| json!({ "score": scores[0] })).collect())
            }
        }
    }

    fn log_probs(&mut self, sequences: &[Sequence]) -> Result<Vec<Value>> {
        let mut batch = TrainBatch::new();
        for sequence in sequences {
            batch.push_at(&sequence.token_ids, &sequence.positions, 1..sequence.token_ids.len());
        }
        let stats = self.stats(&batch);
        self.totals.num_scored += stats.log_probs.len() as u64;
        self.totals.log_prob_sum += stats.log_probs.iter().map(|x| f64::from(*x)).sum::<f64>();
        let mut start = 0;
        let mut rows = Vec::with_capacity(sequences.len());
        for sequence in sequences {
            let range = start..start + sequence.token_ids.len() - 1;
            start = range.end;
            let (log_probs, entropies) = (&stats.log_probs[range.clone()], &stats.entropies[range]);
            check_finite(sequence, log_probs)?;
            rows.push(json!({ "log_probs": log_probs, "entropies": entropies }));
        }
        Ok(rows)
    }

    fn stats(&mut self, batch: &TrainBatch) -> TokenStats {
        if batch.num_targets() == 0 {
            return TokenStats::default();
        }
        let Some((masters, grads)) = &mut self.gradients else {
            return self.policy.score_only(batch, self.temperature, &mut self.arena);
        };
        let tape = self.policy.train_forward(batch, Recompute::Layers, &mut self.arena);
        let stats = self.policy.log_probs(&tape, self.temperature);
        let d_log_probs = vec![-1.0; batch.num_targets()];
        let outputs =
            OutputGrads::LogProbs { d_log_probs: &d_log_probs, d_entropies: &[], temperature: self.temperature };
        self.policy.backward(masters, tape, outputs, grads);
        stats
    }

    fn values(
        &mut self,
        sequences: &[Sequence],
        rows: impl Fn(&Sequence) -> std::ops::Range<usize>,
    ) -> Result<Vec<Vec<f32>>> {
        let mut batch = TrainBatch::new();
        for sequence in sequences {
            batch.push_values(&sequence.token_ids, &sequence.positions, rows(sequence));
        }
        if batch.num_targets() == 0 {
            return Ok(Vec::new());
        }
        let all = self.policy.values_only(&batch, &mut self.arena);
        self.totals.num_scored += all.len() as u64;
        let mut rest = all.as_slice();
        let mut out = Vec::with_capacity(sequences.len());
        for sequence in sequences {
            let (values, later) = rest.split_at(rows(sequence).len());
            check_finite(sequence, values)?;
            out.push(values.to_vec());
            rest = later;
        }
        Ok(out)
    }

    /// Gradients were summed over tokens; their norms are scaled to the mean.
    fn grad_norms(&self, input: &Path) -> Result<Value> {
        let (_, grads) = self.gradients.as_ref().context("gradients are kept where their norms are asked for")?;
        let num_scored = self.totals.num_scored;
        ensure!(num_scored > 0, "{}: no token to score: expected a line with two ids or more", input.display());
        let norm = |(unit, slot): (usize, &temper_actor::TensorSlot)| {
            let squares = self.device.sum_squares(grads.unit(unit).buffer().view(slot.range.clone()));
            ensure!(squares.is_finite(), "the gradient of {} is not finite", slot.name);
            Ok((slot.name.clone(), json!(squares.sqrt() / num_scored as f64)))
        };
        Ok(Value::Object(grads.tensors().map(norm).collect::<Result<_>>()?))
    }
}

fn check_finite(sequence: &Sequence, values: &[f32]) -> Result<()> {
    let bad = values.iter().position(|value| !value.is_finite());
    bad.map_or(Ok(()), |index| Err(anyhow!("line {}: entry {index} of the result is {}", sequence.line, values[index])))
}
