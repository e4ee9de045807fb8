//! Supervised fine-tuning: negative log-likelihood of demonstrations, token-mean over the global count.
//!
//! `L = -sum_t m_t w_t log p_t / num_tokens`. With `dft` the weight is the detached probability `p_t`, else 1. The
//! denominator is at least 1.
//!
//! # Source
//! DFT: arXiv 2508.05629.

use crate::{Error, TokenBatch};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Weight of a token of a demonstration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SftLossType {
    /// 1: negative log-likelihood.
    #[default]
    Nll,
    /// The token's own probability, detached.
    Dft,
}

/// A loss and its gradient with respect to log-probs.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLoss {
    /// This call's share of the global loss.
    pub loss: f64,
    /// `[T]`: d loss / d log_prob, 0 where the mask is 0.
    pub d_log_probs: Vec<f64>,
}

/// Loss of demonstrations; `num_tokens` is the number of unmasked tokens of the whole mini-batch, over all
/// micro-batches and ranks.
///
/// # Errors
/// An array of the wrong length, or a log-prob that is not finite.
pub fn sft_loss(kind: SftLossType, batch: &TokenBatch, log_probs: &[f64], num_tokens: u64) -> Result<TokenLoss, Error> {
    batch.expect_finite("sft_loss", "log_probs", log_probs)?;
    let scale = 1.0 / num_tokens.max(1) as f64;
    let mut out = TokenLoss { loss: 0.0, d_log_probs: vec![0.0; batch.num_slots()] };
    for t in (0..batch.num_slots()).filter(|t| batch.is_active(*t)) {
        let weight = match kind {
            SftLossType::Nll => 1.0,
            SftLossType::Dft => log_probs[t].exp(),
        };
        out.loss -= weight * log_probs[t] * scale;
        out.d_log_probs[t] = -weight * scale;
    }
    Ok(out)
}
