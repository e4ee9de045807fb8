//! The vocabulary of temper: identifiers, versions, seeds, sampling parameters and the record of one sample.
//!
//! Owns: plain data that crosses crate boundaries, and the two pure functions that every layer must compute
//! alike (seed derivation and counter-based noise). Knows nothing of I/O, devices, transports or algorithms.
//! Every other crate may import it; it imports none of them.

mod dtype;
mod error_code;
mod ids;
mod noise;
mod prompt;
mod reward;
mod sample;
mod sampling;
mod suggest;
mod version;
mod weight_format;

pub use dtype::{DType, DTypeChoice};
pub use error_code::ErrorCode;
pub use ids::{GroupId, PromptId, Rank, SampleIndex, SampleKey, Step};
pub use noise::{Philox, derive_seed, uniform53};
pub use prompt::{ChatMessage, PromptContent, PromptRow};
pub use reward::{RewardComponent, RewardFailure, RewardOutcome};
pub use sample::{FinishReason, Sample, SampleTimings};
pub use sampling::{SamplingError, SamplingParams};
pub use suggest::did_you_mean;
pub use version::{ContentHash, ParseVersionError, PolicyVersion};
pub use weight_format::WeightFormat;
