//! Which scored samples enter the update: the best and the worst of a group, or draws by score.

use crate::Error;
use crate::filters::ReweightMethod;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Best-of-n: of every group only its best and its worst samples are trained on. 0 and 0: all of them.
///
/// # Source
/// Down-sampling of rollouts before the update, arXiv 2504.13818 (as many best as worst); advantages are those within
/// the samples that are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BestOfNConfig {
    /// How many of the best are kept.
    pub best: u32,
    /// How many of the worst are kept.
    pub worst: u32,
}

impl BestOfNConfig {
    /// True where samples are left out.
    pub fn is_active(&self) -> bool {
        self.best > 0 || self.worst > 0
    }

    /// How many samples of a group are kept.
    pub fn num_kept(&self) -> usize {
        self.best as usize + self.worst as usize
    }

    /// Which samples of a group are kept, by their scores; among equal ones those that come first. A group that has no
    /// more than [`BestOfNConfig::num_kept`] keeps all.
    pub fn keep(&self, scores: &[f64]) -> Vec<bool> {
        if !self.is_active() || scores.len() <= self.num_kept() {
            return vec![true; scores.len()];
        }
        let mut descending: Vec<usize> = (0..scores.len()).collect();
        descending.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
        let (best, rest) = descending.split_at(self.best as usize);
        let mut ascending = rest.to_vec();
        ascending.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]).then(a.cmp(b)));
        let mut keep = vec![false; scores.len()];
        best.iter().chain(ascending.iter().take(self.worst as usize)).for_each(|i| keep[*i] = true);
        keep
    }
}

/// PF-PPO: the rows of an update are drawn from the step's rows, with replacement, by their scores.
///
/// # Source
/// arXiv 2409.06957; names and defaults are verl's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PfPpoConfig {
    /// Draw the rows anew.
    pub enable: bool,
    /// What a score weighs.
    pub reweight_method: ReweightMethod,
    /// Exponent of the method `pow`.
    pub weight_pow: f64,
}

impl Default for PfPpoConfig {
    fn default() -> Self {
        PfPpoConfig { enable: false, reweight_method: ReweightMethod::Pow, weight_pow: 2.0 }
    }
}

impl PfPpoConfig {
    /// Check the exponent.
    ///
    /// # Errors
    /// An exponent that is negative or not finite.
    pub fn validate(&self) -> Result<(), Error> {
        if self.weight_pow >= 0.0 && self.weight_pow.is_finite() {
            return Ok(());
        }
        Err(Error::setting("pf_ppo.weight_pow", self.weight_pow, "a number from 0"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_and_the_worst_are_kept_and_ties_go_to_the_first() {
        let check = |best, worst, scores: &[f64], expected: &[usize]| {
            let keep = BestOfNConfig { best, worst }.keep(scores);
            let kept: Vec<usize> = (0..scores.len()).filter(|i| keep[*i]).collect();
            assert_eq!(kept, expected, "best {best}, worst {worst} of {scores:?}");
        };
        check(1, 1, &[0.5, 0.1, 0.9, 0.3], &[1, 2]);
        check(2, 0, &[0.5, 0.1, 0.9, 0.3], &[0, 2]);
        check(1, 1, &[1.0, 1.0, 0.0, 0.0], &[0, 2]);
        check(1, 1, &[0.0, 0.0, 0.0], &[0, 1]);
        check(2, 2, &[0.3, 0.2], &[0, 1]);
        check(0, 0, &[0.3, 0.2], &[0, 1]);
    }
}
