//! From a plan to the arrays that a model reads.

use super::sample::OpenSample;
use crate::Error;
use crate::model::{Model, StepBatch, StepOutput};
use crate::scheduler::{Scheduler, Work};
use std::ops::Range;
use temper_tensor::{SampleRow, SeqSpan};

/// Ids with their occurrences in the response, ascending.
type Seen = Vec<(u32, u32)>;

/// Arrays of a step, reused so that decoding does not allocate. The arrays that borrow from other owners are kept
/// empty between steps.
#[derive(Default)]
pub(super) struct StepBuffers {
    token_ids: Vec<u32>,
    positions: Vec<u32>,
    draw_rows: Vec<u32>,
    spans: Vec<SeqSpan<'static>>,
    draws: Vec<SampleRow<'static>>,
    /// What penalties have seen after each drafted token of the samples that have penalties, in the plan's order.
    seen: Vec<Seen>,
    /// Ids ruled out for each draw of the samples that have bad words, one draw after another in the plan's order.
    banned_ids: Vec<u32>,
    /// Which of them are of which draw.
    banned: Vec<Range<usize>>,
    /// What the last step gave, where nobody holds it.
    pub output: StepOutput,
}

impl StepBuffers {
    /// Gather the rows and draws of the scheduler's plan and run the model over them.
    pub fn run<M: Model>(
        &mut self,
        model: &mut M,
        scheduler: &Scheduler,
        samples: &[Option<OpenSample>],
    ) -> Result<StepOutput, Error> {
        let mut spans = recycle(std::mem::take(&mut self.spans));
        let mut draws = recycle(std::mem::take(&mut self.draws));
        self.gather_rows(scheduler, samples, &mut spans);
        self.gather_seen(scheduler, samples);
        self.gather_banned(scheduler, samples);
        gather_draws(scheduler, samples, (&self.seen, &self.banned, &self.banned_ids), &mut self.draw_rows, &mut draws);
        gather_scored(scheduler, samples, &mut self.draw_rows, &mut draws);
        let batch = StepBatch {
            token_ids: &self.token_ids,
            positions: &self.positions,
            spans: &spans,
            draw_rows: &self.draw_rows,
            draws: &draws,
        };
        let done = model.step(batch, &mut self.output);
        self.spans = recycle(spans);
        self.draws = recycle(draws);
        done.map(|()| std::mem::take(&mut self.output))
    }

    fn gather_rows<'a>(
        &mut self,
        scheduler: &'a Scheduler,
        samples: &[Option<OpenSample>],
        spans: &mut Vec<SeqSpan<'a>>,
    ) {
        self.token_ids.clear();
        self.positions.clear();
        for &Work { key, first_slot, num_rows } in &scheduler.plan().work {
            let (row_start, end) = (self.token_ids.len(), first_slot + num_rows);
            open(samples, key.index()).extend_with_tokens(first_slot..end, &mut self.token_ids);
            self.positions.extend(first_slot as u32..end as u32);
            spans.push(SeqSpan { row_start, num_rows, first_slot, blocks: scheduler.block_table(key) });
        }
    }

    fn gather_seen(&mut self, scheduler: &Scheduler, samples: &[Option<OpenSample>]) {
        self.seen.clear();
        for draws in scheduler.plan().draws_by_sequence() {
            open(samples, draws[0].key.index()).extend_with_seen(draws.len() - 1, &mut self.seen);
        }
    }

    fn gather_banned(&mut self, scheduler: &Scheduler, samples: &[Option<OpenSample>]) {
        self.banned.clear();
        self.banned_ids.clear();
        for draw in &scheduler.plan().draws {
            let sample = open(samples, draw.key.index());
            if sample.has_bad_words() {
                let start = self.banned_ids.len();
                sample.extend_with_banned(draw.slot, &mut self.banned_ids);
                self.banned.push(start..self.banned_ids.len());
            }
        }
    }
}

fn gather_draws<'a>(
    scheduler: &Scheduler,
    samples: &'a [Option<OpenSample>],
    (seen, banned, banned_ids): (&'a [Seen], &[Range<usize>], &'a [u32]),
    draw_rows: &mut Vec<u32>,
    out: &mut Vec<SampleRow<'a>>,
) {
    draw_rows.clear();
    let (mut drafted, mut banned) = (seen.iter(), banned.iter());
    for draws in scheduler.plan().draws_by_sequence() {
        let sample = open(samples, draws[0].key.index());
        for (index, draw) in draws.iter().enumerate() {
            let has_own = index > 0 && !sample.seen().is_empty();
            let seen = if has_own { drafted.next().map_or(&[][..], Vec::as_slice) } else { sample.seen() };
            draw_rows.push(draw.row);
            let own = if sample.has_bad_words() { banned.next() } else { None };
            let banned = own.map_or_else(|| sample.banned_stops(draw.slot), |own| &banned_ids[own.clone()]);
            out.push(sample.draw(draw.slot, seen, banned));
        }
    }
}

/// Behind all draws, one for each token of an earlier response that may be taken: it allows no other, so that its
/// log-prob is known.
fn gather_scored<'a>(
    scheduler: &Scheduler,
    samples: &'a [Option<OpenSample>],
    draw_rows: &mut Vec<u32>,
    out: &mut Vec<SampleRow<'a>>,
) {
    for draw in &scheduler.plan().draws {
        let sample = open(samples, draw.key.index());
        if let Some(token_id) = sample.earlier_token(draw.slot) {
            draw_rows.push(draw.row);
            let plain = sample.draw(draw.slot, &[], &[]);
            out.push(SampleRow { allowed_ids: std::slice::from_ref(token_id), ..plain });
        }
    }
}

fn open(samples: &[Option<OpenSample>], index: usize) -> &OpenSample {
    samples[index].as_ref().expect("a planned sample is open")
}

/// The memory of a vector under another lifetime. `map` never runs, and collecting reuses the allocation in place.
fn recycle<A, B>(mut vector: Vec<A>) -> Vec<B> {
    vector.clear();
    vector.into_iter().map(|_| unreachable!("the vector is empty")).collect()
}
