//! TRL's GRPO losses: one surrogate per token or row, masks and weights on it, then KL, then a normaliser by type.
//!
//! `c1 = e^w` (`w` the token's log-ratio, or its mean over the row), `c2 = clamp(c1, 1 - low, 1 + high)`,
//! `L = -min(min(c1, delta) A, c2 A)`; cispo `-sg(min(c1, clip_ratio_high)) A log_prob`, where the bound is absolute;
//! sapo
//! `-(4 / tau) sig(tau (c1 - 1)) A`; vespo `-sg(phi) A log_prob`. Off-policy mask, entropy mask and engine weights
//! multiply
//! L (the weights are inside phi for vespo); then `beta * k3` is added, k3 without clamps, times c1 with
//! `use_bias_correction_kl`. bnpo divides by the tokens of the mini-batch, where TRL divides by those of the
//! micro-batch. `loss -= entropy_coeff * mean entropy per token`. Row means count all rows.
//!
//! # Source
//! TRL's GRPOTrainer; INTELLECT-2's two-sided clip; DeepSeek-V3.2's off-policy mask; 2506.01939 (entropy mask);
//! 2602.05261
//! (luspo); 2602.10693 (vespo).

use super::config::{ClipRange, PolicyLossConfig};
use super::terms::larger;
use super::trl_config::{ImportanceLevel, TrlLossType};
use super::{GlobalCounts, LossMetrics, LossOutput, PolicyLossInput, masks, sapo};
use crate::batch::require_tokens;
use crate::kl::Dual;
use crate::math::{Cut, cut_passes};
use crate::{Error, TokenBatch};

/// What TRL reports about clipping, beside the common metrics.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TrlReport {
    /// `[T]`: 1 where the lower bound holds against a negative advantage.
    pub low_clipped: Vec<u8>,
    /// `[T]`: 1 where the upper bound holds against a positive advantage.
    pub high_clipped: Vec<u8>,
    /// `[B]`: vespo's weights; empty for the others.
    pub phi: Vec<f64>,
    /// Mean over tokens of the KL that enters the loss.
    pub kl: f64,
}

/// Inputs and masks of one call, checked.
struct Call<'a> {
    config: &'a PolicyLossConfig,
    input: &'a PolicyLossInput<'a>,
    range: ClipRange,
    /// `[T]`: product of off-policy mask, entropy mask and engine weights.
    factors: Vec<f64>,
    reference: Option<&'a [f64]>,
}

/// Compute a loss with its gradient and report.
///
/// # Errors
/// An array that is missing, has the wrong length or is not finite.
pub fn trl_loss(
    config: &PolicyLossConfig,
    input: &PolicyLossInput<'_>,
    counts: &GlobalCounts,
) -> Result<(LossOutput, TrlReport), Error> {
    let batch = &input.batch;
    let call = Call {
        config,
        input,
        range: config.clip_range(),
        factors: factors(config, input)?,
        reference: match config.use_kl_loss {
            true => Some(require_tokens(batch, "use_kl_loss", "ref_log_probs", input.ref_log_probs)?),
            false => None,
        },
    };
    let mut out = LossOutput {
        loss: 0.0,
        d_log_probs: vec![0.0; batch.num_slots()],
        d_entropies: vec![0.0; batch.num_slots()],
        metrics: LossMetrics {
            num_tokens: batch.num_tokens() as f64,
            num_pg_tokens: batch.num_tokens() as f64,
            ..LossMetrics::default()
        },
        reports: Vec::new(),
    };
    let zeros = vec![0; batch.num_slots()];
    let mut report = TrlReport { low_clipped: zeros.clone(), high_clipped: zeros, ..TrlReport::default() };
    for row in 0..batch.num_rows() {
        let weight = row_weight(config.trl.loss_type, batch.row_len(row), counts);
        call.row(row, weight, &mut out, &mut report);
    }
    out.loss = out.metrics.pg_loss + config.kl_loss_coef * out.metrics.kl_loss;
    report.kl /= batch.num_tokens().max(1) as f64;
    out.metrics.num_clipped =
        (0..batch.num_slots()).filter(|t| report.low_clipped[*t] + report.high_clipped[*t] > 0).count() as f64;
    add_entropy(config, input, counts, &mut out)?;
    Ok((out, report))
}

/// Weight of every token of a row.
fn row_weight(kind: TrlLossType, row_len: usize, counts: &GlobalCounts) -> f64 {
    let rows = counts.num_rows.max(1) as f64;
    match kind {
        TrlLossType::Grpo | TrlLossType::Sapo => 1.0 / rows / row_len.max(1) as f64,
        TrlLossType::Bnpo | TrlLossType::Dapo | TrlLossType::Cispo | TrlLossType::Vespo => {
            1.0 / counts.num_tokens.max(1) as f64
        }
        TrlLossType::DrGrpo => 1.0 / rows / counts.loss_scale_factor,
        TrlLossType::Luspo => 1.0 / rows,
    }
}

