//! One file a command.

pub mod algos;
pub mod bench;
pub mod certs;
pub mod check;
pub mod common;
pub mod control;
pub mod engine_rank;
pub mod eval;
pub mod export;
pub mod fetch;
pub mod generate;
pub mod import;
pub mod inspect;
pub mod plan;
pub mod recipes;
pub mod score;
pub mod serve;
pub mod train;
