//! The one error type of this crate.

use std::path::{Path, PathBuf};
use temper_proto::ServiceError;
use temper_types::{ContentHash, ErrorCode};

/// Why training cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A message of the caller that cannot be right.
    #[error("{what}: {problem}")]
    Invalid {
        /// Which part of which message.
        what: String,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// The objective refused its input, or gave no finite number.
    #[error("the objective: {0}")]
    Objective(#[from] temper_algos::Error),
    /// A gradient is not finite. No weight has changed.
    #[error("the gradient of `{tensor}` is not finite (its sum of squares is {sum_squares}): no weight was changed")]
    NonFiniteGradient {
        /// First tensor concerned, in canonical order.
        tensor: String,
        /// What its elements sum to.
        sum_squares: f64,
    },
    /// A loss or gradient is not finite, and the mini-batch was kept. No weight has changed.
    #[error("{cause}; {saved}")]
    NonFiniteBatch {
        /// What was not finite.
        cause: Box<Error>,
        /// Where the mini-batch is now, or why it was not saved.
        saved: String,
    },
    /// A value or score is not finite.
    #[error("{what} of sequence {sequence} is {value}: expected a finite number")]
    NonFiniteOutput {
        /// Which model's output.
        what: &'static str,
        /// Index in the call.
        sequence: usize,
        /// What came out.
        value: f32,
    },
    /// The masters cannot lie in shared memory.
    #[error("cannot share the masters with processes of this host: {0}")]
    SharedMemory(#[source] std::io::Error),
    /// A rank was lost, or ranks disagree.
    #[error(transparent)]
    Collective(#[from] temper_collective::Error),
    /// Other ranks could not do their part of an update. No weight has changed.
    #[error("trainer ranks {ranks:?} failed")]
    OtherRanks {
        /// Which ones.
        ranks: Vec<usize>,
    },
    /// State in the memory of ranks is not held, or not what its hash says.
    #[error("{problem}")]
    Mirror {
        /// Which shard of which step, and what is wrong with it.
        problem: String,
    },
    /// A model file cannot be read or written.
    #[error(transparent)]
    Actor(#[from] temper_actor::Error),
    /// A state file cannot be read or written.
    #[error("cannot {operation} {}: {source}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On which path.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A state file is damaged or of another trainer.
    #[error("{}: {problem}", path.display())]
    State {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Loaded weights are not those that the checkpoint names.
    #[error("{}: the weights hash to {got}: expected {expected}", path.display())]
    WrongWeights {
        /// The model directory.
        path: PathBuf,
        /// Hash that the checkpoint's state names.
        expected: ContentHash,
        /// Hash of what was read.
        got: ContentHash,
    },
}

impl Error {
    pub(crate) fn invalid(what: impl Into<String>, problem: impl Into<String>) -> Self {
        Error::Invalid { what: what.into(), problem: problem.into() }
    }

    pub(crate) fn io(operation: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_path_buf();
        move |source| Error::Io { operation, path, source }
    }

    /// True where a loss or gradient was not finite.
    pub(crate) fn is_non_finite(&self) -> bool {
        matches!(self, Error::Objective(temper_algos::Error::NonFinite { .. }) | Error::NonFiniteGradient { .. })
    }

    /// The error of rows that stand at `places` of the mini-batch, with rows counted in the latter.
    pub(crate) fn in_rows(mut self, places: &[usize]) -> Self {
        if let Error::Objective(temper_algos::Error::NonFinite { row, .. }) = &mut self {
            *row = places.get(*row).copied().unwrap_or(*row);
        }
        self
    }

    fn code(&self) -> ErrorCode {
        match self {
            Error::Invalid { .. } => ErrorCode::InvalidArgument,
            Error::Objective(temper_algos::Error::NonFinite { .. })
            | Error::NonFiniteGradient { .. }
            | Error::NonFiniteBatch { .. }
            | Error::NonFiniteOutput { .. } => ErrorCode::NonFinite,
            Error::Objective(_) => ErrorCode::InvalidArgument,
            Error::Collective(_) => ErrorCode::Unavailable,
            Error::OtherRanks { .. } => ErrorCode::Cancelled,
            Error::SharedMemory(_) => ErrorCode::ResourceExhausted,
            Error::Actor(_)
            | Error::Io { .. }
            | Error::State { .. }
            | Error::WrongWeights { .. }
            | Error::Mirror { .. } => ErrorCode::DataLoss,
        }
    }

    /// The error as it crosses the service boundary.
    pub fn into_service(self, operation: &'static str) -> ServiceError {
        ServiceError::new(self.code(), "trainer", operation, self)
    }
}
