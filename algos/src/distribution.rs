//! Reference maths of one row of logits: log-prob, entropy, sum of squared probabilities, and their gradients.
//!
//! A device's fused kernel is tested against these; nothing here is fast.

use crate::Error;
use crate::math::{log_softmax, log_sum_exp};

/// What one row of logits says about one token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenStatistics {
    /// `z_label - log sum e^z`.
    pub log_prob: f64,
    /// `log sum e^z - sum softmax(z) z`.
    pub entropy: f64,
    /// `sum_v p_v^2 = exp(lse(2 z) - 2 lse(z))`.
    pub sum_pi_squared: f64,
}

/// Statistics of a token; `logits` are divided by `temperature` first.
///
/// # Errors
/// A label outside the vocabulary, or a temperature that is not above 0.
pub fn token_statistics(logits: &[f64], label: usize, temperature: f64) -> Result<TokenStatistics, Error> {
    check(logits, label, temperature)?;
    let z: Vec<f64> = logits.iter().map(|v| v / temperature).collect();
    let doubled: Vec<f64> = z.iter().map(|v| 2.0 * v).collect();
    let total = log_sum_exp(&z);
    Ok(TokenStatistics {
        log_prob: z[label] - total,
        entropy: entropy(&log_softmax(&z)),
        sum_pi_squared: (log_sum_exp(&doubled) - 2.0 * total).exp(),
    })
}

/// `-sum p log p`; a probability of 0 adds nothing.
pub(crate) fn entropy(log_probs: &[f64]) -> f64 {
    -log_probs.iter().filter(|l| l.is_finite()).map(|l| l.exp() * l).sum::<f64>()
}

/// Gradient of `d_log_prob * log_prob + d_entropy * entropy` with respect to the logits.
///
/// # Errors
/// As [`token_statistics`].
pub fn token_gradient(
    logits: &[f64],
    label: usize,
    temperature: f64,
    d_log_prob: f64,
    d_entropy: f64,
) -> Result<Vec<f64>, Error> {
    check(logits, label, temperature)?;
    let z: Vec<f64> = logits.iter().map(|v| v / temperature).collect();
    let log_probs = log_softmax(&z);
    let entropy = entropy(&log_probs);
    let one = |v: usize| {
        let p = log_probs[v].exp();
        let hit = if v == label { 1.0 } else { 0.0 };
        let through_entropy = if p > 0.0 { -p * (log_probs[v] + entropy) } else { 0.0 };
        (d_log_prob * (hit - p) + d_entropy * through_entropy) / temperature
    };
    Ok((0..logits.len()).map(one).collect())
}

fn check(logits: &[f64], label: usize, temperature: f64) -> Result<(), Error> {
    if label >= logits.len() {
        let cause = format!("label {label} is outside the vocabulary of {}", logits.len());
        return Err(Error::batch("token_statistics", cause));
    }
    if !(temperature > 0.0 && temperature.is_finite()) {
        return Err(Error::setting("temperature", temperature, "a number above 0"));
    }
    Ok(())
}
