//! Policy losses and their gradients with respect to log-probs and entropies. One file per loss.
//!
//! `loss = pg_loss - entropy_coeff * agg(entropy) + kl_loss_coef * agg(kl)`, every part aggregated by the same mode
//! over global counts. Masked tokens get exactly zero gradient. A log-prob, advantage, weight or result that is not
//! finite on an unmasked token is an error that names it.

mod agg;
mod bypass;
mod cispo;
mod config;
mod cov;
mod decoupled;
mod dppo;
mod dro;
mod geo_mean;
mod gpg;
mod gspo;
mod masks;
mod metrics;
mod opsm;
mod sapo;
mod sequence_ppo;
mod terms;
mod trl;
mod trl_config;
mod vanilla;

pub use agg::{GlobalCounts, LossAggMode, agg_loss};
pub use config::{LossMode, PolicyLossConfig};
pub use decoupled::{
    DecoupledOptions, DecoupledOutput, ProximalMethod, decoupled_loss, m2po_mask, proximal_log_prob, sequence_kl,
};
pub use metrics::LossMetrics;
pub use trl::{TrlReport, trl_loss};
pub use trl_config::{ImportanceLevel, TrlConfig, TrlLossType};

use crate::batch::require_tokens;
use crate::kl::kl_penalty;
use crate::kl_bounded::unbiased_slope;
use crate::masked::broadcast;
use crate::math::Cut;
use crate::{Error, TokenBatch};
pub(crate) use config::ClipRange;
pub(crate) use masks::{gamma_weight, high_entropy, off_policy_rows};
pub(crate) use opsm::{OpsmInput, kept as opsm_kept};
pub(crate) use sapo::gate;
use terms::Terms;
pub(crate) use terms::{TokenTerm, larger, smaller};
pub(crate) use vanilla::clipped_surrogate;

/// Everything a policy loss may read; `..Default::default()` leaves out what the plan does not ask for.
#[derive(Debug, Clone, Copy, Default)]
pub struct PolicyLossInput<'a> {
    /// Rows and mask.
    pub batch: TokenBatch<'a>,
    /// `[T]`: log-probs under the policy now.
    pub log_probs: &'a [f64],
    /// `[T]`: log-probs at the start of the step.
    pub old_log_probs: &'a [f64],
    /// `[T]`: advantages.
    pub advantages: &'a [f64],
    /// `[T]`: log-probs under the reference (use_kl_loss).
    pub ref_log_probs: Option<&'a [f64]>,
    /// `[T]`: entropies under the policy now (entropy_coeff above 0; else only for the metrics).
    pub entropies: Option<&'a [f64]>,
    /// `[T]`: importance weights of the rollout correction; each multiplies its token's loss.
    pub rollout_is_weights: Option<&'a [f64]>,
    /// `[T]`: log-probs by the engine (TRL's off-policy mask).
    pub rollout_log_probs: Option<&'a [f64]>,
    /// Seed of clip_cov's random choice.
    pub noise_seed: u64,
}

/// A loss and its gradient.
#[derive(Debug, Clone, PartialEq)]
pub struct LossOutput {
    /// This call's share of the global loss: shares add up.
    pub loss: f64,
    /// `[T]`: d loss / d log_prob.
    pub d_log_probs: Vec<f64>,
    /// `[T]`: d loss / d entropy; all 0 where `entropy_coeff` is 0.
    pub d_entropies: Vec<f64>,
    /// Sums to add up over micro-batches.
    pub metrics: LossMetrics,
    /// Further numbers by name, of a loss that sees the whole mini-batch: they do not add up.
    pub reports: Vec<(String, f64)>,
}

/// Compute a policy loss with its gradient.
///
/// `counts` are those of the whole mini-batch, over all micro-batches and ranks.
///
/// # Errors
/// A setting out of range; an array that is missing, has the wrong length or is not finite; a loss or gradient that
/// is not finite.
pub fn policy_loss(
    config: &PolicyLossConfig,
    input: &PolicyLossInput<'_>,
    counts: &GlobalCounts,
) -> Result<LossOutput, Error> {
    config.validate()?;
    check(input)?;
    let batch = &input.batch;
    if config.loss_mode == LossMode::Trl {
        let (out, _) = trl_loss(config, input, counts)?;
        finite(batch, &out)?;
        return Ok(out);
    }
    let mut out = match config.loss_mode {
        LossMode::BypassMode => bypass::loss(config, input, counts)?,
        _ => pg_part(config, input, counts)?,
    };
    out.metrics.num_tokens = batch.num_tokens() as f64;
    let weights = broadcast(batch, &config.loss_agg_mode.row_weights(batch, counts)?);
    if config.use_kl_loss {
        add_kl(config, input, &weights, &mut out)?;
    }
    add_entropy(config, input, &weights, &mut out)?;
    finite(batch, &out)?;
    Ok(out)
}

