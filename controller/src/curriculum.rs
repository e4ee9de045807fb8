//! Which prompts come next: in the order of the passes over the data, or chosen by their running pass rates.

use crate::collect::reward_of;
use crate::record_row::{Columns, StepNumbers};
use crate::rollouts::Group;
use crate::{Controller, PolicyStage};
use temper_data::sampler::{Draw, PromptCursor, order};

impl Controller {
    /// The next prompts. With a curriculum, prompts out of the band are passed over; where a whole pass over the data
    /// has too few in it, those passed over are taken after all, in their order.
    pub(crate) fn draw_prompts(
        &mut self,
        stage: &PolicyStage,
        num_prompts: usize,
        numbers: &mut StepNumbers,
    ) -> Vec<Draw> {
        let seed = self.stage_seed();
        let num_rows = self.data.get(&stage.data).map_or(0, Vec::len) as u64;
        if !stage.curriculum.enable {
            return self.state.cursor.next_batch(seed, num_rows, num_prompts);
        }
        let mut walk = Walk { seed, num_rows, order: order(seed, self.state.cursor.epoch, num_rows) };
        let (mut taken, mut passed_over) = (Vec::new(), Vec::new());
        while taken.len() < num_prompts {
            let draw = walk.next(&mut self.state.cursor);
            if self.state.pass_rates.admit(&stage.curriculum, draw.index) {
                taken.push(draw);
            } else {
                passed_over.push(draw);
            }
            if passed_over.len() as u64 == num_rows {
                taken.extend(passed_over.drain(..).take(num_prompts - taken.len()));
            }
        }
        numbers.num_passed_over += passed_over.len() as u64;
        taken
    }

    /// Take in how a prompt fared, by its rewards before any penalty.
    pub(crate) fn observe_pass_rate(&mut self, stage: &PolicyStage, group: &Group) {
        if stage.curriculum.enable {
            let rewards: Vec<f64> = group.samples.iter().filter_map(reward_of).collect();
            self.state.pass_rates.observe(&stage.curriculum, group.row, &rewards);
        }
    }

    /// Metrics of the curriculum, where there is one.
    pub(crate) fn curriculum_columns(&self, stage: &PolicyStage, numbers: &StepNumbers) -> Columns {
        if !stage.curriculum.enable {
            return Columns::new();
        }
        let (num_known, mean) = self.state.pass_rates.summary();
        let named = [("num_prompts_known", num_known as f64), ("pass_rate_mean", mean)];
        let passed_over = [("num_prompts_passed_over", numbers.num_passed_over as f64)];
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
