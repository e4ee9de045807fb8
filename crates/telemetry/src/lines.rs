//! Files of one JSON object a line that survive a crash.

use crate::Error;
use serde_json::{Map, Value};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// A file to which whole lines are appended.
#[derive(Debug)]
pub(crate) struct LineFile {
    file: File,
    path: PathBuf,
}

impl LineFile {
    /// Open for appending, creating the file where it is missing; cut a last line that a crash left without its end.
    pub fn open(path: &Path) -> Result<Self, Error> {
        cut_torn_line(path)?;
        let file = OpenOptions::new().append(true).create(true).open(path).map_err(Error::io("open", path))?;
        Ok(LineFile { file, path: path.to_owned() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Append one object as a line, in one write.
    pub fn append(&self, object: &Map<String, Value>) -> Result<(), Error> {
        let line = line_of(object);
        (&self.file).write_all(line.as_bytes()).map_err(Error::io("write", &self.path))
    }

    pub fn sync(&self) -> Result<(), Error> {
        self.file.sync_all().map_err(Error::io("sync", &self.path))
    }

    /// Keep the lines whose objects `keep` accepts, byte for byte, in one step: after a crash the file holds the old
    /// lines or the new ones. (Written anew from their objects, numbers could lose their last bit.)
    pub fn retain(&mut self, keep: impl Fn(usize, Map<String, Value>) -> Result<bool, Error>) -> Result<(), Error> {
        let bytes = read(&self.path)?;
        let mut text = Vec::with_capacity(bytes.len());
        for (index, line) in whole_lines(&bytes).enumerate() {
            if keep(index, object_of(&self.path, index, line)?)? {
                text.extend_from_slice(line);
            }
        }
        self.replace(&text)
    }

    fn replace(&mut self, text: &[u8]) -> Result<(), Error> {
        let mut name = self.path.as_os_str().to_owned();
        name.push(".tmp");
        let unfinished = PathBuf::from(name);
        let mut file = File::create(&unfinished).map_err(Error::io("create", &unfinished))?;
        file.write_all(text).map_err(Error::io("write", &unfinished))?;
        file.sync_all().map_err(Error::io("sync", &unfinished))?;
        std::fs::rename(&unfinished, &self.path).map_err(Error::io("rename into place", &self.path))?;
        let dir = self.path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(Error::io("sync the directory", dir))?;
        *self = LineFile::open(&self.path)?;
        Ok(())
    }
}

fn line_of(object: &Map<String, Value>) -> String {
    let mut line = serde_json::to_string(object).expect("a JSON object has text");
    line.push('\n');
    line
}

fn cut_torn_line(path: &Path) -> Result<(), Error> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("read", path)(error)),
    };
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    if whole == bytes.len() {
        return Ok(());
    }
    let file = OpenOptions::new().write(true).open(path).map_err(Error::io("open", path))?;
    file.set_len(whole as u64).map_err(Error::io("truncate", path))
}

/// The objects of a file, in order; a last line without its end is not one of them.
pub(crate) fn read_objects(path: &Path) -> Result<Vec<Map<String, Value>>, Error> {
    let bytes = read(path)?;
    whole_lines(&bytes).enumerate().map(|(index, line)| object_of(path, index, line)).collect()
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(Error::io("read", path))
}

fn whole_lines(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.split_inclusive(|byte| *byte == b'\n').filter(|line| line.ends_with(b"\n"))
}

fn object_of(path: &Path, index: usize, line: &[u8]) -> Result<Map<String, Value>, Error> {
    serde_json::from_slice(line).map_err(|e| Error::Line {
        path: path.to_owned(),
        line: index + 1,
        problem: format!("{e}; expected one JSON object a line"),
    })
}
