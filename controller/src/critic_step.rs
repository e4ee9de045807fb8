//! The critic's part of a policy step: values before the advantages, and its own optimizer steps after them. A value
//! head on the policy's trunk has none: it learns in the policy's update.

use crate::packed::Packed;
use crate::record_row::Columns;
use crate::{Controller, CriticConfig, Error, Phase, PolicyStage};
use temper_proto::{MiniBatch, ScalarReport, TokenSequence};
use temper_types::Sample;

impl Controller {
    /// Fill the samples' `values`: those of the critic at the start of the step.
    pub(crate) fn values(&mut self, packed: &Packed, samples: &mut [Sample]) -> Result<(), Error> {
        self.enter(Phase::LogProbs);
        let rows = 0..packed.samples.len();
        let sequences: Vec<TokenSequence> = rows.map(|row| packed.sequence(row, samples)).collect();
        let values = self.attribute(self.services.trainer.values(&sequences))?;
        for (index, values) in packed.samples.iter().zip(values) {
            samples[*index].values = values;
        }
        Ok(())
    }

    /// True where only the critic learns in the current step.
    pub(crate) fn is_critic_warmup(&self, stage: &PolicyStage) -> bool {
        stage.critic.as_ref().is_some_and(|critic| self.state.stage_step < critic.warmup_steps)
    }

    /// The critic's optimizer steps on the returns of a step; gives their metrics, none without a
    /// critic.
    pub(crate) fn update_critic(
        &mut self,
        stage: &PolicyStage,
        packed: &Packed,
        samples: &[Sample],
    ) -> Result<Columns, Error> {
        let Some(critic) = &stage.critic else { return Ok(Columns::new()) };
        let foreseen = ("explained_variance".to_owned(), explained_variance(packed, samples));
        if critic.is_shared() {
            return Ok(vec![foreseen]);
        }
        let learning_rate = self.critic_learning_rate(critic, stage.steps);
        let batches = packed.mini_batches(stage.mini_batches, samples);
        let mut reports = Vec::new();
        for rows in std::iter::repeat_n(&batches, critic.epochs).flatten() {
            self.enter(Phase::Update);
            let batch = MiniBatch {
                rows: rows.iter().map(|row| packed.train_row(*row, samples)).collect(),
                global: packed.counts(rows, stage.sampling.max_new_tokens),
                temperature: stage.sampling.log_prob_temperature(),
                learning_rate,
            };
            let updated = self.services.trainer.update_critic(batch);
            reports.push(self.attribute(updated)?);
        }
        let mut columns = report_columns(&reports);
        columns.push(("critic_lr".to_owned(), learning_rate));
        columns.push(foreseen);
        Ok(columns)
    }

    fn critic_learning_rate(&self, critic: &CriticConfig, steps: u64) -> f64 {
        critic.optimizer.learning_rate * critic.schedule.multiplier(self.state.stage_step, steps)
    }
}

/// Means over the step's optimizer updates of the critic.
fn report_columns(reports: &[ScalarReport]) -> Columns {
    let mean =
        |value: &dyn Fn(&ScalarReport) -> f64| reports.iter().map(value).sum::<f64>() / reports.len().max(1) as f64;
    let metric = |name: &str| mean(&|report| report.metrics.get(name).copied().unwrap_or(0.0));
    vec![
        ("value_loss".to_owned(), mean(&|report| report.loss)),
        ("value_clipfrac".to_owned(), metric("value_clipfrac")),
        ("value_mean".to_owned(), metric("value_mean")),
        ("critic_grad_norm".to_owned(), mean(&|report| report.grad_norm)),
    ]
}

/// `1 - var(R - V) / var(R)` over the step's unmasked tokens, V at the start of the step: 1 where the critic foresaw
/// every return, 0 where it did no better than their mean. 0 where all returns are equal.
fn explained_variance(packed: &Packed, samples: &[Sample]) -> f64 {
    let tokens = packed.samples.iter().enumerate().flat_map(|(row, index)| {
        let sample = &samples[*index];
        let pairs = sample.returns.iter().zip(&sample.values).zip(packed.row_mask(row));
        pairs.filter(|(_, mask)| **mask == 1).map(|((r, v), _)| (f64::from(*r), f64::from(*v)))
    });
    let (returns, errors): (Vec<f64>, Vec<f64>) = tokens.map(|(r, v)| (r, r - v)).unzip();
    let spread = variance(&returns);
    if spread > 0.0 { 1.0 - variance(&errors) / spread } else { 0.0 }
}

fn variance(values: &[f64]) -> f64 {
    let count = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / count;
    values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / count
}
