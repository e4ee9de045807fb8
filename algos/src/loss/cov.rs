//! Clip-Cov and KL-Cov: hold back the few tokens whose log-prob and advantage covary most, to keep entropy up.
//!
//! `cov_t = (A_t - mean A) (log_prob_t - mean log_prob)`, means over the unmasked tokens of the mini-batch, detached.
//! Clip-Cov: PPO's clipped surrogate (no clamp of the log-ratio); candidates are tokens with `lb < cov < ub` that PPO
//! does not clip; a random subset of `max(floor(clip_cov_ratio * tokens), 1)` of them gets loss 0. Noise comes from
//! `noise_seed`. KL-Cov: `L = -A r`; the top `max(1, floor(kl_cov_ratio * tokens))` tokens by covariance also get
//! `ppo_kl_coef |log_prob - old|`. Both need the whole mini-batch.
//!
//! # Source
//! arXiv 2505.22617.

use super::PolicyLossInput;
use super::config::{ClipRange, PolicyLossConfig};
use super::terms::{Terms, TokenTerm, clamped_exp};
use super::vanilla;
use crate::masked::masked_mean;
use temper_types::Philox;

/// Token losses of Clip-Cov.
pub(crate) fn clip_cov(config: &PolicyLossConfig, input: &PolicyLossInput<'_>, range: ClipRange) -> Terms {
    let batch = &input.batch;
    let surrogate = |t: usize| {
        let ratio = clamped_exp(input.log_probs[t] - input.old_log_probs[t], f64::NEG_INFINITY, f64::INFINITY);
        vanilla::clipped_surrogate(ratio, input.advantages[t], range, 0.0)
    };
    let covariances = covariances(input);
    let within = |cov: f64| cov > config.clip_cov_lb && cov < config.clip_cov_ub;
    let mut candidates: Vec<usize> = (0..batch.num_slots())
        .filter(|t| batch.is_active(*t) && within(covariances[*t]) && !surrogate(*t).clipped)
        .collect();
    let count = ((config.clip_cov_ratio * batch.num_tokens() as f64) as usize).max(1);
    let noise = Philox::new(input.noise_seed);
    candidates.sort_by_key(|t| (noise.u64(*t as u64, 0), *t));
    let mut dropped = vec![false; batch.num_slots()];
    candidates.iter().take(count).for_each(|t| dropped[*t] = true);
    Terms::per_token(batch, |t| {
        if dropped[t] {
            return TokenTerm { clipped: true, ..TokenTerm::default() };
        }
        TokenTerm { clipped: false, ..surrogate(t) }
    })
}

/// Token losses of KL-Cov.
pub(crate) fn kl_cov(config: &PolicyLossConfig, input: &PolicyLossInput<'_>) -> Terms {
    let batch = &input.batch;
    let covariances = covariances(input);
    let mut by_covariance: Vec<usize> = (0..batch.num_slots()).filter(|t| batch.is_active(*t)).collect();
    // Adding 0 makes 0 of -0: they tie, and of tied tokens the first comes first.
    by_covariance.sort_by(|a, b| (covariances[*b] + 0.0).total_cmp(&(covariances[*a] + 0.0)));
    let count = ((config.kl_cov_ratio * by_covariance.len() as f64) as usize).max(1);
    let mut penalised = vec![false; batch.num_slots()];
    by_covariance.iter().take(count).for_each(|t| penalised[*t] = true);
    Terms::per_token(batch, |t| {
        let log_ratio = input.log_probs[t] - input.old_log_probs[t];
        let plain = -input.advantages[t] * log_ratio.exp();
        let coef = if penalised[t] { config.ppo_kl_coef } else { 0.0 };
        let sign = if log_ratio == 0.0 { 0.0 } else { log_ratio.signum() };
        TokenTerm { loss: plain + coef * log_ratio.abs(), d: plain + coef * sign, ..TokenTerm::default() }
    })
}

fn covariances(input: &PolicyLossInput<'_>) -> Vec<f64> {
    let mask = input.batch.response_mask();
    let (mean_a, mean_p) = (masked_mean(input.advantages, mask), masked_mean(input.log_probs, mask));
    input.advantages.iter().zip(input.log_probs).map(|(a, p)| (a - mean_a) * (p - mean_p)).collect()
}
