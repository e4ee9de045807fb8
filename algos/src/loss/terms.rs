//! Losses of single tokens before aggregation, and the calculus they share.

use crate::TokenBatch;
use crate::kl::Dual;
use crate::math::{Cut, cut_passes};

/// Loss of one token and its derivative with respect to that token's log-prob.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct TokenTerm {
    pub(crate) loss: f64,
    pub(crate) d: f64,
    /// A clip bound holds.
    pub(crate) clipped: bool,
    /// The dual clip holds.
    pub(crate) clipped_lower: bool,
}

/// Token losses of a batch, and how many tokens were clipped.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Terms {
    /// `[T]`, 0 where the mask is 0.
    pub(crate) losses: Vec<f64>,
    /// `[T]`: derivative of the sum of the row's losses with respect to this token's log-prob.
    pub(crate) d_log_probs: Vec<f64>,
    pub(crate) num_clipped: usize,
    pub(crate) num_clipped_lower: usize,
}

impl Terms {
    /// No loss at all.
    pub(crate) fn zeros(batch: &TokenBatch) -> Terms {
        let zeros = || vec![0.0; batch.num_slots()];
        Terms { losses: zeros(), d_log_probs: zeros(), num_clipped: 0, num_clipped_lower: 0 }
    }

    /// Compute a term for every unmasked token.
    pub(crate) fn per_token(batch: &TokenBatch, term: impl Fn(usize) -> TokenTerm) -> Terms {
        let mut terms = Terms::zeros(batch);
        for t in (0..batch.num_slots()).filter(|t| batch.is_active(*t)) {
            let token = term(t);
            terms.losses[t] = token.loss;
            terms.d_log_probs[t] = token.d;
            terms.num_clipped += usize::from(token.clipped);
            terms.num_clipped_lower += usize::from(token.clipped_lower);
        }
        terms
    }

    /// Multiply losses and derivatives token by token.
    pub(crate) fn weigh(&mut self, batch: &TokenBatch, weights: &[f64]) {
        for t in (0..batch.num_slots()).filter(|t| batch.is_active(*t)) {
            self.losses[t] *= weights[t];
            self.d_log_probs[t] *= weights[t];
        }
    }
}

/// `exp(clamp(x, low, high))`; the derivative is 0 where a bound holds.
pub(crate) fn clamped_exp(x: f64, low: f64, high: f64) -> Dual {
    let value = x.cut(low, high).exp();
    Dual { value, d: if cut_passes(x, low, high) { value } else { 0.0 } }
}

/// The larger of two; on a tie the derivatives are averaged.
pub(crate) fn larger(a: Dual, b: Dual) -> Dual {
    if a.value == b.value {
        return Dual { value: a.value, d: 0.5 * (a.d + b.d) };
    }
    if a.value > b.value { a } else { b }
}

/// The smaller of two; on a tie the derivatives are averaged.
pub(crate) fn smaller(a: Dual, b: Dual) -> Dual {
    if a.value == b.value {
        return Dual { value: a.value, d: 0.5 * (a.d + b.d) };
    }
    if a.value < b.value { a } else { b }
}
