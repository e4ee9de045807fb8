//! GGUF, the format of llama.cpp: import into a Hugging Face model directory, and export from one.
//!
//! Owns the container, block formats, names and the row order of rotary projections. What comes out of an import is an
//! ordinary model directory, so nothing else in temper knows that GGUF exists.
//!
//! # Source
//! `ggml/docs/gguf.md` (container and keys) and the block layouts of `ggml-common.h`, both of ggml-org/ggml.

mod blocks;
mod export;
mod import;
mod metadata;
mod names;
mod parse;
mod tokenizer;
mod tokenizer_export;

pub use export::{GgufType, export_gguf};
pub use import::{ImportSummary, import_gguf};

#[cfg(test)]
mod tests;
