//! Checkpoints: complete or absent.
//!
//! A checkpoint is written into a hidden directory, every file is hashed into `MANIFEST`, everything is synced, and
//! the directory is renamed into place. Whatever a crash leaves behind is a hidden directory that the next start
//! removes.
//!
//! `MANIFEST` has one line a file, sorted by path: `blake3-hex  size  path`.

use crate::{Error, RunState, state::STATE_FORMAT};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

const MANIFEST: &str = "MANIFEST";
const QUEUE: &str = "queue";
const CARRIED: &str = "carried";
const STATE: &str = "state.json";
const PREFIX: &str = "step-";
const TEMPORARY: &str = ".tmp-";

/// A complete checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct CheckpointInfo {
    /// Its directory.
    pub path: PathBuf,
    /// What the controller remembers.
    pub state: RunState,
}

impl CheckpointInfo {
    /// The Hugging Face directory.
    pub fn model(&self) -> PathBuf {
        self.path.join("model")
    }

    /// The reward model, a Hugging Face directory; there only where a stage has trained one.
    pub fn reward_model(&self) -> PathBuf {
        self.path.join("reward_model")
    }

    /// Samples of batches that wait for their steps; there only where some do.
    pub(crate) fn queue(&self) -> PathBuf {
        self.path.join(QUEUE)
    }

    /// Samples of groups that go on; there only where some do.
    pub(crate) fn carried(&self) -> PathBuf {
        self.path.join(CARRIED)
    }

    /// The trainer's state.
    pub fn optimizer(&self) -> PathBuf {
        self.path.join("optimizer")
    }
}

/// A checkpoint being written.
pub(crate) struct PendingCheckpoint {
    temporary: PathBuf,
    target: PathBuf,
}

impl PendingCheckpoint {
    /// An empty hidden directory for the checkpoint of `step`.
    pub(crate) fn create(checkpoints: &Path, step: u64) -> Result<Self, Error> {
        let temporary = checkpoints.join(format!("{TEMPORARY}{PREFIX}{step}"));
        if temporary.exists() {
            fs::remove_dir_all(&temporary).map_err(Error::io("remove", &temporary))?;
        }
        for dir in ["model", "optimizer"] {
            let path = temporary.join(dir);
            fs::create_dir_all(&path).map_err(Error::io("create", &path))?;
        }
        Ok(PendingCheckpoint { temporary, target: checkpoints.join(format!("{PREFIX}{step}")) })
    }

    pub(crate) fn model(&self) -> PathBuf {
        self.temporary.join("model")
    }

    pub(crate) fn reward_model(&self) -> PathBuf {
        self.temporary.join("reward_model")
    }

    pub(crate) fn queue(&self) -> PathBuf {
        self.temporary.join(QUEUE)
    }

    pub(crate) fn carried(&self) -> PathBuf {
        self.temporary.join(CARRIED)
    }

    pub(crate) fn optimizer(&self) -> PathBuf {
        self.temporary.join("optimizer")
    }

    /// Write state and manifest and sync everything.
    pub(crate) fn seal(&self, state: &RunState) -> Result<(), Error> {
        let path = self.temporary.join(STATE);
        let text = serde_json::to_string_pretty(state).expect("a state is plain data");
        fs::write(&path, text + "\n").map_err(Error::io("write", &path))?;
        let mut manifest = String::new();
        for file in files_below(&self.temporary)? {
            let (hash, size) = hash_file(&self.temporary.join(&file))?;
            manifest.push_str(&format!("{hash}  {size}  {file}\n"));
        }
        let path = self.temporary.join(MANIFEST);
        fs::write(&path, manifest).map_err(Error::io("write", &path))?;
        sync_tree(&self.temporary)
    }

    /// Rename into place; an older checkpoint of the same step gives way.
    pub(crate) fn publish(self) -> Result<PathBuf, Error> {
        if self.target.exists() {
            fs::remove_dir_all(&self.target).map_err(Error::io("remove", &self.target))?;
        }
        fs::rename(&self.temporary, &self.target).map_err(Error::io("rename", &self.temporary))?;
        if let Some(parent) = self.target.parent() {
            sync_dir(parent)?;
        }
        Ok(self.target)
    }
}

