//! What commands share: models, devices, sampling flags, files of results.

pub mod address;
pub mod beam;
pub mod compute;
pub mod engine;
pub mod output;
pub mod sampling;
pub mod shell;
pub mod speculation;
mod unfinished_file;
