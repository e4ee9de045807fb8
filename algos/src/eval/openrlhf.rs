//! OpenRLHF's advantages, rewards, KL and losses.

use super::case::{Case, Mask, Results};
use super::logits::Logits;
use crate::advantages::{RewardBaseline, RewardBaselineConfig, baseline_advantages, baselined, rewards_with_kl};
use crate::filters::{OverlongConfig, stop_properly_reward};
use crate::kl_bounded::BoundedKl;
use crate::masked::{masked_mean, masked_var_biased};
use crate::math::Cut;
use crate::preference::{
    DpoConfig, DpoLossType, Pair, PreferenceCounts, PreferenceInput, RewardModelConfig, dpo_loss, reward_model_loss,
};
use crate::{
    Error, GlobalCounts, KlController, KlControllerConfig, KlControllerType, LossAggMode, SftLossType, ValueLossConfig,
    ValueLossInput, agg_loss, sft_loss, value_loss,
};

/// `compute_advantages_and_returns`.
pub(super) fn advantages(case: &Case<'_>) -> Result<Results, Error> {
    let mask = case.mask("action_mask")?;
    let rewards = case.vector("rewards")?;
    let index = case.sized("index", rewards.len())?;
    let (kl, values) = (case.sized("kl", mask.bits.len())?, case.sized("values", mask.bits.len())?);
    let size = case.num("n_samples_per_prompt", 1.0)?.max(1.0);
    let groups: Vec<u64> = index.iter().map(|i| (i / size) as u64).collect();
    let baseline: RewardBaseline = case.parse("estimator", "reinforce")?;
    let config = RewardBaselineConfig {
        baseline,
        gamma: case.num("gamma", 1.0)?,
        lam: case.num("lambd", 1.0)?,
        kl_coef: case.num("kl_coef", 0.0)?,
        clip_range: case.pair("clip_range")?,
        divide_by_std: !case.flag("no_std_norm", false)?,
    };
    let rewards = baselined(baseline, &rewards, &groups);
    let out = baseline_advantages(&config, &mask.batch()?, &rewards, &kl, &values)?;
    Ok(Results::default().grid("advantages", mask.cols, &out.advantages).grid("returns", mask.cols, &out.returns))
}

/// `compute_approx_kl`.
pub(super) fn kl(case: &Case<'_>) -> Result<Results, Error> {
    let log_probs = case.grid("log_probs")?;
    let base = case.sized("log_probs_base", log_probs.data.len())?;
    let old = case.opt_sized("log_probs_old", log_probs.data.len())?.unwrap_or_else(|| log_probs.data.clone());
    let kl = BoundedKl { estimator: case.parse("kl_estimator", "k1")?, bound: 10.0, exponent_max: 10.0 };
    let unbiased = case.flag("unbiased_gradient", false)?;
    let one = |t: usize| {
        if unbiased {
            kl.estimate_unbiased(log_probs.data[t], base[t], old[t])
        } else {
            kl.estimate(log_probs.data[t], base[t])
        }
    };
    let all: Vec<_> = (0..log_probs.data.len()).map(one).collect();
    let values: Vec<f64> = all.iter().map(|k| k.value).collect();
    Ok(Results::default().grid("kl", log_probs.cols, &values).num("loss", values.iter().sum()).grad_grid(
        "log_probs",
        log_probs.cols,
        &all.iter().map(|k| k.d).collect::<Vec<_>>(),
    ))
}

/// Functions around the reward, told apart by the case's name.
pub(super) fn reward(case: &Case<'_>) -> Result<Results, Error> {
    match case.name.split('/').next().unwrap_or("") {
        "compute_reward" => {
            let mask = case.mask("action_mask")?;
            let clip = case.pair("reward_clip_range")?;
            let (r, kl) = (case.vector("r")?, case.sized("kl", mask.bits.len())?);
            let batch = mask.batch()?;
            let mut out = rewards_with_kl(&batch, &r, &kl, case.num("kl_coef", 0.0)?, clip)?;
            // The peer finds the last slot where a row has no token.
            for row in (0..batch.num_rows()).filter(|row| batch.row_len(*row) == 0 && mask.cols > 0) {
                out[batch.row(row).end - 1] += clip.map_or(r[row], |(low, high)| r[row].cut(low, high));
            }
            Ok(Results::default().grid("reward", mask.cols, &out))
        }
        "masked_normalize" => masked_normalize(case),
        "overlong_penalty" => overlong(case),
        "stop_properly_penalty" => {
            let coef = case.num("stop_properly_penalty_coef", 0.0)?;
            if coef > 1.0 {
                return Err(case.bad("stop_properly_penalty_coef", format!("{coef} is above 1")));
            }
            let (truncated, rewards) = (case.vector("truncated")?, case.vector("rewards")?);
            let one = |(t, r): (&f64, &f64)| if *t != 0.0 { stop_properly_reward(*r, coef) } else { *r };
            let out: Vec<f64> = truncated.iter().zip(&rewards).map(one).collect();
            Ok(Results::default().vector("rewards", &out))
        }
        "AdaptiveKLController" => adaptive(case),
        other => Err(case.bad("name", format!("no reward function `{other}` is known"))),
    }
}

