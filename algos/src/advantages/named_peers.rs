//! Estimators of OpenRLHF and TRL over ragged groups, as the loop has them.
//!
//! Both peers take groups of one size; a group that lost a row is filled up with rows that have no score, which TRL's
//! statistics pass over.

use super::groups::group_rows;
use super::openrlhf::{RewardBaseline, RewardBaselineConfig, baseline_advantages, baselined};
use super::trl::{FunctionRewards, function_advantages};
use super::{AdvantageConfig, AdvantageInput, AdvantageOutput, broadcast};
use crate::{Error, TokenBatch};

/// OpenRLHF's estimator with `baseline`, without discount; `scores` are `[B]`.
pub(super) fn baseline(
    baseline: RewardBaseline,
    batch: &TokenBatch,
    scores: &[f64],
    group_ids: &[u64],
) -> Result<AdvantageOutput, Error> {
    let config =
        RewardBaselineConfig { baseline, gamma: 1.0, lam: 1.0, kl_coef: 0.0, clip_range: None, divide_by_std: true };
    let zeros = vec![0.0; batch.num_slots()];
    let mut out = baseline_advantages(&config, batch, &baselined(baseline, scores, group_ids), &zeros, &zeros)?;
    for t in (0..batch.num_slots()).filter(|t| !batch.is_active(*t)) {
        (out.advantages[t], out.returns[t]) = (0.0, 0.0);
    }
    Ok(out)
}

