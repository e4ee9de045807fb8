//! The one error type of this crate.

use crate::Operation;
use std::time::Duration;

/// What an operation gives.
pub type Result<T> = std::result::Result<T, Error>;

/// How a rank was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Its connection or its thread is gone.
    Gone,
    /// It sent nothing until the deadline.
    Late {
        /// How long this rank waited.
        waited: Duration,
    },
    /// Another rank said so.
    Reported {
        /// Which one.
        by: usize,
    },
}

impl std::fmt::Display for Loss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Loss::Gone => f.write_str("its connection is closed"),
            Loss::Late { waited } => write!(f, "nothing came from it within {:.1} s", waited.as_secs_f64()),
            Loss::Reported { by } => write!(f, "rank {by} lost it"),
        }
    }
}

/// Why an operation failed. Ranks are those of the whole world, in subgroups too.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A rank is gone or late. The collective is of no use from now on, on every rank.
    #[error("rank {rank} was lost in {operation}: {loss}")]
    RankLost {
        /// The lost rank.
        rank: usize,
        /// What was going on.
        operation: Operation,
        /// How it was lost.
        loss: Loss,
    },
    /// Ranks are not at the same operation.
    #[error("rank {rank} sent {got}: expected {expected}")]
    Disagreement {
        /// The rank that sent.
        rank: usize,
        /// The operation of this rank, with its number, type and length.
        expected: String,
        /// The same of the other.
        got: String,
    },
    /// Arguments that cannot be right.
    #[error("{operation}: {problem}")]
    Invalid {
        /// The operation.
        operation: Operation,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// The ranks could not be connected.
    #[error("rank {rank} cannot connect to {peer}: {problem}")]
    Connect {
        /// This rank.
        rank: usize,
        /// Whom to: a rank with its address.
        peer: String,
        /// What went wrong.
        problem: String,
    },
}

impl Error {
    pub(crate) fn invalid(operation: Operation, problem: impl Into<String>) -> Self {
        Error::Invalid { operation, problem: problem.into() }
    }
}
