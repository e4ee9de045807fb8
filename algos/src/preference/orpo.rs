//! ORPO: likelihood of chosen rows and the odds ratio against the rejected, without a reference.
//!
//! `log_odds = (lc - lr) - (log(1 - e^lc) - log(1 - e^lr))` on length-averaged log-probs;
//! `loss = NLL(chosen) - beta mean logsig(log_odds)`. The likelihood is the token mean over `nll_mask`, in TRL the
//! chosen
//! rows' prompt and response.
//!
//! # Source
//! arXiv 2403.07691.

use super::{PairTerm, PreferenceCounts, PreferenceInput, PreferenceMetrics, PreferenceOutput};
use crate::Error;
use crate::math::{log_sigmoid, sigmoid};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings of ORPO.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct OrpoConfig {
    /// Weight of the odds ratio.
    pub beta: f64,
}

impl Default for OrpoConfig {
    fn default() -> Self {
        OrpoConfig { beta: 0.1 }
    }
}

impl OrpoConfig {
    /// Check every range.
    ///
    /// # Errors
    /// A weight that is negative or not finite.
    pub fn validate(&self) -> Result<(), Error> {
        if self.beta >= 0.0 && self.beta.is_finite() {
            return Ok(());
        }
        Err(Error::setting("beta", self.beta, "a number from 0"))
    }
}

/// Log-odds of one pair, and `logsig` of them with derivatives (as the term's loss).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OddsRatio {
    /// The log-odds.
    pub log_odds: f64,
    /// `logsig(log_odds)`.
    pub log_odds_ratio: f64,
    /// Its derivative with respect to the chosen row's mean log-prob.
    pub d_chosen: f64,
    /// Its derivative with respect to the rejected row's mean log-prob.
    pub d_rejected: f64,
}

/// Odds ratio of two length-averaged log-probs, both below 0.
///
/// # Errors
/// A log-prob of 0 or more: its odds are infinite.
pub fn odds_ratio(chosen: f64, rejected: f64) -> Result<OddsRatio, Error> {
    if !(chosen < 0.0 && rejected < 0.0) {
        let cause = format!("mean log-probs are {chosen} and {rejected}: expected numbers below 0");
        return Err(Error::batch("orpo", cause));
    }
    let log_one_minus = |x: f64| (-x.exp_m1()).ln();
    let log_odds = (chosen - rejected) - (log_one_minus(chosen) - log_one_minus(rejected));
    // d log(1 - e^x) / dx = -e^x / (1 - e^x)
    let d = |x: f64| 1.0 - x.exp() / x.exp_m1();
    let slope = sigmoid(-log_odds);
    Ok(OddsRatio {
        log_odds,
        log_odds_ratio: log_sigmoid(log_odds),
        d_chosen: slope * d(chosen),
        d_rejected: -slope * d(rejected),
    })
}

/// Compute the loss of a batch of pairs; `counts` are those of the whole mini-batch.
///
/// # Errors
/// A setting out of range; an array of the wrong length or not finite; a pair beyond the batch; a row without tokens.
pub fn orpo_loss(
    config: &OrpoConfig,
    input: &PreferenceInput<'_>,
    counts: &PreferenceCounts,
) -> Result<PreferenceOutput, Error> {
    config.validate()?;
    input.check("orpo")?;
    let scale = 1.0 / counts.num_pairs.max(1) as f64;
    let mut out = PreferenceOutput {
        loss: 0.0,
        d_log_probs: vec![0.0; input.batch.num_slots()],
        metrics: PreferenceMetrics::default(),
    };
    for pair in input.pairs {
        let mean = |row| input.row_mean(input.log_probs, row);
        let (c, j) = (mean(pair.chosen), mean(pair.rejected));
        let odds = odds_ratio(c, j)?;
        let term = PairTerm {
            loss: -config.beta * odds.log_odds_ratio,
            d_chosen: -config.beta * odds.d_chosen,
            d_rejected: -config.beta * odds.d_rejected,
        };
        out.loss += scale * term.loss;
        for (row, d) in [(pair.chosen, term.d_chosen), (pair.rejected, term.d_rejected)] {
            let len = input.batch.row_len(row) as f64;
            input.batch.active(row).for_each(|t| out.d_log_probs[t] += scale * d / len);
        }
        out.metrics.add_pair((config.beta * c, config.beta * j), (c, j));
        out.metrics.log_odds_sum += odds.log_odds;
        out.metrics.log_odds_ratio_sum += odds.log_odds_ratio;
    }
    out.metrics.nll_loss = input.add_nll(1.0, counts, &mut out.d_log_probs);
    out.loss += out.metrics.nll_loss;
    Ok(out)
}
