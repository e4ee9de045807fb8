//! The one small set of failure codes that crosses service boundaries.

use serde::{Deserialize, Serialize};

/// What kind of failure a service reports, and thereby whether trying again can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request itself is wrong; it will fail again.
    InvalidArgument,
    /// A request that can never fit the configured limits.
    ResourceExhausted,
    /// The wait reached its deadline.
    DeadlineExceeded,
    /// The worker is gone or not yet there.
    Unavailable,
    /// The worker holds other weights than the request names.
    VersionMismatch,
    /// A loss, gradient or log-prob is not finite.
    NonFinite,
    /// Stored data is damaged or incomplete.
    DataLoss,
    /// The caller asked to stop.
    Cancelled,
    /// A bug of ours.
    Internal,
}

impl ErrorCode {
    /// True where the same request may succeed later or elsewhere.
    pub const fn is_retryable(self) -> bool {
        matches!(self, ErrorCode::DeadlineExceeded | ErrorCode::Unavailable | ErrorCode::VersionMismatch)
    }
}