fn adaptive(case: &Case<'_>) -> Result<Results, Error> {
    let config = KlControllerConfig {
        kind: KlControllerType::Adaptive,
        kl_coef: case.num("init_kl_coef", 0.01)?,
        target_kl: case.num("target", 0.1)?,
        horizon: case.num("horizon", 10_000.0)?,
    };
    let mut controller = KlController::new(&config)?;
    let mut values = Vec::new();
    for (kl, n) in case.vector("current")?.iter().zip(&case.vector("n_steps")?) {
        controller.update(*kl, *n as u64);
        values.push(controller.coef());
    }
    Ok(Results::default().vector("values", &values))
}

/// Rows scaled to mean 0 and variance 1 over their unmasked entries; 0 elsewhere.
fn masked_normalize(case: &Case<'_>) -> Result<Results, Error> {
    let (tensor, mask) = case.masked_grid("tensor", "mask")?;
    let eps = case.num("eps", 1e-8)?;
    if case.num("dim", 1.0)? != 1.0 {
        return Err(case.bad("dim", "expected 1: rows are normalised one by one"));
    }
    let mut out = Vec::with_capacity(tensor.data.len());
    for i in 0..tensor.rows {
        let bits = &mask.bits[i * mask.cols..(i + 1) * mask.cols];
        let (mean, var) = (masked_mean(tensor.row(i), bits), masked_var_biased(tensor.row(i), bits));
        let scale = var.max(eps).sqrt().recip();
        out.extend(tensor.row(i).iter().zip(bits).map(|(x, m)| if *m == 1 { (x - mean) * scale } else { 0.0 }));
    }
    Ok(Results::default().grid("out", tensor.cols, &out))
}

/// The penalty does not grow beyond the longest response.
fn overlong(case: &Case<'_>) -> Result<Results, Error> {
    let config = OverlongConfig {
        enable: true,
        len: case.num("overlong_buffer_len", 0.0)? as u32,
        penalty_factor: case.num("overlong_penalty_factor", 1.0)?,
        max_response_length: case.num("max_new_tokens", 0.0)? as u32,
    };
    config.validate()?;
    let (lengths, rewards) = (case.vector("response_length")?, case.vector("rewards")?);
    let penalty = |l: &f64| config.penalty((*l as u64).min(u64::from(config.max_response_length)));
    let penalties: Vec<f64> = lengths.iter().map(penalty).collect();
    let out: Vec<f64> = rewards.iter().zip(&penalties).map(|(r, p)| r + p).collect();
    let num_penalised = penalties.iter().filter(|p| **p < 0.0).count();
    Ok(Results::default().vector("rewards", &out).num("n_penalized", num_penalised as f64))
}

/// Token mean or mean of rows' means.
pub(super) fn agg_mode(case: &Case<'_>) -> Result<LossAggMode, Error> {
    let token_level = case.flag("token_level_loss", true)?;
    Ok(if token_level { LossAggMode::TokenMean } else { LossAggMode::SeqMeanTokenMean })
}

/// Loss classes, told apart by the case's name.
pub(super) fn losses(case: &Case<'_>) -> Result<Results, Error> {
    match case.name.split('/').next().unwrap_or("") {
        "ValueLoss" => value(case),
        "PairWiseLoss" | "LogExpLoss" => pairwise(case),
        "DPOLoss" => dpo(case),
        "SFTLoss" => sft(case),
        "GPTLMLoss" => language_model(case),
        other => Err(case.bad("name", format!("no loss `{other}` is known"))),
    }
}

