//! slime's PPO helpers over packed arrays, told apart by the case's name.

use super::case::{Case, Mask, Results};
use crate::Error;
use crate::advantages::unwhitened_gae;
use crate::kl::Dual;
use crate::kl_bounded::BoundedKl;
use crate::loss::{ClipRange, OpsmInput, clipped_surrogate, opsm_kept, sequence_kl};
use crate::math::Cut;

/// One of slime's functions.
pub(super) fn run(case: &Case<'_>) -> Result<Results, Error> {
    match case.name.split('/').next().unwrap_or("") {
        "compute_approx_kl" => kl(case),
        "compute_policy_loss" => policy(case),
        "compute_cispo_loss" => cispo(case),
        "gae" => gae(case),
        "gspo_kl_opsm" => opsm(case),
        other => Err(case.bad("name", format!("no function `{other}` is known"))),
    }
}

/// The importance ratio is a constant factor; only low_var_kl is bounded.
fn kl(case: &Case<'_>) -> Result<Results, Error> {
    let log_probs = case.vector("log_probs")?;
    let base = case.sized("log_probs_base", log_probs.len())?;
    let ratio = case.opt_sized("importance_ratio", log_probs.len())?.unwrap_or_else(|| vec![1.0; log_probs.len()]);
    let bounded = case.text("kl_loss_type", "k1")? == "low_var_kl";
    let bound = if bounded { 10.0 } else { f64::INFINITY };
    let kl =
        BoundedKl { estimator: case.parse("kl_loss_type", "k1")?, bound: f64::INFINITY, exponent_max: f64::INFINITY };
    let one = |t: usize| {
        let raw = kl.estimate(log_probs[t], base[t]);
        let (value, d) = (raw.value * ratio[t], raw.d * ratio[t]);
        Dual { value: value.cut(-bound, bound), d: if value.abs() <= bound { d } else { 0.0 } }
    };
    let all: Vec<Dual> = (0..log_probs.len()).map(one).collect();
    let values: Vec<f64> = all.iter().map(|k| k.value).collect();
    Ok(Results::default()
        .vector("kl", &values)
        .num("loss", values.iter().sum())
        .grad_vector("log_probs", &all.iter().map(|k| k.d).collect::<Vec<_>>()))
}

fn range(case: &Case<'_>) -> Result<ClipRange, Error> {
    let low = case.num("eps_clip", 0.2)?;
    Ok(ClipRange { low, high: case.num("eps_clip_high", low)? })
}

/// The input is `old - log_prob`.
fn policy(case: &Case<'_>) -> Result<Results, Error> {
    let gaps = case.vector("ppo_kl")?;
    let advantages = case.sized("advantages", gaps.len())?;
    let (range, dual_clip) = (range(case)?, case.num("eps_clip_c", 0.0)?);
    let one = |(gap, advantage): (&f64, &f64)| {
        let ratio = Dual { value: (-gap).exp(), d: -(-gap).exp() };
        clipped_surrogate(ratio, *advantage, range, dual_clip)
    };
    let terms: Vec<_> = gaps.iter().zip(&advantages).map(one).collect();
    let column = |f: &dyn Fn(&crate::loss::TokenTerm) -> f64| -> Vec<f64> { terms.iter().map(f).collect() };
    let losses = column(&|t| t.loss);
    Ok(Results::default()
        .vector("pg_losses", &losses)
        .vector("clipfrac", &column(&|t| f64::from(u8::from(t.clipped))))
        .num("loss", losses.iter().sum())
        .grad_vector("ppo_kl", &column(&|t| t.d)))
}

fn cispo(case: &Case<'_>) -> Result<Results, Error> {
    let gaps = case.vector("ppo_kl")?;
    let log_probs = case.sized("log_probs", gaps.len())?;
    let advantages = case.sized("advantages", gaps.len())?;
    let range = range(case)?;
    let (mut losses, mut clipped, mut gradient) = (Vec::new(), Vec::new(), Vec::new());
    for t in 0..gaps.len() {
        let ratio = (-gaps[t]).exp();
        let bounded = ratio.cut(1.0 - range.low, 1.0 + range.high);
        losses.push(-bounded * advantages[t] * log_probs[t]);
        gradient.push(-bounded * advantages[t]);
        clipped.push(f64::from(u8::from(bounded != ratio)));
    }
    Ok(Results::default()
        .vector("pg_losses", &losses)
        .vector("clipfrac", &clipped)
        .num("loss", losses.iter().sum())
        .grad_vector("log_probs", &gradient))
}

/// Unwhitened estimates; the chunked forms compute the same numbers.
fn gae(case: &Case<'_>) -> Result<Results, Error> {
    let rewards = case.grid("rewards")?;
    let values = case.sized("values", rewards.data.len())?;
    let mask = Mask::new(rewards.cols, vec![1; rewards.data.len()]);
    let batch = mask.batch()?;
    let (gamma, lam) = (case.num("gamma", 1.0)?, case.num("lambd", 1.0)?);
    let out = unwhitened_gae(&batch, &rewards.data, &values, gamma, lam);
    let zeros = vec![0.0; values.len()];
    let to_go = unwhitened_gae(&batch, &rewards.data, &zeros, gamma, 1.0);
    Ok(Results::default()
        .grid("advantages", mask.cols, &out.advantages)
        .grid("returns", mask.cols, &out.returns)
        .grid("chunked_advantages", mask.cols, &out.advantages)
        .grid("chunked_returns", mask.cols, &out.returns)
        .grid("discounted_returns", mask.cols, &to_go.advantages))
}

/// Rows of given lengths: GSPO's KL on every token, and the mask of rows that drifted with a negative advantage.
fn opsm(case: &Case<'_>) -> Result<Results, Error> {
    let lens: Vec<usize> = case.numbers("lens")?.unwrap_or_default().iter().map(|v| *v as usize).collect();
    let bits = case.vector("loss_masks")?.iter().map(|v| u8::from(*v != 0.0)).collect();
    let mask = Mask::ragged(&lens, bits);
    let batch = mask.batch()?;
    let now = case.sized("log_probs", batch.num_slots())?;
    let old = case.sized("old_log_probs", batch.num_slots())?;
    let advantages = case.sized("advantages", batch.num_slots())?;
    let delta = case.num("opsm_delta", 0.0)?;
    let kl = sequence_kl(&batch, &now, &old);
    let kept = opsm_kept(&batch, OpsmInput { log_probs: &now, old_log_probs: &old, advantages: &advantages }, delta);
    let (mut per_token, mut share) = (Vec::new(), 0.0);
    for (row, range) in batch.rows().enumerate() {
        per_token.extend(range.clone().map(|_| kl[row]));
        share += kept[range].iter().filter(|k| **k == 0.0).count() as f64 / batch.row_len(row).max(1) as f64;
    }
    Ok(Results::default().vector("gspo_kl", &per_token).vector("opsm_mask", &kept).num("opsm_clipfrac", share))
}
