//! Beam search, for evaluation: the most likely responses instead of drawn ones.
//!
//! Owns: the beams of one prompt and their block tables. It computes over a model's pool that nothing else uses
//! meanwhile. Beams that continue the same one share its blocks, but for the one they write next.
//!
//! # The search
//! Beams of equal length are extended by their most likely ids each, `width` beside those that may be stop ids and no
//! fewer than 2 `width`. Of all extensions, by falling sum of log-probs (ties: the older beam, then the lower id), the
//! first `width` that do not end go on; one that ends with a stop id is a result where it stands among the first
//! `width`. The search is over when `width` results are there that no running beam can beat, or at the longest
//! response. Results are ordered by `sum of log-probs / length^length_penalty`, the stop id counted.
//!
//! # Source
//! The rules of transformers' `generate` with `early_stopping = "never"`. Departure: the bound on what a running beam
//! can still reach holds for negative penalties too.

use crate::block_manager::{BlockCopy, BlockManager, BlockTable, OutOfBlocks};
use crate::model::{Model, ModelLimits, StepBatch, StepOutput};
use crate::{Error, SchedulerLimits};
use std::collections::BTreeSet;
use temper_tensor::{SampleRow, Sampled, SeqSpan};
use temper_types::{FinishReason, PolicyVersion};

/// What is searched for.
#[derive(Debug, Clone, PartialEq)]
pub struct BeamSpec {
    /// Beams that are followed, and results at most; at least 1.
    pub width: usize,
    /// Power of the length that divides a sum of log-probs, finite: 0 compares sums, 1 means; more prefers longer
    /// responses.
    pub length_penalty: f64,
    /// Longest response; at least 1.
    pub max_new_tokens: usize,
    /// Ids that end a response.
    pub stop_token_ids: Vec<u32>,
}

/// A result of a search.
#[derive(Debug, Clone, PartialEq)]
pub struct BeamHypothesis {
    /// Ids, the stop id included.
    pub token_ids: Vec<u32>,
    /// log softmax(logits) of each id after the vocabulary mask.
    pub log_probs: Vec<f32>,
    /// Sum of the log-probs over length^length_penalty.
    pub score: f64,
    /// Why it ended: a stop id or the longest response.
    pub finish_reason: FinishReason,
}

/// Search for the best responses to `prompt`, best first. The contents of the model's pool are overwritten.
///
/// # Errors
/// Where the spec is empty, prompt and responses do not fit the model or the pool, or the model fails.
pub(crate) fn beam_search<M: Model>(
    model: &mut M,
    limits: SchedulerLimits,
    prompt: &[u32],
    spec: &BeamSpec,
) -> Result<(Vec<BeamHypothesis>, PolicyVersion), Error> {
    check(model, limits, prompt, spec)?;
    let stop_ids: BTreeSet<u32> = spec.stop_token_ids.iter().copied().collect();
    let num_candidates = (spec.width + spec.width.max(stop_ids.len())).min(model.limits().num_drawable_ids);
    let blocks = BlockManager::new(limits.num_blocks, limits.block_size);
    let mut search = Search { model, limits, prompt, spec, stop_ids, blocks, beams: Vec::new(), results: Vec::new() };
    let mut version = search.prefill()?;
    loop {
        let candidates = search.candidates(num_candidates)?;
        let copies = search.extend(&candidates).map_err(|OutOfBlocks| out_of_blocks())?;
        if search.is_over() {
            return Ok((search.results, version));
        }
        search.model.copy_blocks(&copies);
        version = search.compute()?;
    }
}

fn out_of_blocks() -> Error {
    Error::Model("beam search ran out of the blocks that were counted for it".to_owned())
}

