//! Bradley-Terry: a reward model learns that the chosen response scores higher.
//!
//! `-logsig(rc - rr - margin)`, mean over pairs, plus `center_rewards_coefficient * mean((rc + rr)^2)`. LogExp,
//! `log(1 + e^(rr - rc))`, is the same function without margin.
//!
//! # Source
//! TRL's RewardTrainer; margins: Llama 2, 2307.09288; centring: 2312.09244.

use crate::Error;
use crate::batch::expect_len;
use crate::math::{log_sigmoid, sigmoid};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings of reward-model training.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RewardModelConfig {
    /// Weight of the pull of the pair's mean towards 0; 0 is off.
    pub center_rewards_coefficient: f64,
}

/// The loss with its gradient.
#[derive(Debug, Clone, PartialEq)]
pub struct RewardModelOutput {
    /// This call's share of the global loss.
    pub loss: f64,
    /// `[P]`: d loss / d (chosen score).
    pub d_chosen: Vec<f64>,
    /// `[P]`: d loss / d (rejected score).
    pub d_rejected: Vec<f64>,
    /// Number of pairs whose chosen score is above the rejected one.
    pub num_correct: usize,
    /// Sum of the differences of scores.
    pub margin_sum: f64,
}

/// Compute the loss of pairs of scores, `[P]` each; `margins` is `[P]`; `num_pairs` counts the whole mini-batch.
///
/// # Errors
/// A setting out of range; arrays of different lengths, or a score that is not finite.
pub fn reward_model_loss(
    config: &RewardModelConfig,
    chosen: &[f64],
    rejected: &[f64],
    margins: Option<&[f64]>,
    num_pairs: u64,
) -> Result<RewardModelOutput, Error> {
    let coef = config.center_rewards_coefficient;
    if !(coef >= 0.0 && coef.is_finite()) {
        return Err(Error::setting("center_rewards_coefficient", coef, "a number from 0"));
    }
    expect_len("rejected", chosen.len(), rejected.len())?;
    expect_len("margins", chosen.len(), margins.map_or(chosen.len(), <[f64]>::len))?;
    if let Some(value) = chosen.iter().chain(rejected).find(|v| !v.is_finite()) {
        return Err(Error::batch("reward_model", format!("a score is {value}: expected a finite number")));
    }
    let scale = 1.0 / num_pairs.max(1) as f64;
    let mut out =
        RewardModelOutput { loss: 0.0, d_chosen: Vec::new(), d_rejected: Vec::new(), num_correct: 0, margin_sum: 0.0 };
    for (i, (c, r)) in chosen.iter().zip(rejected).enumerate() {
        let x = c - r - margins.map_or(0.0, |m| m[i]);
        let (pull, centre) = (sigmoid(-x), c + r);
        out.loss += scale * (coef * centre * centre - log_sigmoid(x));
        out.d_chosen.push(scale * (2.0 * coef * centre - pull));
        out.d_rejected.push(scale * (2.0 * coef * centre + pull));
        out.num_correct += usize::from(c > r);
        out.margin_sum += c - r;
    }
    Ok(out)
}
