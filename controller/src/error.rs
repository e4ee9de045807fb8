//! The one error type of this crate.

use std::path::{Path, PathBuf};
use temper_proto::ServiceError;
use temper_types::ErrorCode;

/// Why a run cannot start, go on, or be resumed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A worker failed.
    #[error("step {step}, phase {phase}: {source}")]
    Service {
        /// Global step.
        step: u64,
        /// Phase of the step.
        phase: &'static str,
        /// The worker's error.
        source: Box<ServiceError>,
    },
    /// Prompts could not be read or generated, or rows could not be stored.
    #[error(transparent)]
    Data(#[from] temper_data::Error),
    /// An algorithm refused its input.
    #[error("step {step}: {source}")]
    Algorithm {
        /// Global step.
        step: u64,
        /// The algorithm's error.
        source: temper_algos::Error,
    },
    /// Logs could not be written.
    #[error(transparent)]
    Telemetry(#[from] temper_telemetry::Error),
    /// The operating system refused an operation on a file.
    #[error("cannot {operation} {}: {source}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On which path.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The recipe asks for something that its data or other keys cannot give.
    #[error("`{key}`: {problem}")]
    Config {
        /// Key of the recipe, dotted.
        key: String,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// The run directory is in use, or holds another run.
    #[error("run directory {}: {problem}", path.display())]
    RunDir {
        /// The directory.
        path: PathBuf,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// A checkpoint is damaged.
    #[error("checkpoint {}: {problem}", path.display())]
    Checkpoint {
        /// The checkpoint's directory.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The run cannot go on from the memory of its trainer ranks.
    #[error("going back to step {step} by the memory of the trainer ranks: {source}")]
    Recovery {
        /// Global step.
        step: u64,
        /// Why not.
        source: Box<Error>,
    },
    /// A sample is neither trained on nor dropped.
    #[error("step {step}: {num_samples} issued samples are neither trained on nor dropped: {samples}")]
    Unaccounted {
        /// Global step.
        step: u64,
        /// How many.
        num_samples: usize,
        /// The first of them, by prompt, group and index.
        samples: String,
    },
    /// A step had no sample to train on.
    #[error("step {step}: no sample can be trained on: {cause}")]
    NothingToTrain {
        /// Global step.
        step: u64,
        /// Why, with counts.
        cause: String,
    },
}

impl Error {
    /// True where a worker is gone: once it is back, the run can go on from its last checkpoint.
    pub fn is_lost_worker(&self) -> bool {
        match self {
            Error::Service { source, .. } => source.code == ErrorCode::Unavailable,
            Error::Recovery { source, .. } => source.is_lost_worker(),
            _ => false,
        }
    }

    /// Name of the worker or service whose failure this is.
    pub fn failed_service(&self) -> Option<&str> {
        match self {
            Error::Service { source, .. } => Some(&source.service),
            Error::Recovery { source, .. } => source.failed_service(),
            _ => None,
        }
    }

    /// True where the memory of the trainer ranks was of no use: the run can go on from its last checkpoint.
    pub fn is_failed_recovery(&self) -> bool {
        matches!(self, Error::Recovery { .. })
    }

    pub(crate) fn io(operation: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_path_buf();
        move |source| Error::Io { operation, path, source }
    }

    pub(crate) fn config(key: impl Into<String>, problem: impl std::fmt::Display) -> Error {
        Error::Config { key: key.into(), problem: problem.to_string() }
    }
}
