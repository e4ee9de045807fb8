//! Validation metrics over the n samples of one prompt: mean@n, best@k, maj@n, pass@k.

use std::collections::HashMap;
use std::hash::Hash;

/// Mean of all scores; 0 without scores.
pub fn mean_at_n(scores: &[f64]) -> f64 {
    if scores.is_empty() { 0.0 } else { scores.iter().sum::<f64>() / scores.len() as f64 }
}

/// Expected largest score of `k` samples drawn without replacement from all n: exact, where verl resamples.
///
/// With the scores sorted ascending, the `i`-th smallest is the largest of the draw in `C(i - 1, k - 1)` of `C(n, k)`
/// cases. `k` is cut to n; 0 without scores or with `k = 0`.
pub fn best_at_k(scores: &[f64], k: usize) -> f64 {
    let n = scores.len();
    let k = k.min(n);
    if k == 0 {
        return 0.0;
    }
    let mut sorted = scores.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    // Probability that the largest of the draw is the one at `place` from the top: the ones above were not drawn.
    let (mut total, mut none_above) = (0.0, 1.0);
    for (place, score) in sorted.iter().enumerate() {
        let left = n - place;
        if left < k {
            break;
        }
        let drawn = k as f64 / left as f64;
        total += none_above * drawn * score;
        none_above *= 1.0 - drawn;
    }
    total
}

/// Unbiased pass@k: `1 - C(n - c, k) / C(n, k)`, `c` of the n samples being right.
///
/// # Source
/// Chen et al., "Evaluating large language models trained on code", arXiv 2107.03374.
pub fn pass_at_k(correct: &[bool], k: usize) -> f64 {
    let scores: Vec<f64> = correct.iter().map(|c| f64::from(u8::from(*c))).collect();
    best_at_k(&scores, k)
}

/// Score of the most frequent answer (the first one on ties); 0 without answers. Samples without an answer (`None`)
/// do not vote; where none votes the first sample's score counts.
pub fn maj_at_n<A: Eq + Hash>(answers: &[Option<A>], scores: &[f64]) -> f64 {
    let mut votes: HashMap<&A, (usize, usize)> = HashMap::new();
    for (place, answer) in answers.iter().enumerate() {
        if let Some(answer) = answer {
            votes.entry(answer).or_insert((0, place)).0 += 1;
        }
    }
    let winner = votes.values().max_by(|a, b| a.0.cmp(&b.0).then(b.1.cmp(&a.1)));
    let place = winner.map_or(0, |(_, first)| *first);
    scores.get(place).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All subsets, one by one.
    fn brute_best(scores: &[f64], k: usize) -> f64 {
        let subsets = (0u32..1 << scores.len()).filter(|s| s.count_ones() as usize == k);
        let best =
            |s: u32| (0..scores.len()).filter(|i| s >> i & 1 == 1).map(|i| scores[i]).fold(f64::NEG_INFINITY, f64::max);
        let all: Vec<f64> = subsets.map(best).collect();
        mean_at_n(&all)
    }

    #[test]
    fn best_at_k_is_the_mean_over_all_subsets() {
        let scores = [0.3, -1.0, 2.5, 0.3, 0.0, 1.0];
        for k in 1..=scores.len() {
            assert!((best_at_k(&scores, k) - brute_best(&scores, k)).abs() < 1e-12, "k = {k}");
        }
        assert_eq!(best_at_k(&[], 3), 0.0);
    }

    #[test]
    fn pass_at_k_matches_the_closed_form() {
        let correct = [true, false, false, true, false];
        assert!((pass_at_k(&correct, 1) - 0.4).abs() < 1e-12);
        assert!((pass_at_k(&correct, 2) - (1.0 - 3.0 / 10.0)).abs() < 1e-12);
        assert!((pass_at_k(&correct, 4) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn majority_takes_the_first_of_tied_answers_and_ignores_silence() {
        let answers = [None, Some("b"), Some("a"), Some("a"), Some("b")];
        assert_eq!(maj_at_n(&answers, &[0.1, 0.2, 0.3, 0.3, 0.2]), 0.2);
        assert_eq!(maj_at_n::<&str>(&[None, None], &[0.7, 0.0]), 0.7);
    }
}
