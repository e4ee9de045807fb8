//! Group Distributional Preference Optimization: calibrate beliefs, then prefer among belief-conditioned answers.
//!
//! Offline data: a prompt, a target law over K belief classes, and a chosen and a rejected answer under one belief
//! whose
//! text precedes the answer. `loss_i = KL + DPO_i - B_i`: KL is the mean over rows of `sum_k p_k (log p_k - log q_k)`,
//! `q` the
//! full-vocabulary law at the last prompt position read at the K class tokens (not renormalised); DPO leaves the belief
//! text out of its sums; `B_i` is the mean log-prob of the belief text. The advantage estimator gdpo is another method.
//!
//! # Source
//! arXiv 2412.20299, as in the authors' code.

use super::dpo_pair::smoothed;
use crate::Error;
use crate::batch::expect_len;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings of the method.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct GdpoConfig {
    /// Strength of the pull towards the reference.
    pub beta: f64,
    /// Share of labels taken to be wrong.
    pub label_smoothing: f64,
}

impl Default for GdpoConfig {
    fn default() -> Self {
        GdpoConfig { beta: 0.1, label_smoothing: 0.0 }
    }
}

impl GdpoConfig {
    /// Check every range.
    ///
    /// # Errors
    /// The first setting out of range, by name.
    pub fn validate(&self) -> Result<(), Error> {
        if !(self.beta > 0.0 && self.beta.is_finite()) {
            return Err(Error::setting("beta", self.beta, "a number above 0"));
        }
        if (0.0..0.5).contains(&self.label_smoothing) {
            return Ok(());
        }
        Err(Error::setting("label_smoothing", self.label_smoothing, "a number from 0 to below 0.5"))
    }
}

/// What the loss reads; rows are pairs.
#[derive(Debug, Clone, Copy, Default)]
pub struct GdpoInput<'a> {
    /// `[B * K]`: target laws.
    pub belief_probs: &'a [f64],
    /// `[B * K]`: the policy's log-probs of the class tokens at the last prompt position.
    pub class_log_probs: &'a [f64],
    /// Log-probs of each row's belief text, token by token.
    pub belief_log_probs: &'a [&'a [f64]],
    /// `[B]`: log-ratio against the reference of each chosen answer, belief text left out.
    pub chosen_log_ratios: &'a [f64],
    /// `[B]`: the same of each rejected answer.
    pub rejected_log_ratios: &'a [f64],
}

/// The loss with its gradients.
#[derive(Debug, Clone, PartialEq)]
pub struct GdpoOutput {
    /// Mean over rows.
    pub loss: f64,
    /// The calibration term.
    pub kl: f64,
    /// `[B]`: DPO's part.
    pub dpo_losses: Vec<f64>,
    /// `[B]`: mean log-prob of the belief text.
    pub belief_log_probs: Vec<f64>,
    /// `[B * K]`: d loss / d (class log-prob).
    pub d_class_log_probs: Vec<f64>,
    /// `[B]`: d loss / d (log-prob of every token of the belief text).
    pub d_belief_log_probs: Vec<f64>,
    /// `[B]`: d loss / d (chosen log-ratio); its negative is that of the rejected one.
    pub d_chosen: Vec<f64>,
}

/// Compute the loss of a whole mini-batch.
///
/// # Errors
/// A setting out of range; arrays of different lengths.
pub fn gdpo_loss(config: &GdpoConfig, input: &GdpoInput<'_>) -> Result<GdpoOutput, Error> {
    let n = input.chosen_log_ratios.len();
    config.validate()?;
    expect_len("rejected_log_ratios", n, input.rejected_log_ratios.len())?;
    expect_len("belief_log_probs", n, input.belief_log_probs.len())?;
    expect_len("class_log_probs", input.belief_probs.len(), input.class_log_probs.len())?;
    let scale = 1.0 / n.max(1) as f64;
    let mut out = GdpoOutput {
        loss: 0.0,
        kl: 0.0,
        dpo_losses: Vec::with_capacity(n),
        belief_log_probs: Vec::with_capacity(n),
        d_class_log_probs: Vec::with_capacity(input.belief_probs.len()),
        d_belief_log_probs: Vec::with_capacity(n),
        d_chosen: Vec::with_capacity(n),
    };
    for (p, log_q) in input.belief_probs.iter().zip(input.class_log_probs) {
        out.kl += if *p > 0.0 { scale * p * (p.ln() - log_q) } else { 0.0 };
        out.d_class_log_probs.push(-scale * p);
    }
    for i in 0..n {
        let x = config.beta * (input.chosen_log_ratios[i] - input.rejected_log_ratios[i]);
        let dpo = smoothed(x, config.label_smoothing);
        let text = input.belief_log_probs[i];
        let len = text.len().max(1) as f64;
        let belief = text.iter().sum::<f64>() / len;
        out.loss += scale * (dpo.value - belief);
        out.dpo_losses.push(dpo.value);
        out.belief_log_probs.push(belief);
        out.d_belief_log_probs.push(-scale / len);
        out.d_chosen.push(scale * config.beta * dpo.d);
    }
    out.loss += out.kl;
    if !out.loss.is_finite() {
        return Err(Error::batch("gdpo", format!("the loss is {}: expected a finite number", out.loss)));
    }
    Ok(out)
}