fn check<M: Model>(model: &M, limits: SchedulerLimits, prompt: &[u32], spec: &BeamSpec) -> Result<(), Error> {
    let invalid =
        |key, value: usize, expected: String| Error::InvalidConfig { key, value: value.to_string(), expected };
    let ModelLimits { vocab_size, max_positions, .. } = model.limits();
    if spec.width == 0 || spec.width > limits.max_batch_tokens {
        return Err(invalid("beam.width", spec.width, format!("1 to {}", limits.max_batch_tokens)));
    }
    if spec.max_new_tokens == 0 {
        return Err(invalid("beam.max_new_tokens", 0, "1 or more".to_owned()));
    }
    if !spec.length_penalty.is_finite() {
        let (key, value, expected) = ("beam.length_penalty", spec.length_penalty.to_string(), "a finite number");
        return Err(Error::InvalidConfig { key, value, expected: expected.to_owned() });
    }
    if prompt.is_empty() {
        return Err(invalid("beam.prompt", 0, "at least one token".to_owned()));
    }
    if let Some(id) = prompt.iter().chain(&spec.stop_token_ids).find(|id| **id as usize >= vocab_size) {
        return Err(invalid("beam.token_id", *id as usize, format!("less than {vocab_size}")));
    }
    let num_slots = prompt.len() + spec.max_new_tokens - 1;
    if num_slots > max_positions {
        return Err(invalid("beam.max_new_tokens", spec.max_new_tokens, format!("{max_positions} positions in all")));
    }
    // While beams are replaced, old and new tables name blocks; full ones of the prompt are shared by all.
    let own = num_slots.div_ceil(limits.block_size) - prompt.len() / limits.block_size;
    let needed = prompt.len() / limits.block_size + 2 * spec.width * own;
    if needed > limits.num_blocks {
        let expected = format!("one that needs at most {} of the pool's blocks, not {needed}", limits.num_blocks);
        return Err(invalid("beam.width", spec.width, expected));
    }
    Ok(())
}

/// A response under way. Its last id has no K/V yet.
struct Beam {
    token_ids: Vec<u32>,
    log_probs: Vec<f32>,
    sum: f64,
    table: BlockTable,
    /// Row of the last step whose logits continue it.
    row: u32,
}

/// One more id for a beam.
#[derive(Clone, Copy)]
struct Candidate {
    beam: usize,
    token_id: u32,
    log_prob: f32,
    sum: f64,
}

struct Search<'a, M> {
    model: &'a mut M,
    limits: SchedulerLimits,
    prompt: &'a [u32],
    spec: &'a BeamSpec,
    stop_ids: BTreeSet<u32>,
    blocks: BlockManager,
    beams: Vec<Beam>,
    /// Best first, `width` at most.
    results: Vec<BeamHypothesis>,
}

