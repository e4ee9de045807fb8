//! `temper bench grpo`: whole steps of GRPO, the workload of TRL's trainer on the same model.

use super::samples::{at_least_one, median, peak_rss_mb, round};
use crate::commands::common::compute::ComputeArgs;
use crate::commands::common::output::print;
use crate::local_text::LocalText;
use anyhow::{Context, Result};
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use temper_actor::ModelConfig;
use temper_algos::{
    AdvantageConfig, AdvantageInput, Objective, PolicyLossConfig, Rewards, TokenBatch, compute_advantages,
};
use temper_proto::{
    GlobalCounts, GroupRequest, GroupResult, MiniBatch, OptimizerConfig, RolloutService, StageSpec, TextService,
    TokenSequence, TrainRow,
};
use temper_rollout::{EngineConfig, LocalRolloutService, TokenByteTable};
use temper_trainer::Trainer;
use temper_types::{DType, GroupId, PromptContent, PromptId, SamplingParams, derive_seed};

/// Seconds of a whole GRPO step: generate every response at full length, score it (share of vowels), advantages, one
/// update of the clipped surrogate, publish the new weights.
///
/// start_to_first_step_s counts from the start of the command to the end of the first step. The log-probs at the start
/// of the step come out of the update's own forward, as in training.
#[derive(clap::Args)]
pub struct Grpo {
    /// Hugging Face model directory.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Prompts of a step.
    #[arg(long, value_name = "P", default_value_t = 4)]
    prompts: usize,
    /// Responses to each prompt.
    #[arg(long, value_name = "G", default_value_t = 8)]
    gens: usize,
    /// Tokens of every response.
    #[arg(long, value_name = "N", default_value_t = 64)]
    len: u32,
    /// Steps; the first counts only for start_to_first_step_s where there are more.
    #[arg(long, value_name = "S", default_value_t = 4)]
    steps: usize,
    /// Most tokens that pass through the model together in training.
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

/// What a step needs.
struct Parts {
    text: LocalText,
    trainer: Trainer,
    service: LocalRolloutService,
    prompts: Vec<Vec<u32>>,
    dtype: DType,
}

/// Seconds of one step and its halves.
struct StepTimes {
    step: f64,
    gen_s: f64,
    train_s: f64,
    reward_mean: f64,
}

impl Grpo {
    pub(super) fn run(self) -> Result<()> {
        at_least_one(&[("--prompts", self.prompts), ("--gens", self.gens), ("--steps", self.steps)])?;
        at_least_one(&[("--len", self.len as usize), ("--micro-batch-tokens", self.micro_batch_tokens)])?;
        let start = Instant::now();
        let mut parts = self.load()?;
        let ready_s = start.elapsed().as_secs_f64();
        let mut times = Vec::new();
        let mut first_s = 0.0;
        for step in 0..self.steps {
            times.push(self.step(&mut parts, step as u64)?);
            if step == 0 {
                first_s = start.elapsed().as_secs_f64();
            }
        }
        self.report(&parts, &times, (ready_s, first_s))
    }

    fn load(&self) -> Result<Parts> {
        let vocab_size = ModelConfig::load(&self.model)?.vocab_size;
        let text = LocalText::load(&self.model)?;
        let (device, dtype) = self.compute.resolve();
        let masked = text.tokenizer().missing_ids(vocab_size);
        let mut trainer = Trainer::load(Arc::clone(&device), &self.model, dtype, masked)?;
        trainer.begin_stage(StageSpec {
            name: "bench".to_owned(),
            objective_json: serde_json::to_string(&Objective::Policy(PolicyLossConfig::default()))?,
            optimizer: OptimizerConfig::default(),
            needs_reference: false,
            max_micro_batch_tokens: self.micro_batch_tokens,
            recompute_activations: self.recompute,
        })?;
        let table = Arc::new(TokenByteTable(vec![Vec::new(); vocab_size]));
        let service = LocalRolloutService::new(device, trainer.policy(), EngineConfig::default(), table)?;
        let line = "The quick brown fox jumps over the lazy dog and then ".repeat(2);
        let encode = |index: usize| Ok(text.encode_prompt(&PromptContent::Text(format!("{line}{index}")))?);
        let prompts = (0..self.prompts).map(encode).collect::<Result<_>>()?;
        Ok(Parts { text, trainer, service, prompts, dtype })
    }

