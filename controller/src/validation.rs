//! Held-out prompts: generate, score, and report mean@n, best@n and pass@k by data source.

use crate::accounts::dropped;
use crate::record_row::Columns;
use crate::rollouts::Rollouts;
use crate::{Controller, Error, Phase, PolicyStage};
use std::collections::BTreeMap;
use temper_algos::metrics::{best_at_k, mean_at_n, pass_at_k};
use temper_proto::{GroupRequest, ScoreRequest, Unused};
use temper_types::{GroupId, PromptRow, RewardOutcome, SamplingParams, derive_seed};

/// Keeps the noise of validation apart from that of training.
const VALIDATION_EPOCH: u64 = u64::MAX;

impl Controller {
    /// Metrics before the first step of a stage, named `val_start/...`.
    pub(crate) fn validation_at_start(&mut self, stage: &PolicyStage) -> Result<Columns, Error> {
        if self.state.stage_step > 0 {
            return Ok(Columns::new());
        }
        self.publish(self.state.step)?;
        self.validate(stage, "val_start")
    }

    /// Metrics after the current step where they are due, named `val/...`: every `every_steps`, and after the last.
    pub(crate) fn validation_after_step(&mut self, stage: &PolicyStage) -> Result<Columns, Error> {
        let (done, every) = (self.state.stage_step + 1, self.spec.validation.every_steps);
        let is_due = done == stage.steps || (every > 0 && done.is_multiple_of(every));
        if is_due { self.validate(stage, "val") } else { Ok(Columns::new()) }
    }

    fn validate(&mut self, stage: &PolicyStage, prefix: &str) -> Result<Columns, Error> {
        if self.spec.validation.data.is_empty() {
            return Ok(Columns::new());
        }
        self.enter(Phase::Validation);
        let rows = self.data.get(&self.spec.validation.data).cloned().unwrap_or_default();
        let rollouts = self.rollouts(self.place.clone());
        let num_samples = self.spec.validation.num_samples;
        let greedy = SamplingParams { temperature: 0.0, ..stage.sampling.clone() };
        let sampling = rollouts.resolve_sampling(self.spec.validation.sampling.as_ref().unwrap_or(&greedy))?;
        let request = |(index, row): (usize, &PromptRow)| {
            let noise = |i| derive_seed(self.spec.seed, row.prompt_id.0, i, VALIDATION_EPOCH);
            Ok(GroupRequest {
                group_id: GroupId(u64::MAX - index as u64),
                prompt_id: row.prompt_id,
                epoch: VALIDATION_EPOCH,
                prompt_token_ids: self.attribute(self.services.text.encode_prompt(&row.prompt))?,
                seeds: (0..num_samples as u32).map(noise).collect(),
                sampling: sampling.clone(),
                ..GroupRequest::default()
            })
        };
        let requests = rows.iter().enumerate().map(request).collect::<Result<Vec<_>, Error>>()?;
        let scores = self.validation_scores(&rollouts, &rows, &requests)?;
        Ok(self.validation_columns(prefix, &rows, &scores))
    }

    /// Outcomes per prompt, scored as the groups end; a sample whose reward failed is left out and counted by the
    /// caller.
    fn validation_scores(
        &self,
        rollouts: &Rollouts,
        rows: &[PromptRow],
        requests: &[GroupRequest],
    ) -> Result<Vec<Vec<RewardOutcome>>, Error> {
        let (line, step) = (rollouts.score_line(), self.state.step + 1);
        let scored = std::thread::scope(|scope| {
            let _closing = line.closing();
            let mut fates = Vec::new();
            rollouts.each_group(requests.to_vec(), &mut |index, result| {
                fates.extend(dropped(std::slice::from_ref(&result), Unused::Validation));
                let samples = rollouts.to_samples((&rows[index], step), &requests[index], result);
                let pushed = line.push(scope, index, samples.iter().map(ScoreRequest::of).collect());
                rollouts.score_beside(Phase::Validation, pushed)
            })?;
            rollouts.settle(&fates)?;
            rollouts.place.attribute(line.finish())
        })?;
        Ok(scored.into_iter().map(|group| group.outcomes).collect())
    }

    fn validation_columns(&self, prefix: &str, rows: &[PromptRow], outcomes: &[Vec<RewardOutcome>]) -> Columns {
        let n = self.spec.validation.num_samples;
        let mut sources: BTreeMap<&str, Vec<Vec<f64>>> = BTreeMap::new();
        let mut failed: BTreeMap<&str, usize> = BTreeMap::new();
        for (row, outcomes) in rows.iter().zip(outcomes) {
            let scored: Vec<f64> = outcomes.iter().filter_map(RewardOutcome::reward).collect();
            *failed.entry(&row.data_source).or_default() += outcomes.len() - scored.len();
            if !scored.is_empty() {
                sources.entry(&row.data_source).or_default().push(scored);
            }
        }
        let mut columns = Columns::new();
        for (source, failed) in &failed {
            columns.push((format!("{prefix}/{source}/num_reward_errors"), *failed as f64));
        }
        for (source, groups) in &sources {
            let over = |f: &dyn Fn(&[f64]) -> f64| groups.iter().map(|g| f(g)).sum::<f64>() / groups.len() as f64;
            let correct = |g: &[f64]| g.iter().map(|s| *s >= self.spec.validation.correct_at).collect::<Vec<bool>>();
            columns.push((format!("{prefix}/{source}/mean@{n}"), over(&mean_at_n)));
            if n > 1 {
                columns.push((format!("{prefix}/{source}/best@{n}"), over(&|g| best_at_k(g, g.len()))));
                columns.push((format!("{prefix}/{source}/pass@{n}"), over(&|g| pass_at_k(&correct(g), g.len()))));
            }
        }
        columns.extend(component_columns(prefix, n, rows, outcomes));
        columns
    }
}

/// Means of the components one by one, where there is more than one: what a sum of rewards consists of, and what a
/// component of weight 0 measures.
fn component_columns(prefix: &str, n: usize, rows: &[PromptRow], outcomes: &[Vec<RewardOutcome>]) -> Columns {
    let mut sums: BTreeMap<(&str, &str), (f64, usize)> = BTreeMap::new();
    for (row, outcome) in rows.iter().zip(outcomes).flat_map(|(row, group)| group.iter().map(move |o| (row, o))) {
        let RewardOutcome::Scored { components, .. } = outcome else { continue };
        for component in components.iter().filter(|_| components.len() > 1) {
            let (sum, count) = sums.entry((&row.data_source, &component.name)).or_default();
            *sum += component.value;
            *count += 1;
        }
    }
    let column = |((source, name), (sum, count))| (format!("{prefix}/{source}/mean@{n}/{name}"), sum / count as f64);
    sums.into_iter().map(column).collect()
}
