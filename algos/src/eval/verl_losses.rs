//! verl's policy losses and their aggregation.

use super::case::{Case, Mask, Results};
use super::rollout;
use crate::{
    BypassLoss, Error, GlobalCounts, LossAggMode, LossMode, LossOutput, PolicyLossConfig, PolicyLossInput, agg_loss,
    policy_loss,
};

/// A policy loss, named by verl's function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::eval) struct Function(LossMode);

impl Function {
    pub(in crate::eval) fn find(name: &str) -> Option<Function> {
        Some(Function(match name.strip_prefix("compute_policy_loss_")? {
            "vanilla" => LossMode::Vanilla,
            "gspo" => LossMode::Gspo,
            "cispo" => LossMode::Cispo,
            "sapo" => LossMode::Sapo,
            "geo_mean" => LossMode::GeoMean,
            "gpg" => LossMode::Gpg,
            "reinforce" => LossMode::Reinforce,
            "clip_cov" => LossMode::ClipCov,
            "kl_cov" => LossMode::KlCov,
            "dppo_tv" => LossMode::DppoTv,
            "dppo_kl" => LossMode::DppoKl,
            "dro" => LossMode::Dro,
            _ => return None,
        }))
    }
}

/// Metrics by name.
pub(super) type Metrics = Vec<(&'static str, f64)>;

/// Counts as verl is given them, and the factor by which it multiplies the loss.
#[derive(Debug, Clone, Copy)]
pub(super) struct Counted {
    pub(super) counts: GlobalCounts,
    pub(super) dp_size: f64,
    mode: LossAggMode,
}

impl Counted {
    /// What the mode divides by.
    fn divisor(&self) -> f64 {
        match self.mode {
            LossAggMode::TokenSum => 1.0,
            LossAggMode::TokenMean => self.counts.num_tokens as f64,
            LossAggMode::SeqMeanTokenSum | LossAggMode::SeqMeanTokenSumNorm | LossAggMode::SeqMeanTokenMean => {
                self.counts.num_sequences as f64
            }
        }
    }

    /// The loss as verl gives it: multiplied by the number of ranks, and 0 / 0 where there is nothing.
    pub(super) fn loss(&self, loss: f64) -> f64 {
        if self.divisor() == 0.0 { f64::NAN } else { loss * self.dp_size }
    }
}

/// The setting `loss_agg_mode`.
pub(super) fn agg_mode(case: &Case<'_>) -> Result<LossAggMode, Error> {
    case.parse("loss_agg_mode", "token-mean")
}

/// The mode by which verl's function of a loss aggregates, where it looks at the counts at all.
fn mode_of(loss: LossMode, case: &Case<'_>) -> Result<LossAggMode, Error> {
    let given = agg_mode(case)?;
    Ok(match loss {
        LossMode::Sapo => LossAggMode::SeqMeanTokenMean,
        LossMode::GeoMean => LossAggMode::TokenSum,
        _ => given,
    })
}

/// verl's global batch information: absent counts are those of the batch itself; with several ranks the one that the
/// mode divides by must be given.
pub(super) fn counted(case: &Case<'_>, mask: &Mask, mode: LossAggMode) -> Result<Counted, Error> {
    let batch = mask.batch()?;
    let info = case.nested("global_batch_info").unwrap_or(*case);
    let own = GlobalCounts::of(&batch, mask.cols as f64);
    let dp_size = info.num("dp_size", 1.0)?;
    let tokens = info.opt_num("batch_num_tokens")?;
    let sequences = info.opt_num("global_batch_size")?;
    let needed = match mode {
        LossAggMode::TokenSum => None,
        LossAggMode::TokenMean => Some((tokens, "batch_num_tokens")),
        LossAggMode::SeqMeanTokenSum | LossAggMode::SeqMeanTokenSumNorm | LossAggMode::SeqMeanTokenMean => {
            Some((sequences, "global_batch_size"))
        }
    };
    if let (true, Some((None, key))) = (dp_size > 1.0, needed) {
        return Err(case.bad(key, format!("missing: with dp_size {dp_size} the global count is needed")));
    }
    let counts = GlobalCounts {
        num_tokens: tokens.map_or(own.num_tokens, |n| n as u64),
        num_sequences: sequences.map_or(own.num_sequences, |n| n as u64),
        // geo_mean is a plain mean over rows that verl does not multiply by dp_size.
        num_rows: own.num_rows.saturating_mul(dp_size as u64),
        loss_scale_factor: info.num("loss_scale_factor", own.loss_scale_factor)?,
    };
    Ok(Counted { counts, dp_size, mode })
}

fn config(mode: LossMode, case: &Case<'_>) -> Result<PolicyLossConfig, Error> {
    let default = PolicyLossConfig::default();
    let ceiling = if matches!(mode, LossMode::DppoTv | LossMode::DppoKl) { 20.0 } else { default.clip_ratio_c };
    Ok(PolicyLossConfig {
        loss_mode: mode,
        loss_agg_mode: agg_mode(case)?,
        clip_ratio: case.num("clip_ratio", default.clip_ratio)?,
        clip_ratio_low: case.opt_num("clip_ratio_low")?,
        clip_ratio_high: case.opt_num("clip_ratio_high")?,
        clip_ratio_c: case.num("clip_ratio_c", ceiling)?,
        entropy_coeff: case.num("entropy_coeff", default.entropy_coeff)?,
        use_kl_loss: case.flag("use_kl_loss", default.use_kl_loss)?,
        kl_loss_coef: case.num("kl_loss_coef", default.kl_loss_coef)?,
        kl_loss_type: case.parse("kl_loss_type", "low_var_kl")?,
        tau_pos: case.num("tau_pos", default.tau_pos)?,
        tau_neg: case.num("tau_neg", default.tau_neg)?,
        clip_cov_ratio: case.num("clip_cov_ratio", default.clip_cov_ratio)?,
        clip_cov_lb: case.num("clip_cov_lb", default.clip_cov_lb)?,
        clip_cov_ub: case.num("clip_cov_ub", default.clip_cov_ub)?,
        kl_cov_ratio: case.num("kl_cov_ratio", default.kl_cov_ratio)?,
        ppo_kl_coef: case.num("ppo_kl_coef", default.ppo_kl_coef)?,
        dro_beta: case.num("dro_beta", default.dro_beta)?,
        rollout_correction: rollout::config(case)?,
        ..default
    })
}

fn loss(config: &PolicyLossConfig, case: &Case<'_>, mask: &Mask, counted: &Counted) -> Result<LossOutput, Error> {
    let (log_probs, old) = (case.sized("log_prob", mask.bits.len())?, case.sized("old_log_prob", mask.bits.len())?);
    let advantages = case.sized("advantages", mask.bits.len())?;
    let reference = case.opt_sized("ref_log_prob", mask.bits.len())?;
    let entropies = case.opt_sized("entropy", mask.bits.len())?;
    let weights = case.opt_sized("rollout_is_weights", mask.bits.len())?;
    let input = PolicyLossInput {
        batch: mask.batch()?,
        log_probs: &log_probs,
        old_log_probs: &old,
        advantages: &advantages,
        ref_log_probs: reference.as_deref(),
        entropies: entropies.as_deref(),
        rollout_is_weights: weights.as_deref(),
        rollout_log_probs: None,
        noise_seed: 0,
    };
    policy_loss(config, &input, &counted.counts)
}

/// Run one case of a policy loss.
pub(in crate::eval) fn run(function: Function, case: &Case<'_>) -> Result<Results, Error> {
    let mask = case.mask("response_mask")?;
    let counted = counted(case, &mask, mode_of(function.0, case)?)?;
    let config = config(function.0, case)?;
    let out = loss(&config, case, &mask, &counted)?;
    Ok(with_gradient(&out, &counted, mask.cols).metrics(&metrics(function.0, &out)))
}

fn with_gradient(out: &LossOutput, counted: &Counted, cols: usize) -> Results {
    let gradient: Vec<f64> = out.d_log_probs.iter().map(|d| d * counted.dp_size).collect();
    Results::default().num("loss", counted.loss(out.loss)).grad_grid("log_prob", cols, &gradient)
}

/// The metrics that verl's function of this mode reports.
fn metrics(mode: LossMode, out: &LossOutput) -> Vec<(&'static str, f64)> {
    let clipfrac = ("actor/pg_clipfrac", out.metrics.pg_clipfrac());
    let ppo_kl = ("actor/ppo_kl", out.metrics.ppo_kl());
    let lower = ("actor/pg_clipfrac_lower", out.metrics.pg_clipfrac_lower());
    match mode {
        LossMode::Gpg => Vec::new(),
        LossMode::Reinforce | LossMode::KlCov | LossMode::Dro => vec![ppo_kl],
        LossMode::ClipCov => vec![clipfrac, ppo_kl],
        LossMode::Vanilla
        | LossMode::Gspo
        | LossMode::Cispo
        | LossMode::Sapo
        | LossMode::GeoMean
        | LossMode::DppoTv
        | LossMode::DppoKl
        | LossMode::Trl
        | LossMode::SequencePpo
        | LossMode::BypassMode => vec![clipfrac, ppo_kl, lower],
    }
}

/// `ppo_loss`: policy loss, entropy bonus and KL in the loss.
pub(in crate::eval) fn total(case: &Case<'_>) -> Result<Results, Error> {
    let mask = case.mask("response_mask")?;
    let mode = case.parse("loss_mode", "vanilla")?;
    let counted = counted(case, &mask, agg_mode(case)?)?;
    let out = loss(&config(mode, case)?, case, &mask, &counted)?;
    let entropies: Vec<f64> = out.d_entropies.iter().map(|d| d * counted.dp_size).collect();
    Ok(with_gradient(&out, &counted, mask.cols).grad_grid("entropy", mask.cols, &entropies))
}

/// `compute_policy_loss_bypass_mode` with the mask that its rejection leaves, and the metrics of the loss inside.
pub(super) fn bypass(case: &Case<'_>, kept: &Mask) -> Result<(Results, Metrics), Error> {
    let mask = case.mask("response_mask")?;
    let mode = agg_mode(case)?;
    // The library divides by what is left; verl by that only where no counts are given.
    let mut counted = counted(case, kept, mode)?;
    let left = Counted { counts: GlobalCounts::of(&kept.batch()?, 1.0), ..counted };
    if counted.divisor() > 0.0 {
        counted.dp_size *= left.divisor() / counted.divisor();
    }
    let config = config(LossMode::BypassMode, case)?;
    let out = loss(&config, case, &mask, &counted)?;
    let inner = match config.rollout_correction.loss_type {
        BypassLoss::PpoClip => LossMode::Vanilla,
        BypassLoss::Reinforce => LossMode::Reinforce,
    };
    Ok((with_gradient(&out, &counted, mask.cols), metrics(inner, &out)))
}

/// `agg_loss`.
pub(in crate::eval) fn agg(case: &Case<'_>) -> Result<Results, Error> {
    let mask = case.mask("loss_mask")?;
    let losses = case.sized("loss_mat", mask.bits.len())?;
    let mode = agg_mode(case)?;
    let counted = counted(case, &mask, mode)?;
    let (loss, weights) = agg_loss(mode, &mask.batch()?, &losses, &counted.counts)?;
    let gradient: Vec<f64> = weights.iter().map(|w| w * counted.dp_size).collect();
    Ok(Results::default().num("loss", counted.loss(loss)).grad_grid("loss_mat", mask.cols, &gradient))
}