/// Remove what a crash left behind.
pub(crate) fn remove_temporaries(checkpoints: &Path) -> Result<(), Error> {
    for name in names_in(checkpoints)? {
        if name.starts_with(TEMPORARY) {
            let path = checkpoints.join(name);
            fs::remove_dir_all(&path).map_err(Error::io("remove", &path))?;
        }
    }
    Ok(())
}

/// Keep the last `keep_last` and the best `keep_best` by metric; remove the others.
pub(crate) fn prune(checkpoints: &Path, keep_last: usize, keep_best: usize) -> Result<Vec<PathBuf>, Error> {
    let all = list_checkpoints(checkpoints)?;
    let mut keep: Vec<&Path> = all.iter().rev().take(keep_last.max(1)).map(|c| c.path.as_path()).collect();
    let mut scored: Vec<(&CheckpointInfo, f64)> = all.iter().filter_map(|c| Some((c, c.state.metric?))).collect();
    scored.sort_by(|a, b| b.1.total_cmp(&a.1).then(b.0.state.step.cmp(&a.0.state.step)));
    keep.extend(scored.iter().take(keep_best).map(|(c, _)| c.path.as_path()));
    let mut removed = Vec::new();
    for checkpoint in all.iter().filter(|c| !keep.contains(&c.path.as_path())) {
        let hidden = checkpoints.join(format!("{TEMPORARY}{PREFIX}{}", checkpoint.state.step));
        fs::rename(&checkpoint.path, &hidden).map_err(Error::io("rename", &checkpoint.path))?;
        fs::remove_dir_all(&hidden).map_err(Error::io("remove", &hidden))?;
        removed.push(checkpoint.path.clone());
    }
    Ok(removed)
}

/// All complete checkpoints, by ascending step. An empty list where the directory does not exist.
///
/// # Errors
/// Where a directory cannot be read or a state file is damaged.
pub fn list_checkpoints(checkpoints: &Path) -> Result<Vec<CheckpointInfo>, Error> {
    let mut all = Vec::new();
    for name in names_in(checkpoints)? {
        let Some(step) = name.strip_prefix(PREFIX).and_then(|n| n.parse::<u64>().ok()) else { continue };
        let path = checkpoints.join(&name);
        let state = read_state(&path)?;
        if state.step != step {
            let problem = format!("{STATE} is of step {}", state.step);
            return Err(Error::Checkpoint { path, problem });
        }
        all.push(CheckpointInfo { path, state });
    }
    all.sort_by_key(|c| c.state.step);
    Ok(all)
}

/// The complete checkpoint with the highest step.
///
/// # Errors
/// Those of [`list_checkpoints`].
pub fn latest_checkpoint(checkpoints: &Path) -> Result<Option<CheckpointInfo>, Error> {
    Ok(list_checkpoints(checkpoints)?.pop())
}

/// The step of the last complete checkpoint, without reading it; `None` where there is none.
///
/// # Errors
/// Where the directory cannot be read.
pub fn last_checkpoint_step(checkpoints: &Path) -> Result<Option<u64>, Error> {
    Ok(names_in(checkpoints)?.iter().filter_map(|name| name.strip_prefix(PREFIX)?.parse().ok()).max())
}

/// Check every file of a checkpoint against its manifest.
///
/// # Errors
/// The first file that is missing, added or changed.
pub fn verify_checkpoint(path: &Path) -> Result<(), Error> {
    let fail = |problem: String| Error::Checkpoint { path: path.to_path_buf(), problem };
    let manifest_path = path.join(MANIFEST);
    let manifest = fs::read_to_string(&manifest_path).map_err(Error::io("read", &manifest_path))?;
    let mut listed = Vec::new();
    for (index, line) in manifest.lines().enumerate() {
        let mut parts = line.splitn(3, "  ");
        let (Some(hash), Some(size), Some(file)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(fail(format!("{MANIFEST}, line {}: expected `hash  size  path`", index + 1)));
        };
        let (found, found_size) = hash_file(&path.join(file))?;
        if found != hash || found_size.to_string() != size {
            return Err(fail(format!(
                "{file} is not what was written: {MANIFEST} says {size} bytes, {hash}; found {found_size} bytes, {found}"
            )));
        }
        listed.push(file.to_owned());
    }
    match files_below(path)?.into_iter().find(|f| f != MANIFEST && !listed.contains(f)) {
        Some(extra) => Err(fail(format!("{extra} is not in {MANIFEST}"))),
        None => Ok(()),
    }
}

