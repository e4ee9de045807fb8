//! The one error type of this crate.

/// What can be wrong with the input of an algorithm.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// An array does not have the length that the batch asks for.
    #[error("`{name}` has the wrong length: expected {expected}, got {got}")]
    Length {
        /// Name of the array.
        name: &'static str,
        /// Length that the batch asks for.
        expected: usize,
        /// Length that was given.
        got: usize,
    },
    /// The algorithm needs an array that was not given.
    #[error("{operation} needs `{name}`, which was not given")]
    Missing {
        /// Algorithm or function that needs it.
        operation: &'static str,
        /// Name of the array or number.
        name: &'static str,
    },
    /// A setting is outside its range.
    #[error("`{name}` = {value} is out of range: expected {expected}")]
    Setting {
        /// Name of the setting.
        name: &'static str,
        /// What was given.
        value: String,
        /// What is accepted.
        expected: &'static str,
    },
    /// A number that takes part in the result is not finite.
    #[error("{operation}: `{name}` of row {row}, token {token} is {value}: expected a finite number")]
    NonFinite {
        /// Algorithm or function.
        operation: &'static str,
        /// Name of the array.
        name: &'static str,
        /// Row of the batch.
        row: usize,
        /// Token within the row.
        token: usize,
        /// What was found.
        value: f64,
    },
    /// The batch itself cannot be handled (too few tokens, an empty group and the like).
    #[error("{operation}: {cause}")]
    Batch {
        /// Algorithm or function.
        operation: &'static str,
        /// What is wrong, and what would be right.
        cause: String,
    },
    /// No formula exists for what was asked.
    #[error("{operation}: {what} is not supported")]
    Unsupported {
        /// Algorithm or function.
        operation: &'static str,
        /// What was asked.
        what: &'static str,
    },
    /// A document in the vectors' schema is malformed.
    #[error("case `{case}`, key `{key}`: {cause}")]
    Case {
        /// Name of the case, or empty for the file itself.
        case: String,
        /// Key within the case.
        key: String,
        /// What is wrong.
        cause: String,
    },
}

impl Error {
    pub(crate) fn batch(operation: &'static str, cause: impl Into<String>) -> Self {
        Error::Batch { operation, cause: cause.into() }
    }

    pub(crate) fn setting(name: &'static str, value: impl ToString, expected: &'static str) -> Self {
        Error::Setting { name, value: value.to_string(), expected }
    }
}
