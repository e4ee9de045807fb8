//! Reading the dataset back.

use super::decode::{check_schema, from_batch};
use super::shard_name;
use crate::Error;
use crate::arrow_io::{Table, data_files, read_ipc};
use arrow_array::{ArrayRef, RecordBatch};
use std::path::{Path, PathBuf};
use temper_types::{Sample, Step};

/// A dataset on disk: the shards that its `state.json` listed when it was opened.
#[derive(Debug, Clone)]
pub struct Dataset {
    dir: PathBuf,
    shards: Vec<String>,
}

impl Dataset {
    /// Open the dataset at `dir`.
    ///
    /// # Errors
    /// Names `state.json` where it is missing or malformed.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        Ok(Dataset { dir: dir.to_owned(), shards: data_files(dir)? })
    }

    /// File names of the shards, in order.
    pub fn shards(&self) -> &[String] {
        &self.shards
    }

    /// The batches of every shard, read shard by shard.
    ///
    /// # Errors
    /// Each item names its shard where that is missing, damaged, or of another schema.
    pub fn batches(&self) -> impl Iterator<Item = Result<Vec<RecordBatch>, Error>> + '_ {
        self.shards.iter().map(|name| read_shard(&self.dir.join(name)))
    }

    /// The samples of every shard, read shard by shard.
    ///
    /// # Errors
    /// Each item names its shard where that is missing, damaged, or of another schema.
    pub fn samples(&self) -> impl Iterator<Item = Result<Vec<Sample>, Error>> + '_ {
        self.shards.iter().map(|name| read_samples(&self.dir.join(name)))
    }

    /// One column, a piece per record batch, without decoding the others.
    ///
    /// # Errors
    /// Those of [`Dataset::batches`], and a column that the schema does not have.
    pub fn column(&self, name: &str) -> Result<Vec<ArrayRef>, Error> {
        let schema = super::schema();
        if schema.column_with_name(name).is_none() {
            let names = schema.fields().iter().map(|field| field.name().as_str());
            let hint = temper_types::did_you_mean(name, names).map_or_else(String::new, |n| format!(" (`{n}`?)"));
            return Err(Error::file(&self.dir, format!("no column `{name}`{hint}")));
        }
        let mut pieces = Vec::new();
        for batches in self.batches() {
            pieces.extend(batches?.iter().filter_map(|batch| batch.column_by_name(name).cloned()));
        }
        Ok(pieces)
    }
}

fn read_shard(path: &Path) -> Result<Vec<RecordBatch>, Error> {
    let Table { batches, .. } = read_ipc(path)?;
    batches.iter().try_for_each(check_schema).map_err(|problem| Error::file(path, problem))?;
    Ok(batches)
}

fn read_samples(path: &Path) -> Result<Vec<Sample>, Error> {
    let mut samples = Vec::new();
    for batch in read_shard(path)? {
        samples.extend(from_batch(&batch).map_err(|problem| Error::file(path, problem))?);
    }
    Ok(samples)
}

/// The samples of one step of the dataset at `dir`, in order; none where the step has no shard.
///
/// # Errors
/// Names the shard that is damaged or of another schema.
pub fn read_step(dir: &Path, step: Step) -> Result<Vec<Sample>, Error> {
    let path = dir.join(shard_name(step));
    if path.exists() { read_samples(&path) } else { Ok(Vec::new()) }
}

/// Every sample of the dataset at `dir`, in order.
///
/// # Errors
/// Names `state.json` or the shard that is missing, damaged, or of another schema.
pub fn read_dataset(dir: &Path) -> Result<Vec<Sample>, Error> {
    let shards = Dataset::open(dir)?.samples().collect::<Result<Vec<_>, _>>()?;
    Ok(shards.into_iter().flatten().collect())
}
