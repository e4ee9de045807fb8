//! The samples of a step as the algorithms see them: rows of response tokens packed end to end.

use crate::{Error, PolicyStage};
use std::collections::BTreeMap;
use temper_algos::{Grouping, Plan, widen};
use temper_proto::{GlobalCounts, TokenSequence, TrainRow};
use temper_types::{FinishReason, GroupId, RewardOutcome, Sample};

/// Rows that take part in a step.
pub(crate) struct Packed {
    /// Index of each row in the step's samples.
    pub(crate) samples: Vec<usize>,
    pub(crate) offsets: Vec<usize>,
    pub(crate) response_mask: Vec<u8>,
    pub(crate) group_ids: Vec<u64>,
}

impl Packed {
    /// The samples that take part: scored, with a trained token, in a group large enough for the estimator.
    pub(crate) fn new(stage: &PolicyStage, plan: &Plan, samples: &[Sample], step: u64) -> Result<Self, Error> {
        let min_size = match plan.grouping {
            Grouping::None => 1,
            Grouping::Group { min_size } => min_size as usize,
        };
        let is_cut = |s: &Sample| stage.algorithm.mask_truncated_completions && s.finish_reason == FinishReason::Length;
        let mut group_sizes: BTreeMap<GroupId, usize> = BTreeMap::new();
        samples.iter().filter(|s| s.is_trainable()).for_each(|s| *group_sizes.entry(s.group_id).or_default() += 1);
        let mut packed =
            Packed { samples: Vec::new(), offsets: vec![0], response_mask: Vec::new(), group_ids: Vec::new() };
        for (index, sample) in samples.iter().enumerate() {
            if !sample.is_trainable() || group_sizes[&sample.group_id] < min_size {
                continue;
            }
            let kept = if is_cut(sample) { vec![0; sample.response_mask.len()] } else { sample.response_mask.clone() };
            packed.samples.push(index);
            packed.response_mask.extend(kept);
            packed.offsets.push(packed.response_mask.len());
            packed.group_ids.push(sample.group_id.0);
        }
        if packed.response_mask.contains(&1) {
            return Ok(packed);
        }
        Err(Error::NothingToTrain { step, cause: why_nothing(samples) })
    }

    /// Rows of each mini-batch: equal numbers of groups, in order.
    pub(crate) fn mini_batches(&self, num_batches: usize, samples: &[Sample]) -> Vec<Vec<usize>> {
        let mut groups: Vec<GroupId> = samples.iter().map(|s| s.group_id).collect();
        groups.dedup();
        let per_batch = groups.len().div_ceil(num_batches).max(1);
        let batch_of: BTreeMap<GroupId, usize> =
            groups.iter().enumerate().map(|(index, group)| (*group, index / per_batch)).collect();
        let mut batches = vec![Vec::new(); num_batches];
        for (row, index) in self.samples.iter().enumerate() {
            batches[batch_of[&samples[*index].group_id]].push(row);
        }
        batches.retain(|rows| rows.iter().any(|row| self.row_mask(*row).contains(&1)));
        batches
    }

    pub(crate) fn row_mask(&self, row: usize) -> &[u8] {
        &self.response_mask[self.offsets[row]..self.offsets[row + 1]]
    }

    pub(crate) fn sequence(&self, row: usize, samples: &[Sample]) -> TokenSequence {
        let sample = &samples[self.samples[row]];
        TokenSequence {
            prompt_token_ids: sample.prompt_token_ids.clone(),
            response_token_ids: sample.response_token_ids.clone(),
            response_mask: self.row_mask(row).to_vec(),
        }
    }

    pub(crate) fn train_row(&self, row: usize, samples: &[Sample]) -> TrainRow {
        let sample = &samples[self.samples[row]];
        TrainRow {
            sequence: self.sequence(row, samples),
            old_log_probs: sample.old_log_probs.clone(),
            rollout_log_probs: sample.rollout_log_probs.clone(),
            ref_log_probs: sample.ref_log_probs.clone(),
            advantages: widen(&sample.advantages),
            returns: widen(&sample.returns),
            values: sample.values.clone(),
            rollout_weights: Vec::new(),
        }
    }

    pub(crate) fn counts(&self, rows: &[usize], max_new_tokens: u32) -> GlobalCounts {
        let active = |row: &usize| self.row_mask(*row).iter().filter(|m| **m == 1).count() as u64;
        GlobalCounts {
            num_tokens: rows.iter().map(active).sum(),
            num_sequences: rows.iter().filter(|row| active(row) > 0).count() as u64,
            num_rows: rows.len() as u64,
            loss_scale_factor: f64::from(max_new_tokens),
        }
    }
}

fn why_nothing(samples: &[Sample]) -> String {
    let failed = samples.iter().filter(|s| matches!(s.outcome, Some(RewardOutcome::Failed(_)))).count();
    let first = samples.iter().find_map(|s| match &s.outcome {
        Some(RewardOutcome::Failed(failure)) => Some(failure.to_string()),
        _ => None,
    });
    let empty = samples.iter().filter(|s| s.response_token_ids.is_empty()).count();
    let cause = first.map_or(String::new(), |f| format!("; the first failure: {f}"));
    format!("of {} samples, {failed} could not be scored and {empty} are empty{cause}", samples.len())
}
