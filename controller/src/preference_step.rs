//! One step of learning from a dataset of preferences: pairs or labelled responses in, an update out.
//!
//! consumes: units of the stage's dataset, in the order of its cursor
//! produces: one optimizer step, a row of metrics; a held-out accuracy where it is due
//! waits for: nothing but the trainer

use crate::preference_data::{Response, Unit};
use crate::record_row::Columns;
use crate::{Controller, Error, Phase, PreferenceStage};
use temper_algos::Objective;
use temper_algos::preference::{PreferenceForm, ResponseLogProb};
use temper_proto::{GlobalCounts, MiniBatch, PolicyRole, TokenSequence, TrainRow};
use temper_telemetry::MetricsRow;

/// The tokenized rows of the stage under way. Derived from data and reference: made anew after a resume.
#[derive(Debug)]
pub(crate) struct PreferenceCache {
    /// Index of the stage.
    stage: usize,
    units: Vec<Unit>,
    held_out: Vec<Unit>,
}

impl Controller {
    /// Take the next units, update, record, and measure the held-out accuracy where it is due.
    pub(crate) fn preference_step(&mut self, stage: &PreferenceStage) -> Result<MetricsRow, Error> {
        let form = stage.form(&stage.name)?;
        self.fill_preference_cache(stage, form)?;
        let start = self.clock.elapsed();
        let learning_rate =
            stage.optimizer.learning_rate * stage.schedule.multiplier(self.state.stage_step, stage.steps);
        let mut row = MetricsRow::new(self.state.step + 1, &stage.name);
        if self.state.stage_step == 0 {
            set_columns(&mut row, self.held_out_columns(stage, "val_start")?);
        }
        let rows = self.preference_rows(stage, form)?;
        let num_rows = rows.len() as u64;
        let num_tokens = rows.iter().map(|r| r.sequence.response_token_ids.len() as u64).sum();
        let batch = MiniBatch {
            rows,
            global: GlobalCounts { num_tokens, num_sequences: num_rows, num_rows, loss_scale_factor: 1.0 },
            temperature: 1.0,
            learning_rate,
        };
        self.enter(Phase::Update);
        self.unpublished = true;
        let updated = self.services.trainer.update(batch);
        let report = self.attribute(updated)?;
        let seconds = (self.clock.elapsed() - start).as_secs_f64();
        row.set("loss", report.loss).set("entropy", report.entropy).set("grad_norm", report.grad_norm);
        row.set("lr", learning_rate).set_count("num_samples", stage.batch_size as u64).set("train_seconds", seconds);
        row.set("tokens_per_second", report.num_tokens as f64 / seconds.max(1e-9));
        report.metrics.iter().for_each(|(name, value)| {
            row.set(name, *value);
        });
        if self.held_out_is_due(stage) {
            set_columns(&mut row, self.held_out_columns(stage, "val")?);
        }
        self.enter(Phase::Record);
        self.finish_step(&mut row)?;
        Ok(row)
    }

    /// Tokenize the stage's datasets and, where asked for, compute the reference's log-probs of all of them.
    fn fill_preference_cache(&mut self, stage: &PreferenceStage, form: PreferenceForm) -> Result<(), Error> {
        if self.preferences.as_ref().is_some_and(|cache| cache.stage == self.state.stage) {
            return Ok(());
        }
        let mut units = self.units(form, &stage.data)?;
        let mut held_out = match stage.held_out.as_str() {
            "" => Vec::new(),
            name => self.units(form.held_out(), name)?,
        };
        held_out.iter_mut().for_each(|unit| unit.truncate(2));
        if stage.objective.needs_reference() {
            self.enter(Phase::LogProbs);
            self.fill_reference(held_out.iter_mut().flatten())?;
            if stage.precompute_ref_log_probs {
                self.fill_reference(units.iter_mut().flatten())?;
            }
        }
        self.preferences = Some(PreferenceCache { stage: self.state.stage, units, held_out });
        Ok(())
    }

