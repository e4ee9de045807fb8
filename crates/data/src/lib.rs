//! Prompts in, trajectories out.
//!
//! Owns: reading prompt files (verl's and TRL's columns), the project's own task generators, the order in which
//! prompts are visited, and the trajectory dataset on disk with its schema. Knows nothing of tokenizers, models,
//! rewards or the loop. Every row it reads or writes is a type of `temper-types`.
//!
//! Invariants: a malformed file is an error that names the file and the place, never a panic; what a generator gives
//! is a pure function of (configuration, index); a shard is complete or absent.

mod arrow_io;
mod arrow_stream;
mod error;
pub mod prompts;
pub mod sampler;
pub mod summary;
mod table_file;
pub mod tasks;
pub mod trajectories;

pub use error::{Error, Place};
pub use table_file::{TableFile, TableFormat};
