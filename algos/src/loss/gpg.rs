//! GPG and REINFORCE: the plain policy gradient, `L = -A log_prob`.
//!
//! The two differ in what surrounds them: gpg expects the advantages of the same name; reinforce is what bypass mode
//! multiplies by rollout importance weights.
//!
//! # Source
//! GPG, arXiv 2504.02546.

use super::terms::TokenTerm;

/// Loss of one token.
pub(crate) fn term(log_prob: f64, advantage: f64) -> TokenTerm {
    TokenTerm { loss: -advantage * log_prob, d: -advantage, ..TokenTerm::default() }
}
