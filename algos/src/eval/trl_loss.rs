//! TRL's losses on per-token log-probs: GRPO's types, GMPO, RLOO.

use super::case::{Case, Mask, Results};
use super::trl::spread;
use crate::kl::Dual;
use crate::loss::{clipped_surrogate, high_entropy};
use crate::masked::masked_mean;
use crate::{
    Error, GlobalCounts, LossAggMode, LossMode, PolicyLossConfig, PolicyLossInput, TokenBatch, TrlConfig, TrlLossType,
    TrlReport, policy_loss, trl_loss,
};

/// Longest completion where a case does not say it: that of the trainer which the reference vectors were made with.
const MAX_COMPLETION_LENGTH: f64 = 16.0;

fn config(case: &Case<'_>) -> Result<PolicyLossConfig, Error> {
    let default = TrlConfig::default();
    let beta = case.num("beta", 0.0)?;
    let low = case.num("epsilon_low", case.num("epsilon", 0.2)?)?;
    // TRL chooses between two plain numbers by torch.where: what comes out is an f32.
    let tau = |key: &str, default| case.num(key, default).map(|tau| f64::from(tau as f32));
    Ok(PolicyLossConfig {
        loss_mode: LossMode::Trl,
        clip_ratio_low: Some(low),
        clip_ratio_high: Some(case.num("epsilon_high", low)?),
        use_kl_loss: beta != 0.0,
        kl_loss_coef: beta,
        entropy_coeff: case.num("entropy_coef", 0.0)?,
        tau_pos: tau("sapo_temperature_pos", 1.0)?,
        tau_neg: tau("sapo_temperature_neg", 1.05)?,
        trl: TrlConfig {
            loss_type: case.parse("loss_type", "dapo")?,
            importance_sampling_level: case.parse("importance_sampling_level", "token")?,
            delta: case.num("delta", 0.0)?,
            use_bias_correction_kl: case.flag("use_bias_correction_kl", false)?,
            top_entropy_quantile: case.num("top_entropy_quantile", 1.0)?,
            off_policy_mask_threshold: case.opt_num("off_policy_mask_threshold")?,
            vespo_k_pos: case.num("vespo_k_pos", default.vespo_k_pos)?,
            vespo_lambda_pos: case.num("vespo_lambda_pos", default.vespo_lambda_pos)?,
            vespo_k_neg: case.num("vespo_k_neg", default.vespo_k_neg)?,
            vespo_lambda_neg: case.num("vespo_lambda_neg", default.vespo_lambda_neg)?,
        },
        ..PolicyLossConfig::default()
    })
}

/// The types that divide by the items of the global batch.
fn divides_by_items(kind: TrlLossType) -> bool {
    matches!(kind, TrlLossType::Dapo | TrlLossType::Cispo | TrlLossType::Vespo)
}

/// Counts of TRL's normalisers: dapo's family divides by the items of the global batch, the rest by the batch's own.
fn counts(case: &Case<'_>, config: &PolicyLossConfig, mask: &Mask) -> Result<GlobalCounts, Error> {
    let batch = mask.batch()?;
    let own = GlobalCounts::of(&batch, case.num("max_completion_length", MAX_COMPLETION_LENGTH)?);
    let items = case.opt_num("num_items_in_batch")?.filter(|_| divides_by_items(config.trl.loss_type));
    Ok(GlobalCounts { num_tokens: items.map_or(own.num_tokens, |n| n as u64), ..own })
}