impl<M: Model> Search<'_, M> {
    /// Store the prompt; one empty beam stands behind its last row.
    fn prefill(&mut self) -> Result<PolicyVersion, Error> {
        let mut table = BlockTable::default();
        self.blocks.grow(&mut table, self.prompt.len()).map_err(|OutOfBlocks| out_of_blocks())?;
        let mut version = PolicyVersion::default();
        let (mut first_slot, mut row) = (0, 0);
        for chunk in self.prompt.chunks(self.limits.prefill_chunk.min(self.limits.max_batch_tokens)) {
            let num_rows = chunk.len();
            let positions: Vec<u32> = (first_slot as u32..(first_slot + num_rows) as u32).collect();
            let span = SeqSpan { row_start: 0, num_rows, first_slot, blocks: table.blocks() };
            let batch =
                StepBatch { token_ids: chunk, positions: &positions, spans: &[span], draw_rows: &[], draws: &[] };
            let mut output = StepOutput::default();
            self.model.step(batch, &mut output)?;
            version = output.version;
            first_slot += num_rows;
            row = num_rows as u32 - 1;
        }
        self.beams.push(Beam { token_ids: Vec::new(), log_probs: Vec::new(), sum: 0.0, table, row });
        Ok(version)
    }

    /// Compute the row of every beam's last id.
    fn compute(&mut self) -> Result<PolicyVersion, Error> {
        let slot = self.prompt.len() + self.beams[0].token_ids.len() - 1;
        let last = |beam: &Beam| beam.token_ids.last().copied().unwrap_or_default();
        let token_ids: Vec<u32> = self.beams.iter().map(last).collect();
        let positions = vec![slot as u32; token_ids.len()];
        let tables = self.beams.iter().enumerate();
        let spans = tables.map(|(row_start, beam)| SeqSpan {
            row_start,
            num_rows: 1,
            first_slot: slot,
            blocks: beam.table.blocks(),
        });
        let spans: Vec<SeqSpan<'_>> = spans.collect();
        let batch =
            StepBatch { token_ids: &token_ids, positions: &positions, spans: &spans, draw_rows: &[], draws: &[] };
        let mut output = StepOutput::default();
        self.model.step(batch, &mut output)?;
        self.beams.iter_mut().zip(0..).for_each(|(beam, row)| beam.row = row);
        Ok(output.version)
    }

    /// The `num` most likely ids of every beam, all together by falling sum.
    fn candidates(&mut self, num: usize) -> Result<Vec<Candidate>, Error> {
        let rows: Vec<u32> = self.beams.iter().map(|beam| beam.row).collect();
        let mut banned: Vec<Vec<u32>> = vec![Vec::with_capacity(num); rows.len()];
        let mut out = Vec::with_capacity(num * rows.len());
        for _ in 0..num {
            let draws: Vec<SampleRow<'_>> = banned.iter().map(|banned_ids| most_likely(banned_ids)).collect();
            let drawn = self.model.draw_again(&rows, &draws)?;
            for (beam, Sampled { token_id, log_prob, .. }) in drawn.into_iter().enumerate() {
                if log_prob.is_nan() {
                    return Err(Error::Model(format!(
                        "the log-prob of token {token_id} is no number: nor are the weights"
                    )));
                }
                banned[beam].push(token_id);
                out.push(Candidate { beam, token_id, log_prob, sum: self.beams[beam].sum + f64::from(log_prob) });
            }
        }
        let order = |a: &Candidate, b: &Candidate| {
            b.sum.total_cmp(&a.sum).then_with(|| (a.beam, a.token_id).cmp(&(b.beam, b.token_id)))
        };
        out.sort_by(order);
        Ok(out)
    }

    /// Replace the beams by their best extensions, and note those that end. Gives the copies that the next rows need.
    fn extend(&mut self, candidates: &[Candidate]) -> Result<Vec<BlockCopy>, OutOfBlocks> {
        let is_longest = self.beams[0].token_ids.len() + 1 == self.spec.max_new_tokens;
        let mut chosen = Vec::new();
        for (rank, candidate) in candidates.iter().enumerate() {
            let is_stop = self.stop_ids.contains(&candidate.token_id);
            if is_stop && rank < self.spec.width {
                self.add_result(candidate, FinishReason::Stop);
            } else if !is_stop && chosen.len() < self.spec.width {
                chosen.push(*candidate);
            }
        }
        if is_longest {
            chosen.iter().for_each(|candidate| self.add_result(candidate, FinishReason::Length));
            chosen.clear();
        }
        self.replace_beams(&chosen)
    }

    fn replace_beams(&mut self, chosen: &[Candidate]) -> Result<Vec<BlockCopy>, OutOfBlocks> {
        let mut beams = Vec::with_capacity(chosen.len());
        for candidate in chosen {
            let parent = &self.beams[candidate.beam];
            let mut table = BlockTable::default();
            self.blocks.fork(&parent.table, parent.table.blocks().len(), &mut table);
            let (token_ids, log_probs) = with(parent, candidate);
            beams.push(Beam { token_ids, log_probs, sum: candidate.sum, table, row: 0 });
        }
        for mut old in std::mem::replace(&mut self.beams, beams) {
            self.blocks.release(&mut old.table);
        }
        let mut copies = Vec::new();
        for beam in &mut self.beams {
            let slot = self.prompt.len() + beam.token_ids.len() - 1;
            self.blocks.grow(&mut beam.table, slot + 1)?;
            copies.extend(self.blocks.make_writable(&mut beam.table, slot)?);
        }
        Ok(copies)
    }

    fn add_result(&mut self, candidate: &Candidate, finish_reason: FinishReason) {
        let (token_ids, log_probs) = with(&self.beams[candidate.beam], candidate);
        let score = self.score(candidate.sum, token_ids.len());
        let at = self.results.partition_point(|better| better.score >= score);
        self.results.insert(at, BeamHypothesis { token_ids, log_probs, score, finish_reason });
        self.results.truncate(self.spec.width);
    }

    fn score(&self, sum: f64, len: usize) -> f64 {
        sum / (len as f64).powf(self.spec.length_penalty)
    }

    /// True where no running beam can become a result.
    fn is_over(&self) -> bool {
        let Some(best) = self.beams.first() else { return true };
        let is_full = self.results.len() == self.spec.width;
        // A sum only falls. Of the lengths ahead, the one that divides it by most is the best it can get.
        let len = if self.spec.length_penalty > 0.0 { self.spec.max_new_tokens } else { best.token_ids.len() + 1 };
        is_full && self.results.last().is_some_and(|worst| worst.score >= self.score(best.sum, len))
    }
}

fn with(parent: &Beam, candidate: &Candidate) -> (Vec<u32>, Vec<f32>) {
    let token_ids = parent.token_ids.iter().copied().chain([candidate.token_id]).collect();
    let log_probs = parent.log_probs.iter().copied().chain([candidate.log_prob]).collect();
    (token_ids, log_probs)
}

/// A draw of the most likely id that is not banned, the lowest of equals.
fn most_likely(banned_ids: &[u32]) -> SampleRow<'_> {
    SampleRow { banned_ids, ..SampleRow::plain(0.0, 0.5) }
}
