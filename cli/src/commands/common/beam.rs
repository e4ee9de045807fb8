//! Beam search on the command line.

use super::engine::{Generator, Request};
use crate::usage;
use anyhow::{Context, Result};
use temper_proto::{GeneratedSample, GroupRequest, GroupResult};
use temper_rollout::{BeamHypothesis, BeamSpec};
use temper_types::{GroupId, PolicyVersion, PromptRow, SampleIndex, SampleTimings, SamplingParams};

/// A search instead of draws.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct BeamArgs {
    /// Search for the most likely responses with W beams instead of drawing; --n of them come out, best first, with
    /// their beam_score: the sum of log-probs over length^penalty.
    #[arg(long, value_name = "W", conflicts_with_all = ["speculative", "draft_model"])]
    beam_width: Option<usize>,
    /// Power of the length that divides the sum of log-probs of a beam: 0 compares sums, 1 means.
    #[arg(long, value_name = "A", default_value_t = 1.0, requires = "beam_width", allow_negative_numbers = true)]
    length_penalty: f64,
}

impl BeamArgs {
    /// The search that is asked for, if any.
    ///
    /// # Errors
    /// Flags of drawing beside it, or more responses than beams (exit code 2).
    pub fn resolve(&self, request: &Request) -> Result<Option<BeamSpec>> {
        let Some(width) = self.beam_width else { return Ok(None) };
        let SamplingParams { temperature, stop, stop_token_ids, max_new_tokens, .. } = &request.sampling;
        let is_plain = SamplingParams { min_new_tokens: 0, ..request.sampling.clone() };
        if *temperature != 1.0 || is_plain.is_truncated() || request.sampling.min_new_tokens > 0 || !stop.is_empty() {
            return Err(usage(
                "--beam-width searches the model's own law: expected no --temperature, --top-p, --top-k, --min-p, \
                 penalty, bias, allowed or bad words, --min-new-tokens or --stop",
            ));
        }
        if width == 0 || width < request.num_samples as usize {
            return Err(usage(format!("--beam-width {width}: expected at least --n {}", request.num_samples)));
        }
        Ok(Some(BeamSpec {
            width,
            length_penalty: self.length_penalty,
            max_new_tokens: *max_new_tokens as usize,
            stop_token_ids: stop_token_ids.clone(),
        }))
    }
}

impl Generator {
    /// Search for responses to every prompt; `each` gets prompt, request, result and the score of each sample.
    ///
    /// # Errors
    /// The prompt that cannot be encoded or searched for, by row; those of `each`.
    pub fn search(
        &self,
        rows: &[PromptRow],
        (request, spec): (&Request, &BeamSpec),
        mut each: impl FnMut(&PromptRow, &GroupRequest, GroupResult, &[f64]) -> Result<()>,
    ) -> Result<()> {
        for (index, row) in rows.iter().enumerate() {
            let encoded = self.encode(&row.prompt).with_context(|| format!("prompt {index}"))?;
            let (mut found, version) =
                self.service.beam_search(&encoded, spec).with_context(|| format!("prompt {index}"))?;
            found.truncate(request.num_samples as usize);
            let scores: Vec<f64> = found.iter().map(|hypothesis| hypothesis.score).collect();
            let group = GroupRequest {
                group_id: GroupId(index as u64),
                prompt_id: row.prompt_id,
                prompt_token_ids: encoded,
                sampling: request.sampling.clone(),
                ..GroupRequest::default()
            };
            let samples = found.into_iter().zip(0..).map(|(h, rank)| to_generated(h, rank, version)).collect();
            let (group_id, prompt_id) = (group.group_id, group.prompt_id);
            let result = GroupResult { group_id, prompt_id, worker: "beam".to_owned(), samples };
            each(row, &group, result, &scores)?;
        }
        Ok(())
    }
}

fn to_generated(hypothesis: BeamHypothesis, rank: u32, version: PolicyVersion) -> GeneratedSample {
    let BeamHypothesis { token_ids, log_probs, finish_reason, score: _ } = hypothesis;
    GeneratedSample {
        sample_index: SampleIndex(rank),
        seed: 0,
        num_begun: 0,
        num_kept: 0,
        policy_versions: vec![(version, token_ids.len() as u32)],
        token_ids,
        reused: Vec::new(),
        log_probs,
        sampled_log_probs: Vec::new(),
        surviving_mass: Vec::new(),
        finish_reason,
        num_drafted: 0,
        num_accepted: 0,
        timings: SampleTimings::default(),
    }
}
