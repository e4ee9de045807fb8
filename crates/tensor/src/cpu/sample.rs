//! Drawing tokens: a pure function of logits, parameters and one uniform number (inverse CDF over the vocabulary).
//!
//! # The law
//! The bias is added to raw logits. Then penalties act: repetition (divides a positive, multiplies a negative logit of
//! every id in `seen`), then frequency and presence (subtracted for ids with a count above 0). Ids that are banned, or
//! not among the allowed where some are, get no mass. Then temperature, min-p (ids less likely than `min_p` times the
//! most likely go), top-k (exactly k stay) and top-p (the smallest most likely prefix whose mass, renormalised, reaches
//! `top_p`; the id that crosses stays). Ties go to the lower id. An id whose weight underflows to 0 is never drawn.
//!
//! At temperature 0 the most likely id after bias, penalties and bans is taken; filters cannot drop it, and the law
//! behind the reported numbers is the one at temperature 1 with these alone.

mod filter;

use super::CpuDevice;
use super::attention::with_scratch;
use super::lm_head::{BLOCK, Laws, MaxOf, Moments, Weights, for_chunks};
use super::math::ln;
use super::parallel::SharedMut;
use super::reused::with_reused;
use super::simd::Isa;
use crate::{PackedLinear, SampleRow, Sampled};
use filter::{ban, keep_ids, penalise};
use std::cell::Cell;

/// One row's masked logits and their law.
struct Row<'a> {
    isa: Isa,
    logits: &'a [f32],
    params: &'a SampleRow<'a>,
    laws: &'a Laws,
    index: usize,
    inv_temperature: f32,
}

/// The factor on logits; temperature 0 reports at temperature 1.
fn inv_temperature(params: &SampleRow<'_>) -> f32 {
    if params.temperature > 0.0 { 1.0 / params.temperature } else { 1.0 }
}

/// True where logits of ids that keep mass may change.
fn shifts_logits(params: &SampleRow<'_>) -> bool {
    !params.logit_bias.is_empty()
        || params.repetition_penalty != 1.0
        || params.presence_penalty != 0.0
        || params.frequency_penalty != 0.0
}

/// Memory of a call.
#[derive(Default)]
struct Memory {
    inv_temperatures: Vec<f32>,
    laws: Laws,
}

thread_local! {
    static MEMORY: Cell<Memory> = Cell::default();
    /// Ids that survive truncation.
    static KEPT: Cell<Vec<u32>> = const { Cell::new(Vec::new()) };
}