/// `GRPOTrainer._compute_loss`.
pub(super) fn grpo(case: &Case<'_>) -> Result<Results, Error> {
    let mask = case.mask("completion_mask")?;
    let batch = mask.batch()?;
    let log_probs = case.sized("per_token_logps", mask.bits.len())?;
    let old = case.opt_sized("old_per_token_logps", mask.bits.len())?.unwrap_or_else(|| log_probs.clone());
    let advantages = spread(&batch, &case.vector("advantages")?)?;
    let (reference, entropies) =
        (case.opt_sized("ref_per_token_logps", mask.bits.len())?, case.opt_sized("entropies", mask.bits.len())?);
    let mut sampling = case.opt_sized("sampling_per_token_logps", mask.bits.len())?;
    // A token that the engine could not score is no evidence of drift.
    let scored = sampling.iter_mut().flatten().zip(&log_probs);
    scored.filter(|(sampled, _)| sampled.is_nan()).for_each(|(sampled, now)| *sampled = *now);
    let config = config(case)?;
    let mut ratio = engine_weights(case, &batch)?;
    if let (Some(ratio), TrlLossType::Vespo) = (&mut ratio, config.trl.loss_type) {
        gather_masked(&batch, ratio);
    }
    config.validate()?;
    let input = PolicyLossInput {
        batch,
        log_probs: &log_probs,
        old_log_probs: &old,
        advantages: &advantages,
        ref_log_probs: reference.as_deref(),
        entropies: None,
        rollout_is_weights: ratio.as_deref(),
        rollout_log_probs: sampling.as_deref().or(Some(&old)),
        noise_seed: 0,
    };
    let masked = PolicyLossInput { entropies: entropies.as_deref(), ..input };
    let without_entropy = PolicyLossConfig { entropy_coeff: 0.0, ..config.clone() };
    let counts = counts(case, &config, &mask)?;
    let (out, mut report) = trl_loss(&without_entropy, &masked, &counts)?;
    // TRL's metrics of completions of one token are means over all rows, masked or not.
    let all = vec![1; mask.bits.len()];
    let seen = if mask.cols == 1 { batch.with_mask(&all)? } else { batch };
    if mask.cols == 1 {
        report = TrlReport { phi: report.phi, ..report_of_all(&without_entropy, &masked, seen, &counts)? };
    }
    // `vllm_is` says that `importance_sampling_ratio` is given; `steps_per_generation` concerns dapo's family alone.
    case.accept(&["vllm_is", "steps_per_generation"]);
    let accumulation = case.num("gradient_accumulation_steps", 1.0)?;
    let scale = normaliser(case, &config, accumulation)?;
    // TRL's bonus is the mean over the tokens of the micro-batch, divided by the accumulation steps alone.
    let entropies = entropies.unwrap_or_default();
    let mean_entropy = masked_mean(&entropies, seen.response_mask());
    let bonus = config.entropy_coeff / accumulation;
    let kept = high_entropy_tokens(&config, &batch, &entropies);
    let loss = out.loss * scale - bonus * masked_mean(&entropies, &kept);
    let d_log_probs: Vec<f64> = out.d_log_probs.iter().map(|d| d * scale).collect();
    let per_token = bonus / kept.iter().filter(|k| **k == 1).count().max(1) as f64;
    let d_entropies: Vec<f64> = kept.iter().map(|k| -per_token * f64::from(*k)).collect();
    let mut metrics = report_metrics(&config, &seen, &report);
    metrics.push(("entropy", mean_entropy));
    if config.entropy_coeff > 0.0 {
        // TRL reports the loss of dapo's family after the accumulation factor, that of the others before it.
        let reported = if divides_by_items(config.trl.loss_type) { scale } else { 1.0 };
        metrics.push(("policy_loss", out.loss * reported));
        metrics.push(("entropy_coef", config.entropy_coeff));
    }
    Ok(Results::default()
        .num("loss", loss)
        .metrics(&metrics)
        .grad_grid("per_token_logps", mask.cols, &d_log_probs)
        .grad_grid("entropies", mask.cols, &d_entropies))
}

/// The report over all slots of `seen`. The ratio of a row without tokens is 1, where rows have one.
fn report_of_all(
    config: &PolicyLossConfig,
    masked: &PolicyLossInput<'_>,
    seen: TokenBatch<'_>,
    counts: &GlobalCounts,
) -> Result<TrlReport, Error> {
    let shared = config.trl.importance_sampling_level == crate::ImportanceLevel::Sequence;
    let old_or_now =
        |t: usize| if shared && !masked.batch.is_active(t) { masked.log_probs[t] } else { masked.old_log_probs[t] };
    let old: Vec<f64> = (0..masked.batch.num_slots()).map(old_or_now).collect();
    let input = PolicyLossInput { batch: seen, old_log_probs: &old, ..*masked };
    Ok(trl_loss(config, &input, counts)?.1)
}

fn high_entropy_tokens(config: &PolicyLossConfig, batch: &TokenBatch, entropies: &[f64]) -> Vec<u8> {
    if config.trl.top_entropy_quantile < 1.0 {
        return high_entropy(batch, entropies, 1.0 - config.trl.top_entropy_quantile);
    }
    batch.response_mask().to_vec()
}

