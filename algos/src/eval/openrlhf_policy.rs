//! OpenRLHF's policy loss: PPO or GSPO, with the correction of the gap to the engine.

use super::case::{Case, Mask, Results, json};
use super::openrlhf::agg_mode;
use crate::kl::Dual;
use crate::loss::clipped_surrogate;
use crate::masked::masked_mean;
use crate::math::Cut;
use crate::{Error, GlobalCounts, LossAggMode, TokenBatch};
use serde_json::Value;

/// Settings of one case.
struct Settings {
    low: f64,
    high: f64,
    dual_clip: f64,
    gspo: bool,
    agg: LossAggMode,
    counts: GlobalCounts,
    dp_size: f64,
}

fn settings(case: &Case<'_>, mask: &Mask) -> Result<Settings, Error> {
    let gspo = case.text("policy_loss_type", "ppo")? == "gspo";
    // GSPO's loss is one of rows, whatever this says.
    case.accept(&["token_level_loss"]);
    let batch = mask.batch()?;
    let own = GlobalCounts::of(&batch, 1.0);
    let sequences = case.opt_num("global_batch_size")?.map_or(own.num_sequences, |n| n as u64);
    let tokens = case.opt_num("batch_num_tokens")?.map_or(own.num_tokens, |n| n as u64);
    Ok(Settings {
        low: case.num("clip_eps_low", 0.2)?,
        high: case.num("clip_eps_high", 0.2)?,
        dual_clip: case.num("dual_clip", 0.0)?,
        gspo,
        agg: if gspo { LossAggMode::SeqMeanTokenMean } else { agg_mode(case)? },
        counts: GlobalCounts { num_tokens: tokens, num_sequences: sequences, ..own },
        dp_size: case.num("dp_size", 1.0)?,
    })
}

/// Weights against the engine, and the tokens that are out of bounds: dropped or clipped.
struct Correction {
    weights: Vec<f64>,
    dropped: Vec<f64>,
}

fn correction(case: &Case<'_>, batch: &TokenBatch, old: &[f64], engine: &[f64]) -> Result<Option<Correction>, Error> {
    let level = case.text("is_correction_level", "off")?;
    if level == "off" {
        return Ok(None);
    }
    let bounds = case.pair("is_correction_threshold")?;
    let (low, high) = bounds.unwrap_or((0.5, 5.0));
    let gating = case.text("is_correction_gating", "ratio")?;
    let clip = case.text("is_correction_mode", "mask")? == "clip";
    if clip && (level != "token" || gating != "ratio") {
        return Err(case.bad("is_correction_mode", "clip needs is_correction_level token and gating ratio"));
    }
    if gating != "ratio" && low > 0.0 {
        return Err(case.bad("is_correction_threshold", "a divergence has an upper bound only: the lower one is 0"));
    }
    let log_ratio: Vec<f64> = old.iter().zip(engine).map(|(o, e)| o - e).collect();
    let divergence = |t: usize| {
        let bounded = |log_prob: f64| log_prob.exp().cut(1e-6, 1.0 - 1e-6);
        let (p, q) = (bounded(engine[t]), bounded(old[t]));
        match gating {
            "binary_kl" => p * (p / q).ln() + (1.0 - p) * ((1.0 - p) / (1.0 - q)).ln(),
            "tv" => (p - q).abs(),
            _ => log_ratio[t],
        }
    };
    let mut out = Correction { weights: vec![0.0; batch.num_slots()], dropped: vec![0.0; batch.num_slots()] };
    for row in 0..batch.num_rows() {
        let len = batch.row_len(row).max(1) as f64;
        let mean = batch.active(row).map(divergence).sum::<f64>() / len;
        for t in batch.active(row) {
            let statistic = if level == "seq" { mean } else { divergence(t) };
            let gate = if gating == "ratio" { statistic.exp() } else { statistic };
            let outside = gate < low || gate > high;
            let weight = log_ratio[t].exp();
            out.weights[t] = if clip {
                weight.cut(low, high)
            } else if outside {
                0.0
            } else {
                weight
            };
            out.dropped[t] = f64::from(u8::from(outside));
        }
    }
    Ok(Some(out))
}

