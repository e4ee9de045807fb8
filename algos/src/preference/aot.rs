//! Alignment via optimal transport: quantiles are compared, not pairs.
//!
//! aot: sorted margins under the policy less sorted margins under the reference; aot_unpaired: sorted log-ratios of the
//! chosen less those of the rejected. On each difference, DPO's loss with smoothed labels. Needs the whole mini-batch.
//!
//! # Source
//! arXiv 2406.05882.

use super::PairTerm;
use super::dpo::{DpoConfig, Scored};
use super::dpo_pair::smoothed;

/// What is sorted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sorted {
    /// Margins of pairs, policy against reference.
    Margins,
    /// Log-ratios, chosen against rejected.
    Scores,
}

/// Loss of the k-th quantile on the k-th pair; derivatives on the pairs that hold the quantiles.
pub(super) fn sorted_terms(config: &DpoConfig, scored: &[Scored], sorted: Sorted) -> Vec<PairTerm> {
    let column = |f: &dyn Fn(&Scored) -> f64| -> Vec<f64> { scored.iter().map(f).collect() };
    let (left, right) = match sorted {
        Sorted::Margins => {
            let reference = |s: &Scored| (s.policy.0 - s.ratios.0) - (s.policy.1 - s.ratios.1);
            (column(&|s| s.policy.0 - s.policy.1), column(&reference))
        }
        Sorted::Scores => (column(&|s| s.ratios.0), column(&|s| s.ratios.1)),
    };
    let (up, down) = (order(&left), order(&right));
    let mut terms = vec![PairTerm::default(); scored.len()];
    for (k, (i, o)) in up.iter().zip(&down).enumerate() {
        let loss = smoothed(config.beta * (left[*i] - right[*o]), config.label_smoothing);
        let weight = scored[k].weight;
        let d = config.beta * loss.d * weight;
        terms[k].loss = loss.value * weight;
        terms[*i].d_chosen += d;
        match sorted {
            Sorted::Margins => terms[*i].d_rejected -= d,
            Sorted::Scores => terms[*o].d_rejected -= d,
        }
    }
    terms
}

fn order(values: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    order
}
