//! The directory of a run: its paths, and the lock that keeps a second process out.

use crate::Error;
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Paths of one run, and the lock on it for as long as this value or a clone of it lives.
#[derive(Debug, Clone)]
pub struct RunDir {
    root: PathBuf,
    _lock: Arc<File>,
}

impl RunDir {
    /// Make the directory where it is missing, and lock it.
    ///
    /// # Errors
    /// Where another process has it, or the directory cannot be made.
    pub fn open(root: &Path) -> Result<Self, Error> {
        std::fs::create_dir_all(root).map_err(Error::io("create", root))?;
        let path = root.join(".lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(Error::io("open", &path))?;
        if let Err(cause) = lock.try_lock() {
            let problem = match cause {
                std::fs::TryLockError::WouldBlock => "another process is running it".to_owned(),
                std::fs::TryLockError::Error(e) => format!("cannot be locked: {e}"),
            };
            return Err(Error::RunDir { path: root.to_path_buf(), problem });
        }
        Ok(RunDir { root: root.to_path_buf(), _lock: Arc::new(lock) })
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The resolved recipe.
    pub fn recipe(&self) -> PathBuf {
        self.root.join("recipe.toml")
    }

    /// The event log.
    pub fn events(&self) -> PathBuf {
        self.root.join("events.jsonl")
    }

    /// Settings that were changed while the run goes on.
    pub fn control_journal(&self) -> PathBuf {
        self.root.join("control.jsonl")
    }

    /// Forget the settings that an attempt before this one changed.
    ///
    /// # Errors
    /// Where the directory cannot be written.
    pub fn forget_changes(&self) -> Result<(), Error> {
        let path = self.control_journal();
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(Error::io("remove", &path)(error)),
            Ok(()) => File::open(&self.root).and_then(|dir| dir.sync_all()).map_err(Error::io("sync", &self.root)),
        }
    }

    /// One row a step.
    pub fn metrics(&self) -> PathBuf {
        self.root.join("metrics.jsonl")
    }

    /// The trajectory dataset.
    pub fn rollouts(&self) -> PathBuf {
        self.root.join("rollouts")
    }

    /// All checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.root.join("checkpoints")
    }
}