fn value(case: &Case<'_>) -> Result<Results, Error> {
    let mask = case.mask("action_mask")?;
    let (values, old_values) = (case.sized("values", mask.bits.len())?, case.sized("old_values", mask.bits.len())?);
    let returns = case.sized("returns", mask.bits.len())?;
    let batch = mask.batch()?;
    // Absent: no clipping; the library's 0 is that, the peer's clips to the old values.
    let cliprange_value = case.opt_num("clip_eps")?.map_or(0.0, |eps| eps.max(f64::MIN_POSITIVE));
    let config = ValueLossConfig { cliprange_value, loss_agg_mode: agg_mode(case)? };
    let input = ValueLossInput { batch, predictions: &values, old_values: &old_values, returns: &returns };
    let out = value_loss(&config, &input, &GlobalCounts::of(&batch, 1.0))?;
    Ok(Results::default().num("loss", out.loss).grad_grid("values", mask.cols, &out.d_predictions))
}

fn pairwise(case: &Case<'_>) -> Result<Results, Error> {
    let (chosen, rejected) = (case.vector("chosen_reward")?, case.vector("reject_reward")?);
    // LogExpLoss takes a margin and does not read it.
    let margin = if case.name.starts_with("LogExpLoss") { None } else { case.opt_sized("margin", chosen.len())? };
    let n = chosen.len() as u64;
    let out = reward_model_loss(&RewardModelConfig::default(), &chosen, &rejected, margin.as_deref(), n)?;
    Ok(Results::default()
        .num("loss", out.loss)
        .grad_vector("chosen_reward", &out.d_chosen)
        .grad_vector("reject_reward", &out.d_rejected))
}

fn dpo(case: &Case<'_>) -> Result<Results, Error> {
    let chosen = case.vector("policy_chosen_logps")?;
    let rejected = case.sized("policy_rejected_logps", chosen.len())?;
    let n = chosen.len();
    let kind = if case.flag("ipo", false)? { DpoLossType::IpoSum } else { DpoLossType::Cdpo };
    let config = DpoConfig {
        loss_type: vec![kind],
        beta: case.num("beta", 0.1)?,
        label_smoothing: case.num("label_smoothing", 0.0)?,
        ..DpoConfig::default()
    };
    let all = |a: &[f64], b: &[f64]| -> Vec<f64> { a.iter().chain(b).copied().collect() };
    let reference = all(
        &case.sized("reference_chosen_logps", chosen.len())?,
        &case.sized("reference_rejected_logps", chosen.len())?,
    );
    let log_probs = all(&chosen, &rejected);
    let mask = Mask::new(1, vec![1; 2 * n]);
    let pairs: Vec<Pair> = (0..n).map(|i| Pair { chosen: i, rejected: i + n }).collect();
    let input = PreferenceInput {
        batch: mask.batch()?,
        pairs: &pairs,
        log_probs: &log_probs,
        ref_log_probs: Some(&reference),
        ..PreferenceInput::default()
    };
    let out = dpo_loss(&config, &input, &PreferenceCounts::of(&input))?;
    let rewards: Vec<f64> = log_probs.iter().zip(&reference).map(|(p, r)| config.beta * (p - r)).collect();
    Ok(Results::default()
        .num("loss", out.loss)
        .vector("chosen_rewards", &rewards[..n])
        .vector("rejected_rewards", &rewards[n..])
        .grad_vector("policy_chosen_logps", &out.d_log_probs[..n])
        .grad_vector("policy_rejected_logps", &out.d_log_probs[n..]))
}

fn sft(case: &Case<'_>) -> Result<Results, Error> {
    let mask = case.mask("loss_mask")?;
    let log_probs = case.sized("per_token_logps", mask.bits.len())?;
    let batch = mask.batch()?;
    let negative: Vec<f64> = log_probs.iter().map(|l| -l).collect();
    let (loss, weights) = agg_loss(agg_mode(case)?, &batch, &negative, &GlobalCounts::of(&batch, 1.0))?;
    let gradient: Vec<f64> = weights.iter().map(|w| -w).collect();
    Ok(Results::default().num("loss", loss).grad_grid("per_token_logps", mask.cols, &gradient))
}

fn language_model(case: &Case<'_>) -> Result<Results, Error> {
    let logits = Logits::read(case, "logits")?;
    let labels = case.sized("labels", logits.grid.rows)?;
    let mask = Mask::new(logits.len - 1, logits.shifted_mask(&labels, |label| label != -100.0));
    let log_probs = logits.log_probs(&labels)?;
    let batch = mask.batch()?;
    let out = sft_loss(SftLossType::Nll, &batch, &log_probs, batch.num_tokens() as u64)?;
    let gradient = logits.gradient(&labels, &out.d_log_probs)?;
    Ok(Results::default().num("loss", out.loss).grad_cube("logits", (logits.len, logits.grid.cols), &gradient))
}
