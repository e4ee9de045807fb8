//! The trajectory dataset: everything that is known of every sample, as one Arrow table.
//!
//! One schema ([`schema`]), versioned in its metadata, is used in flight ([`to_batch`], [`from_batch`]) and on disk. On
//! disk a dataset is a directory in the layout of `datasets.load_from_disk`: one IPC stream per step of the run,
//! `state.json` that lists them, `dataset_info.json`. [`DatasetWriter`] is its one writer, [`Dataset`] reads it.
//!
//! Invariants: a column is never dropped, an absent value is null; a shard that `state.json` lists is complete; writing
//! a step again replaces it.

mod decode;
mod encode;
mod parquet;
mod reader;
mod schema;
mod shard;
mod writer;

pub use self::parquet::export_parquet;
pub use decode::from_batch;
pub use encode::to_batch;
pub use reader::{Dataset, read_dataset, read_step};
pub use schema::{SCHEMA_VERSION, SCHEMA_VERSION_KEY, schema};
pub use shard::{ShardBatches, ShardSize, shard_size, shard_steps};
pub use writer::DatasetWriter;
pub(crate) use writer::{rename_into_place, unfinished_name};

use temper_types::Step;

/// File name of a step's shard.
fn shard_name(step: Step) -> String {
    format!("step-{:06}.arrow", step.0)
}

/// The step of a shard, or `None` where the name is not one that [`shard_name`] gives.
fn shard_step(name: &str) -> Option<Step> {
    let step = Step(name.strip_prefix("step-")?.strip_suffix(".arrow")?.parse().ok()?);
    (shard_name(step) == name).then_some(step)
}

#[cfg(test)]
pub(crate) mod fixtures;
#[cfg(test)]
mod tests;
