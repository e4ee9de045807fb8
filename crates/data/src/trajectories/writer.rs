//! Writing the dataset: one shard a step, each complete or absent.

use super::{schema, shard_name, shard_step, to_batch};
use crate::Error;
use crate::arrow_io::data_files;
use arrow_ipc::writer::StreamWriter;
use serde_json::json;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use temper_types::{Sample, Step};

/// Rows of one record batch: keeps 32-bit list offsets far from overflow and readers' memory small.
const ROWS_PER_BATCH: usize = 1024;

/// What `datasets` knows of a dataset besides its rows.
const INFO_FILE: &str = "dataset_info.json";

/// Ending of a file that is being written; what carries it after a crash is left over.
const UNFINISHED: &str = ".tmp";

/// The one writer of a trajectory dataset.
///
/// A shard is written under a temporary name, synced and renamed into place; then `state.json` is replaced in the same
/// way. A crash between the two leaves a complete shard that is not listed: readers do not see it, and writing its step
/// again replaces it.
#[derive(Debug)]
pub struct DatasetWriter {
    dir: PathBuf,
    run: String,
    steps: BTreeSet<Step>,
    fingerprint: String,
}

impl DatasetWriter {
    /// Create the dataset at `dir`, or go on with the one that is there. `run` is the value of the column of that name.
    ///
    /// # Errors
    /// Names the directory or file that cannot be made or read, and a `state.json` that lists foreign files.
    pub fn open(dir: &Path, run: &str) -> Result<Self, Error> {
        std::fs::create_dir_all(dir).map_err(Error::io("create the directory", dir))?;
        let info = dir.join(INFO_FILE);
        if !info.exists() {
            write_atomically(&info, b"{}\n")?;
        }
        let steps = if dir.join("state.json").exists() { listed_steps(dir)? } else { BTreeSet::new() };
        let names: Vec<String> = steps.iter().map(|step| shard_name(*step)).collect();
        let fingerprint = fingerprint(&[run.as_bytes(), names.join(" ").as_bytes()]);
        Ok(DatasetWriter { dir: dir.to_owned(), run: run.to_owned(), steps, fingerprint })
    }

    /// Say something of the whole dataset, in `description` of its `dataset_info.json`; replaces what was said before.
    ///
    /// # Errors
    /// Names the file that cannot be written.
    pub fn describe(&self, description: &str) -> Result<(), Error> {
        let info = json!({ "description": description });
        write_atomically(&self.dir.join(INFO_FILE), format!("{info:#}\n").as_bytes())
    }

    /// Steps that have a shard, ascending.
    pub fn steps(&self) -> impl Iterator<Item = Step> + '_ {
        self.steps.iter().copied()
    }

    /// Write the shard of `step`, replacing an earlier one.
    ///
    /// # Errors
    /// Names the file that cannot be written, or the sample and column with an array of the wrong length.
    pub fn write_step(&mut self, step: Step, samples: &[Sample]) -> Result<(), Error> {
        let name = shard_name(step);
        let path = self.dir.join(&name);
        let bytes = encode_shard(&path, &self.run, samples)?;
        write_atomically(&path, &bytes)?;
        self.steps.insert(step);
        self.fingerprint = fingerprint(&[self.fingerprint.as_bytes(), name.as_bytes(), &bytes]);
        self.write_state()
    }

    /// Drop every shard after `step`, and what an interrupted write left behind; for resume.
    ///
    /// # Errors
    /// Names the file that cannot be written or removed.
    pub fn truncate_after(&mut self, step: Step) -> Result<(), Error> {
        self.steps.retain(|kept| *kept <= step);
        self.fingerprint = fingerprint(&[self.fingerprint.as_bytes(), b"truncated after", &step.0.to_le_bytes()]);
        self.write_state()?;
        let entries = std::fs::read_dir(&self.dir).map_err(Error::io("list", &self.dir))?;
        for entry in entries {
            let path = entry.map_err(Error::io("list", &self.dir))?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let is_stale = shard_step(name).is_some_and(|step| !self.steps.contains(&step));
            if is_stale || name.ends_with(UNFINISHED) {
                std::fs::remove_file(&path).map_err(Error::io("remove", &path))?;
            }
        }
        sync_dir(&self.dir)
    }

    fn write_state(&self) -> Result<(), Error> {
        let files: Vec<_> = self.steps.iter().map(|step| json!({ "filename": shard_name(*step) })).collect();
        let state = json!({
            "_data_files": files,
            "_fingerprint": self.fingerprint,
            "_format_columns": null,
            "_format_kwargs": {},
            "_format_type": null,
            "_output_all_columns": false,
            "_split": null,
        });
        write_atomically(&self.dir.join("state.json"), format!("{state:#}\n").as_bytes())
    }
}

/// The steps of the shards that `state.json` lists.
pub(super) fn listed_steps(dir: &Path) -> Result<BTreeSet<Step>, Error> {
    let path = dir.join("state.json");
    let step = |name: String| {
        shard_step(&name)
            .ok_or_else(|| Error::file(&path, format!("lists `{name}`: expected shards named step-N.arrow")))
    };
    data_files(dir)?.into_iter().map(step).collect()
}

/// Tells caches of `datasets` that the content changed.
fn fingerprint(parts: &[&[u8]]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
    }
    hasher.finalize().to_hex()[..16].to_owned()
}

fn encode_shard(path: &Path, run: &str, samples: &[Sample]) -> Result<Vec<u8>, Error> {
    let refused = |e: arrow_schema::ArrowError| Error::file(path, format!("cannot encode the shard: {e}"));
    let mut writer = StreamWriter::try_new(Vec::new(), &schema()).map_err(refused)?;
    if samples.is_empty() {
        writer.write(&to_batch(run, samples)?).map_err(refused)?;
    }
    for part in samples.chunks(ROWS_PER_BATCH) {
        writer.write(&to_batch(run, part)?).map_err(refused)?;
    }
    writer.into_inner().map_err(refused)
}

/// Replace a file in one step: after a crash it holds the old bytes or the new ones.
pub(super) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let unfinished = unfinished_name(path);
    let mut file = File::create(&unfinished).map_err(Error::io("create", &unfinished))?;
    file.write_all(bytes).map_err(Error::io("write", &unfinished))?;
    file.sync_all().map_err(Error::io("sync", &unfinished))?;
    drop(file);
    rename_into_place(&unfinished, path)
}

/// The name under which `path` is written before it is renamed into place.
pub(crate) fn unfinished_name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(UNFINISHED);
    name.into()
}

/// Rename a finished file and make the new name durable.
pub(crate) fn rename_into_place(unfinished: &Path, path: &Path) -> Result<(), Error> {
    std::fs::rename(unfinished, path).map_err(Error::io("rename into place", path))?;
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => sync_dir(dir),
        _ => sync_dir(Path::new(".")),
    }
}

fn sync_dir(dir: &Path) -> Result<(), Error> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(Error::io("sync the directory", dir))
}
