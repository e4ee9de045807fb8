//! TRL's GRPO family: advantages, losses, weights, helpers; SFT and generalised knowledge distillation.

use super::case::{Case, Grid, Mask, Results};
use crate::advantages::{
    FunctionRewards, MultiObjective, RlooOptions, ScaleRewards, function_advantages, function_rloo, nan_statistics,
};
use crate::distill::generalized_jsd;
use crate::distribution::token_statistics;
use crate::loss::{gamma_weight, high_entropy, off_policy_rows};
use crate::math::Cut;
use crate::rollout_correction::{EngineRange, OutOfRange, engine_ratio};
use crate::{Error, IsLevel, TokenBatch, sft_loss};

/// Spread one number per row over the row's slots.
pub(super) fn spread(batch: &TokenBatch, per_row: &[f64]) -> Result<Vec<f64>, Error> {
    batch.expect_rows("advantages", per_row)?;
    let mut out = vec![0.0; batch.num_slots()];
    for (row, value) in batch.rows().zip(per_row) {
        out[row].fill(*value);
    }
    Ok(out)
}

fn function_rewards<'a>(case: &Case<'_>, scores: &'a Grid, weights: &'a [f64]) -> Result<FunctionRewards<'a>, Error> {
    let num_generations = case.num("num_generations", 1.0)? as usize;
    Ok(FunctionRewards { scores: &scores.data, weights, num_generations })
}

/// Advantage lines of the GRPO trainer.
pub(super) fn grpo_advantages(case: &Case<'_>) -> Result<Results, Error> {
    let (scores, weights) = (case.grid("rewards_per_func")?, case.vector("reward_weights")?);
    let rewards = function_rewards(case, &scores, &weights)?;
    let scale: ScaleRewards = case.parse("scale_rewards", "group")?;
    let aggregation: MultiObjective = case.parse("multi_objective_aggregation", "sum_then_normalize")?;
    let out = function_advantages(&rewards, scale, aggregation)?;
    let zero: Vec<f64> = out.is_std_zero.iter().map(|z| f64::from(u8::from(*z))).collect();
    Ok(Results::default().vector("advantages", &out.advantages).vector("is_std_zero", &zero))
}

/// Advantage lines of the RLOO trainer.
pub(super) fn rloo_advantages(case: &Case<'_>) -> Result<Results, Error> {
    let (scores, weights) = (case.grid("rewards_per_func")?, case.vector("reward_weights")?);
    let rewards = function_rewards(case, &scores, &weights)?;
    let options = RlooOptions {
        beta: case.num("beta", 0.05)?,
        reward_clip_range: case.pair("reward_clip_range")?,
        normalize: case.flag("normalize_advantages", false)?,
    };
    let mask = case.mask("completion_mask")?;
    let (old, reference) = (
        case.opt_sized("old_per_token_logps", mask.bits.len())?,
        case.opt_sized("ref_per_token_logps", mask.bits.len())?,
    );
    let batch = mask.batch()?;
    let kl: Vec<f64> = match (old, reference) {
        (Some(old), Some(reference)) => {
            (0..batch.num_rows()).map(|row| batch.active(row).map(|t| old[t] - reference[t]).sum()).collect()
        }
        _ => vec![0.0; batch.num_rows()],
    };
    Ok(Results::default().vector("advantages", &function_rloo(&rewards, &options, &kl)?))
}

/// The engine's importance ratio.
pub(super) fn ratio(case: &Case<'_>) -> Result<Results, Error> {
    let mask = case.mask("completion_mask")?;
    let (old, sampling) =
        (case.sized("old_per_token_logps", mask.bits.len())?, case.sized("sampling_per_token_logps", mask.bits.len())?);
    let mode = case.text("mode", "sequence_mask")?;
    let (level, cols) = if mode.starts_with("token") { (IsLevel::Token, mask.cols) } else { (IsLevel::Sequence, 1) };
    let outside = if mode.ends_with("truncate") { OutOfRange::Truncate } else { OutOfRange::Mask };
    let range = EngineRange {
        min: case.num("clip_min", f64::NEG_INFINITY)?,
        max: case.num("clip_max", f64::INFINITY)?,
        outside,
    };
    let out = engine_ratio(level, range, &mask.batch()?, &old, &sampling)?;
    Ok(Results::default().grid("ratio", cols, &out))
}

/// `SFTTrainer.compute_loss`.
pub(super) fn sft(case: &Case<'_>) -> Result<Results, Error> {
    let mask = case.mask("label_mask")?;
    let log_probs = case.sized("log_probs", mask.bits.len())?;
    let batch = mask.batch()?;
    let count = case.num("num_items_in_batch", batch.num_tokens() as f64)?;
    let out = sft_loss(case.parse("loss_type", "nll")?, &batch, &log_probs, count as u64)?;
    Ok(Results::default().num("loss", out.loss).grad_grid("log_probs", mask.cols, &out.d_log_probs))
}

