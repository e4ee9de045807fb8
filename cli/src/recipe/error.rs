//! A recipe that cannot be run: which file, line and key, what is wrong, and what would be right.

use std::path::PathBuf;

/// What is wrong with a recipe.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// The file cannot be read.
    #[error("cannot read recipe {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The file is no TOML.
    #[error("{}:{line}: {problem}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What the parser says.
        problem: String,
    },
    /// An `extends` chain that does not end.
    #[error("{}: `extends` comes back to this file", path.display())]
    Cycle {
        /// The file.
        path: PathBuf,
    },
    /// A `--set` that is no assignment.
    #[error("--set {argument}: {problem}")]
    Set {
        /// As given.
        argument: String,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// A key that does not exist, or a value that cannot be.
    #[error("{at}: `{key}`: {problem}")]
    Key {
        /// File and line, or `--set`.
        at: String,
        /// The key, dotted.
        key: String,
        /// What is wrong and what would be right.
        problem: String,
    },
}
