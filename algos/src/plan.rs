//! What an algorithm needs: the loop and the trainer follow the plan and name no algorithm.

use crate::advantages::{AdvEstimator, AdvantageConfig};
use crate::filters::{FilterGroupsConfig, OverlongConfig};
use crate::kl::KlInRewardConfig;
use crate::loss::{LossMode, PolicyLossConfig};
use crate::selection::{BestOfNConfig, PfPpoConfig};
use crate::{Error, KlController};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a loss has to see at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Any set of tokens of a row.
    Token,
    /// Whole rows.
    Sequence,
    /// The whole mini-batch, over all ranks: covariances, quantiles, sorts.
    MiniBatch,
}

/// How rows hang together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Grouping {
    /// Every row stands alone.
    None,
    /// Samples of one prompt form a group; with fewer than `min_size` of them the estimator says nothing useful.
    Group {
        /// Smallest useful number of samples per prompt.
        min_size: u32,
    },
}

/// A complete on-policy algorithm: its parts, each with its own settings.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AlgorithmConfig {
    /// Rewards to advantages.
    pub advantage: AdvantageConfig,
    /// The policy loss.
    pub policy_loss: PolicyLossConfig,
    /// KL as a part of the reward.
    pub kl_in_reward: KlInRewardConfig,
    /// Dynamic sampling.
    pub filter_groups: FilterGroupsConfig,
    /// Penalty for long responses.
    pub overlong: OverlongConfig,
    /// Only the best and the worst samples of a group.
    pub best_of_n: BestOfNConfig,
    /// Rows drawn by their scores.
    pub pf_ppo: PfPpoConfig,
    /// Leave responses that reached the length limit out of the loss.
    pub mask_truncated_completions: bool,
    /// Reward of responses that reached the length limit: so many times what it was, or, where this is negative, this;
    /// absent: what it was.
    pub stop_properly_penalty_coef: Option<f64>,
}

/// What to compute and provide before advantages and loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Log-probs at the start of the step, by the trainer.
    pub old_log_probs: bool,
    /// They are needed of every row before the first update.
    pub old_log_probs_first: bool,
    /// Log-probs by the engine enter the weights, the mask or the loss.
    pub rollout_log_probs: bool,
    /// Rollout correction runs once a step, on the log-probs at its start.
    pub rollout_correction: bool,
    /// Log-probs under the reference policy, by the trainer.
    pub ref_log_probs: bool,
    /// Values by a critic.
    pub values: bool,
    /// Entropies enter the loss (else they are only reported).
    pub entropies: bool,
    /// Sum of squared probabilities over the vocabulary.
    pub sum_pi_squared: bool,
    /// A greedy response to every prompt, scored.
    pub greedy_baseline: bool,
    /// Reward components one by one.
    pub reward_components: bool,
    /// Grouping of rows.
    pub grouping: Grouping,
    /// Groups are filtered and refilled.
    pub filter_groups: bool,
    /// What the advantages have to see at once.
    pub advantage_scope: Scope,
    /// What the loss has to see at once.
    pub loss_scope: Scope,
}

impl AlgorithmConfig {
    /// Check every part.
    ///
    /// # Errors
    /// The first setting out of range, by name.
    pub fn validate(&self) -> Result<(), Error> {
        self.advantage.validate()?;
        self.policy_loss.validate()?;
        KlController::new(&self.kl_in_reward.kl_ctrl)?;
        self.pf_ppo.validate()?;
        self.check_best_of_n()?;
        self.check_stop_properly()?;
        self.overlong.validate()
    }

    fn check_stop_properly(&self) -> Result<(), Error> {
        match self.stop_properly_penalty_coef {
            Some(coef) if !coef.is_finite() || coef > 1.0 => {
                Err(Error::setting("stop_properly_penalty_coef", coef, "a number of at most 1"))
            }
            _ => Ok(()),
        }
    }

    fn check_best_of_n(&self) -> Result<(), Error> {
        let smallest = match grouping(self.advantage.adv_estimator) {
            Grouping::None => 1,
            Grouping::Group { min_size } => min_size as usize,
        };
        let kept = self.best_of_n.num_kept();
        if self.best_of_n.is_active() && kept < smallest {
            let expected = "best + worst of 2 or more: this estimator compares the samples of a group";
            return Err(Error::setting("best_of_n", kept, expected));
        }
        Ok(())
    }

    /// What this algorithm needs.
    pub fn plan(&self) -> Plan {
        let estimator = self.advantage.adv_estimator;
        let token_baseline =
            matches!(estimator, AdvEstimator::OptimalTokenBaseline | AdvEstimator::TirOptimalTokenBaseline);
        let bypass = self.policy_loss.loss_mode == LossMode::BypassMode;
        let values = estimator == AdvEstimator::Gae;
        let rollout_correction = !bypass && self.policy_loss.rollout_correction.is_active();
        let in_reward = self.kl_in_reward.use_kl_in_reward;
        Plan {
            old_log_probs_first: in_reward || values || token_baseline || rollout_correction || self.pf_ppo.enable,
            old_log_probs: !bypass || in_reward || token_baseline,
            rollout_log_probs: bypass || self.policy_loss.rollout_correction.is_active(),
            rollout_correction,
            ref_log_probs: self.policy_loss.use_kl_loss || in_reward,
            values,
            entropies: self.policy_loss.needs_entropies(),
            sum_pi_squared: token_baseline,
            greedy_baseline: estimator == AdvEstimator::Remax,
            reward_components: self.advantage.reads_components(),
            grouping: grouping(estimator),
            filter_groups: self.filter_groups.enable,
            advantage_scope: advantage_scope(estimator),
            loss_scope: self.policy_loss.scope(),
        }
    }
}

fn grouping(estimator: AdvEstimator) -> Grouping {
    match estimator {
        AdvEstimator::Gae | AdvEstimator::ReinforcePlusPlus | AdvEstimator::Remax | AdvEstimator::FlashReinforce => {
            Grouping::None
        }
        AdvEstimator::Grpo
        | AdvEstimator::GrpoVectorized
        | AdvEstimator::GrpoPassk
        | AdvEstimator::Rloo
        | AdvEstimator::RlooVectorized
        | AdvEstimator::ReinforcePlusPlusBaseline
        | AdvEstimator::Opo
        | AdvEstimator::Gpg
        | AdvEstimator::OptimalTokenBaseline
        | AdvEstimator::TirOptimalTokenBaseline
        | AdvEstimator::Gdpo
        | AdvEstimator::ReinforceBaseline
        | AdvEstimator::TrlGrpo => Grouping::Group { min_size: 2 },
    }
}

/// Group statistics are complete when the group's rows are; whitening and gpg's scale need the whole batch.
fn advantage_scope(estimator: AdvEstimator) -> Scope {
    match estimator {
        AdvEstimator::Gae
        | AdvEstimator::ReinforcePlusPlus
        | AdvEstimator::ReinforcePlusPlusBaseline
        | AdvEstimator::Gpg
        | AdvEstimator::Gdpo
        | AdvEstimator::ReinforceBaseline
        | AdvEstimator::FlashReinforce
        | AdvEstimator::TrlGrpo => Scope::MiniBatch,
        AdvEstimator::Grpo
        | AdvEstimator::GrpoVectorized
        | AdvEstimator::GrpoPassk
        | AdvEstimator::Rloo
        | AdvEstimator::RlooVectorized
        | AdvEstimator::Remax
        | AdvEstimator::Opo
        | AdvEstimator::OptimalTokenBaseline
        | AdvEstimator::TirOptimalTokenBaseline => Scope::Sequence,
    }
}
