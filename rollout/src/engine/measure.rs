//! What steps cost by their number of rows, before the first one: drafts are chosen by it from the first step on.

use super::Engine;
use crate::model::{Model, StepBatch, StepOutput};
use crate::{Error, Speculation};
use std::time::Duration;
use temper_tensor::{SampleRow, SeqSpan};

/// Most rows of a step that is measured; what more cost is learned from the steps themselves.
const MAX_ROWS: usize = 64;
/// No larger step is measured once this much time was spent. A step that takes longer is a large model's, of which the
/// steps themselves tell more than enough.
const MAX_TIME: Duration = Duration::from_millis(250);

impl<M: Model> Engine<M> {
    /// Time steps of 1, 2, 4, ... sequences that draw, where the drafters want to know. Only while the pool holds
    /// nothing: their K/V go where the first prompts' will.
    pub(super) fn measure_steps(&mut self) -> Result<(), Error> {
        if self.num_steps > 0 || !self.speculation.as_ref().is_some_and(Speculation::lacks_step_times) {
            return Ok(());
        }
        let limits = self.options.limits;
        let most = MAX_ROWS.min(2 * limits.max_num_seqs).min(limits.max_batch_tokens).min(limits.num_blocks);
        let begin = self.options.clock.now();
        // The first step takes memory and touches every weight.
        self.time_step(1)?;
        let sizes = std::iter::successors(Some(1), |rows| Some(2 * rows)).take_while(|rows| *rows <= most);
        let mut times = Vec::new();
        for num_rows in sizes {
            times.push((num_rows, self.time_step(num_rows)?.min(self.time_step(num_rows)?)));
            if self.options.clock.now().saturating_sub(begin) >= MAX_TIME {
                break;
            }
        }
        // All or none: where a step failed they are measured again.
        if let Some(speculation) = &mut self.speculation {
            times.into_iter().for_each(|(num_rows, elapsed)| speculation.note_step(num_rows, elapsed));
        }
        Ok(())
    }

    /// Time that a step of `num_rows` sequences takes which fill a block each.
    fn time_step(&mut self, num_rows: usize) -> Result<Duration, Error> {
        let first_slot = (self.options.limits.block_size - 1).min(self.model.limits().max_positions - 1);
        let token_ids = vec![0; num_rows];
        let positions = vec![first_slot as u32; num_rows];
        let draw_rows: Vec<u32> = (0..num_rows as u32).collect();
        let spans: Vec<SeqSpan<'_>> = draw_rows
            .iter()
            .map(|block| {
                let (row_start, blocks) = (*block as usize, std::slice::from_ref(block));
                SeqSpan { row_start, num_rows: 1, first_slot, blocks }
            })
            .collect();
        let draws = vec![SampleRow::plain(1.0, 0.5); num_rows];
        let begin = self.options.clock.now();
        let batch = StepBatch {
            token_ids: &token_ids,
            positions: &positions,
            spans: &spans,
            draw_rows: &draw_rows,
            draws: &draws,
        };
        self.model.step(batch, &mut StepOutput::default())?;
        Ok(self.options.clock.now().saturating_sub(begin))
    }
}
