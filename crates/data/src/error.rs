//! What can go wrong between a file and a typed row.

use std::fmt;
use std::path::{Path, PathBuf};
use temper_types::{PromptId, SampleIndex, Step};

/// Where in a file a row stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Line of a text file, from 1.
    Line(usize),
    /// Row of a table, from 0.
    Row(usize),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Line(line) => write!(f, "line {line}"),
            Place::Row(row) => write!(f, "row {row}"),
        }
    }
}

/// A failure of this crate: which file, where in it, and what would be right.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused an operation.
    #[error("cannot {operation} {}: {source}", path.display())]
    Io {
        /// What was tried, in words.
        operation: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A file as a whole is not what it should be.
    #[error("{}: {problem}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// One row is not what it should be.
    #[error("{}, {place}, column `{column}`: {problem}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// Line or row.
        place: Place,
        /// The column, dotted where it is nested.
        column: String,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// One line of a text file is no JSON object.
    #[error("{}, line {line}: {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// A per-token array of a sample does not fit its response.
    #[error(
        "step {step}, prompt {prompt_id}, sample {sample_index}, column `{column}`: {found} entries: expected \
         {expected}, one a response token"
    )]
    Sample {
        /// The sample's step.
        step: Step,
        /// Its prompt.
        prompt_id: PromptId,
        /// Its index in the group.
        sample_index: SampleIndex,
        /// The column.
        column: &'static str,
        /// Number of entries it has.
        found: usize,
        /// Number of response tokens.
        expected: usize,
    },
    /// A generator's configuration cannot be met.
    #[error("task `{task}`: {key} = {value}: expected {expected}")]
    Task {
        /// Name of the generator.
        task: &'static str,
        /// The configuration key.
        key: &'static str,
        /// What was given.
        value: String,
        /// What would be right.
        expected: &'static str,
    },
}

impl Error {
    /// An [`Error::File`].
    pub(crate) fn file(path: &Path, problem: impl Into<String>) -> Self {
        Error::File { path: path.to_owned(), problem: problem.into() }
    }

    /// A closure that wraps a system error, for `map_err`.
    pub(crate) fn io(operation: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Error::Io { operation, path, source }
    }
}
