//! SAPO: a sigmoid gate in the place of the clip.
//!
//! `L = -(4 / tau) sigmoid(tau (r - 1)) A`, `tau` by the sign of the advantage, log-ratio clamped to +-20. Always
//! aggregated as seq-mean-token-mean, whatever `loss_agg_mode` says, as verl does.
//!
//! # Source
//! arXiv 2511.20347.

use super::terms::{TokenTerm, clamped_exp};
use crate::kl::Dual;
use crate::math::sigmoid;

/// Loss of one token; `taus` are those of positive and of other advantages.
pub(crate) fn term(log_ratio: f64, advantage: f64, taus: (f64, f64)) -> TokenTerm {
    gate(clamped_exp(log_ratio, -20.0, 20.0), advantage, taus)
}

/// The gate at a given ratio and its derivative.
pub(crate) fn gate(ratio: Dual, advantage: f64, taus: (f64, f64)) -> TokenTerm {
    let tau = if advantage > 0.0 { taus.0 } else { taus.1 };
    let gate = sigmoid(tau * (ratio.value - 1.0));
    TokenTerm {
        loss: -4.0 / tau * gate * advantage,
        d: -4.0 * gate * (1.0 - gate) * advantage * ratio.d,
        ..TokenTerm::default()
    }
}
