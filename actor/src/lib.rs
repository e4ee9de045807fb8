//! The policy: model families, Hugging Face weights in and out, tokenizer and chat template.
//!
//! Knows model directories and token ids; knows nothing of services, recipes or training loops.

pub mod config;
mod error;
mod exact_math;

pub use config::{Family, Head, ModelConfig, RopeConfig, RopeScaling};
pub use error::{Error, Result};
