//! Where the tables stand on disk, and how they become Arrow.

use super::unreadable;
use arrow_array::{ArrayRef, Float64Array, RecordBatch, StringArray, UInt64Array};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;
use temper_data::trajectories::{self, ShardBatches, ShardSize, shard_size, shard_steps};
use temper_proto::ServiceResult;
use temper_telemetry::{MetricsRow, read_metrics};
use temper_types::Step;

/// A table of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dataset {
    /// Trajectories: a row a sample, in the schema of `rollouts/`.
    Rollouts,
    /// Figures: a row a step and name.
    Metrics,
}

/// Rows that are read as they are taken.
pub(super) type Batches = Box<dyn Iterator<Item = ServiceResult<RecordBatch>> + Send>;

impl Dataset {
    pub(super) const ALL: [Dataset; 2] = [Dataset::Rollouts, Dataset::Metrics];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Dataset::Rollouts => "rollouts",
            Dataset::Metrics => "metrics",
        }
    }

    pub(super) fn schema(self) -> SchemaRef {
        match self {
            Dataset::Rollouts => trajectories::schema(),
            Dataset::Metrics => metrics_schema(),
        }
    }

    /// The complete steps, ascending; none where nothing is written yet.
    pub(super) fn steps(self, run_dir: &Path) -> ServiceResult<Vec<u64>> {
        match self {
            Dataset::Rollouts => {
                let steps = shard_steps(&run_dir.join("rollouts")).map_err(unreadable)?;
                Ok(steps.into_iter().map(|step| step.0).collect())
            }
            Dataset::Metrics => {
                let steps: BTreeSet<u64> = metrics(run_dir)?.iter().map(MetricsRow::step).collect();
                Ok(steps.into_iter().collect())
            }
        }
    }

    /// Length and time of the file that is written with every step.
    pub(super) fn stamp(self, run_dir: &Path) -> Option<(u64, SystemTime)> {
        let path = match self {
            Dataset::Rollouts => run_dir.join("rollouts").join("state.json"),
            Dataset::Metrics => metrics_path(run_dir),
        };
        let metadata = std::fs::metadata(path).ok()?;
        Some((metadata.len(), metadata.modified().ok()?))
    }

    /// Rows and bytes of `steps`.
    pub(super) fn size(self, run_dir: &Path, steps: &[u64]) -> ServiceResult<ShardSize> {
        match self {
            Dataset::Rollouts => {
                let dir = run_dir.join("rollouts");
                let mut total = ShardSize::default();
                for step in steps {
                    let size = shard_size(&dir, Step(*step)).map_err(unreadable)?;
                    total.num_rows += size.num_rows;
                    total.num_bytes += size.num_bytes;
                }
                Ok(total)
            }
            Dataset::Metrics => {
                let rows = rows_of(run_dir, steps)?;
                let json = |row: &MetricsRow| serde_json::Value::Object(row.to_json()).to_string().len() as u64 + 1;
                let num_rows = rows.iter().map(|row| figures(row).len() as u64).sum();
                Ok(ShardSize { num_rows, num_bytes: rows.iter().map(json).sum() })
            }
        }
    }

    /// The rows of `steps`. Shards are opened one after another, and read a batch at a time.
    pub(super) fn open(self, run_dir: &Path, steps: Vec<u64>) -> ServiceResult<Batches> {
        match self {
            Dataset::Rollouts => {
                let dir = run_dir.join("rollouts");
                Ok(Box::new(steps.into_iter().flat_map(move |step| shard(&dir, step))))
            }
            Dataset::Metrics => {
                let rows = rows_of(run_dir, &steps)?;
                Ok(Box::new(rows.into_iter().map(|row| metrics_batch(&row))))
            }
        }
    }
}

/// The batches of a shard, or why there are none.
fn shard(dir: &Path, step: u64) -> Batches {
    match ShardBatches::open(dir, Step(step)) {
        Ok(batches) => Box::new(batches.map(|batch| batch.map_err(unreadable))),
        Err(error) => Box::new(std::iter::once(Err(unreadable(error)))),
    }
}

fn metrics_path(run_dir: &Path) -> PathBuf {
    run_dir.join("metrics.jsonl")
}

fn metrics(run_dir: &Path) -> ServiceResult<Vec<MetricsRow>> {
    let path = metrics_path(run_dir);
    if path.exists() { read_metrics(&path).map_err(unreadable) } else { Ok(Vec::new()) }
}

/// The rows of `steps`, which are ascending.
fn rows_of(run_dir: &Path, steps: &[u64]) -> ServiceResult<Vec<MetricsRow>> {
    let mut rows = metrics(run_dir)?;
    rows.retain(|row| steps.binary_search(&row.step()).is_ok());
    Ok(rows)
}

/// Names differ from step to step, so each figure is a row of its own.
fn metrics_schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("step", DataType::UInt64, false),
        Field::new("stage", DataType::Utf8, false),
        Field::new("name", DataType::Utf8, false),
        Field::new("value", DataType::Float64, false),
    ]))
}

/// The figures of a step, in the order of the file.
fn figures(row: &MetricsRow) -> Vec<(String, f64)> {
    let names = row.to_json();
    names.into_iter().filter_map(|(name, _)| row.get(&name).map(|value| (name, value))).collect()
}

fn metrics_batch(row: &MetricsRow) -> ServiceResult<RecordBatch> {
    let (names, values): (Vec<String>, Vec<f64>) = figures(row).into_iter().unzip();
    let n = names.len();
    let columns: Vec<ArrayRef> = vec![
        Arc::new(UInt64Array::from(vec![row.step(); n])),
        Arc::new(StringArray::from(vec![row.stage(); n])),
        Arc::new(StringArray::from(names)),
        Arc::new(Float64Array::from(values)),
    ];
    RecordBatch::try_new(metrics_schema(), columns).map_err(unreadable)
}
