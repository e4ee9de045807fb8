//! From a plan to the arrays that a model reads.

use super::sample::OpenSample;
use crate::Error;
use crate::model::{Model, StepBatch, StepOutput};
use crate::scheduler::{Scheduler, Work};
use temper_tensor::{SampleRow, SeqSpan};

/// Arrays of a step, reused so that decoding does not allocate. The arrays that borrow from other owners are kept
/// empty between steps.
#[derive(Default)]
pub(super) struct StepBuffers {
    token_ids: Vec<u32>,
    positions: Vec<u32>,
    draw_rows: Vec<u32>,
    spans: Vec<SeqSpan<'static>>,
    draws: Vec<SampleRow<'static>>,
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
        self.gather_draws(scheduler, samples, &mut draws);
        let output = model.step(StepBatch {
            token_ids: &self.token_ids,
            positions: &self.positions,
            spans: &spans,
            draw_rows: &self.draw_rows,
            draws: &draws,
        });
        self.spans = recycle(spans);
        self.draws = recycle(draws);
        output
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

    fn gather_draws<'a>(
        &mut self,
        scheduler: &Scheduler,
        samples: &'a [Option<OpenSample>],
        draws: &mut Vec<SampleRow<'a>>,
    ) {
        self.draw_rows.clear();
        for draw in &scheduler.plan().draws {
            self.draw_rows.push(draw.row);
            draws.push(open(samples, draw.key.index()).draw(draw.slot));
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