/// The policy-gradient part of the loss.
fn pg_part(config: &PolicyLossConfig, input: &PolicyLossInput<'_>, counts: &GlobalCounts) -> Result<LossOutput, Error> {
    let batch = &input.batch;
    let weights = match config.loss_mode {
        LossMode::GeoMean | LossMode::SequencePpo => vec![1.0 / counts.num_rows.max(1) as f64; batch.num_slots()],
        LossMode::Sapo => broadcast(batch, &LossAggMode::SeqMeanTokenMean.row_weights(batch, counts)?),
        _ => broadcast(batch, &config.loss_agg_mode.row_weights(batch, counts)?),
    };
    let mut terms = surrogate(config, input);
    let kept = config.opsm_delta.map(|delta| opsm_kept(batch, OpsmInput::of(input), delta));
    if let Some(kept) = &kept {
        terms.weigh(batch, kept);
    }
    let mut out = aggregate(batch, &terms, &weights, input);
    let is_dropped = |kept: &Vec<f64>| (0..kept.len()).filter(|t| batch.is_active(*t) && kept[*t] == 0.0).count();
    out.metrics.num_opsm = kept.as_ref().map(|kept| is_dropped(kept) as f64);
    out.metrics.ppo_kl_sum = ppo_kl_sum(config.loss_mode, input);
    Ok(out)
}

/// Sum of `old - log_prob`, cut as the mode cuts its log-ratio; absolute for kl_cov.
fn ppo_kl_sum(mode: LossMode, input: &PolicyLossInput<'_>) -> f64 {
    let active = (0..input.batch.num_slots()).filter(|t| input.batch.is_active(*t));
    let gaps = active.map(|t| input.old_log_probs[t] - input.log_probs[t]);
    match mode {
        LossMode::Vanilla | LossMode::Cispo | LossMode::Sapo | LossMode::DppoTv | LossMode::DppoKl => {
            gaps.map(|gap| gap.cut(-20.0, 20.0)).sum()
        }
        LossMode::KlCov => gaps.map(f64::abs).sum(),
        LossMode::Gspo
        | LossMode::GeoMean
        | LossMode::Gpg
        | LossMode::Reinforce
        | LossMode::ClipCov
        | LossMode::Dro
        | LossMode::Trl
        | LossMode::SequencePpo
        | LossMode::BypassMode => gaps.sum(),
    }
}

/// Token losses of the configured mode, with importance weights inside.
fn surrogate(config: &PolicyLossConfig, input: &PolicyLossInput<'_>) -> Terms {
    let (log_probs, old, advantages) = (input.log_probs, input.old_log_probs, input.advantages);
    let log_ratio = |t: usize| log_probs[t] - old[t];
    let range = config.clip_range();
    let per_token = |term: &dyn Fn(usize) -> TokenTerm| Terms::per_token(&input.batch, term);
    let dppo = |divergence| {
        let ceiling = config.clip_ratio_c;
        per_token(&|t| dppo::term(divergence, (log_probs[t], old[t]), advantages[t], range, ceiling))
    };
    let mut terms = match config.loss_mode {
        LossMode::Vanilla => per_token(&|t| vanilla::term(log_ratio(t), advantages[t], range, config.clip_ratio_c)),
        LossMode::Gspo => gspo::terms(input, range),
        LossMode::Cispo => per_token(&|t| cispo::term(log_probs[t], log_ratio(t), advantages[t], range)),
        LossMode::Sapo => per_token(&|t| sapo::term(log_ratio(t), advantages[t], config.taus())),
        LossMode::GeoMean => return geo_mean::terms(input, range),
        LossMode::SequencePpo => return sequence_ppo::terms(input, range),
        LossMode::Gpg | LossMode::Reinforce | LossMode::Trl | LossMode::BypassMode => {
            per_token(&|t| gpg::term(log_probs[t], advantages[t]))
        }
        LossMode::ClipCov => cov::clip_cov(config, input, range),
        LossMode::KlCov => cov::kl_cov(config, input),
        LossMode::DppoTv => dppo(dppo::Divergence::TotalVariation),
        LossMode::DppoKl => dppo(dppo::Divergence::BinaryKl),
        LossMode::Dro => per_token(&|t| dro::term(log_probs[t], log_ratio(t), advantages[t], config.dro_beta)),
    };
    if let Some(weights) = input.rollout_is_weights {
        terms.weigh(&input.batch, weights);
    }
    terms
}

