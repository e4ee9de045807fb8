//! verl's KL estimators, KL in the reward, and controllers.

use super::case::{Case, Mask, Results};
use crate::{Error, KlController, KlControllerConfig, KlType, apply_kl_penalty, kl_penalty};

fn kl_type(case: &Case<'_>, key: &str) -> Result<KlType, Error> {
    if matches!(case.text(key, "kl")?, "full" | "full+") {
        return Err(Error::Unsupported { operation: "kl_penalty", what: "the full KL over the vocabulary" });
    }
    case.parse(key, "kl")
}

/// `kl_penalty`: estimates and the gradient of their sum.
pub(in crate::eval) fn penalty(case: &Case<'_>) -> Result<Results, Error> {
    let log_probs = case.grid("logprob")?;
    let reference = case.sized("ref_logprob", log_probs.data.len())?;
    let mask = Mask::new(log_probs.cols, vec![1; log_probs.data.len()]);
    let kl = kl_penalty(kl_type(case, "kl_penalty")?, &mask.batch()?, &log_probs.data, &reference)?;
    let values: Vec<f64> = kl.iter().map(|k| k.value).collect();
    let gradient: Vec<f64> = kl.iter().map(|k| k.d).collect();
    Ok(Results::default()
        .grid("kl", mask.cols, &values)
        .num("loss", values.iter().sum())
        .grad_grid("logprob", mask.cols, &gradient))
}

fn controller_config(case: &Case<'_>) -> Result<KlControllerConfig, Error> {
    let default = KlControllerConfig::default();
    Ok(KlControllerConfig {
        kind: case.parse("type", "fixed")?,
        kl_coef: case.num("kl_coef", default.kl_coef)?,
        target_kl: case.num("target_kl", default.target_kl)?,
        horizon: case.num("horizon", default.horizon)?,
    })
}

/// `apply_kl_penalty` and `compute_rewards`.
pub(in crate::eval) fn apply(case: &Case<'_>) -> Result<Results, Error> {
    let mask = case.mask("response_mask")?;
    let (scores, old) =
        (case.sized("token_level_scores", mask.bits.len())?, case.sized("old_log_probs", mask.bits.len())?);
    let reference = case.sized("ref_log_prob", mask.bits.len())?;
    let mut controller = KlController::new(&controller_config(case)?)?;
    let coef = controller.coef();
    let batch = mask.batch()?;
    let out = apply_kl_penalty(kl_type(case, "kl_penalty")?, coef, &batch, &scores, &old, &reference)?;
    controller.update(out.current_kl, batch.num_rows() as u64);
    // `compute_rewards` is the same formula with the k1 estimate on every slot, masked or not.
    let plain: Vec<f64> = (0..scores.len()).map(|t| scores[t] - coef * (old[t] - reference[t])).collect();
    Ok(Results::default()
        .grid("token_level_rewards", mask.cols, &out.token_level_rewards)
        .num("current_kl", out.current_kl)
        .num("coef_used", coef)
        .num("coef_after", controller.coef())
        .grid("compute_rewards", mask.cols, &plain))
}

/// A controller over a sequence of updates.
pub(in crate::eval) fn controller(case: &Case<'_>) -> Result<Results, Error> {
    let mut controller = KlController::new(&controller_config(case)?)?;
    let (kls, steps) = (case.vector("current_kl")?, case.vector("n_steps")?);
    let mut values = Vec::with_capacity(kls.len());
    for (kl, n) in kls.iter().zip(&steps) {
        controller.update(*kl, *n as u64);
        values.push(controller.coef());
    }
    Ok(Results::default().vector("values", &values))
}