/// Share of rows with a dropped token; the peer's mean of a row without tokens is no number, and out of bounds.
fn rows_hit(batch: &TokenBatch, dropped: &[f64]) -> f64 {
    let is_hit = |row: &usize| batch.row_len(*row) == 0 || dropped[batch.row(*row)].contains(&1.0);
    let hit = (0..batch.num_rows()).filter(is_hit).count();
    hit as f64 / batch.num_rows().max(1) as f64
}

/// `PolicyLoss`.
pub(super) fn loss(case: &Case<'_>) -> Result<Results, Error> {
    let mask = case.mask("action_mask")?;
    let batch = mask.batch()?;
    let settings = settings(case, &mask)?;
    let (now, mut old) = (case.sized("log_probs", mask.bits.len())?, case.sized("old_log_probs", mask.bits.len())?);
    let advantages = case.sized("advantages", mask.bits.len())?;
    let engine = case.opt_sized("rollout_log_probs", mask.bits.len())?.unwrap_or_else(|| old.clone());
    let mut correction = correction(case, &batch, &old, &engine)?;
    // GSPO corrects by taking its ratio against the engine itself.
    let start = old.clone();
    if settings.gspo && correction.take().is_some() {
        old.clone_from(&engine);
    }
    let weights = settings.agg.row_weights(&batch, &settings.counts)?;
    let range = crate::loss::ClipRange { low: settings.low, high: settings.high };
    let gap = |t: usize| now[t] - old[t];
    let (mut loss, mut gradient) = (0.0, vec![0.0; batch.num_slots()]);
    let mut clipped = vec![0.0; batch.num_slots()];
    for (row, row_weight) in weights.iter().enumerate() {
        let len = batch.row_len(row).max(1) as f64;
        let mean = batch.active(row).map(gap).sum::<f64>() / len;
        let mut through_mean = 0.0;
        for t in batch.active(row) {
            let raw = if settings.gspo { mean } else { gap(t) };
            let inside = settings.gspo || raw.abs() <= 20.0;
            let value = if settings.gspo { raw.exp() } else { raw.cut(-20.0, 20.0).exp() };
            let ratio = Dual { value, d: if inside { value } else { 0.0 } };
            let term = clipped_surrogate(ratio, advantages[t], range, settings.dual_clip);
            let weight = row_weight * settings.dp_size * correction.as_ref().map_or(1.0, |c| c.weights[t]);
            loss += weight * term.loss;
            clipped[t] = f64::from(u8::from(term.clipped));
            if settings.gspo {
                through_mean += weight * term.d / len;
            } else {
                gradient[t] = weight * term.d;
            }
        }
        batch.active(row).for_each(|t| gradient[t] += through_mean);
    }
    let bits = batch.response_mask();
    let mean = |values: &[f64]| masked_mean(values, bits);
    let kl: Vec<f64> = (0..batch.num_slots()).map(|t| start[t] - now[t]).collect();
    let engine_kl: Vec<f64> = engine.iter().zip(&old).map(|(e, o)| e - o).collect();
    let optional = |value: Option<f64>| value.map_or(Value::Null, json);
    let by_row = case.text("is_correction_level", "off")? == "seq";
    let filtered = |c: &Correction| {
        if by_row { rows_hit(&batch, &c.dropped) } else { mean(&c.dropped) }
    };
    Ok(Results::default()
        .num("loss", loss)
        .num("clip_ratio", mean(&clipped))
        .num("ppo_kl", mean(&kl))
        .value("vllm_kl", optional(correction.as_ref().map(|_| mean(&engine_kl))))
        .value("is_filter_ratio", optional(correction.as_ref().map(filtered)))
        .grad_grid("log_probs", mask.cols, &gradient))
}
