//! What can go wrong between a figure and its file.

use std::path::{Path, PathBuf};

/// A failure of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused an operation.
    #[error("cannot {operation} {}: {source}", path.display())]
    Io {
        /// What was tried, in words.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A line of a log is not what this crate writes.
    #[error("{}, line {line}: {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// The terminal cannot be written to.
    #[error("cannot write progress: {source}")]
    Progress {
        /// The system's answer.
        source: std::io::Error,
    },
    /// A filter of log messages is malformed.
    #[error("`{filter}` is no log filter: {problem}; expected LEVEL or TARGET=LEVEL, separated by commas")]
    Filter {
        /// What was given.
        filter: String,
        /// What is wrong with it.
        problem: String,
    },
    /// This process already has a subscriber of log messages.
    #[error("log messages already have a subscriber: initialise tracing once")]
    AlreadyInitialised,
}

impl Error {
    /// A closure that wraps a system error, for `map_err`.
    pub(crate) fn io(operation: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Error::Io { operation, path, source }
    }
}