fn read_state(checkpoint: &Path) -> Result<RunState, Error> {
    let path = checkpoint.join(STATE);
    let text = fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    let fail = |problem: String| Error::Checkpoint { path: checkpoint.to_path_buf(), problem };
    let state: RunState = serde_json::from_str(&text).map_err(|e| fail(format!("{STATE}: {e}")))?;
    if state.format != STATE_FORMAT {
        return Err(fail(format!("{STATE} has format {}: this binary reads format {STATE_FORMAT}", state.format)));
    }
    Ok(state)
}

fn names_in(dir: &Path) -> Result<Vec<String>, Error> {
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
        names.push(entry.map_err(Error::io("list", dir))?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Paths of all files below `root`, relative, with `/`, sorted.
fn files_below(root: &Path) -> Result<Vec<String>, Error> {
    let mut files = Vec::new();
    let mut pending = vec![String::new()];
    while let Some(dir) = pending.pop() {
        for name in names_in(&root.join(&dir))? {
            let relative = if dir.is_empty() { name } else { format!("{dir}/{name}") };
            if root.join(&relative).is_dir() {
                pending.push(relative);
            } else {
                files.push(relative);
            }
        }
    }
    files.sort();
    Ok(files)
}

fn hash_file(path: &Path) -> Result<(String, u64), Error> {
    let mut file = File::open(path).map_err(Error::io("open", path))?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0u8; 1 << 20];
    let mut size = 0;
    loop {
        let read = file.read(&mut buffer).map_err(Error::io("read", path))?;
        if read == 0 {
            return Ok((hasher.finalize().to_hex().to_string(), size));
        }
        hasher.update(&buffer[..read]);
        size += read as u64;
    }
}

fn sync_tree(root: &Path) -> Result<(), Error> {
    for file in files_below(root)? {
        let path = root.join(file);
        File::open(&path).and_then(|f| f.sync_all()).map_err(Error::io("sync", &path))?;
    }
    for dir in ["model", "optimizer", "reward_model", QUEUE, CARRIED, ""] {
        if root.join(dir).is_dir() {
            sync_dir(&root.join(dir))?;
        }
    }
    Ok(())
}

fn sync_dir(path: &Path) -> Result<(), Error> {
    File::open(path).and_then(|f| f.sync_all()).map_err(Error::io("sync", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(checkpoints: &Path, step: u64, metric: Option<f64>) -> PathBuf {
        let pending = PendingCheckpoint::create(checkpoints, step).expect("a fresh directory");
        fs::write(pending.model().join("model.safetensors"), step.to_le_bytes()).expect("writable");
        let state = RunState { step, metric, ..RunState::new("id") };
        pending.seal(&state).expect("sealed");
        pending.publish().expect("renamed")
    }

    #[test]
    fn a_checkpoint_verifies_until_a_byte_changes() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = write(dir.path(), 5, None);
        verify_checkpoint(&path).expect("untouched");
        fs::write(path.join("model/model.safetensors"), [0u8; 8]).expect("writable");
        let error = verify_checkpoint(&path).expect_err("a changed byte is seen").to_string();
        assert!(error.contains("model/model.safetensors"), "{error}");
    }

    #[test]
    fn an_unfinished_checkpoint_is_no_checkpoint() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        write(dir.path(), 1, None);
        let pending = PendingCheckpoint::create(dir.path(), 2).expect("a fresh directory");
        pending.seal(&RunState { step: 2, ..RunState::new("id") }).expect("sealed");
        drop(pending);
        assert_eq!(latest_checkpoint(dir.path()).expect("readable").map(|c| c.state.step), Some(1));
        remove_temporaries(dir.path()).expect("removable");
        assert_eq!(names_in(dir.path()).expect("readable"), ["step-1"]);
    }

    #[test]
    fn pruning_keeps_the_last_and_the_best() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for (step, metric) in [(1, 0.9), (2, 0.1), (3, 0.5), (4, 0.2), (10, 0.3)] {
            write(dir.path(), step, Some(metric));
        }
        prune(dir.path(), 2, 1).expect("removable");
        let steps: Vec<u64> = list_checkpoints(dir.path()).expect("readable").iter().map(|c| c.state.step).collect();
        assert_eq!(steps, [1, 4, 10]);
    }
}
