//! Advantages: how much better a token was than expected. One file per estimator.
//!
//! Rows whose reward failed are left out by the caller before this: a failed reward is never a score.

mod config;
mod gae;
mod gdpo;
mod gpg;
mod groups;
mod grpo;
mod grpo_passk;
mod named_peers;
mod openrlhf;
mod opo;
mod reinforce_plus_plus;
mod remax;
mod rloo;
mod token_baseline;
mod trl;

use crate::batch::require_tokens;
use crate::masked::broadcast;
use crate::{Error, TokenBatch};
pub use config::{AdvEstimator, AdvantageConfig};
pub(crate) use groups::group_rows;
use grpo::Scale;
pub use openrlhf::{RewardBaseline, RewardBaselineConfig, baseline_advantages, baselined, rewards_with_kl};
use rloo::Singleton;
use token_baseline::{TimeAxis, TokenBaseline, ZeroTail};
pub(crate) use trl::nan_statistics;
pub use trl::{
    FunctionAdvantages, FunctionRewards, MultiObjective, RlooOptions, ScaleRewards, function_advantages, function_rloo,
};

/// Rewards of a batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rewards<'a> {
    /// `[B]`: one number per row, given at its last unmasked token.
    Sequence(&'a [f64]),
    /// `[T]`: one number per token (with a KL penalty inside, say). The score of a row is the sum over the whole row.
    Token(&'a [f64]),
}

impl Default for Rewards<'_> {
    fn default() -> Self {
        Rewards::Sequence(&[])
    }
}

impl Rewards<'_> {
    /// One number per row, `[B]`.
    ///
    /// # Errors
    /// Wrong length, or a reward that is not finite.
    pub fn scores(&self, batch: &TokenBatch) -> Result<Vec<f64>, Error> {
        let scores: Vec<f64> = match self {
            Rewards::Sequence(rewards) => rewards.to_vec(),
            Rewards::Token(rewards) => {
                batch.expect_tokens("token_level_rewards", rewards)?;
                batch.rows().map(|row| rewards[row].iter().sum()).collect()
            }
        };
        batch.expect_finite_rows("advantages", "rewards", &scores)?;
        Ok(scores)
    }

    /// One number per token, `[T]`.
    ///
    /// # Errors
    /// Wrong length, or a reward that is not finite.
    pub fn tokens(&self, batch: &TokenBatch) -> Result<Vec<f64>, Error> {
        let tokens = match self {
            Rewards::Token(rewards) => rewards.to_vec(),
            Rewards::Sequence(rewards) => {
                batch.expect_finite_rows("advantages", "rewards", rewards)?;
                let mut tokens = vec![0.0; batch.num_slots()];
                for (row, reward) in rewards.iter().enumerate() {
                    if let Some(last) = batch.active(row).next_back() {
                        tokens[last] = *reward;
                    }
                }
                tokens
            }
        };
        batch.expect_finite("advantages", "token_level_rewards", &tokens)?;
        Ok(tokens)
    }
}

/// Everything an estimator may read; `..Default::default()` leaves out what the plan does not ask for.
#[derive(Debug, Clone, Copy, Default)]
pub struct AdvantageInput<'a> {
    /// Rows and mask.
    pub batch: TokenBatch<'a>,
    /// `[B]`: rows with the same number are samples of one prompt; they need not be neighbours.
    pub group_ids: &'a [u64],
    /// The rewards.
    pub rewards: Rewards<'a>,
    /// `[T]`: the critic's values (gae).
    pub values: Option<&'a [f64]>,
    /// `[T]`: log-probs at the start of the step (the token baselines).
    pub old_log_probs: Option<&'a [f64]>,
    /// `[T]`: sum of the squared probabilities of all tokens of the vocabulary (the token baselines).
    pub sum_pi_squared: Option<&'a [f64]>,
    /// `[T]`: importance weights of the rollout correction (the token baselines, optional).
    pub rollout_is_weights: Option<&'a [f64]>,
    /// `[B]`: reward of the greedy response to the row's prompt (remax).
    pub reward_baselines: Option<&'a [f64]>,
    /// One `[B]` per reward component (gdpo).
    pub reward_components: Option<&'a [&'a [f64]]>,
}

/// Advantages and returns, both `[T]`, 0 where the mask is 0.
#[derive(Debug, Clone, PartialEq)]
pub struct AdvantageOutput {
    /// Advantages.
    pub advantages: Vec<f64>,
    /// Returns: targets of a critic for the estimators that define them, else equal to the advantages.
    pub returns: Vec<f64>,
}

impl AdvantageOutput {
    fn same(advantages: Vec<f64>) -> Self {
        AdvantageOutput { returns: advantages.clone(), advantages }
    }
}

