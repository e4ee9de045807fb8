//! TRL's preference losses: DPO, CPO, ORPO, KTO, online DPO, reward modelling; and Group Distributional Preference
//! Optimization.

use super::case::{Case, Mask, Results};
use super::logits::Logits;
use crate::Error;
use crate::preference::{
    CpoConfig, DpoConfig, DpoLossType, KtoConfig, KtoInput, OrpoConfig, Pair, PreferenceCounts, PreferenceInput,
    PreferenceMetrics, RewardModelConfig, cpo_loss, dpo_loss, kto_loss, odds_ratio, online_pairs, orpo_loss,
    reward_model_loss,
};
use serde_json::Value;

/// Rows `0..P` are chosen, rows `P..2P` rejected.
fn halves(num_rows: usize) -> Vec<Pair> {
    let half = num_rows / 2;
    (0..half).map(|i| Pair { chosen: i, rejected: i + half }).collect()
}

fn named_metrics(m: &PreferenceMetrics) -> Vec<(&'static str, f64)> {
    let (chosen, rejected) = (m.per_pair(m.chosen_reward_sum), m.per_pair(m.rejected_reward_sum));
    vec![
        ("rewards/chosen", chosen),
        ("rewards/rejected", rejected),
        ("rewards/accuracies", m.accuracy()),
        ("rewards/margins", chosen - rejected),
        ("logps/chosen", m.per_pair(m.chosen_log_prob_sum)),
        ("logps/rejected", m.per_pair(m.rejected_log_prob_sum)),
    ]
}

fn loss_types(case: &Case<'_>) -> Result<Vec<DpoLossType>, Error> {
    let kinds = match case.param("loss_type") {
        None => Value::Array(vec![Value::String("sigmoid".to_owned())]),
        Some(Value::Array(kinds)) => Value::Array(kinds.clone()),
        Some(kind) => Value::Array(vec![kind.clone()]),
    };
    serde_json::from_value(kinds).map_err(|error| case.bad("loss_type", error.to_string()))
}

fn dpo_config(case: &Case<'_>) -> Result<DpoConfig, Error> {
    let default = DpoConfig::default();
    Ok(DpoConfig {
        loss_type: loss_types(case)?,
        loss_weights: case.numbers("loss_weights")?.unwrap_or_default(),
        beta: case.num("beta", default.beta)?,
        label_smoothing: case.num("label_smoothing", default.label_smoothing)?,
        f_divergence_type: case.parse("f_divergence_type", "reverse_kl")?,
        f_alpha_divergence_coef: case.num("f_alpha_divergence_coef", default.f_alpha_divergence_coef)?,
        discopop_tau: case.num("discopop_tau", default.discopop_tau)?,
        ld_alpha: case.opt_num("ld_alpha")?,
        use_weighting: case.flag("use_weighting", false)?,
    })
}

/// `DPOTrainer._compute_loss`.
pub(super) fn dpo(case: &Case<'_>) -> Result<Results, Error> {
    let mask = case.mask("completion_mask")?;
    let (policy, reference) = (case.sized("policy_logps", mask.bits.len())?, case.sized("ref_logps", mask.bits.len())?);
    let squares = case.opt_sized("log_sum_sq_probs", mask.bits.len())?;
    let batch = mask.batch()?;
    let pairs = halves(batch.num_rows());
    let input = PreferenceInput {
        batch,
        pairs: &pairs,
        log_probs: &policy,
        ref_log_probs: Some(&reference),
        log_sum_sq_probs: squares.as_deref(),
        nll_mask: None,
    };
    let out = dpo_loss(&dpo_config(case)?, &input, &PreferenceCounts::of(&input))?;
    Ok(Results::default().num("loss", out.loss).metrics(&named_metrics(&out.metrics)).grad_grid(
        "policy_logps",
        mask.cols,
        &out.d_log_probs,
    ))
}

fn cpo_config(case: &Case<'_>) -> Result<CpoConfig, Error> {
    let default = CpoConfig::default();
    Ok(CpoConfig {
        loss_type: case.parse("loss_type", "sigmoid")?,
        beta: case.num("beta", default.beta)?,
        label_smoothing: case.num("label_smoothing", default.label_smoothing)?,
        cpo_alpha: case.num("cpo_alpha", default.cpo_alpha)?,
        simpo_gamma: case.num("simpo_gamma", default.simpo_gamma)?,
        alpha: case.num("alpha", default.alpha)?,
    })
}