    fn step(&self, parts: &mut Parts, step: u64) -> Result<StepTimes> {
        let begin = Instant::now();
        let groups = self.generate(parts, step)?;
        let gen_s = begin.elapsed().as_secs_f64();
        let samples = || groups.iter().flat_map(|group| group.samples.iter().map(move |s| (group, s)));
        let rewards: Vec<f64> = samples().map(|(_, s)| vowel_share(&parts.text.decode(&s.token_ids))).collect();
        let lengths: Vec<usize> = samples().map(|(_, s)| s.token_ids.len()).collect();
        let group_ids: Vec<u64> = samples().map(|(group, _)| group.prompt_id.0).collect();
        let advantages = advantages(&rewards, &lengths, &group_ids)?;
        let train_begin = Instant::now();
        let mut rest = advantages.as_slice();
        let mut rows = Vec::new();
        for (group, sample) in samples() {
            let (own, later) = rest.split_at(sample.token_ids.len());
            rest = later;
            let mut row = TrainRow::demonstration(TokenSequence {
                prompt_token_ids: parts.prompts[group.prompt_id.0 as usize].clone(),
                response_token_ids: sample.token_ids.clone(),
                response_mask: vec![1; sample.token_ids.len()],
            });
            row.rollout_log_probs.clone_from(&sample.log_probs);
            row.advantages = own.to_vec();
            rows.push(row);
        }
        let num_rows = rows.len() as u64;
        let num_tokens = lengths.iter().sum::<usize>() as u64;
        let loss_scale_factor = f64::from(self.len);
        parts.trainer.update(&MiniBatch {
            rows,
            global: GlobalCounts { num_tokens, num_sequences: num_rows, num_rows, loss_scale_factor },
            temperature: 1.0,
            learning_rate: OptimizerConfig::default().learning_rate,
        })?;
        let version = parts.trainer.publish(step + 1)?;
        parts.service.set_version(version)?;
        let reward_mean = rewards.iter().sum::<f64>() / rewards.len() as f64;
        let train_s = train_begin.elapsed().as_secs_f64();
        Ok(StepTimes { step: begin.elapsed().as_secs_f64(), gen_s, train_s, reward_mean })
    }

    fn generate(&self, parts: &Parts, step: u64) -> Result<Vec<GroupResult>> {
        let sampling = SamplingParams { max_new_tokens: self.len, ..SamplingParams::default() };
        let group = |(index, prompt): (usize, &Vec<u32>)| GroupRequest {
            group_id: GroupId(step * self.prompts as u64 + index as u64),
            prompt_id: PromptId(index as u64),
            epoch: step,
            prompt_token_ids: prompt.clone(),
            seeds: (0..self.gens as u32).map(|i| derive_seed(0, index as u64, i, step)).collect(),
            sampling: sampling.clone(),
            ..GroupRequest::default()
        };
        parts.service.submit(parts.prompts.iter().enumerate().map(group).collect())?;
        let next = |_| parts.service.next_group(Duration::from_secs(3600))?.context("a prompt never came back");
        let mut groups = (0..self.prompts).map(next).collect::<Result<Vec<_>>>()?;
        groups.sort_by_key(|group| group.prompt_id);
        Ok(groups)
    }

    fn report(&self, parts: &Parts, times: &[StepTimes], (ready_s, first_s): (f64, f64)) -> Result<()> {
        let counted = if times.len() > 1 { &times[1..] } else { times };
        let over = |f: fn(&StepTimes) -> f64| median(&counted.iter().map(f).collect::<Vec<_>>());
        let all = |f: fn(&StepTimes) -> f64| times.iter().map(f).collect::<Vec<_>>();
        let (step_s, gen_s, train_s) = (over(|t| t.step), over(|t| t.gen_s), over(|t| t.train_s));
        let generated = (self.prompts * self.gens) as f64 * f64::from(self.len);
        let rss = peak_rss_mb();
        if self.json {
            let object = json!({
                "peer": "temper", "bench": "grpo", "dtype": parts.dtype, "prompts": self.prompts, "gens": self.gens,
                "len": self.len, "step_s": round(step_s), "gen_s": round(gen_s), "train_s": round(train_s),
                "gen_tok_s": round(generated / gen_s), "prompt_tokens": parts.prompts[0].len(),
                "steps": all(|t| t.step), "gen_samples_s": all(|t| t.gen_s), "train_samples_s": all(|t| t.train_s),
                "rewards": all(|t| t.reward_mean), "load_s": round(ready_s), "start_to_first_step_s": round(first_s),
                "rss_mb": rss,
            });
            return print(&format!("{object}\n"));
        }
        let memory = rss.map_or_else(String::new, |mb| format!(", peak memory {mb} MiB"));
        print(&format!(
            "{} x {} x {}, {}: {step_s:.3} s a step (generation {gen_s:.3}, training {train_s:.3}), first step done after \
             {first_s:.2} s{memory}\n",
            self.prompts, self.gens, self.len, parts.dtype
        ))
    }
}

/// Share of vowels among the characters of a text; the reward of the peer's script.
fn vowel_share(text: &str) -> f64 {
    let vowels = text.chars().filter(|c| "aeiou".contains(*c)).count();
    vowels as f64 / (1 + text.chars().count()) as f64
}

fn advantages(rewards: &[f64], lengths: &[usize], group_ids: &[u64]) -> Result<Vec<f64>> {
    let mut offsets = vec![0];
    for length in lengths {
        offsets.push(offsets.last().copied().unwrap_or_default() + length);
    }
    let mask = vec![1u8; offsets.last().copied().unwrap_or_default()];
    let input = AdvantageInput {
        batch: TokenBatch::new(&offsets, &mask)?,
        group_ids,
        rewards: Rewards::Sequence(rewards),
        ..AdvantageInput::default()
    };
    Ok(compute_advantages(&AdvantageConfig::default(), &input)?.advantages)
}
