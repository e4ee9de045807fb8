//! verl's remaining functions: value and SFT losses, entropy, masked statistics, schedules, sampling control,
//! distillation.

use super::case::{Case, Mask, Results, json, list};
use super::verl_losses::{agg_mode, counted};
use crate::distill::forward_kl_top_k;
use crate::distribution::{TokenStatistics, token_gradient, token_statistics};
use crate::filters::{OverlongConfig, pf_ppo_weights, response_mask};
use crate::masked::{masked_mean, masked_sum, masked_var, masked_var_biased};
use crate::{
    Error, LossAggMode, LrScheduleConfig, SftLossType, ValueLossConfig, ValueLossInput, agg_loss, sft_loss, value_loss,
};
use serde_json::{Value, json as object};

/// `compute_value_loss`.
pub(super) fn value(case: &Case<'_>) -> Result<Results, Error> {
    let mask = case.mask("response_mask")?;
    let (predictions, old_values) = (case.sized("vpreds", mask.bits.len())?, case.sized("values", mask.bits.len())?);
    let returns = case.sized("returns", mask.bits.len())?;
    let loss_agg_mode = agg_mode(case)?;
    let counted = counted(case, &mask, loss_agg_mode)?;
    // A range of 0 is no clipping in the library; the peer clips to the old values.
    let cliprange_value = case.num("cliprange_value", 0.5)?;
    let cliprange_value = if cliprange_value == 0.0 { f64::MIN_POSITIVE } else { cliprange_value };
    let config = ValueLossConfig { cliprange_value, loss_agg_mode };
    let batch = mask.batch()?;
    let input = ValueLossInput { batch, predictions: &predictions, old_values: &old_values, returns: &returns };
    let out = value_loss(&config, &input, &counted.counts)?;
    let gradient: Vec<f64> = out.d_predictions.iter().map(|d| d * counted.dp_size).collect();
    Ok(Results::default()
        .num("loss", counted.loss(out.loss))
        .num("vf_clipfrac", out.num_clipped as f64 / batch.num_tokens().max(1) as f64)
        .grad_grid("vpreds", mask.cols, &gradient))
}

/// `sft_loss`.
pub(super) fn sft(case: &Case<'_>) -> Result<Results, Error> {
    let mask = case.mask("response_mask")?;
    let log_probs = case.sized("log_probs", mask.bits.len())?;
    let counted = counted(case, &mask, LossAggMode::TokenMean)?;
    let out = sft_loss(SftLossType::Nll, &mask.batch()?, &log_probs, counted.counts.num_tokens)?;
    let gradient: Vec<f64> = out.d_log_probs.iter().map(|d| d * counted.dp_size).collect();
    Ok(Results::default().num("loss", out.loss * counted.dp_size).grad_grid("log_probs", mask.cols, &gradient))
}

/// `compute_entropy_loss` and the statistics of logits.
pub(super) fn entropy(case: &Case<'_>) -> Result<Results, Error> {
    let mask = case.mask("response_mask")?;
    let (_, middle, logits) = case.cube("logits")?;
    let labels = case.sized("labels", logits.rows)?;
    if mask.bits.len() != logits.rows {
        return Err(case.bad("response_mask", format!("expected {} entries", logits.rows)));
    }
    let statistics: Vec<TokenStatistics> =
        (0..logits.rows).map(|t| token_statistics(logits.row(t), labels[t] as usize, 1.0)).collect::<Result<_, _>>()?;
    let column = |f: fn(&TokenStatistics) -> f64| -> Vec<f64> { statistics.iter().map(f).collect() };
    let mode = agg_mode(case)?;
    let counted = counted(case, &mask, mode)?;
    let entropies = column(|s| s.entropy);
    let (loss, weights) = agg_loss(mode, &mask.batch()?, &entropies, &counted.counts)?;
    let mut gradient = Vec::with_capacity(logits.data.len());
    for (t, weight) in weights.iter().enumerate() {
        gradient.extend(token_gradient(logits.row(t), labels[t] as usize, 1.0, 0.0, *weight)?);
    }
    Ok(Results::default()
        .num("loss", counted.loss(loss))
        .grid("entropy", mask.cols, &entropies)
        .grid("logprobs", mask.cols, &column(|s| s.log_prob))
        .grid("sum_pi_squared", mask.cols, &column(|s| s.sum_pi_squared))
        .grad_cube("logits", (middle, logits.cols), &gradient))
}

/// `masked_sum`, `masked_mean`, `masked_var`, `masked_whiten`.
pub(super) fn masked(case: &Case<'_>) -> Result<Results, Error> {
    let (values, Mask { offsets, bits, cols }) = case.masked_grid("values", "mask")?;
    let rows = || offsets.windows(2).map(|w| w[0]..w[1]);
    let sums: Vec<f64> = rows().map(|row| masked_sum(&values.data[row.clone()], &bits[row])).collect();
    let means: Vec<f64> = rows().map(|row| masked_mean(&values.data[row.clone()], &bits[row])).collect();
    let failure = |error: Error| object!({ "error": { "type": "ValueError", "message": error.to_string() } });
    let variance = masked_var(&values.data, &bits);
    let mean = masked_mean(&values.data, &bits);
    // verl whitens masked slots too; the library leaves them 0.
    let whiten = |back: f64| -> Value {
        match &variance {
            Err(error) => failure(error.clone()),
            Ok(variance) => {
                let scale = (variance + 1e-8).sqrt().recip();
                let all: Vec<f64> = values.data.iter().map(|v| (v - mean) * scale + back).collect();
                Value::Array(all.chunks(cols).map(list).collect())
            }
        }
    };
    Ok(Results::default()
        .num("masked_sum", masked_sum(&values.data, &bits))
        .num("masked_mean", mean)
        .vector("masked_sum_axis_last", &sums)
        .vector("masked_mean_axis_last", &means)
        .value("masked_var", variance.clone().map_or_else(failure, json))
        .num("masked_var_biased", masked_var_biased(&values.data, &bits))
        .value("masked_whiten", whiten(0.0))
        .value("masked_whiten_no_shift", whiten(mean)))
}

