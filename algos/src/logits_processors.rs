//! Reference forms of the processors that shape a token's law before sampling; a removed token has `-inf`.
//!
//! The engine's sampler has its own fast path and is tested against these.
//!
//! # Source
//! transformers' `generation/logits_process`.

use crate::math::log_softmax;

/// Divide by the temperature.
pub fn temperature(scores: &mut [f64], temperature: f64) {
    scores.iter_mut().for_each(|s| *s /= temperature);
}

/// Keep scores at or above the `k`-th largest (ties stay); `k` is cut to the size.
pub fn top_k(scores: &mut [f64], k: usize) {
    let mut sorted = scores.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let Some(threshold) = sorted.get(k.clamp(1, scores.len().max(1)) - 1).copied() else { return };
    remove(scores, |_, s| s < threshold);
}

/// Keep the smallest set of most likely tokens whose mass reaches `p`; at least one.
///
/// Ascending cumulative mass decides: a token goes where the mass up to and with it is at most `1 - p`.
pub fn top_p(scores: &mut [f64], p: f64) {
    let order = ascending(scores);
    let probs = softmax(scores);
    let mut mass = 0.0;
    let mut removed = vec![false; scores.len()];
    for token in &order[..order.len().saturating_sub(1)] {
        mass += probs[*token];
        removed[*token] = mass <= 1.0 - p;
    }
    remove(scores, |token, _| removed[token]);
}

/// Keep tokens at least `min_p` times as likely as the most likely one.
pub fn min_p(scores: &mut [f64], min_p: f64) {
    let probs = softmax(scores);
    let top = probs.iter().copied().fold(0.0, f64::max);
    remove(scores, |token, _| probs[token] < min_p * top);
}

/// Keep the tokens whose surprise is nearest to the entropy, until their mass reaches `mass`.
pub fn typical(scores: &mut [f64], mass: f64) {
    let log_probs = log_softmax(scores);
    let entropy = crate::distribution::entropy(&log_probs);
    let distance: Vec<f64> = log_probs.iter().map(|l| (-l - entropy).abs()).collect();
    let order = ascending(&distance);
    let mut total = 0.0;
    let below = |token: &&usize| {
        total += log_probs[**token].exp();
        total < mass
    };
    let last = order.iter().take_while(below).count().min(order.len().saturating_sub(1));
    let Some(threshold) = order.get(last).map(|token| distance[*token]) else { return };
    remove(scores, |token, _| distance[token] > threshold);
}

/// Divide positive and multiply negative scores of seen tokens, once each.
pub fn repetition_penalty(scores: &mut [f64], seen: &[usize], penalty: f64) {
    for (_, score) in scores.iter_mut().enumerate().filter(|(token, _)| seen.contains(token)) {
        *score = if *score < 0.0 { *score * penalty } else { *score / penalty };
    }
}

/// Remove the tokens that would complete an n-gram which the history already holds.
pub fn no_repeat_ngram(scores: &mut [f64], history: &[usize], size: usize) {
    if size == 0 || history.len() + 1 < size {
        return;
    }
    let prefix = &history[history.len() + 1 - size..];
    let banned: Vec<usize> =
        history.windows(size).filter(|gram| gram[..size - 1] == *prefix).map(|gram| gram[size - 1]).collect();
    remove(scores, |token, _| banned.contains(&token));
}

fn remove(scores: &mut [f64], test: impl Fn(usize, f64) -> bool) {
    for (token, score) in scores.iter_mut().enumerate() {
        if test(token, *score) {
            *score = f64::NEG_INFINITY;
        }
    }
}

fn softmax(scores: &[f64]) -> Vec<f64> {
    log_softmax(scores).iter().map(|l| l.exp()).collect()
}

fn ascending(values: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    order
}
