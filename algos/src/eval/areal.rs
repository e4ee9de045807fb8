//! AReaL's functions: decoupled PPO, SAPO, critic, normalisation, penalties, proximal log-probs, M2PO.

use super::case::{Case, Results};
use crate::filters::OverlongConfig;
use crate::kl::Dual;
use crate::kl_bounded::BoundedKl;
use crate::loss::{DecoupledOptions, ProximalMethod, decoupled_loss, gate, m2po_mask, proximal_log_prob};
use crate::masked::{masked_mean, masked_var_biased};
use crate::math::Cut;
use crate::math::{log_sigmoid, sigmoid};
use crate::{Error, GlobalCounts, ImportanceLevel, PolicyLossInput, TokenBatch};

/// Functions of one document, told apart by the case's name.
pub(super) fn misc(case: &Case<'_>) -> Result<Results, Error> {
    match case.name.split('/').next().unwrap_or("") {
        "sapo_loss_fn" => sapo(case),
        "ppo_critic_loss_fn" => critic(case),
        "masked_normalization" => normalization(case),
        "dpo_preference_loss" => preference(case),
        "reward_overlong_penalty" => overlong(case),
        "KLEstimator" => kl(case),
        "compute_prox_logp_approximations" => proximal(case),
        "_get_m2po_loss_mask" => {
            let mask = m2po_mask(&case.vector("sorted_m2")?, case.num("m2_threshold", 0.04)?);
            Ok(Results::default().vector("mask", &mask.iter().map(|m| f64::from(u8::from(*m))).collect::<Vec<_>>()))
        }
        other => Err(case.bad("name", format!("no function `{other}` is known"))),
    }
}

/// `ppo_actor_loss_fn`.
pub(super) fn actor(case: &Case<'_>) -> Result<Results, Error> {
    let mask = case.mask("loss_mask")?;
    let batch = mask.batch()?;
    let now = case.sized("logprobs", mask.bits.len())?;
    let proximal = case.sized("proximal_logprobs", mask.bits.len())?;
    let behave = case.sized("old_logprobs", mask.bits.len())?;
    let advantages = case.sized("advantages", mask.bits.len())?;
    let clip_low = case.num("eps_clip", 0.2)?;
    let options = DecoupledOptions {
        clip_low,
        clip_high: case.num("eps_clip_higher", clip_low)?,
        dual_clip: case.num("c_clip", 0.0)?,
        level: case.parse("importance_sampling_level", "token")?,
    };
    let weights = behaviour_weights(case, &batch, &proximal, &behave)?;
    let input = PolicyLossInput {
        batch,
        log_probs: &now,
        old_log_probs: &proximal,
        advantages: &advantages,
        rollout_is_weights: weights.as_ref().map(|(w, _)| &w[..]),
        ..PolicyLossInput::default()
    };
    let out = decoupled_loss(&options, &input, &GlobalCounts::of(&batch, 1.0))?;
    // A rejected token is not reported as clipped.
    let kept = |t: usize| weights.as_ref().is_none_or(|(w, _)| w[t] != 0.0);
    let widen = |bits: &[u8]| -> Vec<f64> {
        bits.iter().enumerate().map(|(t, b)| f64::from(*b) * f64::from(u8::from(kept(t)))).collect()
    };
    let mut results = Results::default()
        .num("loss", out.loss)
        .grid("clip_mask", mask.cols, &widen(&out.clipped))
        .grid("dual_clip_mask", mask.cols, &widen(&out.dual_clipped))
        .grad_grid("logprobs", mask.cols, &out.d_log_probs);
    if let Some((weights, filtered)) = &weights {
        results = results.grid("behave_imp_weight", mask.cols, weights).num("filtered_fraction", *filtered);
    }
    Ok(results)
}

