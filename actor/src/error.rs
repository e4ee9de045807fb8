//! The one error of this crate.

use std::io;
use std::path::{Path, PathBuf};

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong between a model directory and a policy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be opened, read, written or renamed.
    #[error("cannot {operation} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb phrase.
        operation: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A key of a configuration file has a value that is wrong or not supported.
    #[error("{}: `{key}` is {got}: expected {expected}", file.display())]
    Config {
        /// The file.
        file: PathBuf,
        /// The key, dotted where nested.
        key: String,
        /// The value found, or `missing`.
        got: String,
        /// What would be right.
        expected: String,
    },
    /// A file does not have the structure it claims to have.
    #[error("{}: {problem}", file.display())]
    Format {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A tensor of a checkpoint is missing, damaged or of another kind than the model needs.
    #[error("{}: tensor `{tensor}`: expected {expected}, got {got}", file.display())]
    Tensor {
        /// The file, or the directory where the tensor stands in none.
        file: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// What would be right.
        expected: String,
        /// What was found.
        got: String,
    },
    /// A directory holds no weights that can be read, only a pickle.
    #[error(
        "{}: pickle checkpoints are refused because loading one runs code from the file: expected model.safetensors \
         or model.safetensors.index.json (save the model again with safe_serialization=True)", file.display()
    )]
    Pickle {
        /// The pickle.
        file: PathBuf,
    },
    /// A text could not be turned into token ids, or ids into text.
    #[error("cannot {operation} with {}: {problem}", file.display())]
    Tokenizer {
        /// `encode` or `decode` or `render`.
        operation: &'static str,
        /// The tokenizer file or the file that holds the chat template.
        file: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A setting of a new model is out of range.
    #[error("init: `{key}` is {got}: expected {expected}")]
    Init {
        /// The setting.
        key: &'static str,
        /// The value given.
        got: String,
        /// What would be right.
        expected: String,
    },
}

impl Error {
    /// An [`Error::Io`] constructor for `map_err`.
    pub(crate) fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { operation, path, source }
    }

    /// An [`Error::Format`].
    pub(crate) fn format(file: &Path, problem: impl Into<String>) -> Error {
        Error::Format { file: file.to_owned(), problem: problem.into() }
    }

    /// An [`Error::Config`].
    pub(crate) fn config(file: &Path, key: &str, got: impl ToString, expected: impl Into<String>) -> Error {
        Error::Config { file: file.to_owned(), key: key.to_owned(), got: got.to_string(), expected: expected.into() }
    }

    /// An [`Error::Tensor`].
    pub(crate) fn tensor(file: &Path, tensor: &str, expected: impl Into<String>, got: impl Into<String>) -> Error {
        Error::Tensor { file: file.to_owned(), tensor: tensor.to_owned(), expected: expected.into(), got: got.into() }
    }
}