/// `CPOTrainer.cpo_loss`: the pair term alone, on given log-probs.
pub(super) fn cpo(case: &Case<'_>) -> Result<Results, Error> {
    let config = cpo_config(case)?;
    config.validate()?;
    let chosen = case.vector("policy_chosen_logps")?;
    let rejected = case.sized("policy_rejected_logps", chosen.len())?;
    let n = chosen.len() as f64;
    let terms: Vec<_> = chosen.iter().zip(&rejected).map(|(c, r)| config.term(*c, *r)).collect();
    let losses: Vec<f64> = terms.iter().map(|t| t.loss).collect();
    let reward =
        |values: &[f64]| -> Vec<f64> { values.iter().map(|v| config.beta * config.reward(*v).value).collect() };
    Ok(Results::default()
        .vector("losses", &losses)
        .num("loss", losses.iter().sum::<f64>() / n)
        .vector("chosen_rewards", &reward(&chosen))
        .vector("rejected_rewards", &reward(&rejected))
        .grad_vector("policy_chosen_logps", &terms.iter().map(|t| t.d_chosen / n).collect::<Vec<_>>())
        .grad_vector("policy_rejected_logps", &terms.iter().map(|t| t.d_rejected / n).collect::<Vec<_>>()))
}

/// `CPOTrainer.get_batch_loss_metrics`.
pub(super) fn cpo_full(case: &Case<'_>) -> Result<Results, Error> {
    let logits = Logits::read(case, "logits")?;
    let labels = case.sized("labels", logits.grid.rows)?;
    let mask = Mask::new(logits.len - 1, logits.shifted_mask(&labels, |label| label != -100.0));
    let log_probs = logits.log_probs(&labels)?;
    let pairs = halves(logits.num_rows);
    let input =
        PreferenceInput { batch: mask.batch()?, pairs: &pairs, log_probs: &log_probs, ..PreferenceInput::default() };
    let out = cpo_loss(&cpo_config(case)?, &input, &PreferenceCounts::of(&input))?;
    let gradient = logits.gradient(&labels, &out.d_log_probs)?;
    let mut metrics = named_metrics(&out.metrics);
    metrics.push(("nll_loss", out.metrics.nll_loss));
    Ok(Results::default().num("loss", out.loss).metrics(&metrics).grad_cube(
        "logits",
        (logits.len, logits.grid.cols),
        &gradient,
    ))
}

/// `ORPOTrainer.odds_ratio_loss`: the mean of `beta * logsig(log_odds)`, to be subtracted from the likelihood term.
pub(super) fn odds(case: &Case<'_>) -> Result<Results, Error> {
    let beta = case.num("beta", OrpoConfig::default().beta)?;
    let chosen = case.vector("policy_chosen_logps")?;
    let rejected = case.sized("policy_rejected_logps", chosen.len())?;
    let n = chosen.len() as f64;
    let odds = chosen.iter().zip(&rejected).map(|(c, r)| odds_ratio(*c, *r)).collect::<Result<Vec<_>, _>>()?;
    let losses: Vec<f64> = odds.iter().map(|o| beta * o.log_odds_ratio).collect();
    let mean = |values: Vec<f64>| values.iter().sum::<f64>() / n;
    Ok(Results::default()
        .vector("losses", &losses)
        .num("loss", losses.iter().sum::<f64>() / n)
        .num("log_odds_ratio", mean(odds.iter().map(|o| o.log_odds_ratio).collect()))
        .num("log_odds_chosen", mean(odds.iter().map(|o| o.log_odds).collect()))
        .grad_vector("policy_chosen_logps", &odds.iter().map(|o| beta * o.d_chosen / n).collect::<Vec<_>>())
        .grad_vector("policy_rejected_logps", &odds.iter().map(|o| beta * o.d_rejected / n).collect::<Vec<_>>()))
}

/// `ORPOTrainer.get_batch_loss_metrics`.
pub(super) fn orpo_full(case: &Case<'_>) -> Result<Results, Error> {
    let logits = Logits::read(case, "logits")?;
    let labels = case.sized("labels", logits.grid.rows)?;
    let ids = case.sized("input_ids", logits.grid.rows)?;
    let attention = case.sized("attention_mask", logits.grid.rows)?;
    let mask = Mask::new(logits.len - 1, logits.shifted_mask(&labels, |label| label != -100.0));
    let nll_mask = logits.shifted_mask(&attention, |m| m != 0.0);
    let log_probs = logits.log_probs(&ids)?;
    let pairs = halves(logits.num_rows);
    let input = PreferenceInput {
        batch: mask.batch()?,
        pairs: &pairs,
        log_probs: &log_probs,
        nll_mask: Some(&nll_mask),
        ..PreferenceInput::default()
    };
    let config = OrpoConfig { beta: case.num("beta", 0.1)? };
    let out = orpo_loss(&config, &input, &PreferenceCounts::of(&input))?;
    let gradient = logits.gradient(&ids, &out.d_log_probs)?;
    let m = &out.metrics;
    let mut metrics = named_metrics(m);
    metrics.push(("nll_loss", m.nll_loss));
    metrics.push(("log_odds_ratio", m.per_pair(m.log_odds_ratio_sum)));
    metrics.push(("log_odds_chosen", m.per_pair(m.log_odds_sum)));
    Ok(Results::default().num("loss", out.loss).metrics(&metrics).grad_cube(
        "logits",
        (logits.len, logits.grid.cols),
        &gradient,
    ))
}

