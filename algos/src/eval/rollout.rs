//! verl's rollout correction: weights, rejection, diagnostics, bypass mode.

use super::case::{Case, Results};
use super::verl_losses;
use crate::Error;
use crate::rollout_correction::{
    OptionReport, RejectionReport, RolloutCorrectionConfig, Threshold, WeightMetrics, importance_weights,
    off_policy_metrics, rejection_mask,
};
use serde_json::Value;

fn threshold(case: &Case<'_>, key: &str) -> Result<Option<Threshold>, Error> {
    Ok(match case.param(key) {
        None => None,
        Some(Value::String(text)) => Some(Threshold::Text(text.clone())),
        Some(_) => case.opt_num(key)?.map(Threshold::Upper),
    })
}

/// Settings of the correction under verl's names.
pub(super) fn config(case: &Case<'_>) -> Result<RolloutCorrectionConfig, Error> {
    let default = RolloutCorrectionConfig::default();
    Ok(RolloutCorrectionConfig {
        rollout_is: case.parse("rollout_is", "none")?,
        rollout_is_threshold: threshold(case, "rollout_is_threshold")?.unwrap_or(default.rollout_is_threshold),
        rollout_is_batch_normalize: case.flag("rollout_is_batch_normalize", false)?,
        rollout_rs: case.text("rollout_rs", "")?.to_owned(),
        rollout_rs_threshold: threshold(case, "rollout_rs_threshold")?,
        loss_type: case.parse("loss_type", "ppo_clip")?,
    })
}

/// `compute_rollout_correction_weights`.
pub(super) fn weights(case: &Case<'_>) -> Result<Results, Error> {
    let mask = case.mask("response_mask")?;
    let log_ratio = case.sized("log_ratio", mask.bits.len())?;
    let out = importance_weights(&config(case)?, &mask.batch()?, &log_ratio)?
        .ok_or_else(|| case.bad("rollout_is", "expected token or sequence"))?;
    Ok(Results::default().grid("weights", mask.cols, &out.weights).metrics(&weight_metrics(&out.metrics)))
}

fn weight_metrics(m: &WeightMetrics) -> Vec<(&'static str, f64)> {
    let mut metrics = vec![
        ("rollout_is_mean", m.mean),
        ("rollout_is_ratio_fraction_high", m.fraction_high),
        ("rollout_is_ratio_fraction_low", m.fraction_low),
        ("rollout_is_max", m.max),
        ("rollout_is_min", m.min),
        ("rollout_is_std", m.std),
        ("rollout_is_eff_sample_size", m.eff_sample_size),
        ("rollout_is_seq_mean", m.seq_mean),
        ("rollout_is_seq_std", m.seq_std),
        ("rollout_is_seq_max", m.seq_max),
        ("rollout_is_seq_min", m.seq_min),
        ("rollout_is_seq_max_deviation", m.seq_max_deviation),
        ("rollout_is_seq_fraction_high", m.seq_fraction_high),
        ("rollout_is_seq_fraction_low", m.seq_fraction_low),
    ];
    metrics.extend(m.oob_ratio.map(|v| ("rollout_is_oob_ratio", v)));
    metrics.extend(m.batch_norm_factor.map(|v| ("rollout_is_batch_norm_factor", v)));
    metrics
}

/// `compute_rollout_rejection_mask`.
pub(super) fn rejection(case: &Case<'_>) -> Result<Results, Error> {
    let mask = case.mask("response_mask")?;
    let log_ratio = case.sized("log_ratio", mask.bits.len())?;
    let config = config(case)?;
    let bound = config.rollout_rs_threshold.as_ref();
    let out = rejection_mask(&config.rollout_rs, bound, &mask.batch()?, &log_ratio)?;
    let bits: Vec<f64> = out.response_mask.iter().map(|m| f64::from(*m)).collect();
    let metrics = rejection_metrics(&out.report, "");
    let metrics: Vec<(&str, f64)> = metrics.iter().map(|(key, value)| (key.as_str(), *value)).collect();
    Ok(Results::default()
        .grid("response_mask", mask.cols, &bits)
        .num("masked_fraction", out.report.masked_fraction)
        .num("seq_masked_fraction", out.report.seq_masked_fraction)
        .metrics(&metrics))
}

