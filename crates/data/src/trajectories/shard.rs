//! Reading single shards of a dataset that may still grow.

use super::decode::check_schema;
use super::writer::listed_steps;
use super::{SCHEMA_VERSION, shard_name};
use crate::Error;
use crate::arrow_stream::IpcStream;
use arrow_array::RecordBatch;
use std::path::{Path, PathBuf};
use temper_types::Step;

/// The steps of the complete shards of the dataset at `dir`, ascending; none where there is no dataset yet.
///
/// # Errors
/// Names a `state.json` that cannot be read or lists foreign files.
pub fn shard_steps(dir: &Path) -> Result<Vec<Step>, Error> {
    if dir.join("state.json").exists() { Ok(listed_steps(dir)?.into_iter().collect()) } else { Ok(Vec::new()) }
}

/// Rows and bytes of a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ShardSize {
    /// Number of rows.
    pub num_rows: u64,
    /// Size of the file in bytes.
    pub num_bytes: u64,
}

/// The size of the shard of `step` in the dataset at `dir`; only its headers are read.
///
/// # Errors
/// Names the shard that is missing, truncated or damaged.
pub fn shard_size(dir: &Path, step: Step) -> Result<ShardSize, Error> {
    let stream = IpcStream::open(&dir.join(shard_name(step)))?;
    let num_bytes = stream.num_bytes();
    Ok(ShardSize { num_rows: stream.count_rows()?, num_bytes })
}

/// The batches of one shard, as they stand in the file, of which one is in memory at a time.
#[derive(Debug)]
pub struct ShardBatches {
    path: PathBuf,
    stream: IpcStream,
}

impl ShardBatches {
    /// Open the shard of `step` in the dataset at `dir`.
    ///
    /// # Errors
    /// Names the shard that is missing.
    pub fn open(dir: &Path, step: Step) -> Result<Self, Error> {
        let path = dir.join(shard_name(step));
        Ok(ShardBatches { stream: IpcStream::open(&path)?, path })
    }
}

/// Each item names the shard where it is truncated, damaged, or of another schema than [`SCHEMA_VERSION`] says.
impl Iterator for ShardBatches {
    type Item = Result<RecordBatch, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let batch = self.stream.next()?;
        Some(batch.and_then(|batch| match check_schema(&batch) {
            Ok(()) => Ok(batch),
            Err(problem) => Err(Error::file(&self.path, format!("{problem} (version {SCHEMA_VERSION})"))),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trajectories::{Dataset, DatasetWriter, fixtures};

    /// Two shards, the second without a row.
    fn dataset() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("the system gives a temporary directory");
        let mut writer = DatasetWriter::open(dir.path(), "run").expect("writable");
        let samples = vec![fixtures::full(); 1500];
        writer.write_step(Step(3), &samples).expect("writable");
        writer.write_step(Step(4), &[]).expect("writable");
        dir
    }

    #[test]
    fn a_shard_read_by_batches_is_the_shard_read_whole() {
        let dir = dataset();
        assert_eq!(shard_steps(dir.path()).expect("steps"), [Step(3), Step(4)]);
        let whole: Vec<Vec<RecordBatch>> =
            Dataset::open(dir.path()).expect("opens").batches().collect::<Result<_, _>>().expect("reads");
        for (step, expected) in [(3, &whole[0]), (4, &whole[1])] {
            let batches: Vec<RecordBatch> =
                ShardBatches::open(dir.path(), Step(step)).expect("opens").collect::<Result<_, _>>().expect("reads");
            assert_eq!(&batches, expected);
            let size = shard_size(dir.path(), Step(step)).expect("counts");
            let num_bytes = std::fs::metadata(dir.path().join(shard_name(Step(step)))).expect("is there").len();
            let num_rows = expected.iter().map(|batch| batch.num_rows() as u64).sum();
            assert_eq!(size, ShardSize { num_rows, num_bytes });
        }
        assert_eq!(whole[0].len(), 2, "more than one batch");
    }

    #[test]
    fn a_shard_that_is_cut_anywhere_is_an_error_that_names_it() {
        let dir = dataset();
        let path = dir.path().join(shard_name(Step(3)));
        let bytes = std::fs::read(&path).expect("is there");
        for length in [0, 7, 8, 100, bytes.len() / 2, bytes.len() - 8, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..length]).expect("writable");
            let read: Result<Vec<_>, _> = ShardBatches::open(dir.path(), Step(3)).expect("opens").collect();
            let error = read.expect_err("truncated").to_string();
            assert!(error.contains("step-000003.arrow"), "{error}");
            let error = shard_size(dir.path(), Step(3)).expect_err("truncated").to_string();
            assert!(error.contains("step-000003.arrow"), "{error}");
        }
    }

    #[test]
    fn damaged_bytes_are_an_error_or_rows_and_never_a_panic() {
        let dir = dataset();
        let path = dir.path().join(shard_name(Step(4)));
        let bytes = std::fs::read(&path).expect("is there");
        for index in (0..bytes.len()).step_by(7) {
            let mut damaged = bytes.clone();
            damaged[index] ^= 0xff;
            std::fs::write(&path, &damaged).expect("writable");
            if let Ok(batches) = ShardBatches::open(dir.path(), Step(4)) {
                assert!(batches.count() <= 2, "nothing comes after an error");
            }
        }
    }
}
