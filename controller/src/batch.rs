//! Scored samples of one step, and batches that wait for their step.
//!
//! Owns: what a batch is, in memory and in a checkpoint. A batch that waits is stored whole (tokens, log-probs,
//! versions, rewards), so that a resumed run needs no old weights.

use crate::checkpoint::PendingCheckpoint;
use crate::collect::reward_of;
use crate::record_row::Columns;
use crate::rollouts::Group;
use crate::{CheckpointInfo, Error, PolicyStage};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use temper_data::trajectories::{DatasetWriter, read_dataset};
use temper_types::{PolicyVersion, Sample, Step};

/// Counts and times of a batch's generation.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct BatchNumbers {
    pub(crate) rollout_seconds: f64,
    pub(crate) reward_seconds: f64,
    pub(crate) num_gen_batches: u64,
    pub(crate) num_filtered_groups: u64,
    /// Number of scored samples before groups were filtered, and the sum of their rewards.
    pub(crate) generated: (u64, f64),
    /// Groups that dynamic sampling did not find.
    pub(crate) num_missing_groups: u64,
    /// Greedy responses that could not be scored.
    pub(crate) num_baseline_errors: u64,
    /// Prompts that the curriculum passed over.
    pub(crate) num_passed_over: u64,
}

impl BatchNumbers {
    /// Count samples before any group is filtered out.
    pub(crate) fn count_generated(&mut self, samples: &[Sample]) {
        for reward in samples.iter().filter_map(reward_of) {
            self.generated = (self.generated.0 + 1, self.generated.1 + reward);
        }
    }
}

/// What one step trains on.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Batch {
    /// The step that trains on it.
    pub(crate) step: u64,
    /// Temperature that it was drawn at.
    pub(crate) temperature: f32,
    /// The samples, group by group.
    pub(crate) samples: Vec<Sample>,
    /// Greedy responses, one per group where the algorithm needs them: recorded, never trained on.
    pub(crate) baselines: Vec<Sample>,
    pub(crate) numbers: BatchNumbers,
    /// Metrics of how its prompts were chosen.
    pub(crate) columns: Columns,
}

impl Batch {
    /// Take in a group. Where its greedy response could not be scored its samples are masked out and counted: they
    /// have no baseline.
    pub(crate) fn add(&mut self, mut group: Group) {
        if group.baseline.as_ref().is_some_and(|b| reward_of(b).is_none()) {
            self.numbers.num_baseline_errors += 1;
            group.samples.iter_mut().for_each(|sample| sample.response_mask.fill(0));
        }
        self.samples.extend(group.samples);
        self.baselines.extend(group.baseline);
    }

    /// Everything that is recorded.
    pub(crate) fn into_record(self) -> Vec<Sample> {
        self.samples.into_iter().chain(self.baselines).collect()
    }

    /// Note how many updates came between the oldest token of each sample and the weights of `current`.
    pub(crate) fn measure_staleness(&mut self, current: PolicyVersion) {
        for sample in self.samples.iter_mut().chain(&mut self.baselines) {
            let oldest = sample.policy_versions.iter().map(|(version, _)| version.number).min();
            let behind = current.number.saturating_sub(oldest.unwrap_or(current.number));
            sample.staleness = u32::try_from(behind).unwrap_or(u32::MAX);
        }
    }

    /// The stage as the batch was drawn: its temperature may have been changed since.
    pub(crate) fn stage_of(&self, stage: &PolicyStage) -> PolicyStage {
        let mut stage = stage.clone();
        stage.sampling.temperature = self.temperature;
        stage
    }
}

/// A number as text in the shortest decimals that give the same bits back, which numbers in JSON do not promise.
type Exact = String;

/// A waiting batch in `state.json`, without its samples: those stand in the dataset `queue/` of the checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueuedBatch {
    /// The step that trains on it.
    step: u64,
    /// Its first rows are samples, the others greedy responses.
    num_samples: usize,
    temperature: Exact,
    seconds: [Exact; 2],
    /// Batches of prompts, filtered groups, missing groups, failed baselines, prompts passed over.
    counts: [u64; 5],
    generated: (u64, Exact),
    columns: Vec<(String, Exact)>,
}

impl QueuedBatch {
    fn of(batch: &Batch) -> Self {
        let n = &batch.numbers;
        QueuedBatch {
            step: batch.step,
            num_samples: batch.samples.len(),
            temperature: batch.temperature.to_string(),
            seconds: [n.rollout_seconds.to_string(), n.reward_seconds.to_string()],
            counts: [
                n.num_gen_batches,
                n.num_filtered_groups,
                n.num_missing_groups,
                n.num_baseline_errors,
                n.num_passed_over,
            ],
            generated: (n.generated.0, n.generated.1.to_string()),
            columns: batch.columns.iter().map(|(name, value)| (name.clone(), value.to_string())).collect(),
        }
    }

    /// The batch with its rows; `None` where a number is none.
    fn with(&self, mut rows: Vec<Sample>) -> Option<Batch> {
        let number = |text: &Exact| text.parse::<f64>().ok();
        let [num_gen_batches, num_filtered_groups, num_missing_groups, num_baseline_errors, num_passed_over] =
            self.counts;
        let numbers = BatchNumbers {
            rollout_seconds: number(&self.seconds[0])?,
            reward_seconds: number(&self.seconds[1])?,
            num_gen_batches,
            num_filtered_groups,
            generated: (self.generated.0, number(&self.generated.1)?),
            num_missing_groups,
            num_baseline_errors,
            num_passed_over,
        };
        let columns = self.columns.iter().map(|(name, value)| Some((name.clone(), number(value)?)));
        let baselines = rows.split_off(self.num_samples.min(rows.len()));
        Some(Batch {
            step: self.step,
            temperature: self.temperature.parse().ok()?,
            samples: rows,
            baselines,
            numbers,
            columns: columns.collect::<Option<_>>()?,
        })
    }
}

/// Write the samples of waiting batches into a checkpoint; gives what `state.json` says of them.
pub(crate) fn save_queue(
    queue: &VecDeque<Batch>,
    (pending, run): (&PendingCheckpoint, &str),
) -> Result<Vec<QueuedBatch>, Error> {
    if queue.is_empty() {
        return Ok(Vec::new());
    }
    let mut writer = DatasetWriter::open(&pending.queue(), run)?;
    for batch in queue {
        writer.write_step(Step(batch.step), &batch.clone().into_record())?;
    }
    Ok(queue.iter().map(QueuedBatch::of).collect())
}

/// The waiting batches of a checkpoint.
pub(crate) fn load_queue(checkpoint: &CheckpointInfo) -> Result<VecDeque<Batch>, Error> {
    let queued = &checkpoint.state.queue;
    if queued.is_empty() {
        return Ok(VecDeque::new());
    }
    let rows = read_dataset(&checkpoint.queue())?;
    let batch = |queued: &QueuedBatch| {
        let own = rows.iter().filter(|row| row.step.0 == queued.step).cloned().collect();
        let problem = || format!("a number of the waiting batch of step {} is none", queued.step);
        queued.with(own).ok_or_else(|| Error::Checkpoint { path: checkpoint.path.clone(), problem: problem() })
    };
    queued.iter().map(batch).collect()
}
