//! The samples of a step as the algorithms see them: rows of response tokens packed end to end.

use crate::collect::reward_of;
use crate::{Error, PolicyStage};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use temper_algos::{Grouping, Plan, widen};
use temper_proto::{GlobalCounts, TokenSequence, TrainRow};
use temper_types::{FinishReason, GroupId, RewardOutcome, Sample};

/// Rows that take part in a step, and what is known of them besides their samples' columns.
#[derive(Default)]
pub(crate) struct Packed {
    /// Index of each row in the step's samples.
    pub(crate) samples: Vec<usize>,
    pub(crate) offsets: Vec<usize>,
    pub(crate) response_mask: Vec<u8>,
    pub(crate) group_ids: Vec<u64>,
    /// Rewards per token, the KL against the reference inside; empty where that is not asked for.
    pub(crate) token_rewards: Vec<f64>,
    /// Importance weights of rollout correction per token; empty where there are none.
    pub(crate) rollout_weights: Vec<f64>,
    /// Sum of squared probabilities per token; empty where it is not asked for.
    pub(crate) sum_pi_squared: Vec<f64>,
    /// Reward of the greedy response to each row's prompt; empty where there are none.
    pub(crate) reward_baselines: Vec<f64>,
    /// The rows of the update, drawn with replacement; absent: all, in order.
    pub(crate) drawn_rows: Option<Vec<usize>>,
}

impl Packed {
    /// The samples that take part: scored, with a trained token, in a group large enough for the estimator.
    pub(crate) fn new(stage: &PolicyStage, plan: &Plan, samples: &[Sample], step: u64) -> Result<Self, Error> {
        let min_size = match plan.grouping {
            Grouping::None => 1,
            Grouping::Group { min_size } => min_size as usize,
        };
        let is_cut = |s: &Sample| stage.algorithm.mask_truncated_completions && s.finish_reason == FinishReason::Length;
        let is_kept = best_and_worst(stage, samples);
        let mut group_sizes: BTreeMap<GroupId, usize> = BTreeMap::new();
        let kept = samples.iter().zip(&is_kept).filter(|(_, kept)| **kept);
        kept.for_each(|(s, _)| *group_sizes.entry(s.group_id).or_default() += 1);
        let mut packed = Packed { offsets: vec![0], ..Packed::default() };
        for (index, sample) in samples.iter().enumerate() {
            if !is_kept[index] || group_sizes[&sample.group_id] < min_size {
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

    /// Indices of the samples that the step trains on.
    pub(crate) fn trained(&self) -> BTreeSet<usize> {
        match &self.drawn_rows {
            Some(rows) => rows.iter().map(|row| self.samples[*row]).collect(),
            None => self.samples.iter().copied().collect(),
        }
    }

    /// Give every row the reward of its prompt's greedy response; every packed row has one where any has.
    pub(crate) fn add_baselines(&mut self, samples: &[Sample], baselines: &[Sample]) {
        let rewards: BTreeMap<GroupId, f64> =
            baselines.iter().filter_map(|b| Some((b.group_id, reward_of(b)?))).collect();
        self.reward_baselines =
            self.samples.iter().filter_map(|i| rewards.get(&samples[*i].group_id).copied()).collect();
    }

    /// Rows of each mini-batch: equal numbers of groups in order, or equal numbers of drawn rows.
    pub(crate) fn mini_batches(&self, num_batches: usize, samples: &[Sample]) -> Vec<Vec<usize>> {
        let mut batches = match &self.drawn_rows {
            Some(rows) => rows.chunks(rows.len().div_ceil(num_batches).max(1)).map(<[usize]>::to_vec).collect(),
            None => self.batches_of_groups(num_batches, samples),
        };
        batches.retain(|rows| rows.iter().any(|row| self.row_mask(*row).contains(&1)));
        batches
    }

    fn batches_of_groups(&self, num_batches: usize, samples: &[Sample]) -> Vec<Vec<usize>> {
        let mut groups: Vec<GroupId> = samples.iter().map(|s| s.group_id).collect();
        groups.dedup();
        let per_batch = groups.len().div_ceil(num_batches).max(1);
        let batch_of: BTreeMap<GroupId, usize> =
            groups.iter().enumerate().map(|(index, group)| (*group, index / per_batch)).collect();
        let mut batches = vec![Vec::new(); num_batches];
        for (row, index) in self.samples.iter().enumerate() {
            batches[batch_of[&samples[*index].group_id]].push(row);
        }
        batches
    }

    /// Where a row lies in the per-token arrays.
    pub(crate) fn slots(&self, row: usize) -> Range<usize> {
        self.offsets[row]..self.offsets[row + 1]
    }

    pub(crate) fn row_mask(&self, row: usize) -> &[u8] {
        &self.response_mask[self.slots(row)]
    }

    /// One column of the samples, packed end to end.
    pub(crate) fn gather(&self, samples: &[Sample], column: fn(&Sample) -> &Vec<f32>) -> Vec<f64> {
        self.samples.iter().flat_map(|index| widen(column(&samples[*index]))).collect()
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
            rollout_weights: self.rollout_weights.get(self.slots(row)).unwrap_or_default().to_vec(),
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

/// Which samples may take part: those that can be trained on, or the best and worst of each group among them.
fn best_and_worst(stage: &PolicyStage, samples: &[Sample]) -> Vec<bool> {
    let mut groups: BTreeMap<GroupId, Vec<usize>> = BTreeMap::new();
    for (index, sample) in samples.iter().enumerate().filter(|(_, s)| s.is_trainable()) {
        groups.entry(sample.group_id).or_default().push(index);
    }
    let mut is_kept = vec![false; samples.len()];
    for members in groups.values() {
        let scores: Vec<f64> = members.iter().filter_map(|i| reward_of(&samples[*i])).collect();
        let keep = stage.algorithm.best_of_n.keep(&scores);
        members.iter().zip(keep).for_each(|(index, keep)| is_kept[*index] = keep);
    }
    is_kept
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
