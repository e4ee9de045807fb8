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
    let behaviour = behaviour(case, &batch, &proximal, &behave)?;
    let weights = behaviour.as_ref().map(|b| &b.weights[..]);
    let kept = behaviour.as_ref().map_or(batch.response_mask(), |b| &b.kept);
    let input = PolicyLossInput {
        batch: batch.with_mask(kept)?,
        log_probs: &now,
        old_log_probs: &proximal,
        advantages: &advantages,
        rollout_is_weights: weights,
        ..PolicyLossInput::default()
    };
    let out = decoupled_loss(&options, &input, &GlobalCounts::of(&batch, 1.0))?;
    let widen = |bits: &[u8]| -> Vec<f64> { bits.iter().map(|b| f64::from(*b)).collect() };
    let mut results = Results::default()
        .num("loss", out.loss)
        .grid("clip_mask", mask.cols, &widen(&out.clipped))
        .grid("dual_clip_mask", mask.cols, &widen(&out.dual_clipped))
        .grad_grid("logprobs", mask.cols, &out.d_log_probs);
    if let Some(behaviour) = &behaviour {
        results = results
            .grid("behave_imp_weight", mask.cols, &behaviour.weights)
            .num("filtered_fraction", behaviour.touched as f64 / batch.num_tokens().max(1) as f64);
    }
    Ok(results)
}

/// Weights against the behaviour policy after rejection.
struct Behaviour {
    /// `[T]`, 0 where nothing is left.
    weights: Vec<f64>,
    /// `[T]`: the mask that is left.
    kept: Vec<u8>,
    /// Number of tokens that were rejected, or whose weight was clamped.
    touched: usize,
}

/// How tokens or rows are rejected, or their weights clamped.
struct Rule<'a> {
    sequence: bool,
    clamp: bool,
    metric: &'a str,
    agg: &'a str,
    lower: Option<f64>,
    upper: f64,
}

impl Rule<'_> {
    /// The statistic of a log-ratio; for `ratio` the log-ratio itself, which rows aggregate before the exponential.
    fn statistic(&self, gap: f64) -> f64 {
        match self.metric {
            "kl_k2" => 0.5 * gap * gap,
            "kl_k3" => (-gap).exp() - 1.0 + gap,
            _ => gap,
        }
    }

    fn rejects(&self, statistic: f64) -> bool {
        let value = if self.metric == "ratio" { statistic.exp() } else { statistic };
        value > self.upper || self.lower.is_some_and(|lower| value < lower)
    }

    /// The statistic of a row.
    fn of_row(&self, gaps: &[f64]) -> f64 {
        let statistics = gaps.iter().map(|gap| self.statistic(*gap));
        match self.agg {
            "sum" => statistics.sum(),
            "max" => statistics.fold(f64::NEG_INFINITY, f64::max),
            _ => statistics.sum::<f64>() / gaps.len().max(1) as f64,
        }
    }
}

fn behaviour(
    case: &Case<'_>,
    batch: &TokenBatch,
    proximal: &[f64],
    behave: &[f64],
) -> Result<Option<Behaviour>, Error> {
    let Some(table) = case.nested("rejection_sampling") else { return Ok(None) };
    let rule = Rule {
        sequence: table.text("level", "token")? == "sequence",
        clamp: table.text("action", "mask")? == "clamp",
        metric: table.text("metric", "ratio")?,
        agg: table.text("agg", "mean")?,
        lower: table.opt_num("lower")?,
        upper: table.num("upper", f64::INFINITY)?,
    };
    let mut out = Behaviour { weights: vec![0.0; batch.num_slots()], kept: vec![0; batch.num_slots()], touched: 0 };
    for row in 0..batch.num_rows() {
        let gaps: Vec<f64> = batch.active(row).map(|t| proximal[t] - behave[t]).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len().max(1) as f64;
        let of_row = rule.of_row(&gaps);
        for (t, gap) in batch.active(row).zip(&gaps) {
            // A row that is judged by its ratio has one weight, the geometric mean.
            let weight = if rule.sequence && rule.metric == "ratio" { mean.exp() } else { gap.exp() };
            let outside = rule.rejects(if rule.sequence { of_row } else { rule.statistic(*gap) });
            if outside && !rule.clamp {
                out.touched += 1;
                continue;
            }
            // Token weights are clamped one by one, whatever judges them.
            let clamps = rule.clamp && (outside || !rule.sequence);
            let bounded = if clamps { weight.cut(rule.lower.unwrap_or(0.0), rule.upper) } else { weight };
            out.touched += usize::from(bounded != weight);
            out.weights[t] = bounded;
            out.kept[t] = 1;
        }
    }
    Ok(Some(out))
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
