//! The policy against references computed by transformers, and against itself, bit for bit.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod arriving;
mod bitwise;
mod distill;
mod gradients;
mod parity;
mod sequence;
mod shared;
mod support;
mod tensor_part;
