//! Groups that a batch left over, between two batches and in a checkpoint.
//!
//! Owns: what of them is stored. Their samples are rows of the dataset `carried/` of the checkpoint, as far as they are
//! drawn, with the log-probs and versions of every token; `state.json` says which row of the data each group answers.

use crate::checkpoint::PendingCheckpoint;
use crate::rollouts::Group;
use crate::{CheckpointInfo, Error};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use temper_data::trajectories::{DatasetWriter, read_dataset};
use temper_types::{GroupId, Sample, Step};

/// A group of `carried/` in `state.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CarriedGroup {
    group_id: u64,
    /// Row of its prompt in the stage's dataset.
    row: u64,
}

/// Samples of which something is drawn.
pub(crate) fn begun(groups: &[Group]) -> impl Iterator<Item = &Sample> {
    groups.iter().flat_map(|group| &group.samples).filter(|sample| !sample.response_token_ids.is_empty())
}

/// Write groups into a checkpoint; gives what `state.json` says of them.
pub(crate) fn save(
    groups: &[Group],
    step: u64,
    (pending, run): (&PendingCheckpoint, &str),
) -> Result<Vec<CarriedGroup>, Error> {
    if groups.is_empty() {
        return Ok(Vec::new());
    }
    let rows: Vec<Sample> = groups.iter().flat_map(|group| group.samples.iter().cloned()).collect();
    DatasetWriter::open(&pending.carried(), run)?.write_step(Step(step), &rows)?;
    let entry = |group: &Group| Some(CarriedGroup { group_id: group.samples.first()?.group_id.0, row: group.row });
    Ok(groups.iter().filter_map(entry).collect())
}

/// The groups of a checkpoint, in their order.
pub(crate) fn load(checkpoint: &CheckpointInfo) -> Result<Vec<Group>, Error> {
    let carried = &checkpoint.state.carried;
    if carried.is_empty() {
        return Ok(Vec::new());
    }
    let mut rows: BTreeMap<GroupId, Vec<Sample>> = BTreeMap::new();
    for row in read_dataset(&checkpoint.carried())? {
        rows.entry(row.group_id).or_default().push(row);
    }
    let group = |entry: &CarriedGroup| {
        let problem = || format!("group {} that goes on has no rows", entry.group_id);
        let samples = rows.remove(&GroupId(entry.group_id));
        let samples = samples.ok_or_else(|| Error::Checkpoint { path: checkpoint.path.clone(), problem: problem() })?;
        Ok(Group { row: entry.row, samples, baseline: None })
    };
    carried.iter().map(group).collect()
}
