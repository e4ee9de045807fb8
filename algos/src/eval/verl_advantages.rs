//! verl's advantage estimators, by their function names.

use super::case::{Case, Results};
use crate::{AdvEstimator, AdvantageConfig, AdvantageInput, Error, Rewards, TokenBatch, compute_advantages};

/// An estimator, named by verl's function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::eval) struct Function(AdvEstimator);

impl Function {
    pub(in crate::eval) fn find(name: &str) -> Option<Function> {
        Some(Function(match name {
            "compute_gae_advantage_return" => AdvEstimator::Gae,
            "compute_gdpo_outcome_advantage" => AdvEstimator::Gdpo,
            "compute_gpg_outcome_advantage" => AdvEstimator::Gpg,
            "compute_grpo_outcome_advantage" => AdvEstimator::Grpo,
            "compute_grpo_passk_outcome_advantage" => AdvEstimator::GrpoPassk,
            "compute_grpo_vectorized_outcome_advantage" => AdvEstimator::GrpoVectorized,
            "compute_opo_outcome_advantage" => AdvEstimator::Opo,
            "compute_optimal_token_baseline_advantage" => AdvEstimator::OptimalTokenBaseline,
            "compute_multi_turn_optimal_token_baseline_advantage" => AdvEstimator::TirOptimalTokenBaseline,
            "compute_reinforce_plus_plus_outcome_advantage" => AdvEstimator::ReinforcePlusPlus,
            "compute_reinforce_plus_plus_baseline_outcome_advantage" => AdvEstimator::ReinforcePlusPlusBaseline,
            "compute_remax_outcome_advantage" => AdvEstimator::Remax,
            "compute_rloo_outcome_advantage" => AdvEstimator::Rloo,
            "compute_rloo_vectorized_outcome_advantage" => AdvEstimator::RlooVectorized,
            _ => return None,
        }))
    }
}

fn config(estimator: AdvEstimator, case: &Case<'_>) -> Result<AdvantageConfig, Error> {
    let default = AdvantageConfig::default();
    let baseline = [AdvEstimator::OptimalTokenBaseline, AdvEstimator::TirOptimalTokenBaseline].contains(&estimator);
    let epsilon = case.num("epsilon", if baseline { default.token_baseline_epsilon } else { default.epsilon })?;
    // The library asks for a number above 0; this one is lost beside any deviation but 0.
    let epsilon = if epsilon == 0.0 { f64::MIN_POSITIVE } else { epsilon };
    Ok(AdvantageConfig {
        adv_estimator: estimator,
        gamma: case.num("gamma", default.gamma)?,
        lam: case.num("lam", default.lam)?,
        norm_adv_by_std_in_grpo: case.flag("norm_adv_by_std_in_grpo", default.norm_adv_by_std_in_grpo)?,
        epsilon: if baseline { default.epsilon } else { epsilon },
        token_baseline_epsilon: if baseline { epsilon } else { default.token_baseline_epsilon },
        f_norm: case.num("f_norm", default.f_norm)?,
        handle_zero_tail: case.flag("handle_zero_tail", default.handle_zero_tail)?,
        gdpo_reward_weights: case.numbers("gdpo_reward_weights")?.unwrap_or_default(),
        ..default
    })
}

/// Run one case.
pub(in crate::eval) fn run(function: Function, case: &Case<'_>) -> Result<Results, Error> {
    let config = config(function.0, case)?;
    let mask = case.mask("response_mask")?;
    let groups = if case.has("index") { case.groups("index")? } else { Vec::new() };
    let components = case.opt_grid("component_rewards")?;
    let components: Option<Vec<&[f64]>> = components.as_ref().map(|g| (0..g.rows).map(|k| g.row(k)).collect());
    let rewards = case.opt_vector("token_level_rewards")?.unwrap_or_default();
    let values = case.opt_vector("values")?;
    let old_log_probs = case.opt_vector("old_log_probs")?;
    let sum_pi_squared = case.opt_vector("sum_pi_squared")?;
    let rollout_is_weights = case.opt_vector("rollout_is_weights")?;
    let reward_baselines = case.opt_vector("reward_baselines")?;
    let input = AdvantageInput {
        batch: mask.batch()?,
        group_ids: &groups,
        rewards: Rewards::Token(&rewards),
        values: values.as_deref(),
        old_log_probs: old_log_probs.as_deref(),
        sum_pi_squared: sum_pi_squared.as_deref(),
        rollout_is_weights: rollout_is_weights.as_deref(),
        reward_baselines: reward_baselines.as_deref(),
        reward_components: components.as_deref(),
    };
    let mut out = compute_advantages(&config, &input)?;
    let reward_to_go = [AdvEstimator::Remax, AdvEstimator::OptimalTokenBaseline, AdvEstimator::TirOptimalTokenBaseline];
    if reward_to_go.contains(&config.adv_estimator) {
        carry(&input.batch, &mut out.returns);
    }
    if config.adv_estimator == AdvEstimator::Remax {
        let masked = (0..out.returns.len()).filter(|t| !input.batch.is_active(*t));
        masked.for_each(|t| out.advantages[t] = out.returns[t]);
    }
    Ok(Results::default().grid("advantages", mask.cols, &out.advantages).grid("returns", mask.cols, &out.returns))
}

/// verl's reward-to-go stands on masked slots too, where the library has 0.
fn carry(batch: &TokenBatch, returns: &mut [f64]) {
    for row in batch.rows() {
        let mut next = 0.0;
        for t in row.rev() {
            if batch.is_active(t) {
                next = returns[t];
            }
            returns[t] = next;
        }
    }
}