/// `KTOTrainer._compute_loss`.
pub(super) fn kto(case: &Case<'_>) -> Result<Results, Error> {
    let default = KtoConfig::default();
    let config = KtoConfig {
        loss_type: case.parse("loss_type", "kto")?,
        beta: case.num("beta", default.beta)?,
        desirable_weight: case.num("desirable_weight", default.desirable_weight)?,
        undesirable_weight: case.num("undesirable_weight", default.undesirable_weight)?,
    };
    let (log_probs, ref_log_probs) = (case.vector("logps")?, case.vector("ref_logps")?);
    let (kl, ref_kl) = (case.opt_vector("KL_logps")?, case.opt_vector("ref_KL_logps")?);
    let kl: Vec<f64> = kl.unwrap_or_default().iter().zip(&ref_kl.unwrap_or_default()).map(|(p, r)| p - r).collect();
    let labels: Vec<bool> = case.vector("label")?.iter().map(|v| *v != 0.0).collect();
    let input = KtoInput { log_probs: &log_probs, ref_log_probs: &ref_log_probs, labels: &labels, kl_log_ratios: &kl };
    let out = kto_loss(&config, &input, labels.len() as u64)?;
    Ok(Results::default().num("loss", out.loss).num("kl", out.kl).grad_vector("logps", &out.d_log_probs))
}

/// `OnlineDPOTrainer.training_step`: pairing and loss.
pub(super) fn online(case: &Case<'_>) -> Result<Results, Error> {
    let mask = case.mask("completion_mask")?;
    let (log_probs, reference) =
        (case.sized("logprobs", mask.bits.len())?, case.sized("ref_logprobs", mask.bits.len())?);
    let rewards = case.sized("rewards", mask.offsets.len() - 1)?;
    let half = rewards.len() / 2;
    let groups: Vec<u64> = (0..rewards.len()).map(|row| (row % half.max(1)) as u64).collect();
    let pairs = online_pairs(&rewards, &groups)?.pairs;
    let kind = match case.text("loss_type", "sigmoid")? {
        "ipo" => DpoLossType::IpoSum,
        _ => case.parse("loss_type", "sigmoid")?,
    };
    let config = DpoConfig { loss_type: vec![kind], beta: case.num("beta", 0.1)?, ..DpoConfig::default() };
    let input = PreferenceInput {
        batch: mask.batch()?,
        pairs: &pairs,
        log_probs: &log_probs,
        ref_log_probs: Some(&reference),
        ..PreferenceInput::default()
    };
    let out = dpo_loss(&config, &input, &PreferenceCounts::of(&input))?;
    let rows = |f: fn(&Pair) -> usize| -> Vec<f64> { pairs.iter().map(|p| f(p) as f64).collect() };
    Ok(Results::default()
        .num("loss", out.loss)
        .vector("chosen_indices", &rows(|p| p.chosen))
        .vector("rejected_indices", &rows(|p| p.rejected))
        .grad_grid("logprobs", mask.cols, &out.d_log_probs))
}

/// `RewardTrainer.compute_loss`.
pub(super) fn reward(case: &Case<'_>) -> Result<Results, Error> {
    let scores = case.vector("rewards")?;
    let margins = case.opt_vector("margin")?;
    let config = RewardModelConfig { center_rewards_coefficient: case.num("center_rewards_coefficient", 0.0)? };
    let (chosen, rejected) = scores.split_at(scores.len() / 2);
    let n = chosen.len();
    let out = reward_model_loss(&config, chosen, rejected, margins.as_deref(), n as u64)?;
    let gradient: Vec<f64> = out.d_chosen.iter().chain(&out.d_rejected).copied().collect();
    Ok(Results::default()
        .num("loss", out.loss)
        .num("accuracy", out.num_correct as f64 / n.max(1) as f64)
        .num("margin", out.margin_sum / n.max(1) as f64)
        .grad_grid("rewards", 1, &gradient))
}
