//! One step of reward-model training: pairs in, an update out, and accuracy on held-out pairs where it is due.

use crate::record_row::Columns;
use crate::{Controller, Error, Phase, RewardModelStage};
use temper_proto::{PreferencePair, TokenSequence};
use temper_telemetry::MetricsRow;
use temper_types::{PromptContent, PromptRow};

impl Controller {
    /// Take the next pairs, update, record.
    pub(crate) fn reward_model_step(&mut self, stage: &RewardModelStage) -> Result<MetricsRow, Error> {
        let start = self.clock.elapsed();
        let is_first = self.state.stage_step == 0;
        let before = if is_first { self.pair_accuracy(stage, "val_start")? } else { Columns::new() };
        let pairs = self.pairs(stage)?;
        let learning_rate =
            stage.optimizer.learning_rate * stage.schedule.multiplier(self.state.stage_step, stage.steps);
        self.enter(Phase::Update);
        let updated = self.services.trainer.update_reward_model(&pairs, learning_rate);
        let report = self.attribute(updated)?;
        let seconds = (self.clock.elapsed() - start).as_secs_f64();
        let mut row = MetricsRow::new(self.state.step + 1, &stage.name);
        row.set("loss", report.loss).set("grad_norm", report.grad_norm).set("lr", learning_rate);
        row.set_count("num_pairs", pairs.len() as u64).set("train_seconds", seconds);
        row.set("tokens_per_second", report.num_tokens as f64 / seconds.max(1e-9));
        report.metrics.iter().for_each(|(name, value)| {
            row.set(name, *value);
        });
        let (done, every) = (self.state.stage_step + 1, self.spec.validation.every_steps);
        let is_due = done == stage.steps || (every > 0 && done.is_multiple_of(every));
        let after = if is_due { self.pair_accuracy(stage, "val")? } else { Columns::new() };
        before.iter().chain(&after).for_each(|(name, value)| {
            row.set(name, *value);
        });
        self.enter(Phase::Record);
        self.finish_step(&mut row)?;
        Ok(row)
    }

    fn pairs(&mut self, stage: &RewardModelStage) -> Result<Vec<PreferencePair>, Error> {
        let seed = self.stage_seed();
        let num_rows = self.data.get(&stage.data).map_or(0, |rows| rows.len()) as u64;
        let draws = self.state.cursor.next_batch(seed, num_rows, stage.batch_size);
        draws.iter().map(|draw| self.pair(&stage.data, &self.data[&stage.data][draw.index as usize])).collect()
    }

    fn pair(&self, data: &str, row: &PromptRow) -> Result<PreferencePair, Error> {
        let (Some(chosen), Some(rejected)) = (&row.chosen, &row.rejected) else {
            let problem = format!("row {} has no `chosen` and `rejected`: expected both in every row", row.prompt_id);
            return Err(Error::config(format!("data.{data}"), problem));
        };
        let prompt_token_ids = self.attribute(self.services.text.encode_prompt(&row.prompt))?;
        let sequence = |response: &PromptContent| -> Result<TokenSequence, Error> {
            let response_token_ids = self.attribute(self.services.text.encode_response(response))?;
            let response_mask = vec![1; response_token_ids.len()];
            Ok(TokenSequence { prompt_token_ids: prompt_token_ids.clone(), response_token_ids, response_mask })
        };
        Ok(PreferencePair {
            chosen: sequence(chosen)?,
            rejected: sequence(rejected)?,
            margin: row.margin.unwrap_or(0.0),
        })
    }

    /// Share of held-out pairs whose chosen response scores higher, and the mean difference of scores.
    fn pair_accuracy(&mut self, stage: &RewardModelStage, prefix: &str) -> Result<Columns, Error> {
        let Some(rows) = self.data.get(&stage.held_out) else { return Ok(Columns::new()) };
        let pairs = rows.iter().map(|row| self.pair(&stage.held_out, row)).collect::<Result<Vec<_>, Error>>()?;
        self.enter(Phase::Validation);
        let sequences: Vec<TokenSequence> = pairs.into_iter().flat_map(|pair| [pair.chosen, pair.rejected]).collect();
        let scores = self.attribute(self.services.trainer.scores(&sequences))?;
        let margins: Vec<f64> = scores.chunks_exact(2).map(|pair| f64::from(pair[0]) - f64::from(pair[1])).collect();
        let count = margins.len().max(1) as f64;
        let num_correct = margins.iter().filter(|margin| **margin > 0.0).count() as f64;
        let name = &stage.held_out;
        Ok(vec![
            (format!("{prefix}/{name}/pair_accuracy"), num_correct / count),
            (format!("{prefix}/{name}/pair_margin_mean"), margins.iter().sum::<f64>() / count),
        ])
    }
}