/// `[T]` weights from a `[B, T]` or `[B, 1]` ratio.
fn engine_weights(case: &Case<'_>, batch: &TokenBatch) -> Result<Option<Vec<f64>>, Error> {
    let Some(ratio) = case.opt_grid("importance_sampling_ratio")? else { return Ok(None) };
    if ratio.cols == 1 && ratio.data.len() != batch.num_slots() {
        return spread(batch, &ratio.data).map(Some);
    }
    Ok(Some(ratio.data))
}

/// TRL's vespo adds up the engine's log-ratios over masked slots too (where they are 0); move them to a token.
fn gather_masked(batch: &TokenBatch, ratio: &mut [f64]) {
    for row in 0..batch.num_rows() {
        let masked: f64 = batch.row(row).filter(|t| !batch.is_active(*t)).map(|t| ratio[t].max(1e-8).ln()).sum();
        if let Some(first) = batch.active(row).next() {
            ratio[first] *= masked.exp();
        }
    }
}

/// What TRL divides by beyond the counts.
fn normaliser(case: &Case<'_>, config: &PolicyLossConfig, accumulation: f64) -> Result<f64, Error> {
    match config.trl.loss_type {
        TrlLossType::Dapo | TrlLossType::Cispo | TrlLossType::Vespo => {
            Ok(case.num("steps_per_generation", 1.0)? / accumulation)
        }
        TrlLossType::Grpo | TrlLossType::Bnpo | TrlLossType::DrGrpo | TrlLossType::Luspo | TrlLossType::Sapo => {
            Ok(1.0 / accumulation)
        }
    }
}

fn report_metrics(config: &PolicyLossConfig, batch: &TokenBatch, report: &TrlReport) -> Vec<(&'static str, f64)> {
    let mask = batch.response_mask();
    let widen = |bits: &[u8]| -> Vec<f64> { bits.iter().map(|b| f64::from(*b)).collect() };
    let (low, high) = (widen(&report.low_clipped), widen(&report.high_clipped));
    let sequence = config.trl.importance_sampling_level == crate::ImportanceLevel::Sequence;
    // With one ratio per row TRL counts rows without tokens too, as not clipped.
    let per_row = |values: &[f64]| -> Vec<f64> {
        let rows = (0..batch.num_rows()).filter(|row| sequence || batch.row_len(*row) > 0);
        rows.map(|row| masked_mean(&values[batch.row(row)], &mask[batch.row(row)])).collect()
    };
    let (low_rows, high_rows) = (per_row(&low), per_row(&high));
    let mean = |values: &[f64], rows: &[f64]| {
        if sequence { rows.iter().sum::<f64>() / batch.num_rows() as f64 } else { masked_mean(values, mask) }
    };
    let mut metrics = Vec::new();
    if config.use_kl_loss {
        metrics.push(("kl", report.kl));
    }
    match config.trl.loss_type {
        TrlLossType::Cispo => metrics.push(("cispo_clip_ratio", mean(&high, &high_rows))),
        TrlLossType::Vespo => {
            let mean = report.phi.iter().sum::<f64>() / report.phi.len().max(1) as f64;
            metrics.push(("vespo/phi_seq_mean", mean));
        }
        TrlLossType::Sapo => {}
        TrlLossType::Grpo | TrlLossType::Bnpo | TrlLossType::DrGrpo | TrlLossType::Dapo | TrlLossType::Luspo => {
            let (low_mean, high_mean) = (mean(&low, &low_rows), mean(&high, &high_rows));
            metrics.push(("clip_ratio/low_mean", low_mean));
            metrics.push(("clip_ratio/high_mean", high_mean));
            metrics.push(("clip_ratio/region_mean", low_mean + high_mean));
            // Of no row the peer's extremes are NaN, as f64's are of NaN alone.
            metrics.push(("clip_ratio/low_min", low_rows.iter().copied().fold(f64::NAN, f64::min)));
            metrics.push(("clip_ratio/high_max", high_rows.iter().copied().fold(f64::NAN, f64::max)));
        }
    }
    metrics
}