/// Weights against the behaviour policy after rejection, and the share of tokens that it touches.
fn behaviour_weights(
    case: &Case<'_>,
    batch: &TokenBatch,
    proximal: &[f64],
    behave: &[f64],
) -> Result<Option<(Vec<f64>, f64)>, Error> {
    let Some(rule) = case.nested("rejection_sampling") else { return Ok(None) };
    let upper = rule.num("upper", f64::INFINITY)?;
    let lower = rule.num("lower", f64::NEG_INFINITY)?;
    let sequence = rule.text("level", "token")? == "sequence";
    let clamp = rule.text("action", "mask")? == "clamp";
    let (metric, agg) = (rule.text("metric", "ratio")?, rule.text("agg", "mean")?);
    let gap = |t: usize| proximal[t] - behave[t];
    let statistic = |t: usize| match metric {
        "kl_k1" => gap(t),
        "kl_k2" => 0.5 * gap(t) * gap(t),
        "kl_k3" => gap(t).exp() - 1.0 - gap(t),
        _ => gap(t).exp(),
    };
    let (mut weights, mut touched) = (vec![0.0; batch.num_slots()], 0usize);
    for row in 0..batch.num_rows() {
        let len = batch.row_len(row).max(1) as f64;
        let mean_gap = batch.active(row).map(gap).sum::<f64>() / len;
        let of_row = match agg {
            "sum" => batch.active(row).map(statistic).sum(),
            "max" => batch.active(row).map(statistic).fold(f64::NEG_INFINITY, f64::max),
            _ => batch.active(row).map(statistic).sum::<f64>() / len,
        };
        for t in batch.active(row) {
            let by_ratio = sequence && metric == "ratio";
            let weight = if by_ratio { mean_gap.exp() } else { gap(t).exp() };
            let value = match (sequence, by_ratio) {
                // A row's ratio is the geometric mean, but for the gate of `mask` by sum or maximum.
                (true, true) if agg == "max" && !clamp => of_row,
                (true, true) if agg == "sum" && !clamp => (mean_gap * len).exp(),
                (true, true) => mean_gap.exp(),
                (true, false) => of_row,
                (false, _) => statistic(t),
            };
            let outside = value < lower || value > upper;
            touched += usize::from(outside);
            weights[t] = match (outside, clamp) {
                (true, true) => weight.cut(lower, upper),
                (true, false) => 0.0,
                (false, _) => weight,
            };
        }
    }
    Ok(Some((weights, touched as f64 / batch.num_tokens().max(1) as f64)))
}

fn sapo(case: &Case<'_>) -> Result<Results, Error> {
    let mask = case.mask("loss_mask")?;
    let batch = mask.batch()?;
    let (now, old) = (case.sized("logprobs", mask.bits.len())?, case.sized("old_logprobs", mask.bits.len())?);
    let advantages = case.sized("advantages", mask.bits.len())?;
    let taus = (case.num("tau_pos", 1.0)?, case.num("tau_neg", 1.05)?);
    let level: ImportanceLevel = case.parse("importance_sampling_level", "token")?;
    let scale = 1.0 / batch.num_tokens().max(1) as f64;
    let (mut loss, mut gradient) = (0.0, vec![0.0; batch.num_slots()]);
    for row in 0..batch.num_rows() {
        let len = batch.row_len(row).max(1) as f64;
        let mean = |f: &dyn Fn(usize) -> f64| batch.active(row).map(f).sum::<f64>() / len;
        let shared =
            (level == ImportanceLevel::Sequence).then(|| (mean(&|t| now[t] - old[t]), mean(&|t| advantages[t])));
        for t in batch.active(row) {
            let (log_ratio, advantage) = shared.unwrap_or((now[t] - old[t], advantages[t]));
            let ratio = Dual { value: log_ratio.exp(), d: log_ratio.exp() };
            let term = gate(ratio, advantage, taus);
            loss += scale * term.loss;
            // With a shared ratio every token of the row has the same derivative: len terms, each over len.
            gradient[t] = scale * term.d;
        }
    }
    Ok(Results::default().num("loss", loss).grad_grid("logprobs", mask.cols, &gradient))
}

fn critic(case: &Case<'_>) -> Result<Results, Error> {
    let mask = case.mask("loss_mask")?;
    let batch = mask.batch()?;
    let (value, old) = (case.sized("value", mask.bits.len())?, case.sized("old_value", mask.bits.len())?);
    let target = case.sized("target_value", mask.bits.len())?;
    let eps = case.num("value_eps_clip", 0.2)?;
    let huber = case.text("loss_fn_type", "mse")? == "huber";
    let error = |x: f64, d: f64| {
        if huber && x.abs() > 10.0 {
            return Dual { value: 10.0 * (x.abs() - 5.0), d: 10.0 * x.signum() * d };
        }
        Dual { value: 0.5 * x * x, d: x * d }
    };
    let scale = 1.0 / batch.num_tokens().max(1) as f64;
    let (mut loss, mut gradient) = (0.0, vec![0.0; batch.num_slots()]);
    for t in (0..batch.num_slots()).filter(|t| batch.is_active(*t)) {
        let (low, high) = (old[t] - eps, old[t] + eps);
        // On a bound torch's clamp by tensors splits the derivative in halves.
        let inside = match value[t] {
            v if v == low || v == high => 0.5,
            v => f64::from(u8::from(low < v && v < high)),
        };
        let clipped = error(value[t].cut(low, high) - target[t], inside);
        let term = crate::loss::larger(error(value[t] - target[t], 1.0), clipped);
        loss += scale * term.value;
        gradient[t] = scale * term.d;
    }
    Ok(Results::default().num("loss", loss).grad_grid("value", mask.cols, &gradient))
}

