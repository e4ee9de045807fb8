//! Advantages: how much better a token was than expected. One file per estimator.
//!
//! Rows whose reward failed are left out by the caller before this: a failed reward is never a score.

mod gae;
mod gdpo;
mod gpg;
mod groups;
mod grpo;
mod grpo_passk;
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
pub(crate) use groups::group_rows;
use grpo::Scale;
pub use openrlhf::{RewardBaseline, RewardBaselineConfig, baseline_advantages, baselined, rewards_with_kl};
use rloo::Singleton;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use token_baseline::{TimeAxis, TokenBaseline, ZeroTail};
pub(crate) use trl::nan_statistics;
pub use trl::{
    FunctionAdvantages, FunctionRewards, MultiObjective, RlooOptions, ScaleRewards, function_advantages, function_rloo,
};

/// Which estimator turns rewards into advantages. Names are verl's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AdvEstimator {
    /// Reward relative to the group (DeepSeekMath), divided by the group's standard deviation or not (Dr.GRPO).
    #[default]
    Grpo,
    /// The same; kept as a name of its own for verl's recipes.
    GrpoVectorized,
    /// Only the best sample of a group, by its lead over the second.
    GrpoPassk,
    /// Leave-one-out baseline; a group of one keeps its score.
    Rloo,
    /// Leave-one-out baseline; a group of one gets 0.
    RlooVectorized,
    /// Discounted reward-to-go, whitened over the batch.
    ReinforcePlusPlus,
    /// Group-centred reward, whitened over the batch.
    ReinforcePlusPlusBaseline,
    /// Baseline from a greedy response to the same prompt.
    Remax,
    /// Length-weighted group baseline.
    Opo,
    /// Group-centred reward, scaled by the share of non-zero rewards.
    Gpg,
    /// Generalised advantage estimation with a critic.
    Gae,
    /// Variance-minimising baseline at every position.
    OptimalTokenBaseline,
    /// The same on the compacted time axis of multi-turn rows.
    TirOptimalTokenBaseline,
    /// Reward components normalised one by one.
    Gdpo,
}

/// Settings of the estimators; each reads those it names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AdvantageConfig {
    /// The estimator.
    pub adv_estimator: AdvEstimator,
    /// Discount per token (gae, reinforce_plus_plus).
    pub gamma: f64,
    /// Decay of the trace (gae).
    pub lam: f64,
    /// Divide by the group's standard deviation (grpo, grpo_passk, gdpo); `false` is Dr.GRPO.
    pub norm_adv_by_std_in_grpo: bool,
    /// Added to that standard deviation.
    pub epsilon: f64,
    /// Divisor of gpg.
    pub f_norm: f64,
    /// No baseline where only the longest row of a group is left (the token baselines).
    pub handle_zero_tail: bool,
    /// Names of the reward components that gdpo normalises; empty takes all.
    pub gdpo_reward_keys: Vec<String>,
    /// One weight per component of gdpo; empty is all ones.
    pub gdpo_reward_weights: Vec<f64>,
}

impl Default for AdvantageConfig {
    fn default() -> Self {
        AdvantageConfig {
            adv_estimator: AdvEstimator::Grpo,
            gamma: 1.0,
            lam: 1.0,
            norm_adv_by_std_in_grpo: true,
            epsilon: 1e-6,
            f_norm: 1.0,
            handle_zero_tail: true,
            gdpo_reward_keys: Vec::new(),
            gdpo_reward_weights: Vec::new(),
        }
    }
}

impl AdvantageConfig {
    /// Check every range.
    ///
    /// # Errors
    /// The first setting out of range, by name.
    pub fn validate(&self) -> Result<(), Error> {
        let unit = |name, v: f64| {
            if (0.0..=1.0).contains(&v) { Ok(()) } else { Err(Error::setting(name, v, "a number from 0 to 1")) }
        };
        unit("gamma", self.gamma)?;
        unit("lam", self.lam)?;
        if !(self.epsilon > 0.0 && self.epsilon.is_finite()) {
            return Err(Error::setting("epsilon", self.epsilon, "a number above 0"));
        }
        if !(self.f_norm.is_finite() && self.f_norm != 0.0) {
            return Err(Error::setting("f_norm", self.f_norm, "a finite number other than 0"));
        }
        let (keys, weights) = (self.gdpo_reward_keys.len(), self.gdpo_reward_weights.len());
        if keys > 0 && weights > 0 && keys != weights {
            return Err(Error::setting("gdpo_reward_weights", weights, "one weight per entry of gdpo_reward_keys"));
        }
        Ok(())
    }
}

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
        epsilon: 1e-8,
    };
    Ok(token_baseline::advantages(batch, input.group_ids, baseline))
}
