//! Sampling flags, shared by `generate` and `eval`.

use crate::usage;
use anyhow::{Context, Result, anyhow};
use serde::Deserialize;
use std::path::Path;
use temper_types::SamplingParams;

/// How tokens are drawn and when a response ends.
#[derive(Debug, Clone, clap::Args)]
pub struct SamplingArgs {
    /// Divides the logits, at least 1e-6; 0 takes the most likely token. Default: 1.
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Nucleus mass that is kept, in (0, 1]. Default: 1, all.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f32>,
    /// Number of most likely tokens kept; 0 keeps all. Default: 0.
    #[arg(long, value_name = "K")]
    top_k: Option<u32>,
    /// Drop tokens less likely than P times the most likely one; 0 keeps all. Default: 0.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    min_p: Option<f32>,
    /// Divide (positive) or multiply (negative) the logits of tokens seen before. Default: 1, off.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    repetition_penalty: Option<f32>,
    /// Subtract X from the logits of tokens that the response has. Default: 0, off.
    #[arg(long, value_name = "X", default_value_t = 0.0, hide_default_value = true, allow_negative_numbers = true)]
    presence_penalty: f32,
    /// Subtract X from the logit of a token for every time that the response has it. Default: 0, off.
    #[arg(long, value_name = "X", default_value_t = 0.0, hide_default_value = true, allow_negative_numbers = true)]
    frequency_penalty: f32,
    /// Add BIAS to the logit of token id ID; may be given several times.
    #[arg(long, value_name = "ID=BIAS", value_parser = parse_bias)]
    logit_bias: Vec<(u32, f32)>,
    /// Draw no token but this id; may be given several times.
    #[arg(long, value_name = "ID")]
    allowed_token_id: Vec<u32>,
    /// Never complete this text, as it is tokenized at the start of a text or behind a space; may be given several
    /// times.
    #[arg(long, value_name = "TEXT")]
    bad_word: Vec<String>,
    /// Stop tokens are not drawn before this many tokens.
    #[arg(long, value_name = "N", default_value_t = 0)]
    min_new_tokens: u32,
    /// Seed of the run. A response is a function of weights, prompt, row number, sample index, seed and these flags.
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// End a response where this text is complete; may be given several times.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// End a response at this token id, beside the model's own end tokens; may be given several times.
    #[arg(long, value_name = "ID")]
    stop_token_id: Vec<u32>,
    /// Do not end at the model's own end tokens.
    #[arg(long)]
    ignore_eos: bool,
    /// Take defaults of sampling from generation_config.json of the model; it is ignored otherwise.
    #[arg(long)]
    generation_config: bool,
}

/// Keys of `generation_config.json` that are read.
#[derive(Debug, Default, Deserialize)]
struct GenerationConfig {
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<u32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    eos_token_id: Option<Ids>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Ids {
    One(u32),
    Many(Vec<u32>),
}

impl SamplingArgs {
    /// The parameters, with every choice made. `end_ids` are the model's own end tokens.
    ///
    /// # Errors
    /// A parameter out of range (exit code 2), or a generation_config.json that cannot be read.
    pub fn resolve(&self, model_dir: &Path, max_new_tokens: u32, end_ids: &[u32]) -> Result<SamplingParams> {
        let config =
            if self.generation_config { read_generation_config(model_dir)? } else { GenerationConfig::default() };
        let defaults = SamplingParams::default();
        let configured_temperature = if config.do_sample == Some(false) { Some(0.0) } else { config.temperature };
        let mut stop_token_ids = self.stop_token_id.clone();
        if !self.ignore_eos {
            stop_token_ids.extend_from_slice(end_ids);
            match config.eos_token_id {
                Some(Ids::One(id)) => stop_token_ids.push(id),
                Some(Ids::Many(ids)) => stop_token_ids.extend(ids),
                None => {}
            }
        }
        stop_token_ids.sort_unstable();
        stop_token_ids.dedup();
        let params = SamplingParams {
            temperature: self.temperature.or(configured_temperature).unwrap_or(defaults.temperature),
            top_p: self.top_p.or(config.top_p).unwrap_or(defaults.top_p),
            top_k: self.top_k.or(config.top_k).unwrap_or(defaults.top_k),
            min_p: self.min_p.or(config.min_p).unwrap_or(defaults.min_p),
            repetition_penalty: self
                .repetition_penalty
                .or(config.repetition_penalty)
                .unwrap_or(defaults.repetition_penalty),
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.iter().copied().collect(),
            allowed_token_ids: self.allowed_token_id.clone(),
            bad_words: self.bad_word.clone(),
            max_new_tokens,
            min_new_tokens: self.min_new_tokens,
            stop_token_ids,
            stop: self.stop.clone(),
            ..defaults
        };
        params.validate().map_err(usage)?;
        Ok(params)
    }
}

fn parse_bias(text: &str) -> Result<(u32, f32), String> {
    let wrong = || format!("expected a token id and a number, such as 42=-1.5, got \"{text}\"");
    let (id, bias) = text.split_once('=').ok_or_else(wrong)?;
    Ok((id.trim().parse().map_err(|_| wrong())?, bias.trim().parse().map_err(|_| wrong())?))
}

fn read_generation_config(model_dir: &Path) -> Result<GenerationConfig> {
    let path = model_dir.join("generation_config.json");
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_str(&text).map_err(|cause| anyhow!("{}: {cause}", path.display()))
}