/// Turn rewards into token-level advantages.
///
/// # Errors
/// An array that is missing, has the wrong length or is not finite; a batch too small to whiten (gae, the
/// reinforce_plus_plus pair and gdpo need two unmasked tokens); a group of one for grpo_passk.
pub fn compute_advantages(config: &AdvantageConfig, input: &AdvantageInput<'_>) -> Result<AdvantageOutput, Error> {
    config.validate()?;
    let (batch, groups) = (&input.batch, input.group_ids);
    let scale = Scale::from_flag(config.norm_adv_by_std_in_grpo);
    let scores = || {
        batch.expect_rows("group_ids", groups)?;
        input.rewards.scores(batch)
    };
    let per_row = match config.adv_estimator {
        AdvEstimator::Grpo | AdvEstimator::GrpoVectorized => {
            grpo::advantages(&scores()?, groups, scale, config.epsilon)
        }
        AdvEstimator::GrpoPassk => grpo_passk::advantages(&scores()?, groups, scale, config.epsilon)?,
        AdvEstimator::Rloo => rloo::advantages(&scores()?, groups, Singleton::Score),
        AdvEstimator::RlooVectorized => rloo::advantages(&scores()?, groups, Singleton::Zero),
        AdvEstimator::Opo => opo::advantages(batch, &scores()?, groups),
        AdvEstimator::Gpg => gpg::advantages(&scores()?, groups, config.f_norm),
        AdvEstimator::ReinforcePlusPlusBaseline => {
            let whitened = reinforce_plus_plus::baseline_advantages(batch, &scores()?, groups)?;
            return Ok(AdvantageOutput::same(whitened));
        }
        AdvEstimator::Gdpo => return decoupled(config, input, scale),
        AdvEstimator::TrlGrpo => return named_peers::functions(config, input, &scores()?),
        AdvEstimator::ReinforceBaseline => {
            return named_peers::baseline(RewardBaseline::ReinforceBaseline, batch, &scores()?, groups);
        }
        AdvEstimator::FlashReinforce => {
            return named_peers::baseline(RewardBaseline::FlashReinforce, batch, &scores()?, groups);
        }
        AdvEstimator::Gae => return critic(config, input),
        AdvEstimator::Remax => return greedy_baseline(input),
        AdvEstimator::ReinforcePlusPlus => {
            return reinforce_plus_plus::advantages(batch, &input.rewards.tokens(batch)?, config.gamma);
        }
        AdvEstimator::OptimalTokenBaseline => return token_baseline(config, input, TimeAxis::Slot),
        AdvEstimator::TirOptimalTokenBaseline => return token_baseline(config, input, TimeAxis::Compacted),
    };
    Ok(AdvantageOutput::same(broadcast(batch, &per_row)))
}

/// Advantages by a critic before whitening, and returns.
pub fn unwhitened_gae(batch: &TokenBatch, rewards: &[f64], values: &[f64], gamma: f64, lam: f64) -> AdvantageOutput {
    gae::unwhitened(batch, rewards, values, gae::Discounts { gamma, lam })
}

fn critic(config: &AdvantageConfig, input: &AdvantageInput<'_>) -> Result<AdvantageOutput, Error> {
    let values = require_tokens(&input.batch, "gae", "values", input.values)?;
    let discounts = gae::Discounts { gamma: config.gamma, lam: config.lam };
    gae::advantages(&input.batch, &input.rewards.tokens(&input.batch)?, values, discounts)
}

fn greedy_baseline(input: &AdvantageInput<'_>) -> Result<AdvantageOutput, Error> {
    let missing = Error::Missing { operation: "remax", name: "reward_baselines" };
    let baselines = input.reward_baselines.ok_or(missing)?;
    input.batch.expect_finite_rows("remax", "reward_baselines", baselines)?;
    Ok(remax::advantages(&input.batch, &input.rewards.tokens(&input.batch)?, baselines))
}

fn decoupled(config: &AdvantageConfig, input: &AdvantageInput<'_>, scale: Scale) -> Result<AdvantageOutput, Error> {
    input.batch.expect_rows("group_ids", input.group_ids)?;
    let missing = Error::Missing { operation: "gdpo", name: "reward_components" };
    let rewards = input.reward_components.ok_or(missing)?;
    let weights = Some(&config.gdpo_reward_weights[..]).filter(|w| !w.is_empty());
    let components = gdpo::Components { rewards, weights, scale, epsilon: config.epsilon };
    gdpo::advantages(&input.batch, input.group_ids, components).map(AdvantageOutput::same)
}

fn token_baseline(
    config: &AdvantageConfig,
    input: &AdvantageInput<'_>,
    axis: TimeAxis,
) -> Result<AdvantageOutput, Error> {
    const NAME: &str = "optimal_token_baseline";
    let batch = &input.batch;
    batch.expect_rows("group_ids", input.group_ids)?;
    if let Some(weights) = input.rollout_is_weights {
        batch.expect_finite(NAME, "rollout_is_weights", weights)?;
    }
    let baseline = TokenBaseline {
        rewards: &input.rewards.tokens(batch)?,
        old_log_probs: require_tokens(batch, NAME, "old_log_probs", input.old_log_probs)?,
        sum_pi_squared: require_tokens(batch, NAME, "sum_pi_squared", input.sum_pi_squared)?,
        rollout_is_weights: input.rollout_is_weights,
        axis,
        tail: if config.handle_zero_tail { ZeroTail::Zero } else { ZeroTail::Keep },
        epsilon: config.token_baseline_epsilon,
    };
    Ok(token_baseline::advantages(batch, input.group_ids, baseline))
}