fn factors(config: &PolicyLossConfig, input: &PolicyLossInput<'_>) -> Result<Vec<f64>, Error> {
    let batch = &input.batch;
    let mut factors = vec![1.0; batch.num_slots()];
    if let Some(threshold) = config.trl.off_policy_mask_threshold {
        let name = "rollout_log_probs";
        let sampling = require_tokens(batch, "off_policy_mask", name, input.rollout_log_probs)?;
        let kept = masks::off_policy_rows(batch, input.advantages, input.log_probs, sampling, threshold);
        for (row, kept) in kept.into_iter().enumerate().filter(|(_, kept)| !kept) {
            batch.row(row).for_each(|t| factors[t] = f64::from(u8::from(kept)));
        }
    }
    if config.trl.top_entropy_quantile < 1.0 {
        let entropies = require_tokens(batch, "top_entropy_quantile", "entropies", input.entropies)?;
        let kept = masks::high_entropy(batch, entropies, 1.0 - config.trl.top_entropy_quantile);
        factors.iter_mut().zip(kept).for_each(|(f, kept)| *f *= f64::from(kept));
    }
    if let (Some(weights), true) = (input.rollout_is_weights, config.trl.loss_type != TrlLossType::Vespo) {
        factors.iter_mut().zip(weights).for_each(|(f, w)| *f *= w);
    }
    Ok(factors)
}

