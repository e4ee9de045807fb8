//! Settings of the advantage estimators, with verl's names.

use super::trl::{MultiObjective, ScaleRewards};
use crate::Error;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
    /// OpenRLHF's: group-centred reward, whitened over the batch by the biased deviation.
    ReinforceBaseline,
    /// OpenRLHF's: reward less the mean of the batch.
    FlashReinforce,
    /// TRL's: the reward relative to the group, scaled by the deviation of group or batch, or reward components
    /// normalised one by one and their sum over the batch.
    TrlGrpo,
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
    /// Added to the denominator of the token baselines; a constant, not a key of a recipe.
    #[serde(skip)]
    pub token_baseline_epsilon: f64,
    /// Divisor of gpg.
    pub f_norm: f64,
    /// No baseline where only the longest row of a group is left (the token baselines).
    pub handle_zero_tail: bool,
    /// Names of the reward components that gdpo reads, and trl_grpo where it normalises before it sums; empty: all.
    pub gdpo_reward_keys: Vec<String>,
    /// One weight per such component; empty is all ones.
    pub gdpo_reward_weights: Vec<f64>,
    /// What divides the centred reward (trl_grpo).
    pub scale_rewards: ScaleRewards,
    /// Order of adding up reward components and normalising (trl_grpo).
    pub multi_objective_aggregation: MultiObjective,
}

impl Default for AdvantageConfig {
    fn default() -> Self {
        AdvantageConfig {
            adv_estimator: AdvEstimator::Grpo,
            gamma: 1.0,
            lam: 1.0,
            norm_adv_by_std_in_grpo: true,
            epsilon: 1e-6,
            token_baseline_epsilon: 1e-8,
            f_norm: 1.0,
            handle_zero_tail: true,
            gdpo_reward_keys: Vec::new(),
            gdpo_reward_weights: Vec::new(),
            scale_rewards: ScaleRewards::Group,
            multi_objective_aggregation: MultiObjective::SumThenNormalize,
        }
    }
}

impl AdvantageConfig {
    /// True where the estimator reads reward components one by one.
    pub fn reads_components(&self) -> bool {
        match self.adv_estimator {
            AdvEstimator::Gdpo => true,
            AdvEstimator::TrlGrpo => self.multi_objective_aggregation == MultiObjective::NormalizeThenSum,
            _ => false,
        }
    }

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