/// Draw one token per row of `hidden[T, D]` into `drawn`, which is overwritten.
pub(crate) fn sample_rows(
    dev: &CpuDevice,
    hidden: &[f32],
    (head, masked_ids): (&PackedLinear, &[u32]),
    rows: &[SampleRow<'_>],
    drawn: &mut Vec<Sampled>,
) {
    let vocab = head.shape().n;
    assert_eq!(hidden.len(), rows.len() * head.shape().k, "one set of parameters per hidden row");
    drawn.clear();
    drawn.resize(rows.len(), Sampled { token_id: 0, log_prob: 0.0, sampled_log_prob: 0.0, surviving_mass: 1.0 });
    for_chunks(dev, hidden, head, masked_ids, |first, logits| {
        let chunk = first..first + logits.len() / vocab;
        sample_logits(dev, logits, &rows[chunk.clone()], &mut drawn[chunk]);
    });
}

/// Draw one token per row of masked logits.
pub(crate) fn sample_logits(dev: &CpuDevice, logits: &[f32], rows: &[SampleRow<'_>], drawn: &mut [Sampled]) {
    let vocab = logits.len() / rows.len().max(1);
    with_reused(&MEMORY, |Memory { inv_temperatures, laws }| {
        inv_temperatures.clear();
        inv_temperatures.extend(rows.iter().map(inv_temperature));
        laws.take(dev, logits, inv_temperatures, Moments::Skip);
        let (laws, inv_temperatures) = (&*laws, &*inv_temperatures);
        let shared = SharedMut::new(drawn);
        dev.pool.run(rows.len(), &|index| {
            let row = Row {
                isa: dev.isa,
                logits: &logits[index * vocab..(index + 1) * vocab],
                params: &rows[index],
                laws,
                index,
                inv_temperature: inv_temperatures[index],
            };
            // SAFETY: every row has an element of its own.
            unsafe { shared.set(index, row.draw()) };
        });
    });
}

impl Row<'_> {
    fn log_prob(&self, id: usize) -> f32 {
        self.laws.log_prob(self.index, self.logits[id], self.inv_temperature)
    }

    fn draw(&self) -> Sampled {
        let p = self.params;
        let truncated = p.top_p < 1.0 || p.top_k > 0 || p.min_p > 0.0;
        let bans = !p.banned_ids.is_empty() || !p.allowed_ids.is_empty();
        if shifts_logits(p) || bans || (truncated && p.temperature > 0.0) {
            return with_reused(&KEPT, |kept| {
                with_scratch(2 * self.logits.len(), |memory| self.draw_processed(memory, kept))
            });
        }
        let id = if p.temperature > 0.0 { self.draw_untruncated() } else { argmax(self.logits) };
        let log_prob = self.log_prob(id);
        Sampled { token_id: id as u32, log_prob, sampled_log_prob: log_prob, surviving_mass: 1.0 }
    }

    /// Inverse CDF over block sums, then inside the block over the ids' own weights.
    fn draw_untruncated(&self) -> usize {
        let sums = self.laws.block_sums(self.index);
        let target = self.params.uniform * self.laws.total[self.index];
        let (mut before, mut chosen) = (0f64, None);
        for (block, sum) in sums.iter().enumerate().filter(|(_, sum)| **sum > 0.0) {
            chosen = Some((block, before));
            before += f64::from(*sum);
            if target < before {
                break;
            }
        }
        // No block has mass only where logits are not finite; the log-prob says so.
        let Some((block, before)) = chosen else { return 0 };
        let start = block * BLOCK;
        let logits = &self.logits[start..self.logits.len().min(start + BLOCK)];
        let mut memory = [0f32; BLOCK];
        let weights = &mut memory[..logits.len()];
        self.weigh(logits, self.laws.max[self.index], weights);
        // The block's f32 sum and its f64 sum differ by rounding; scaling keeps every id's share.
        let exact: f64 = weights.iter().map(|w| f64::from(*w)).sum();
        let inside = (target - before) * (exact / f64::from(sums[block]));
        let weight_of = |i: usize| weights[i];
        start + walk(0..weights.len(), weight_of, inside).unwrap_or(0)
    }

    fn weigh(&self, logits: &[f32], max: f32, out: &mut [f32]) {
        self.isa.run(Weights { logits, inv_temperature: self.inv_temperature, max, out });
    }

    /// Draw under bias, penalties, bans and truncation. `memory` has room for two rows.
    fn draw_processed(&self, memory: &mut [f32], kept: &mut Vec<u32>) -> Sampled {
        let p = self.params;
        let (logits, weights) = memory.split_at_mut(self.logits.len());
        logits.copy_from_slice(self.logits);
        penalise(p, logits);
        ban(p, logits);
        let max = self.isa.run(MaxOf(logits)) * self.inv_temperature;
        self.weigh(logits, max, weights);
        keep_ids(p, logits, weights, kept);
        let weight_of = |i: usize| weights[kept[i] as usize];
        let total: f64 = (0..kept.len()).map(|i| f64::from(weight_of(i))).sum();
        let id = if p.temperature > 0.0 {
            walk(0..kept.len(), weight_of, p.uniform * total).map_or_else(|| argmax(logits), |i| kept[i] as usize)
        } else {
            argmax(logits)
        };
        let scaled = f64::from(logits[id] * self.inv_temperature);
        let sampled_log_prob = ((scaled - f64::from(max)) - ln(total)) as f32;
        let surviving_mass = self.surviving_mass(kept, weights);
        let log_prob = self.log_prob(id);
        let unchanged = surviving_mass == 1.0 && !shifts_logits(p);
        let sampled_log_prob = if unchanged { log_prob } else { sampled_log_prob };
        Sampled { token_id: id as u32, log_prob, sampled_log_prob, surviving_mass }
    }

    /// Mass of `kept` under the untruncated law; exactly 1 where no id with mass is missing.
    fn surviving_mass(&self, kept: &[u32], weights: &mut [f32]) -> f32 {
        self.weigh(self.logits, self.laws.max[self.index], weights);
        let all = weights.iter().filter(|w| **w > 0.0).count();
        let with_mass = kept.iter().filter(|id| weights[**id as usize] > 0.0).count();
        if all == with_mass {
            return 1.0;
        }
        let mass: f64 = kept.iter().map(|id| f64::from(weights[*id as usize])).sum();
        (mass / self.laws.total[self.index]).min(1.0) as f32
    }
}

/// The first index at which the running sum of weights exceeds `target`; else the last one with weight.
fn walk(indices: std::ops::Range<usize>, weight_of: impl Fn(usize) -> f32, target: f64) -> Option<usize> {
    let (mut sum, mut last) = (0f64, None);
    for index in indices.filter(|index| weight_of(*index) > 0.0) {
        sum += f64::from(weight_of(index));
        last = Some(index);
        if target < sum {
            break;
        }
    }
    last
}

/// The lowest id among the largest logits; 0 where none is comparable.
fn argmax(logits: &[f32]) -> usize {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] || (logits[best].is_nan() && !logit.is_nan()) {
            best = id;
        }
    }
    best
}

#[cfg(test)]
mod tests;
