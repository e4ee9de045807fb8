//! The policy against references computed by transformers, and against itself, bit for bit.

mod bitwise;
mod gradients;
mod parity;
mod support;
