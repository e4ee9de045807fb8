//! KTO: labels without pairs, against a reference point estimated from mismatched completions.
//!
//! With `r` a row's log-ratio and `z = max(mean(KL rows' log-ratios), 0)`, detached: desirable `1 - sig(beta (r - z))`,
//! undesirable `1 - sig(beta (z - r))`; apo_zero_unpaired: `1 - sig(beta r)` and `sig(beta r)`, without z. Weighted,
//! then
//! the mean over all rows. z needs the whole mini-batch.
//!
//! # Source
//! arXiv 2402.01306; forms as in TRL.

use crate::Error;
use crate::batch::expect_len;
use crate::math::sigmoid;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KtoLossType {
    /// Against the reference point.
    #[default]
    Kto,
    /// Anchored at 0.
    ApoZeroUnpaired,
}

/// Settings of KTO.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct KtoConfig {
    /// The loss.
    pub loss_type: KtoLossType,
    /// Strength of the pull towards the reference.
    pub beta: f64,
    /// Weight of desirable rows.
    pub desirable_weight: f64,
    /// Weight of undesirable rows.
    pub undesirable_weight: f64,
}

impl Default for KtoConfig {
    fn default() -> Self {
        KtoConfig { loss_type: KtoLossType::Kto, beta: 0.1, desirable_weight: 1.0, undesirable_weight: 1.0 }
    }
}

impl KtoConfig {
    /// True where the loss has a reference point, which mismatched completions estimate.
    pub fn reads_mismatched(&self) -> bool {
        self.loss_type == KtoLossType::Kto
    }

    /// Check every range.
    ///
    /// # Errors
    /// The first setting out of range, by name.
    pub fn validate(&self) -> Result<(), Error> {
        if !(self.beta > 0.0 && self.beta.is_finite()) {
            return Err(Error::setting("beta", self.beta, "a number above 0"));
        }
        let from_zero = |name, v: f64| {
            if v >= 0.0 && v.is_finite() { Ok(()) } else { Err(Error::setting(name, v, "a number from 0")) }
        };
        from_zero("desirable_weight", self.desirable_weight)?;
        from_zero("undesirable_weight", self.undesirable_weight)
    }
}

/// What KTO reads: log-probs summed over completions.
#[derive(Debug, Clone, Copy, Default)]
pub struct KtoInput<'a> {
    /// `[B]`: policy now.
    pub log_probs: &'a [f64],
    /// `[B]`: reference.
    pub ref_log_probs: &'a [f64],
    /// `[B]`: true where the completion is desirable.
    pub labels: &'a [bool],
    /// Log-ratios of mismatched completions, of the whole mini-batch.
    pub kl_log_ratios: &'a [f64],
}

/// KTO's loss with its gradient.
#[derive(Debug, Clone, PartialEq)]
pub struct KtoOutput {
    /// Mean over all rows.
    pub loss: f64,
    /// The reference point z; 0 for apo_zero_unpaired.
    pub kl: f64,
    /// `[B]`: d loss / d (sum of the row's log-probs).
    pub d_log_probs: Vec<f64>,
}

/// Compute the loss; `num_rows` is the number of rows of the whole mini-batch.
///
/// # Errors
/// A setting out of range; an array of the wrong length or not finite.
pub fn kto_loss(config: &KtoConfig, input: &KtoInput<'_>, num_rows: u64) -> Result<KtoOutput, Error> {
    config.validate()?;
    let n = input.log_probs.len();
    expect_len("ref_log_probs", n, input.ref_log_probs.len())?;
    expect_len("labels", n, input.labels.len())?;
    let all = input.log_probs.iter().chain(input.ref_log_probs).chain(input.kl_log_ratios);
    if let Some(value) = all.copied().find(|v| !v.is_finite()) {
        return Err(Error::batch("kto", format!("a log-prob is {value}: expected a finite number")));
    }
    let count = input.kl_log_ratios.len().max(1) as f64;
    let kl = match config.loss_type {
        KtoLossType::Kto => (input.kl_log_ratios.iter().sum::<f64>() / count).max(0.0),
        KtoLossType::ApoZeroUnpaired => 0.0,
    };
    let scale = 1.0 / num_rows.max(1) as f64;
    let mut out = KtoOutput { loss: 0.0, kl, d_log_probs: Vec::with_capacity(n) };
    for i in 0..n {
        let x = config.beta * (input.log_probs[i] - input.ref_log_probs[i] - kl);
        let slope = config.beta * sigmoid(x) * sigmoid(-x);
        let (loss, d, weight) = if input.labels[i] {
            (sigmoid(-x), -slope, config.desirable_weight)
        } else {
            (sigmoid(x), slope, config.undesirable_weight)
        };
        out.loss += scale * weight * loss;
        out.d_log_probs.push(scale * weight * d);
    }
    Ok(out)
}
