//! Which prompts come next: in the order of the passes over the data, or chosen by their running pass rates.

use crate::collect::{Collector, reward_of};
use crate::record_row::Columns;
use crate::rollouts::Group;
use temper_data::sampler::{Draw, PromptCursor, order};

impl Collector {
    /// The next prompts. With a curriculum, prompts out of the band are passed over; where a whole pass over the data
    /// has too few in it, those passed over are taken after all, in their order.
    pub(crate) fn draw_prompts(&mut self, num_prompts: usize) -> Vec<Draw> {
        let (seed, num_rows) = (self.seed, self.rows.len() as u64);
        let (draws, curriculum) = (&mut self.draws, &self.stage.curriculum);
        if !curriculum.enable {
            return draws.cursor.next_batch(seed, num_rows, num_prompts);
        }
        let mut walk = Walk { seed, num_rows, order: order(seed, draws.cursor.epoch, num_rows) };
        let (mut taken, mut passed_over) = (Vec::new(), Vec::new());
        while taken.len() < num_prompts {
            let draw = walk.next(&mut draws.cursor);
            if draws.pass_rates.admit(curriculum, draw.index) {
                taken.push(draw);
            } else {
                passed_over.push(draw);
            }
            if passed_over.len() as u64 == num_rows {
                taken.extend(passed_over.drain(..).take(num_prompts - taken.len()));
            }
        }
        self.batch.numbers.num_passed_over += passed_over.len() as u64;
        taken
    }

    /// Take in how a prompt fared, by its rewards before any penalty.
    pub(crate) fn observe_pass_rate(&mut self, group: &Group) {
        if self.stage.curriculum.enable {
            let rewards: Vec<f64> = group.samples.iter().filter_map(reward_of).collect();
            self.draws.pass_rates.observe(&self.stage.curriculum, group.row, &rewards);
        }
    }

    /// Metrics of the curriculum, where there is one.
    pub(crate) fn curriculum_columns(&self) -> Columns {
        if !self.stage.curriculum.enable {
            return Columns::new();
        }
        let (num_known, mean) = self.draws.pass_rates.summary();
        let named = [("num_prompts_known", num_known as f64), ("pass_rate_mean", mean)];
        let passed_over = [("num_prompts_passed_over", self.batch.numbers.num_passed_over as f64)];
        named.into_iter().chain(passed_over).map(|(name, value)| (format!("curriculum/{name}"), value)).collect()
    }
}

/// One step at a time through the shuffled passes.
struct Walk {
    seed: u64,
    num_rows: u64,
    order: Vec<u64>,
}

impl Walk {
    fn next(&mut self, cursor: &mut PromptCursor) -> Draw {
        if cursor.position >= self.num_rows {
            *cursor = PromptCursor { epoch: cursor.epoch + 1, position: 0 };
            self.order = order(self.seed, cursor.epoch, self.num_rows);
        }
        let index = self.order[cursor.position as usize];
        cursor.position += 1;
        Draw { epoch: cursor.epoch, index }
    }
}
