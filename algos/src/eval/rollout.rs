//! verl's rollout correction: weights, rejection, diagnostics, bypass mode.

use super::case::{Case, Mask, Results};
use super::verl_losses;
use crate::Error;
use crate::rollout_correction::{
    RolloutCorrectionConfig, Threshold, importance_weights, off_policy_metrics, rejection_mask,
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
        ..default
    })
}

/// The mask; the peer refuses one without any token.
fn mask(case: &Case<'_>) -> Result<Mask, Error> {
    let mask = case.mask("response_mask")?;
    if mask.bits.contains(&1) { Ok(mask) } else { Err(case.bad("response_mask", "expected at least one token")) }
}

/// `compute_rollout_correction_weights`.
pub(super) fn weights(case: &Case<'_>) -> Result<Results, Error> {
    let mask = mask(case)?;
    let log_ratio = case.sized("log_ratio", mask.bits.len())?;
    let out = importance_weights(&config(case)?, &mask.batch()?, &log_ratio)?
        .ok_or_else(|| case.bad("rollout_is", "expected token or sequence"))?;
    Ok(Results::default().grid("weights", mask.cols, &out.weights).metrics(&out.metrics.named()))
}

/// `compute_rollout_rejection_mask`.
pub(super) fn rejection(case: &Case<'_>) -> Result<Results, Error> {
    let mask = mask(case)?;
    let log_ratio = case.sized("log_ratio", mask.bits.len())?;
    let config = config(case)?;
    let bound = config.rollout_rs_threshold.as_ref();
    let out = rejection_mask(&config.rollout_rs, bound, &mask.batch()?, &log_ratio)?;
    let bits: Vec<f64> = out.response_mask.iter().map(|m| f64::from(*m)).collect();
    let metrics = out.report.named();
    let metrics: Vec<(&str, f64)> = metrics.iter().map(|(key, value)| (key.as_str(), *value)).collect();
    Ok(Results::default()
        .grid("response_mask", mask.cols, &bits)
        .num("masked_fraction", out.report.masked_fraction)
        .num("seq_masked_fraction", out.report.seq_masked_fraction)
        .metrics(&metrics))
}

/// `compute_offpolicy_metrics`.
pub(super) fn off_policy(case: &Case<'_>) -> Result<Results, Error> {
    let mask = mask(case)?;
    let (old, rollout) =
        (case.sized("old_log_prob", mask.bits.len())?, case.sized("rollout_log_prob", mask.bits.len())?);
    let m = off_policy_metrics(&mask.batch()?, &old, &rollout)?;
    Ok(Results::default().metrics(&m.named()))
}

/// `compute_policy_loss_bypass_mode`: the loss, and the report of its rejection.
pub(super) fn bypass(case: &Case<'_>) -> Result<Results, Error> {
    let mut kept = mask(case)?;
    let config = config(case)?;
    let mut reports = Vec::new();
    if !config.rollout_rs.is_empty() {
        let mask = &kept;
        let (now, rollout) = (case.sized("log_prob", mask.bits.len())?, case.sized("old_log_prob", mask.bits.len())?);
        let log_ratio: Vec<f64> = now.iter().zip(&rollout).map(|(n, r)| n - r).collect();
        let bound = config.rollout_rs_threshold.as_ref();
        let out = rejection_mask(&config.rollout_rs, bound, &mask.batch()?, &log_ratio)?;
        reports = out.report.named();
        kept.bits = out.response_mask;
    }
    let (results, metrics) = verl_losses::bypass(case, &kept)?;
    let mut all: Vec<(String, f64)> = metrics.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    all.extend(reports.into_iter().map(|(key, value)| (format!("rollout_corr/{key}"), value)));
    let all: Vec<(&str, f64)> = all.iter().map(|(key, value)| (key.as_str(), *value)).collect();
    Ok(results.metrics(&all))
}
