//! Rewards: verifiers as pure functions from a response to a value, and their weighted sum.
//!
//! Owns: the verifiers (one a file), the `reward` table of a recipe, the scorer that turns a sample into components
//! and a sum, reward models as components, and the user's own code as components, in processes within limits
//! (`external`). To a verifier a response is text; a reward model reads its ids. Knows nothing of training.
//!
//! Invariants: a verifier never panics and never guesses: what it cannot decide (no ground truth, one it cannot
//! read, a number beyond its arithmetic) is a [`RewardFailure`](temper_types::RewardFailure) with its name and cause,
//! never a value of 0. Scoring is a pure function of sample and configuration.
//!
//! Called by: the reward service (embedded or a process of its own) and `temper eval`.

mod config;
mod error;
mod exact;
mod external;
mod reward_model;
mod scorer;
mod service;
mod text;
mod validate;
mod verifiers;

pub use config::{ComponentConfig, Extract, ExtractRegex, RewardConfig, RewardKind, kinds, names};
pub use error::Error;
pub use external::{
    BreakerConfig, CommandConfig, HttpConfig, Launcher, MAX_ABS_SCORE, ProcessLimits, PythonConfig, role,
};
pub use reward_model::{ModelScorer, RewardModelConfig, RewardModelSource, SequenceScorer};
pub use scorer::{ScoreInput, Scorer};
pub use service::LocalRewardService;
pub use verifiers::contains::ContainsConfig;
pub use verifiers::exact_match::{ExactMatchConfig, Strip};
pub use verifiers::format::{FormatConfig, OutsideText};
pub use verifiers::json::{JsonConfig, JsonType};
pub use verifiers::length::LengthConfig;
pub use verifiers::math::MathConfig;
pub use verifiers::number::{NumberConfig, Percent};
pub use verifiers::overlong::OverlongConfig;
pub use verifiers::regex::{RegexConfig, RegexScope};