impl Call<'_> {
    /// Add one row's share to loss, gradient and report.
    fn row(&self, row: usize, weight: f64, out: &mut LossOutput, report: &mut TrlReport) {
        let batch = &self.input.batch;
        let trl = &self.config.trl;
        let phi = self.phi(row);
        report.phi.extend(phi);
        let shared = match trl.importance_sampling_level {
            ImportanceLevel::Token => None,
            ImportanceLevel::Sequence => Some(self.mean_log_ratio(row)),
        };
        // Derivative of the row's loss with respect to its shared log-ratio.
        let mut through_shared = 0.0;
        for t in batch.active(row) {
            let ratio = shared.unwrap_or_else(|| self.log_ratio(t)).exp();
            let surrogate = self.surrogate(t, ratio, phi);
            let factor = self.factors[t] * weight;
            let kl = self.kl(t, ratio);
            let beta = self.config.kl_loss_coef * weight;
            out.metrics.pg_loss += factor * surrogate.loss;
            out.metrics.kl_loss += weight * kl.value;
            out.metrics.ppo_kl_sum -= self.log_ratio(t);
            out.metrics.log_ratio_max = out.metrics.log_ratio_max.max(self.log_ratio(t).abs());
            report.kl += kl.value;
            out.d_log_probs[t] += factor * surrogate.d_log_prob + beta * kl.d_log_prob;
            let d_log_ratio = factor * surrogate.d_log_ratio + beta * kl.d_log_ratio;
            match shared {
                None => out.d_log_probs[t] += d_log_ratio,
                Some(_) => through_shared += d_log_ratio,
            }
            let (low, high) = self.clipped(t, ratio);
            report.low_clipped[t] = u8::from(low);
            report.high_clipped[t] = u8::from(high);
        }
        let len = batch.row_len(row).max(1) as f64;
        batch.active(row).for_each(|t| out.d_log_probs[t] += through_shared / len);
    }

    fn log_ratio(&self, t: usize) -> f64 {
        self.input.log_probs[t] - self.input.old_log_probs[t]
    }

    fn mean_log_ratio(&self, row: usize) -> f64 {
        let batch = &self.input.batch;
        batch.active(row).map(|t| self.log_ratio(t)).sum::<f64>() / batch.row_len(row).max(1) as f64
    }

    fn surrogate(&self, t: usize, ratio: f64, phi: Option<f64>) -> Surrogate {
        let (advantage, log_prob) = (self.input.advantages[t], self.input.log_probs[t]);
        let detached = |weight: f64| Surrogate {
            loss: -weight * advantage * log_prob,
            d_log_prob: -weight * advantage,
            d_log_ratio: 0.0,
        };
        match self.config.trl.loss_type {
            TrlLossType::Cispo => detached(ratio.min(self.range.high)),
            TrlLossType::Vespo => detached(phi.unwrap_or(1.0)),
            TrlLossType::Sapo => {
                let term = sapo::gate(Dual { value: ratio, d: ratio }, advantage, self.config.taus());
                Surrogate { loss: term.loss, d_log_prob: 0.0, d_log_ratio: term.d }
            }
            TrlLossType::Grpo | TrlLossType::Bnpo | TrlLossType::DrGrpo | TrlLossType::Dapo | TrlLossType::Luspo => {
                let loss = two_sided(ratio, advantage, self.range, self.config.trl.delta);
                Surrogate { loss: loss.value, d_log_prob: 0.0, d_log_ratio: loss.d }
            }
        }
    }

    /// k3 without clamps, times the ratio where asked; derivatives through both.
    fn kl(&self, t: usize, ratio: f64) -> KlTerm {
        let Some(reference) = self.reference else { return KlTerm::default() };
        let x = reference[t] - self.input.log_probs[t];
        let (value, d) = (x.exp() - x - 1.0, 1.0 - x.exp());
        if self.config.trl.use_bias_correction_kl {
            return KlTerm { value: value * ratio, d_log_prob: d * ratio, d_log_ratio: value * ratio };
        }
        KlTerm { value, d_log_prob: d, d_log_ratio: 0.0 }
    }

    /// Where the lower and the upper bound hold for the ratio below `delta`; for cispo the absolute one alone.
    fn clipped(&self, t: usize, ratio: f64) -> (bool, bool) {
        let advantage = self.input.advantages[t];
        if self.config.trl.loss_type == TrlLossType::Cispo {
            return (false, ratio > self.range.high && advantage > 0.0);
        }
        let delta = self.config.trl.delta;
        let ratio = if delta > 0.0 { ratio.min(delta) } else { ratio };
        let low = ratio < 1.0 - self.range.low && advantage < 0.0;
        (low, ratio > 1.0 + self.range.high && advantage > 0.0)
    }

    /// vespo's weight of a row.
    fn phi(&self, row: usize) -> Option<f64> {
        let trl = &self.config.trl;
        if trl.loss_type != TrlLossType::Vespo {
            return None;
        }
        let batch = &self.input.batch;
        let advantage = batch.active(row).next().map_or(0.0, |t| self.input.advantages[t]);
        let (k, lambda) = if advantage >= 0.0 {
            (trl.vespo_k_pos, trl.vespo_lambda_pos)
        } else {
            (trl.vespo_k_neg, trl.vespo_lambda_neg)
        };
        let engine = |t: usize| self.input.rollout_is_weights.map_or(0.0, |w| w[t].max(1e-8).ln());
        let log_ratios = batch.active(row).map(|t| self.log_ratio(t).cut(-20.0, 20.0) + engine(t));
        Some(masks::gamma_weight(log_ratios.sum(), k, lambda))
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Surrogate {
    loss: f64,
    d_log_prob: f64,
    d_log_ratio: f64,
}

#[derive(Debug, Clone, Copy, Default)]
struct KlTerm {
    value: f64,
    d_log_prob: f64,
    d_log_ratio: f64,
}

/// `-min(min(c1, delta) A, clamp(c1) A)` and its derivative with respect to `ln c1`.
fn two_sided(ratio: f64, advantage: f64, range: ClipRange, delta: f64) -> Dual {
    let bound = |r: f64, low: f64, high: f64| {
        let slope = if cut_passes(r, low, high) { -advantage * r } else { 0.0 };
        Dual { value: -advantage * r.cut(low, high), d: slope }
    };
    let ceiling = if delta > 0.0 { delta } else { f64::INFINITY };
    larger(bound(ratio, f64::NEG_INFINITY, ceiling), bound(ratio, 1.0 - range.low, 1.0 + range.high))
}

fn add_entropy(
    config: &PolicyLossConfig,
    input: &PolicyLossInput<'_>,
    counts: &GlobalCounts,
    out: &mut LossOutput,
) -> Result<(), Error> {
    if config.entropy_coeff == 0.0 && input.entropies.is_none() {
        return Ok(());
    }
    let batch: &TokenBatch = &input.batch;
    let entropies = require_tokens(batch, "entropy_coeff", "entropies", input.entropies)?;
    // With an entropy mask the whole mini-batch is here, and the bonus is the mean over the tokens that stay.
    let masks = config.trl.top_entropy_quantile < 1.0;
    let kept = match masks {
        true => masks::high_entropy(batch, entropies, 1.0 - config.trl.top_entropy_quantile),
        false => batch.response_mask().to_vec(),
    };
    let num_kept = kept.iter().filter(|k| **k == 1).count() as u64;
    let scale = 1.0 / if masks { num_kept } else { counts.num_tokens }.max(1) as f64;
    for t in (0..batch.num_slots()).filter(|t| batch.is_active(*t)) {
        out.metrics.entropy_sum += entropies[t];
        out.metrics.entropy_agg += scale * entropies[t] * f64::from(kept[t]);
        out.d_entropies[t] = -config.entropy_coeff * scale * f64::from(kept[t]);
    }
    out.loss -= config.entropy_coeff * out.metrics.entropy_agg;
    Ok(())
}