/// `GMPOTrainer._compute_loss`.
pub(super) fn gmpo(case: &Case<'_>) -> Result<Results, Error> {
    let mask = case.mask("completion_mask")?;
    let batch = mask.batch()?;
    let (log_probs, old) =
        (case.sized("per_token_logps", mask.bits.len())?, case.sized("old_per_token_logps", mask.bits.len())?);
    let advantages = spread(&batch, &case.vector("advantages")?)?;
    let quantile = case.num("top_entropy_quantile", 1.0)?;
    let kept = if quantile < 1.0 {
        high_entropy(&batch, &case.sized("entropies", mask.bits.len())?, 1.0 - quantile)
    } else {
        batch.response_mask().to_vec()
    };
    let low = case.num("epsilon_low", 0.4)?;
    let config = PolicyLossConfig {
        loss_mode: LossMode::GeoMean,
        clip_ratio_low: Some(low),
        clip_ratio_high: Some(case.num("epsilon_high", low)?),
        ..PolicyLossConfig::default()
    };
    let counts = GlobalCounts::of(&batch, mask.cols as f64);
    let input = PolicyLossInput {
        batch: batch.with_mask(&kept)?,
        log_probs: &log_probs,
        old_log_probs: &old,
        advantages: &advantages,
        ..PolicyLossInput::default()
    };
    let mut out = policy_loss(&config, &input, &counts)?;
    // TRL counts a row without tokens as ratio 1; it has no gradient.
    for row in (0..batch.num_rows()).filter(|row| input.batch.row_len(*row) == 0) {
        out.loss -= advantages[row * mask.cols] / counts.num_rows as f64;
    }
    let beta = case.num("beta", 0.0)?;
    if beta != 0.0 {
        let reference = case.sized("ref_per_token_logps", mask.bits.len())?;
        let per_row = GlobalCounts { num_sequences: counts.num_rows, ..counts };
        let weights = LossAggMode::SeqMeanTokenMean.row_weights(&batch, &per_row)?;
        for (row, weight) in weights.iter().enumerate() {
            for t in batch.active(row) {
                // TRL's k3 has no clamps.
                let gap = reference[t] - log_probs[t];
                out.loss += beta * weight * (gap.exp() - gap - 1.0);
                out.d_log_probs[t] += beta * weight * (1.0 - gap.exp());
            }
        }
    }
    let accumulation = case.num("gradient_accumulation_steps", 1.0)?;
    let gradient: Vec<f64> = out.d_log_probs.iter().map(|d| d / accumulation).collect();
    Ok(Results::default().num("loss", out.loss / accumulation).grad_grid("per_token_logps", mask.cols, &gradient))
}

/// `RLOOTrainer._compute_loss`: the old log-probs are sums over rows.
pub(super) fn rloo(case: &Case<'_>) -> Result<Results, Error> {
    let mask = case.mask("completion_mask")?;
    let batch = mask.batch()?;
    let log_probs = case.sized("per_token_logps", mask.bits.len())?;
    let advantages = spread(&batch, &case.vector("advantages")?)?;
    // A row's sum of old log-probs stands on its first token; only the sum is read.
    let mut old = vec![0.0; batch.num_slots()];
    let sums = case.sized("old_logps", batch.num_rows())?;
    for (row, sum) in sums.iter().enumerate() {
        if let Some(first) = batch.active(row).next() {
            old[first] = *sum;
        }
    }
    let low = case.num("epsilon_low", 0.2)?;
    let config = PolicyLossConfig {
        loss_mode: LossMode::SequencePpo,
        clip_ratio_low: Some(low),
        clip_ratio_high: Some(case.num("epsilon_high", low)?),
        ..PolicyLossConfig::default()
    };
    let input = PolicyLossInput {
        batch,
        log_probs: &log_probs,
        old_log_probs: &old,
        advantages: &advantages,
        ..PolicyLossInput::default()
    };
    let mut out = policy_loss(&config, &input, &GlobalCounts::of(&batch, mask.cols as f64))?;
    // TRL counts a row without tokens by the ratio of an empty sum to its old log-prob; it has no gradient.
    for row in (0..batch.num_rows()).filter(|row| batch.row_len(*row) == 0) {
        let ratio = Dual { value: (-sums[row]).exp(), d: 0.0 };
        let term = clipped_surrogate(ratio, advantages[row * mask.cols], config.clip_range(), 0.0);
        out.loss += term.loss / batch.num_rows() as f64;
    }
    Ok(Results::default().num("loss", out.loss).grad_grid("per_token_logps", mask.cols, &out.d_log_probs))
}
