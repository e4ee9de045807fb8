//! DRO: policy gradient with a quadratic pull towards the old policy.
//!
//! `L = -(log_prob A - beta / 2 (log_prob - old)^2)`.
//!
//! # Source
//! arXiv 2405.19107 as in verl; `dro_beta` has to be given.

use super::terms::TokenTerm;

/// Loss of one token.
pub(crate) fn term(log_prob: f64, log_ratio: f64, advantage: f64, beta: f64) -> TokenTerm {
    TokenTerm {
        loss: -(log_prob * advantage - 0.5 * beta * log_ratio * log_ratio),
        d: -advantage + beta * log_ratio,
        ..TokenTerm::default()
    }
}
