//! One step of supervised fine-tuning: demonstrations in, an update out.

use crate::{Controller, Error, Phase, SftStage};
use temper_proto::{GlobalCounts, MiniBatch, TokenSequence, TrainRow};
use temper_telemetry::MetricsRow;
use temper_types::PromptRow;

impl Controller {
    /// Take the next demonstrations, update, record.
    pub(crate) fn sft_step(&mut self, stage: &SftStage) -> Result<MetricsRow, Error> {
        let start = self.clock.elapsed();
        let sequences = self.demonstrations(stage)?;
        let num_tokens = sequences.iter().map(|s| s.response_token_ids.len() as u64).sum();
        let num_rows = sequences.len() as u64;
        let learning_rate =
            stage.optimizer.learning_rate * stage.schedule.multiplier(self.state.stage_step, stage.steps);
        let batch = MiniBatch {
            rows: sequences.into_iter().map(TrainRow::demonstration).collect(),
            global: GlobalCounts { num_tokens, num_sequences: num_rows, num_rows, loss_scale_factor: 1.0 },
            temperature: 1.0,
            learning_rate,
        };
        self.enter(Phase::Update);
        self.unpublished = true;
        let updated = self.services.trainer.update(batch);
        let report = self.attribute(updated)?;
        let seconds = (self.clock.elapsed() - start).as_secs_f64();
        let mut row = MetricsRow::new(self.state.step + 1, &stage.name);
        row.set("loss", report.loss).set("entropy", report.entropy).set("grad_norm", report.grad_norm);
        row.set("lr", learning_rate).set_count("num_samples", num_rows).set("train_seconds", seconds);
        row.set("tokens_per_second", report.num_tokens as f64 / seconds.max(1e-9));
        let between_ranks = report.metrics.iter().filter(|(name, _)| name.starts_with("communication_"));
        between_ranks.for_each(|(name, value)| {
            row.set(name, *value);
        });
        self.enter(Phase::Record);
        self.finish_step(&mut row)?;
        Ok(row)
    }

    fn demonstrations(&mut self, stage: &SftStage) -> Result<Vec<TokenSequence>, Error> {
        let rows = self.data.get(&stage.data).map_or(&[][..], |rows| rows.as_slice());
        let seed = self.stage_seed();
        let draws = self.state.cursor.next_batch(seed, rows.len() as u64, stage.batch_size);
        draws.iter().map(|draw| self.demonstration(stage, &rows[draw.index as usize])).collect()
    }

    fn demonstration(&self, stage: &SftStage, row: &PromptRow) -> Result<TokenSequence, Error> {
        let Some(completion) = &row.completion else {
            let problem = format!("row {} has no `completion`: supervised stages need one in every row", row.prompt_id);
            return Err(Error::config(format!("data.{}", stage.data), problem));
        };
        let prompt_token_ids = self.attribute(self.services.text.encode_prompt(&row.prompt))?;
        let response_token_ids = self.attribute(self.services.text.encode_response(completion))?;
        let response_mask = vec![1; response_token_ids.len()];
        Ok(TokenSequence { prompt_token_ids, response_token_ids, response_mask })
    }
}
