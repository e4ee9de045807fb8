//! OpenRLHF's way from rewards to advantages: baseline per group, KL in the reward, reward-to-go, batch whitening.
//!
//! The baseline acts on scalar rewards (group_norm `(r - mean) / (std + 1e-9)`, dr_grpo and reinforce_baseline `r -
//! mean`,
//! rloo `r - mean of the others`, flash_reinforce `r - mean of the batch`); the result, clipped, stands on a row's last
//! token, less `kl_coef * kl` on every token. Masked tokens carry returns through. Whitening uses the biased variance,
//! `(x - mean) / sqrt(max(var, 1e-8))`.
//!
//! # Source
//! OpenRLHF's experience maker.

use super::groups::{group_rows, mean_of, std_of};
use super::{gae, rloo};
use crate::masked::{masked_mean, masked_var_biased};
use crate::math::Cut;
use crate::{AdvantageOutput, Error, TokenBatch};
use serde::{Deserialize, Serialize};

/// OpenRLHF's estimators.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RewardBaseline {
    /// A critic.
    Gae,
    /// None.
    Reinforce,
    /// The mean of the siblings.
    Rloo,
    /// The group's mean, whitened over the batch.
    ReinforceBaseline,
    /// The group's mean and deviation.
    GroupNorm,
    /// The group's mean.
    DrGrpo,
    /// The batch's mean.
    FlashReinforce,
}

/// Settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RewardBaselineConfig {
    /// The estimator.
    pub baseline: RewardBaseline,
    /// Discount per token (gae, reinforce).
    pub gamma: f64,
    /// Decay of the trace (gae).
    pub lam: f64,
    /// Weight of the KL in the reward; 0 or less is off.
    pub kl_coef: f64,
    /// Range of the reward before the KL.
    pub clip_range: Option<(f64, f64)>,
    /// Whether whitening divides by the deviation.
    pub divide_by_std: bool,
}

/// Rewards of the rows after their baseline, `[B]`.
pub fn baselined(baseline: RewardBaseline, rewards: &[f64], group_ids: &[u64]) -> Vec<f64> {
    let mut out = rewards.to_vec();
    let centre = |out: &mut [f64], scale: &dyn Fn(f64) -> f64| {
        for rows in group_rows(group_ids) {
            let (mean, std) = (mean_of(rewards, &rows), std_of(rewards, &rows));
            rows.iter().for_each(|r| out[*r] = (rewards[*r] - mean) / scale(std));
        }
    };
    match baseline {
        RewardBaseline::Gae | RewardBaseline::Reinforce => {}
        RewardBaseline::Rloo => out = rloo::advantages(rewards, group_ids, rloo::Singleton::Zero),
        RewardBaseline::GroupNorm => centre(&mut out, &|std| std + 1e-9),
        RewardBaseline::DrGrpo | RewardBaseline::ReinforceBaseline => centre(&mut out, &|_| 1.0),
        RewardBaseline::FlashReinforce => {
            let mean = rewards.iter().sum::<f64>() / rewards.len().max(1) as f64;
            out.iter_mut().for_each(|r| *r -= mean);
        }
    }
    out
}

/// Token-level rewards: the row's reward on its last unmasked token, `-kl_coef * kl` on every slot.
pub fn rewards_with_kl(
    batch: &TokenBatch,
    rewards: &[f64],
    kl: &[f64],
    kl_coef: f64,
    clip_range: Option<(f64, f64)>,
) -> Result<Vec<f64>, Error> {
    batch.expect_rows("rewards", rewards)?;
    batch.expect_tokens("kl", kl)?;
    let mut out: Vec<f64> = kl.iter().map(|kl| if kl_coef > 0.0 { -kl_coef * kl } else { 0.0 }).collect();
    for (row, reward) in rewards.iter().enumerate() {
        if let Some(last) = batch.active(row).next_back() {
            out[last] += clip_range.map_or(*reward, |(low, high)| reward.cut(low, high));
        }
    }
    Ok(out)
}

/// Advantages and returns over all slots; masked ones carry what comes after them.
pub fn baseline_advantages(
    config: &RewardBaselineConfig,
    batch: &TokenBatch,
    rewards: &[f64],
    kl: &[f64],
    values: &[f64],
) -> Result<AdvantageOutput, Error> {
    let tokens = rewards_with_kl(batch, rewards, kl, config.kl_coef, config.clip_range)?;
    let mut out = match config.baseline {
        RewardBaseline::Gae => masked_gae(batch, &tokens, values, config),
        RewardBaseline::Reinforce => reward_to_go(batch, &tokens, config.gamma),
        RewardBaseline::Rloo
        | RewardBaseline::ReinforceBaseline
        | RewardBaseline::GroupNorm
        | RewardBaseline::DrGrpo
        | RewardBaseline::FlashReinforce => reward_to_go(batch, &tokens, 1.0),
    };
    let whitened =
        [RewardBaseline::Gae, RewardBaseline::Reinforce, RewardBaseline::ReinforceBaseline].contains(&config.baseline);
    if whitened {
        let mask = batch.response_mask();
        let (mean, var) = (masked_mean(&out.advantages, mask), masked_var_biased(&out.advantages, mask));
        let scale = if config.divide_by_std { var.max(1e-8).sqrt().recip() } else { 1.0 };
        out.advantages.iter_mut().for_each(|a| *a = (*a - mean) * scale);
    }
    Ok(out)
}

fn reward_to_go(batch: &TokenBatch, rewards: &[f64], gamma: f64) -> AdvantageOutput {
    let mut returns = vec![0.0; batch.num_slots()];
    for row in batch.rows() {
        let mut to_go = 0.0;
        for t in row.rev() {
            to_go = gamma * to_go + if batch.is_active(t) { rewards[t] } else { 0.0 };
            returns[t] = to_go;
        }
    }
    AdvantageOutput { advantages: returns.clone(), returns }
}

/// Values and rewards of masked slots count as 0; no slot is skipped.
fn masked_gae(batch: &TokenBatch, rewards: &[f64], values: &[f64], config: &RewardBaselineConfig) -> AdvantageOutput {
    let keep = |v: &[f64]| -> Vec<f64> {
        v.iter().enumerate().map(|(t, v)| if batch.is_active(t) { *v } else { 0.0 }).collect()
    };
    let all: Vec<u8> = vec![1; batch.num_slots()];
    let discounts = gae::Discounts { gamma: config.gamma, lam: config.lam };
    match batch.with_mask(&all) {
        Ok(every) => gae::unwhitened(&every, &keep(rewards), &keep(values), discounts),
        Err(_) => AdvantageOutput { advantages: Vec::new(), returns: Vec::new() },
    }
}
