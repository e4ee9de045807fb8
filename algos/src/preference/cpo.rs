//! CPO and SimPO: preferences without a reference.
//!
//! With `x` the difference of the rows' log-probs (length-averaged for simpo and ipo; with `alpha != 0`, of
//! `(1 - p^-alpha) / alpha`): sigmoid `-(1-e) logsig(bx) - e logsig(-bx)`; hinge `max(1 - bx, 0)`; ipo
//! `(x - 1 / (2b))^2`; simpo: sigmoid of `x - gamma / b`. Plus `cpo_alpha` times the token-mean likelihood of chosen
//! rows.
//! SimPO proper has `cpo_alpha = 0`.
//!
//! # Source
//! CPO 2401.08417, SimPO 2405.14734, AlphaPO 2501.03884; forms as in TRL.

use super::dpo_pair::smoothed;
use super::{PairTerm, PreferenceCounts, PreferenceInput, PreferenceMetrics, PreferenceOutput};
use crate::Error;
use crate::kl::Dual;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which loss of the family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CpoLossType {
    /// Logistic.
    #[default]
    Sigmoid,
    /// Hinge.
    Hinge,
    /// Squared distance from a target margin, length-averaged.
    Ipo,
    /// Logistic with a target margin, length-averaged.
    Simpo,
}

/// Settings of the family.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CpoConfig {
    /// The loss.
    pub loss_type: CpoLossType,
    /// Scale of the difference.
    pub beta: f64,
    /// Share of labels taken to be wrong (sigmoid, simpo).
    pub label_smoothing: f64,
    /// Weight of the likelihood of chosen rows.
    pub cpo_alpha: f64,
    /// Target margin of simpo.
    pub simpo_gamma: f64,
    /// AlphaPO's reshaping of the reward; 0 is off.
    pub alpha: f64,
}

impl Default for CpoConfig {
    fn default() -> Self {
        CpoConfig {
            loss_type: CpoLossType::Sigmoid,
            beta: 0.1,
            label_smoothing: 0.0,
            cpo_alpha: 1.0,
            simpo_gamma: 0.5,
            alpha: 0.0,
        }
    }
}

impl CpoConfig {
    /// Check every range.
    ///
    /// # Errors
    /// The first setting out of range, by name.
    pub fn validate(&self) -> Result<(), Error> {
        if !(self.beta > 0.0 && self.beta.is_finite()) {
            return Err(Error::setting("beta", self.beta, "a number above 0"));
        }
        if !(0.0..0.5).contains(&self.label_smoothing) {
            return Err(Error::setting("label_smoothing", self.label_smoothing, "a number from 0 to below 0.5"));
        }
        if !(self.cpo_alpha >= 0.0 && self.cpo_alpha.is_finite()) {
            return Err(Error::setting("cpo_alpha", self.cpo_alpha, "a number from 0"));
        }
        let finite = |name, v: f64| if v.is_finite() { Ok(()) } else { Err(Error::setting(name, v, "a number")) };
        finite("simpo_gamma", self.simpo_gamma)?;
        finite("alpha", self.alpha)
    }

    /// True where log-probs are divided by the number of tokens.
    pub(crate) fn is_length_averaged(&self) -> bool {
        matches!(self.loss_type, CpoLossType::Ipo | CpoLossType::Simpo)
    }

    /// A row's reward before `beta`, and its derivative.
    pub(crate) fn reward(&self, log_prob: f64) -> Dual {
        if self.alpha == 0.0 {
            return Dual { value: log_prob, d: 1.0 };
        }
        let power = (-self.alpha * log_prob).exp();
        Dual { value: (1.0 - power) / self.alpha, d: power }
    }

    /// Loss of one pair; derivatives with respect to the two log-probs.
    pub(crate) fn term(&self, chosen: f64, rejected: f64) -> PairTerm {
        let (c, j) = (self.reward(chosen), self.reward(rejected));
        let beta = self.beta;
        let x = c.value - j.value;
        let scaled = |loss: Dual| Dual { value: loss.value, d: beta * loss.d };
        let loss = match self.loss_type {
            CpoLossType::Sigmoid => scaled(smoothed(beta * x, self.label_smoothing)),
            CpoLossType::Simpo => scaled(smoothed(beta * x - self.simpo_gamma, self.label_smoothing)),
            CpoLossType::Hinge => {
                Dual { value: (1.0 - beta * x).max(0.0), d: if beta * x < 1.0 { -beta } else { 0.0 } }
            }
            CpoLossType::Ipo => {
                let gap = x - 0.5 / beta;
                Dual { value: gap * gap, d: 2.0 * gap }
            }
        };
        PairTerm { loss: loss.value, d_chosen: loss.d * c.d, d_rejected: -loss.d * j.d }
    }
}

/// Compute the loss of a batch of pairs; `counts` are those of the whole mini-batch.
///
/// # Errors
/// A setting out of range; an array of the wrong length or not finite; a pair beyond the batch.
pub fn cpo_loss(
    config: &CpoConfig,
    input: &PreferenceInput<'_>,
    counts: &PreferenceCounts,
) -> Result<PreferenceOutput, Error> {
    config.validate()?;
    input.check("cpo")?;
    let scale = 1.0 / counts.num_pairs.max(1) as f64;
    let mut out = PreferenceOutput {
        loss: 0.0,
        d_log_probs: vec![0.0; input.batch.num_slots()],
        metrics: PreferenceMetrics::default(),
    };
    let len = |row| if config.is_length_averaged() { input.batch.row_len(row).max(1) as f64 } else { 1.0 };
    let log_prob = |row| input.row_sum(input.log_probs, row) / len(row);
    for pair in input.pairs {
        let (c, j) = (log_prob(pair.chosen), log_prob(pair.rejected));
        let term = config.term(c, j);
        out.loss += scale * term.loss;
        for (row, d) in [(pair.chosen, term.d_chosen), (pair.rejected, term.d_rejected)] {
            input.batch.active(row).for_each(|t| out.d_log_probs[t] += scale * d / len(row));
        }
        let rewards = (config.beta * config.reward(c).value, config.beta * config.reward(j).value);
        out.metrics.add_pair(rewards, (c, j));
    }
    if config.cpo_alpha > 0.0 {
        let nll = input.add_nll(config.cpo_alpha, counts, &mut out.d_log_probs);
        out.metrics.nll_loss = nll;
        out.loss += config.cpo_alpha * nll;
    }
    Ok(out)
}