    /// Compute the reference's log-probs of responses that have none.
    fn fill_reference<'a>(&self, responses: impl Iterator<Item = &'a mut Response>) -> Result<(), Error> {
        let missing: Vec<&mut Response> = responses.filter(|r| r.ref_log_probs.is_empty()).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let sequences: Vec<TokenSequence> = missing.iter().map(|r| r.sequence.clone()).collect();
        let computed = self.attribute(self.services.trainer.log_probs(PolicyRole::Reference, &sequences, 1.0))?;
        for (response, log_probs) in missing.into_iter().zip(computed.log_probs) {
            response.ref_log_probs = log_probs;
        }
        Ok(())
    }

    /// Rows of the next mini-batch, in the form that the objective reads.
    fn preference_rows(&mut self, stage: &PreferenceStage, form: PreferenceForm) -> Result<Vec<TrainRow>, Error> {
        let units = self.preferences.as_ref().map_or(&[][..], |cache| &cache.units);
        let seed = self.stage_seed();
        let draws = self.state.cursor.next_batch(seed, units.len() as u64, stage.batch_size);
        let mut batch: Vec<Response> = draws.iter().flat_map(|draw| units[draw.index as usize].clone()).collect();
        if form == (PreferenceForm::Labels { mismatched: true }) {
            batch.extend(mismatched(&batch));
        }
        if stage.objective.needs_reference() {
            self.enter(Phase::LogProbs);
            self.fill_reference(batch.iter_mut())?;
        }
        let row = |response: Response| {
            let num_tokens = response.sequence.response_token_ids.len();
            let advantages = if form == PreferenceForm::Pairs { Vec::new() } else { vec![response.mark; num_tokens] };
            let ref_log_probs = response.ref_log_probs;
            TrainRow { ref_log_probs, advantages, ..TrainRow::demonstration(response.sequence) }
        };
        Ok(batch.into_iter().map(row).collect())
    }

    fn held_out_is_due(&self, stage: &PreferenceStage) -> bool {
        let (done, every) = (self.state.stage_step + 1, self.spec.validation.every_steps);
        done == stage.steps || (every > 0 && done.is_multiple_of(every))
    }

    /// `{prefix}/preference_accuracy`: share of held-out pairs whose chosen response has the higher implied reward,
    /// equal ones counted as one half; `{prefix}/preference_margin`: mean difference of the two.
    fn held_out_columns(&mut self, stage: &PreferenceStage, prefix: &str) -> Result<Columns, Error> {
        self.enter(Phase::Validation);
        let units = self.preferences.as_ref().map_or(&[][..], |cache| &cache.held_out);
        if units.is_empty() {
            return Ok(Columns::new());
        }
        let responses: Vec<&Response> = units.iter().flatten().collect();
        let sequences: Vec<TokenSequence> = responses.iter().map(|r| r.sequence.clone()).collect();
        let now = self.attribute(self.services.trainer.log_probs(PolicyRole::Policy, &sequences, 1.0))?;
        let rewards: Vec<f64> =
            responses.iter().zip(&now.log_probs).map(|(r, policy)| implied(&stage.objective, r, policy)).collect();
        let margins: Vec<f64> = rewards.chunks_exact(2).map(|pair| pair[0] - pair[1]).collect();
        let count = margins.len() as f64;
        Ok(vec![
            (format!("{prefix}/preference_accuracy"), margins.iter().map(|m| share(*m)).sum::<f64>() / count),
            (format!("{prefix}/preference_margin"), margins.iter().sum::<f64>() / count),
        ])
    }
}

fn share(margin: f64) -> f64 {
    match margin.partial_cmp(&0.0) {
        Some(std::cmp::Ordering::Greater) => 1.0,
        Some(std::cmp::Ordering::Equal) => 0.5,
        _ => 0.0,
    }
}

fn implied(objective: &Objective, response: &Response, policy: &[f32]) -> f64 {
    let sum = |log_probs: &[f32]| log_probs.iter().map(|v| f64::from(*v)).sum::<f64>();
    let response =
        ResponseLogProb { policy: sum(policy), reference: sum(&response.ref_log_probs), num_tokens: policy.len() };
    objective.implicit_reward(&response).unwrap_or(0.0)
}

/// Every prompt of the batch with the response of the row before it, the first with that of the last.
fn mismatched(batch: &[Response]) -> Vec<Response> {
    let other = |index: usize| &batch[(index + batch.len() - 1) % batch.len()].sequence;
    let mix = |(index, response): (usize, &Response)| Response {
        sequence: TokenSequence {
            prompt_token_ids: response.sequence.prompt_token_ids.clone(),
            response_token_ids: other(index).response_token_ids.clone(),
            response_mask: other(index).response_mask.clone(),
        },
        mark: 0.0,
        ref_log_probs: Vec::new(),
    };
    batch.iter().enumerate().map(mix).collect()
}

fn set_columns(row: &mut MetricsRow, columns: Columns) {
    for (name, value) in columns {
        row.set(&name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(prompt: u32, id: u32, mark: f64) -> Response {
        let sequence = TokenSequence {
            prompt_token_ids: vec![prompt],
            response_token_ids: vec![id; 2],
            response_mask: vec![1; 2],
        };
        Response { sequence, mark, ref_log_probs: vec![-1.0; 2] }
    }

    #[test]
    fn a_mismatched_row_has_its_prompt_and_the_response_of_the_row_before() {
        let batch = [response(1, 10, 1.0), response(2, 20, -1.0), response(3, 30, 1.0)];
        let mixed = mismatched(&batch);
        let found: Vec<(u32, u32)> =
            mixed.iter().map(|r| (r.sequence.prompt_token_ids[0], r.sequence.response_token_ids[0])).collect();
        assert_eq!(found, [(1, 30), (2, 10), (3, 20)]);
        assert!(mixed.iter().all(|r| r.ref_log_probs.is_empty()), "their reference is another one");
        assert!(mixed.iter().all(|r| r.mark == 0.0), "they have no label");
    }

    #[test]
    fn equal_rewards_count_as_one_half() {
        assert_eq!([2.0, 0.0, -1.0, f64::NAN].map(share), [1.0, 0.5, 0.0, 0.0]);
    }
}
