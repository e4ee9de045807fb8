//! Read-only memory maps of whole files.
#![allow(unsafe_code, reason = "mapping a file into memory has no safe form")]

use crate::error::{Error, Result};
use memmap2::Mmap;
use std::fs::File;
use std::path::{Path, PathBuf};

/// A file mapped into memory. An empty file is an empty slice.
pub(crate) struct MappedFile {
    path: PathBuf,
    map: Option<Mmap>,
}

impl MappedFile {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let length = file.metadata().map_err(Error::io("inspect", path))?.len();
        // SAFETY: the map is read-only and private to this value, and lives no longer than it. The bytes are only ever
        // read as plain integers, so no value of them is invalid. What remains is that another process must not
        // truncate the file while it is mapped; temper never does: its own writers replace files by renaming.
        let map = (length > 0).then(|| unsafe { Mmap::map(&file) }).transpose().map_err(Error::io("map", path))?;
        Ok(MappedFile { path: path.to_owned(), map })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }
}
