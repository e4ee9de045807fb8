//! The commands over models, run directories and vectors, run as a user runs them.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod bench;
mod check;
#[path = "../common/mod.rs"]
mod common;
mod eval;
mod files;
mod generate;
mod generate_flags;
mod inspect;
mod plan;
mod score;
mod support;
mod train;
mod usage;
