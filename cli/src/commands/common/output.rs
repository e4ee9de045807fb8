//! Where results go: stdout, or a file that appears whole or not at all.

use super::unfinished_file;
use crate::usage;
use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Lines of results. What is unfinished when Ctrl-C or SIGTERM ends the process is removed.
pub struct Output {
    writer: Option<BufWriter<Box<dyn Write>>>,
    /// Temporary and final name of a file being written; `None` where lines go straight to their place.
    pending: Option<(PathBuf, PathBuf)>,
    name: String,
}

impl Output {
    /// Results to `path`, or to stdout where there is none. A regular file takes its name when it is complete; devices
    /// and pipes are written as results come.
    ///
    /// # Errors
    /// Where the file cannot be made.
    pub fn create(path: Option<&Path>) -> Result<Self> {
        let Some(path) = path else {
            let writer = Some(BufWriter::new(Box::new(std::io::stdout()) as Box<dyn Write>));
            return Ok(Output { writer, pending: None, name: "stdout".to_owned() });
        };
        let is_special = path.metadata().is_ok_and(|m| !m.is_file());
        let (file, pending) = if is_special {
            (File::create(path), None)
        } else {
            let target = unfinished(path);
            (unfinished_file::create(&target), Some((target, path.to_owned())))
        };
        let file = file.with_context(|| format!("creating {}", path.display()))?;
        let writer = Some(BufWriter::new(Box::new(file) as Box<dyn Write>));
        Ok(Output { writer, pending, name: path.display().to_string() })
    }

    /// Append one JSON value as a line.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn json_line(&mut self, value: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string(value)?;
        self.line(&text)
    }

    /// Append a line.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn line(&mut self, text: &str) -> Result<()> {
        let writer = self.writer.as_mut().expect("an output is written before it is finished");
        writeln!(writer, "{text}").with_context(|| format!("writing {}", self.name))
    }

    /// Write a JSON document over several lines, and finish.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn document(mut self, value: &Value) -> Result<()> {
        self.line(&serde_json::to_string_pretty(value)?)?;
        self.finish()
    }

    /// Write what is buffered and give the file its name.
    ///
    /// # Errors
    /// Where it cannot be written or renamed.
    pub fn finish(mut self) -> Result<()> {
        let mut writer = self.writer.take().expect("an output is finished once");
        writer.flush().with_context(|| format!("writing {}", self.name))?;
        drop(writer);
        if let Some((from, to)) = self.pending.take() {
            unfinished_file::rename(&from, &to).with_context(|| format!("renaming {} into place", to.display()))?;
        }
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if let Some((from, _)) = &self.pending
            && let Err(error) = unfinished_file::remove(from)
        {
            tracing::warn!(file = %from.display(), %error, "an unfinished file was left behind");
        }
    }
}

/// A name beside `path` that no other process and no other output has.
fn unfinished(path: &Path) -> PathBuf {
    static NUM_NAMED: AtomicU64 = AtomicU64::new(0);
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".tmp-{}-{}", std::process::id(), NUM_NAMED.fetch_add(1, Ordering::Relaxed)));
    path.with_file_name(name)
}

/// Write a JSON document to `path`, or to stdout where there is none.
///
/// # Errors
/// Where it cannot be written.
pub fn write_json(path: Option<&Path>, value: &Value) -> Result<()> {
    Output::create(path)?.document(value)
}

/// Refuse a directory that holds something already.
///
/// # Errors
/// Its name (exit code 2).
pub fn require_empty(dir: &Path) -> Result<()> {
    if dir.read_dir().is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(usage(format!("--output {}: the directory is not empty", dir.display())));
    }
    Ok(())
}

/// Make a directory for results before work is done for them: it is empty, and files can be written there.
///
/// # Errors
/// A directory that holds something already (exit code 2), or cannot be written.
pub fn prepare_dir(dir: &Path) -> Result<()> {
    require_empty(dir)?;
    let probe = unfinished(&dir.join("probe"));
    let written = std::fs::create_dir_all(dir).and_then(|()| File::create(&probe)).map(drop);
    written.and_then(|()| std::fs::remove_file(&probe)).with_context(|| format!("--output {}", dir.display()))
}

/// Print a JSON value to stdout, over several lines.
///
/// # Errors
/// Where stdout is closed.
pub fn print_json(value: &impl Serialize) -> Result<()> {
    print(&format!("{}\n", serde_json::to_string_pretty(value)?))
}

/// Print lines of text to stdout. (`println!` panics where stdout is closed.)
///
/// # Errors
/// Where stdout is closed.
pub fn print(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).context("writing stdout")
}
