//! One file a command.

pub mod check;
pub mod recipes;
pub mod train;
