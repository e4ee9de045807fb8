//! What can go wrong in generation.

use temper_types::{ErrorCode, GroupId};

/// An error of the rollout crate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An engine that has work cannot sleep.
    #[error("{num_open} groups are open: expected an idle engine, which alone can sleep")]
    NotIdle {
        /// Groups that are queued or run.
        num_open: usize,
    },
    /// A request that is wrong in itself.
    #[error("group {group_id}: {cause}")]
    InvalidRequest {
        /// The group.
        group_id: GroupId,
        /// What is wrong and what would be right.
        cause: String,
    },
    /// A request that no state of the engine can hold.
    #[error(
        "group {group_id} can never fit: {prompt_len} prompt tokens and up to {max_new_tokens} new ones need \
         {needed} {unit}, the engine has {available}"
    )]
    NeverFits {
        /// The group.
        group_id: GroupId,
        /// Length of its prompt.
        prompt_len: usize,
        /// Longest response asked for.
        max_new_tokens: usize,
        /// What is needed.
        needed: usize,
        /// What there is.
        available: usize,
        /// Of what: `kv blocks` or `positions`.
        unit: &'static str,
    },
    /// More samples are queued than the configuration allows.
    #[error("the queue is full: {queued} samples are queued, {submitted} more exceed max_queued_samples = {limit}")]
    QueueFull {
        /// Samples queued or running.
        queued: usize,
        /// Samples of this call.
        submitted: usize,
        /// The limit.
        limit: usize,
    },
    /// A configuration value outside its range.
    #[error("rollout.{key} = {value} is out of range: expected {expected}")]
    InvalidConfig {
        /// Name of the key.
        key: &'static str,
        /// What was given.
        value: String,
        /// What would be right.
        expected: String,
    },
    /// The model cannot compute.
    #[error("the model failed: {0}")]
    Model(String),
    /// A tensor-parallel rank is lost, or does not do what it was told; the engine is of no use any more.
    #[error("tensor-parallel ranks: {0}")]
    Ranks(String),
}

impl Error {
    /// The code under which a service reports it.
    pub const fn code(&self) -> ErrorCode {
        match self {
            Error::InvalidRequest { .. } | Error::InvalidConfig { .. } | Error::NotIdle { .. } => {
                ErrorCode::InvalidArgument
            }
            Error::NeverFits { .. } | Error::QueueFull { .. } => ErrorCode::ResourceExhausted,
            Error::Model(_) => ErrorCode::Internal,
            Error::Ranks(_) => ErrorCode::Unavailable,
        }
    }
}
