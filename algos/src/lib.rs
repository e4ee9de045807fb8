//! The algorithms of RL post-training as pure functions with gradients.
//!
//! Owns: advantages, losses, KL, filters, schedules and the reference maths of optimizers; what each algorithm needs
//! ([`Plan`]). Knows nothing of I/O, devices, services or the loop. All maths is f64. Every loss returns its gradient
//! with respect to log-probs (and entropies, values, scores); losses are normalised by global counts, so the split
//! into micro-batches, packing order and the number of ranks do not change them.
//!
//! Called by the controller (advantages, filters) and the trainer (losses, schedules).

mod advantages;
mod batch;
pub mod catalog;
mod curriculum;
pub mod distill;
pub mod distribution;
mod error;
pub mod eval;
pub mod filters;
mod kl;
mod kl_bounded;
pub mod logits_processors;
mod loss;
pub mod masked;
mod math;
pub mod metrics;
mod objective;
pub mod optim;
mod plan;
pub mod preference;
pub mod rollout_correction;
mod schedule;
mod selection;
mod sft;
mod value;

pub use advantages::{
    AdvEstimator, AdvantageConfig, AdvantageInput, AdvantageOutput, FunctionAdvantages, FunctionRewards,
    MultiObjective, RewardBaseline, RewardBaselineConfig, Rewards, RlooOptions, ScaleRewards, baseline_advantages,
    baselined, compute_advantages, function_advantages, function_rloo, rewards_with_kl, unwhitened_gae,
};
pub use batch::{TokenBatch, widen};
pub use curriculum::{CurriculumConfig, PassRate, PassRates};
pub use error::Error;
pub use kl::{
    Dual, KlController, KlControllerConfig, KlControllerType, KlInRewardConfig, KlType, PenalisedRewards,
    apply_kl_penalty, kl_penalty,
};
pub use kl_bounded::{BoundedKl, Estimator};
pub use loss::{
    DecoupledOptions, DecoupledOutput, GlobalCounts, ImportanceLevel, LossAggMode, LossMetrics, LossMode, LossOutput,
    PolicyLossConfig, PolicyLossInput, ProximalMethod, TrlConfig, TrlLossType, TrlReport, agg_loss, decoupled_loss,
    m2po_mask, policy_loss, proximal_log_prob, sequence_kl, trl_loss,
};
pub use objective::{Objective, ObjectiveInput, ObjectiveOutput};
pub use plan::{AlgorithmConfig, Grouping, Plan, Scope};
pub use rollout_correction::{
    BypassLoss, CorrectionOutput, IsLevel, RolloutCorrectionConfig, Threshold, rollout_correction,
};
pub use schedule::{LrScheduleConfig, ScheduleType};
pub use selection::{BestOfNConfig, PfPpoConfig};
pub use sft::{SftLossType, TokenLoss, sft_loss};
pub use value::{SharedValueLossConfig, ValueLossConfig, ValueLossInput, ValueLossOutput, value_loss};