/// TRL's estimator over the reward, or over its components where they are normalised before they are added up.
pub(super) fn functions(
    config: &AdvantageConfig,
    input: &AdvantageInput<'_>,
    scores: &[f64],
) -> Result<AdvantageOutput, Error> {
    let whole = [scores];
    let columns: &[&[f64]] = match config.reads_components() {
        true => input.reward_components.ok_or(Error::Missing { operation: "trl_grpo", name: "reward_components" })?,
        false => &whole,
    };
    for column in columns {
        input.batch.expect_finite_rows("trl_grpo", "reward_components", column)?;
    }
    let weights = match &config.gdpo_reward_weights[..] {
        given if config.reads_components() && given.len() == columns.len() => given.to_vec(),
        given if config.reads_components() && !given.is_empty() => {
            return Err(Error::setting("gdpo_reward_weights", given.len(), "one weight per reward component"));
        }
        _ => vec![1.0; columns.len()],
    };
    let groups = group_rows(input.group_ids);
    let size = groups.iter().map(Vec::len).max().unwrap_or(1);
    let mut padded = vec![f64::NAN; groups.len() * size * columns.len()];
    let slot = |group: usize, place: usize| group * size + place;
    for (group, rows) in groups.iter().enumerate() {
        for (place, row) in rows.iter().enumerate() {
            let first = slot(group, place) * columns.len();
            columns.iter().enumerate().for_each(|(k, column)| padded[first + k] = column[*row]);
        }
    }
    let rewards = FunctionRewards { scores: &padded, weights: &weights, num_generations: size };
    let out = function_advantages(&rewards, config.scale_rewards, config.multi_objective_aggregation)?;
    let mut per_row = vec![0.0; scores.len()];
    for (group, rows) in groups.iter().enumerate() {
        rows.iter().enumerate().for_each(|(place, row)| per_row[*row] = out.advantages[slot(group, place)]);
    }
    Ok(AdvantageOutput::same(broadcast(&input.batch, &per_row)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AdvEstimator, MultiObjective, Rewards, ScaleRewards, compute_advantages};

    /// Five rows of two groups, of one token each but for the last, which has two; the third is masked.
    fn advantages(config: &AdvantageConfig, scores: &[f64; 5], components: &[&[f64]]) -> Vec<f64> {
        let (offsets, mask) = ([0, 1, 2, 3, 4, 6], [1, 1, 0, 1, 1, 1]);
        let input = AdvantageInput {
            batch: TokenBatch::new(&offsets, &mask).expect("five rows"),
            group_ids: &[7, 7, 7, 9, 9],
            rewards: Rewards::Sequence(scores),
            reward_components: Some(components),
            ..AdvantageInput::default()
        };
        compute_advantages(config, &input).expect("advantages").advantages
    }

    fn close(got: &[f64], expected: &[f64]) {
        assert_eq!(got.len(), expected.len());
        got.iter().zip(expected).for_each(|(g, e)| assert!((g - e).abs() < 1e-9, "{got:?}: expected {expected:?}"));
    }

    #[test]
    fn flash_reinforce_subtracts_the_mean_of_the_batch() {
        let config = AdvantageConfig { adv_estimator: AdvEstimator::FlashReinforce, ..AdvantageConfig::default() };
        close(&advantages(&config, &[1.0, 3.0, 5.0, 0.0, 1.0], &[]), &[-1.0, 1.0, 0.0, -2.0, -1.0, -1.0]);
    }

    #[test]
    fn reinforce_baseline_whitens_what_is_centred_in_its_group() {
        let config = AdvantageConfig { adv_estimator: AdvEstimator::ReinforceBaseline, ..AdvantageConfig::default() };
        let got = advantages(&config, &[1.0, 3.0, 5.0, 0.0, 1.0], &[]);
        let centred = [-2.0, 0.0, -0.5, 0.5, 0.5];
        let mean = centred.iter().sum::<f64>() / 5.0;
        let std = (centred.iter().map(|c| (c - mean) * (c - mean)).sum::<f64>() / 5.0).sqrt();
        let white = |c: f64| (c - mean) / std;
        close(&got, &[white(-2.0), white(0.0), 0.0, white(-0.5), white(0.5), white(0.5)]);
    }

    #[test]
    fn trl_grpo_scales_by_group_or_batch_over_ragged_groups() {
        let scores = [1.0, 3.0, 5.0, 0.0, 1.0];
        let of = |scale_rewards| {
            let adv_estimator = AdvEstimator::TrlGrpo;
            advantages(&AdvantageConfig { adv_estimator, scale_rewards, ..AdvantageConfig::default() }, &scores, &[])
        };
        close(&of(ScaleRewards::None), &[-2.0, 0.0, 0.0, -0.5, 0.5, 0.5]);
        let half = 0.5_f64.sqrt();
        let (own, other) = (2.0 + 1e-4, half + 1e-4);
        close(&of(ScaleRewards::Group), &[-2.0 / own, 0.0, 0.0, -0.5 / other, 0.5 / other, 0.5 / other]);
        let batch = 4.0_f64.sqrt() + 1e-4;
        close(&of(ScaleRewards::Batch), &[-2.0 / batch, 0.0, 0.0, -0.5 / batch, 0.5 / batch, 0.5 / batch]);
    }

    #[test]
    fn trl_grpo_normalises_components_before_it_sums() {
        let config = AdvantageConfig {
            adv_estimator: AdvEstimator::TrlGrpo,
            multi_objective_aggregation: MultiObjective::NormalizeThenSum,
            gdpo_reward_weights: vec![1.0, 2.0],
            ..AdvantageConfig::default()
        };
        let components: [&[f64]; 2] = [&[0.0, 1.0, 2.0, 5.0, 5.0], &[1.0, 1.0, 1.0, 0.0, 2.0]];
        let got = advantages(&config, &[0.0; 5], &components);
        let (first, second) = (1.0 + 1e-4, 2.0_f64.sqrt() + 1e-4);
        let totals = [-1.0 / first, 0.0, 1.0 / first, -2.0 / second, 2.0 / second];
        let std = (totals.iter().map(|t| t * t).sum::<f64>() / 4.0).sqrt() + 1e-4;
        close(&got, &[totals[0] / std, 0.0, 0.0, totals[3] / std, totals[4] / std, totals[4] / std]);
    }
}