/// `GKDTrainer.generalized_jsd_loss`.
pub(super) fn jsd(case: &Case<'_>) -> Result<Results, Error> {
    let (rows, middle, student) = case.cube("student_logits")?;
    let (_, _, teacher) = case.cube("teacher_logits")?;
    let labels = case.opt_sized("labels", student.rows)?;
    if teacher.rows != student.rows {
        return Err(case.bad("teacher_logits", format!("expected {} positions", student.rows)));
    }
    let (beta, temperature) = (case.num("beta", 0.5)?, case.num("temperature", 1.0)?);
    let active: Vec<bool> =
        (0..student.rows).map(|t| labels.as_ref().is_none_or(|labels| labels[t] != -100.0)).collect();
    let count = active.iter().filter(|a| **a).count().max(1) as f64;
    // Without labels the peer divides by the number of rows, not of positions.
    let denominator = if labels.is_some() { count } else { rows.max(1) as f64 };
    let scale = match (case.opt_num("num_items_in_batch")?, case.text("reduction", "batchmean")?) {
        (Some(items), _) => 1.0 / items,
        (None, "sum") => 1.0,
        (None, "mean") => 1.0 / count / student.cols as f64,
        (None, "batchmean") => 1.0 / denominator,
        (None, other) => return Err(case.bad("reduction", format!("`{other}` is not batchmean, mean or sum"))),
    };
    let (mut loss, mut gradient) = (0.0, vec![0.0; student.data.len()]);
    for t in (0..student.rows).filter(|t| active[*t]) {
        let out = generalized_jsd(student.row(t), teacher.row(t), beta, temperature)?;
        loss += scale * out.value;
        let slot = &mut gradient[t * student.cols..(t + 1) * student.cols];
        slot.iter_mut().zip(&out.d_logits).for_each(|(g, d)| *g = scale * d);
    }
    Ok(Results::default().num("loss", loss).grad_cube("student_logits", (middle, student.cols), &gradient))
}

/// The helpers of one document, told apart by their inputs.
pub(super) fn utils(case: &Case<'_>) -> Result<Results, Error> {
    if case.has("logits") {
        return log_probs(case);
    }
    if case.has("x") {
        return nan_std(case);
    }
    let mask = case.mask("mask")?;
    let batch = mask.batch()?;
    if case.has("entropies") {
        let kept = high_entropy(&batch, &case.sized("entropies", mask.bits.len())?, case.num("threshold", 0.0)?);
        let kept: Vec<f64> = kept.iter().map(|k| f64::from(*k)).collect();
        return Ok(Results::default().grid("mask", mask.cols, &kept));
    }
    let per_row = case.vector("advantages")?;
    let advantages = spread(&batch, &per_row)?;
    if case.has("log_ratio_per_token") {
        return vespo(case, &mask, &per_row);
    }
    let (now, sampling) =
        (case.sized("per_token_logps", mask.bits.len())?, case.sized("sampling_per_token_logps", mask.bits.len())?);
    let threshold = case.num("off_policy_threshold", 0.0)?;
    let kept = off_policy_rows(&batch, &advantages, &now, &sampling, threshold);
    let kept: Vec<f64> = kept.iter().map(|k| f64::from(u8::from(*k))).collect();
    Ok(Results::default().grid("keep", 1, &kept))
}

fn log_probs(case: &Case<'_>) -> Result<Results, Error> {
    let (_, middle, logits) = case.cube("logits")?;
    let index = case.sized("index", logits.rows)?;
    let temperature = case.num("temperature", 1.0)?;
    let statistics = (0..logits.rows)
        .map(|t| token_statistics(logits.row(t), index[t] as usize, temperature))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Results::default().grid("logprobs", middle, &statistics.iter().map(|s| s.log_prob).collect::<Vec<_>>()).grid(
        "entropy",
        middle,
        &statistics.iter().map(|s| s.entropy).collect::<Vec<_>>(),
    ))
}

fn nan_std(case: &Case<'_>) -> Result<Results, Error> {
    let x = case.grid("x")?;
    let rows: Vec<(f64, f64)> = (0..x.rows).map(|i| nan_statistics(x.row(i))).collect();
    Ok(Results::default()
        .num("nanstd", nan_statistics(&x.data).1)
        .vector("nanstd_dim1", &rows.iter().map(|r| r.1).collect::<Vec<_>>())
        .vector("nanmean_dim1", &rows.iter().map(|r| r.0).collect::<Vec<_>>()))
}

fn vespo(case: &Case<'_>, mask: &Mask, advantages: &[f64]) -> Result<Results, Error> {
    let log_ratio = case.sized("log_ratio_per_token", mask.bits.len())?;
    let engine = case.opt_sized("importance_sampling_ratio", mask.bits.len())?;
    let batch = mask.batch()?;
    let positive = (case.num("k_pos", 2.0)?, case.num("lambda_pos", 3.0)?);
    let negative = (case.num("k_neg", 3.0)?, case.num("lambda_neg", 2.0)?);
    let phi = |row: usize| -> f64 {
        let (k, lambda) = if advantages[row] >= 0.0 { positive } else { negative };
        let extra = |t: usize| engine.as_ref().map_or(0.0, |e| e[t].max(1e-8).ln());
        // TRL adds up the engine's ratios over all slots; they are 1 on masked ones.
        let sum: f64 = batch.active(row).map(|t| log_ratio[t].cut(-20.0, 20.0)).sum();
        let engine: f64 = batch.row(row).map(extra).sum();
        gamma_weight(sum + engine, k, lambda)
    };
    let phi: Vec<f64> = (0..batch.num_rows()).map(phi).collect();
    Ok(Results::default().grid("phi", 1, &phi))
}