/// Masked entries count as 0 and are scaled too.
fn normalization(case: &Case<'_>) -> Result<Results, Error> {
    let (x, mask) = case.masked_grid("x", "mask")?;
    let eps = case.num("eps", 1e-5)?;
    let unbiased = case.flag("unbiased", false)?;
    let rows: Vec<std::ops::Range<usize>> = if case.param("dim").is_some() {
        (0..x.rows).map(|i| i * x.cols..(i + 1) * x.cols).collect()
    } else {
        std::iter::once(0..x.data.len()).collect()
    };
    let mut out = vec![0.0; x.data.len()];
    for range in rows {
        let bits = &mask.bits[range.clone()];
        let n = bits.iter().filter(|m| **m == 1).count() as f64;
        let (mean, biased) =
            (masked_mean(&x.data[range.clone()], bits), masked_var_biased(&x.data[range.clone()], bits));
        let var = if unbiased { biased * n / (n - 1.0) } else { biased };
        for t in range {
            let entry = if mask.bits[t] == 1 { x.data[t] } else { 0.0 };
            out[t] = (entry - mean) / (var.sqrt() + eps);
        }
    }
    Ok(Results::default().grid("out", x.cols, &out))
}

fn preference(case: &Case<'_>) -> Result<Results, Error> {
    let logits = case.vector("logits")?;
    let beta = case.num("beta", 0.1)?;
    let ipo = case.text("loss_type", "sigmoid")? == "ipo";
    let one = |x: &f64| {
        if ipo {
            let gap = x - 0.5 / beta;
            return Dual { value: gap * gap, d: 2.0 * gap };
        }
        Dual { value: -log_sigmoid(beta * x), d: -beta * sigmoid(-beta * x) }
    };
    let terms: Vec<Dual> = logits.iter().map(one).collect();
    let losses: Vec<f64> = terms.iter().map(|t| t.value).collect();
    let n = losses.len().max(1) as f64;
    Ok(Results::default()
        .vector("losses", &losses)
        .num("loss", losses.iter().sum::<f64>() / n)
        .grad_vector("logits", &terms.iter().map(|t| t.d / n).collect::<Vec<_>>()))
}

fn overlong(case: &Case<'_>) -> Result<Results, Error> {
    let config = OverlongConfig {
        enable: true,
        len: case.num("overlong_tokens", 0.0)? as u32,
        penalty_factor: case.num("overlong_penalty_factor", 1.0)?,
        max_response_length: case.num("max_response_length", 0.0)? as u32,
    };
    config.validate()?;
    let mask = case.mask("loss_mask")?;
    let batch = mask.batch()?;
    let rewards = case.sized("rewards", batch.num_rows())?;
    let one = |(row, reward): (usize, &f64)| reward + config.penalty(batch.row_len(row) as u64);
    Ok(Results::default().vector("rewards", &rewards.iter().enumerate().map(one).collect::<Vec<_>>()))
}

fn kl(case: &Case<'_>) -> Result<Results, Error> {
    let log_probs = case.grid("log_probs")?;
    let base = case.sized("log_probs_base", log_probs.data.len())?;
    let bound = if case.flag("apply_clamp", true)? { 10.0 } else { f64::INFINITY };
    let kl = BoundedKl { estimator: case.parse("kl_estimator", "k1")?, bound, exponent_max: f64::INFINITY };
    let values: Vec<f64> = log_probs.data.iter().zip(&base).map(|(p, b)| kl.estimate(*p, *b).value).collect();
    Ok(Results::default().grid("kl", log_probs.cols, &values))
}

fn proximal(case: &Case<'_>) -> Result<Results, Error> {
    let old = case.grid("old_logp")?;
    let now = case.sized("logprobs", old.data.len())?;
    let versions = case.sized("versions", old.data.len())?;
    let current = case.num("current_version", 0.0)? as i64;
    let method: ProximalMethod = case.parse("method", "loglinear")?;
    let one = |t: usize| proximal_log_prob(method, old.data[t], now[t], versions[t] as i64, current);
    Ok(Results::default().grid("prox_logp", old.cols, &(0..now.len()).map(one).collect::<Vec<_>>()))
}