fn check(input: &PolicyLossInput<'_>) -> Result<(), Error> {
    let batch = &input.batch;
    let check = |name, values| batch.expect_finite("policy_loss", name, values);
    check("log_probs", input.log_probs)?;
    check("old_log_probs", input.old_log_probs)?;
    check("advantages", input.advantages)?;
    input.rollout_is_weights.map_or(Ok(()), |weights| check("rollout_is_weights", weights))
}

fn aggregate(batch: &TokenBatch, terms: &Terms, weights: &[f64], input: &PolicyLossInput<'_>) -> LossOutput {
    let active = || (0..batch.num_slots()).filter(|t| batch.is_active(*t));
    let pg_loss = active().map(|t| terms.losses[t] * weights[t]).sum();
    let metrics = LossMetrics {
        num_tokens: batch.num_tokens() as f64,
        num_pg_tokens: batch.num_tokens() as f64,
        pg_loss,
        num_clipped: terms.num_clipped as f64,
        num_clipped_lower: terms.num_clipped_lower as f64,
        log_ratio_max: active().map(|t| (input.log_probs[t] - input.old_log_probs[t]).abs()).fold(0.0, f64::max),
        ..LossMetrics::default()
    };
    LossOutput {
        loss: pg_loss,
        d_log_probs: terms.d_log_probs.iter().zip(weights).map(|(d, w)| d * w).collect(),
        d_entropies: vec![0.0; batch.num_slots()],
        metrics,
        reports: Vec::new(),
    }
}

fn add_kl(
    config: &PolicyLossConfig,
    input: &PolicyLossInput<'_>,
    weights: &[f64],
    out: &mut LossOutput,
) -> Result<(), Error> {
    let reference = require_tokens(&input.batch, "use_kl_loss", "ref_log_probs", input.ref_log_probs)?;
    let kl = kl_penalty(config.kl_loss_type, &input.batch, input.log_probs, reference)?;
    let slope = |t: usize, own: f64| match config.unbiased_kl {
        true if input.batch.is_active(t) => unbiased_slope(input.log_probs[t], reference[t], input.old_log_probs[t]),
        _ => own,
    };
    let mut total = 0.0;
    for (t, (kl, weight)) in kl.iter().zip(weights).enumerate() {
        total += kl.value * weight;
        out.d_log_probs[t] += config.kl_loss_coef * slope(t, kl.d) * weight;
    }
    out.metrics.kl_loss = total;
    out.loss += config.kl_loss_coef * total;
    Ok(())
}

fn add_entropy(
    config: &PolicyLossConfig,
    input: &PolicyLossInput<'_>,
    weights: &[f64],
    out: &mut LossOutput,
) -> Result<(), Error> {
    if config.entropy_coeff == 0.0 && input.entropies.is_none() {
        return Ok(());
    }
    let batch = &input.batch;
    let entropies = require_tokens(batch, "entropy_coeff", "entropies", input.entropies)?;
    let active = || (0..batch.num_slots()).filter(|t| batch.is_active(*t));
    out.metrics.entropy_sum = active().map(|t| entropies[t]).sum();
    out.metrics.entropy_agg = active().map(|t| entropies[t] * weights[t]).sum();
    if config.entropy_coeff > 0.0 {
        out.loss -= config.entropy_coeff * out.metrics.entropy_agg;
        active().for_each(|t| out.d_entropies[t] = -config.entropy_coeff * weights[t]);
    }
    Ok(())
}

fn finite(batch: &TokenBatch, out: &LossOutput) -> Result<(), Error> {
    batch.expect_finite("policy_loss", "d_log_probs", &out.d_log_probs)?;
    if out.loss.is_finite() {
        return Ok(());
    }
    Err(Error::batch("policy_loss", format!("the loss is {}: expected a finite number", out.loss)))
}