fn rejection_metrics(report: &RejectionReport, prefix: &str) -> Vec<(String, f64)> {
    let mut metrics: Vec<(String, f64)> = report.options.iter().flat_map(|o| option_metrics(o, prefix)).collect();
    metrics.push((format!("{prefix}rollout_rs_masked_fraction"), report.masked_fraction));
    metrics.push((format!("{prefix}rollout_rs_seq_masked_fraction"), report.seq_masked_fraction));
    metrics
}

fn option_metrics(o: &OptionReport, prefix: &str) -> Vec<(String, f64)> {
    let mut metrics = vec![
        ("mean", o.mean),
        ("max", o.max),
        ("min", o.min),
        ("fraction_high", o.fraction_high),
        ("fraction_low", o.fraction_low),
        ("std", o.std),
        ("seq_mean", o.seq_mean),
        ("seq_std", o.seq_std),
        ("seq_max", o.seq_max),
        ("seq_min", o.seq_min),
        ("seq_max_deviation", o.seq_max_deviation),
        ("seq_fraction_high", o.seq_fraction_high),
        ("masked_fraction", o.masked_fraction),
        ("seq_masked_fraction", o.seq_masked_fraction),
    ];
    metrics.extend(o.seq_fraction_low.map(|v| ("seq_fraction_low", v)));
    let name = |key| format!("{prefix}rollout_rs_{}_{key}", o.option.name);
    metrics.into_iter().map(|(key, value)| (name(key), value)).collect()
}

/// `compute_offpolicy_metrics`.
pub(super) fn off_policy(case: &Case<'_>) -> Result<Results, Error> {
    let mask = case.mask("response_mask")?;
    let (old, rollout) =
        (case.sized("old_log_prob", mask.bits.len())?, case.sized("rollout_log_prob", mask.bits.len())?);
    let m = off_policy_metrics(&mask.batch()?, &old, &rollout)?;
    Ok(Results::default().metrics(&[
        ("training_ppl", m.training_ppl),
        ("training_log_ppl", m.training_log_ppl),
        ("kl", m.kl),
        ("k3_kl", m.k3_kl),
        ("rollout_ppl", m.rollout_ppl),
        ("rollout_log_ppl", m.rollout_log_ppl),
        ("log_ppl_diff", m.log_ppl_diff),
        ("log_ppl_abs_diff", m.log_ppl_abs_diff),
        ("log_ppl_diff_max", m.log_ppl_diff_max),
        ("log_ppl_diff_min", m.log_ppl_diff_min),
        ("ppl_ratio", m.ppl_ratio),
        ("chi2_token", m.chi2_token),
        ("chi2_seq", m.chi2_seq),
    ]))
}

/// `compute_policy_loss_bypass_mode`: the loss, and the report of its rejection.
pub(super) fn bypass(case: &Case<'_>) -> Result<Results, Error> {
    let (results, metrics) = verl_losses::bypass(case)?;
    let config = config(case)?;
    let mut all: Vec<(String, f64)> = metrics.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    if !config.rollout_rs.is_empty() {
        let mask = case.mask("response_mask")?;
        let (now, rollout) = (case.sized("log_prob", mask.bits.len())?, case.sized("old_log_prob", mask.bits.len())?);
        let log_ratio: Vec<f64> = now.iter().zip(&rollout).map(|(n, r)| n - r).collect();
        let bound = config.rollout_rs_threshold.as_ref();
        let out = rejection_mask(&config.rollout_rs, bound, &mask.batch()?, &log_ratio)?;
        all.extend(rejection_metrics(&out.report, "rollout_corr/"));
    }
    let all: Vec<(&str, f64)> = all.iter().map(|(key, value)| (key.as_str(), *value)).collect();
    Ok(results.metrics(&all))
}