/// The learning-rate schedules: multipliers of steps `0..=num_training_steps`.
pub(super) fn schedule(case: &Case<'_>) -> Result<Results, Error> {
    let default = LrScheduleConfig::default();
    let config = LrScheduleConfig {
        kind: case.parse("schedule", "constant")?,
        num_warmup_steps: case.num("num_warmup_steps", 0.0)? as u64,
        init_lr_ratio: case.num("init_lr_ratio", default.init_lr_ratio)?,
        min_lr_ratio: case.num("min_lr_ratio", default.min_lr_ratio)?,
        num_cycles: case.num("num_cycles", default.num_cycles)?,
        stable_ratio: case.num("stable_ratio", default.stable_ratio)?,
        zero_indexed_step: case.flag("zero_indexed_step", default.zero_indexed_step)?,
    };
    config.validate()?;
    let total = case.num("num_training_steps", 0.0)?;
    if !(0.0..=1e6).contains(&total) {
        return Err(case.bad("num_training_steps", "expected a number from 0 to a million"));
    }
    let total = total as u64;
    let lr: Vec<f64> = (0..=total).map(|step| config.multiplier(step, total)).collect();
    Ok(Results::default().vector("lr", &lr))
}

/// The overlong penalty of DAPO's reward manager.
pub(super) fn overlong(case: &Case<'_>) -> Result<Results, Error> {
    let config = OverlongConfig {
        enable: true,
        len: case.num("overlong_buffer_len", 0.0)? as u32,
        penalty_factor: case.num("penalty_factor", 1.0)?,
        max_response_length: case.num("max_resp_len", 0.0)? as u32,
    };
    config.validate()?;
    let (lengths, scores) = (case.vector("response_lengths")?, case.vector("scores")?);
    let rewards: Vec<f64> = lengths.iter().zip(&scores).map(|(l, s)| s + config.penalty(*l as u64)).collect();
    Ok(Results::default().vector("rewards", &rewards))
}

/// `compute_pf_ppo_reweight_data.compute_weights`.
pub(super) fn pf_ppo(case: &Case<'_>) -> Result<Results, Error> {
    let method = case.parse("reweight_method", "pow")?;
    let weights = pf_ppo_weights(method, &case.vector("scores")?, case.num("weight_pow", 2.0)?);
    Ok(Results::default().vector("weights", &weights))
}

/// `get_response_mask`.
pub(super) fn response(case: &Case<'_>) -> Result<Results, Error> {
    let ids = case.grid("response_id")?;
    let stops: Vec<u32> = case.numbers("eos_token")?.unwrap_or_default().iter().map(|v| *v as u32).collect();
    let row = |i| -> Vec<f64> {
        let row: Vec<u32> = ids.row(i).iter().map(|v| *v as u32).collect();
        response_mask(&row, &stops).iter().map(|m| f64::from(*m)).collect()
    };
    let mask: Vec<f64> = (0..ids.rows).flat_map(row).collect();
    Ok(Results::default().grid("response_mask", ids.cols, &mask))
}

/// `compute_forward_kl_topk`.
pub(super) fn distill(case: &Case<'_>) -> Result<Results, Error> {
    let (_, middle, logits) = case.cube("student_logits")?;
    let (_, _, teacher) = case.cube("teacher_topk_log_probs")?;
    let (_, _, ids) = case.cube("teacher_topk_ids")?;
    let clamp = case.opt_num("log_prob_min_clamp")?;
    if teacher.rows != logits.rows || ids.rows != logits.rows {
        return Err(case.bad("teacher_topk_ids", format!("expected {} positions", logits.rows)));
    }
    let (mut losses, mut student, mut mass) = (Vec::new(), Vec::new(), Vec::new());
    let mut gradient = Vec::with_capacity(logits.data.len());
    for t in 0..logits.rows {
        let ids: Vec<usize> = ids.row(t).iter().map(|v| *v as usize).collect();
        let out = forward_kl_top_k(logits.row(t), teacher.row(t), &ids, clamp)?;
        losses.push(out.value);
        student.push(out.student_mass);
        mass.push(out.teacher_mass);
        gradient.extend(out.d_logits);
    }
    Ok(Results::default()
        .grid("distillation_losses", middle, &losses)
        .grid("student_mass", middle, &student)
        .grid("teacher_mass", middle, &mass)
        .num("loss", losses.iter().sum())
        .grad_cube("student_logits", (middle, logits.cols), &gradient))
}
