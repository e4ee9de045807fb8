//! Losses over preferences: pairs of a chosen and a rejected response, unpaired labels, and reward models.
//!
//! A pair names two rows of a batch. Losses are means over all pairs of the mini-batch; the counts are passed in, so
//! that the split into micro-batches does not change a loss that looks at single pairs. Those that sort or average
//! over the batch (aot, kto) need the whole mini-batch. One file per family.

mod aot;
mod cpo;
mod dpo;
mod dpo_pair;
mod form;
mod gdpo;
mod gdpo_rows;
mod kto;
mod online_dpo;
mod orpo;
mod reward_model;

pub use cpo::{CpoConfig, CpoLossType, cpo_loss};
pub use dpo::{DpoConfig, dpo_loss};
pub use dpo_pair::{DpoLossType, FDivergence};
pub use form::{PreferenceForm, ResponseLogProb};
pub use gdpo::{GdpoConfig, GdpoInput, GdpoOutput, gdpo_loss};
pub(crate) use gdpo_rows::gdpo_objective;
pub use kto::{KtoConfig, KtoInput, KtoLossType, KtoOutput, kto_loss};
pub use online_dpo::{OnlinePairs, online_pairs};
pub use orpo::{OrpoConfig, odds_ratio, orpo_loss};
pub use reward_model::{RewardModelConfig, RewardModelOutput, reward_model_loss};

use crate::{Error, TokenBatch};

/// Rows of a chosen and of a rejected response to one prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pair {
    /// Row of the preferred response.
    pub chosen: usize,
    /// Row of the other.
    pub rejected: usize,
}

/// What a loss over pairs reads.
#[derive(Debug, Clone, Copy, Default)]
pub struct PreferenceInput<'a> {
    /// Rows and mask; the mask selects the completion.
    pub batch: TokenBatch<'a>,
    /// The pairs.
    pub pairs: &'a [Pair],
    /// `[T]`: log-probs under the policy now.
    pub log_probs: &'a [f64],
    /// `[T]`: log-probs under the reference (the DPO family).
    pub ref_log_probs: Option<&'a [f64]>,
    /// `[T]`: log of the sum of squared probabilities over the vocabulary (use_weighting).
    pub log_sum_sq_probs: Option<&'a [f64]>,
    /// `[T]`: tokens of the likelihood term, where they are not those of the batch's mask (orpo: the prompt too).
    pub nll_mask: Option<&'a [u8]>,
}

/// Counts over the whole mini-batch: all micro-batches, all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PreferenceCounts {
    /// Number of pairs.
    pub num_pairs: u64,
    /// Number of tokens of the likelihood term, over chosen rows.
    pub num_nll_tokens: u64,
}

impl PreferenceCounts {
    /// Counts of an input that is the whole mini-batch.
    pub fn of(input: &PreferenceInput<'_>) -> Self {
        let mask = input.nll_mask.unwrap_or(input.batch.response_mask());
        let row = |pair: &Pair| mask[input.batch.row(pair.chosen)].iter().filter(|m| **m == 1).count() as u64;
        PreferenceCounts { num_pairs: input.pairs.len() as u64, num_nll_tokens: input.pairs.iter().map(row).sum() }
    }
}

/// Sums over pairs or labelled rows, to add up over micro-batches; means are taken side by side, as the sides of
/// labelled rows may differ in number.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct PreferenceMetrics {
    /// Number of pairs; a labelled row is half a pair.
    pub num_pairs: f64,
    /// Number of chosen or desirable rows.
    pub num_chosen: f64,
    /// Number of rejected or undesirable rows.
    pub num_rejected: f64,
    /// Pairs whose chosen reward is above the rejected one.
    pub num_preferred: f64,
    /// Sum of the implicit rewards of chosen rows.
    pub chosen_reward_sum: f64,
    /// Sum of the implicit rewards of rejected rows.
    pub rejected_reward_sum: f64,
    /// Sum of the log-probs of chosen rows (averages where the loss uses averages).
    pub chosen_log_prob_sum: f64,
    /// Sum of the log-probs of rejected rows.
    pub rejected_log_prob_sum: f64,
    /// This call's share of the likelihood term, before its coefficient.
    pub nll_loss: f64,
    /// Sum of orpo's log-sigmoid of the log-odds.
    pub log_odds_ratio_sum: f64,
    /// Sum of orpo's log-odds.
    pub log_odds_sum: f64,
}

impl PreferenceMetrics {
    /// Take in one pair's implicit rewards and log-probs.
    fn add_pair(&mut self, rewards: (f64, f64), log_probs: (f64, f64)) {
        self.num_pairs += 1.0;
        self.num_chosen += 1.0;
        self.num_rejected += 1.0;
        self.num_preferred += f64::from(u8::from(rewards.0 > rewards.1));
        self.chosen_reward_sum += rewards.0;
        self.rejected_reward_sum += rewards.1;
        self.chosen_log_prob_sum += log_probs.0;
        self.rejected_log_prob_sum += log_probs.1;
    }

    /// Take in one labelled row (kto): its implicit reward counts for its side, and a row is half a pair.
    pub(crate) fn add_labelled(&mut self, desirable: bool, reward: f64, log_prob: f64) {
        self.num_pairs += 0.5;
        let preferred = if desirable { reward > 0.0 } else { reward < 0.0 };
        self.num_preferred += 0.5 * f64::from(u8::from(preferred));
        if desirable {
            self.num_chosen += 1.0;
            self.chosen_reward_sum += reward;
            self.chosen_log_prob_sum += log_prob;
        } else {
            self.num_rejected += 1.0;
            self.rejected_reward_sum += reward;
            self.rejected_log_prob_sum += log_prob;
        }
    }

    /// Add the metrics of other pairs of the same mini-batch.
    pub fn merge(&mut self, other: &PreferenceMetrics) {
        self.num_pairs += other.num_pairs;
        self.num_chosen += other.num_chosen;
        self.num_rejected += other.num_rejected;
        self.num_preferred += other.num_preferred;
        self.chosen_reward_sum += other.chosen_reward_sum;
        self.rejected_reward_sum += other.rejected_reward_sum;
        self.chosen_log_prob_sum += other.chosen_log_prob_sum;
        self.rejected_log_prob_sum += other.rejected_log_prob_sum;
        self.nll_loss += other.nll_loss;
        self.log_odds_ratio_sum += other.log_odds_ratio_sum;
        self.log_odds_sum += other.log_odds_sum;
    }

    /// Share of pairs whose chosen reward is above the rejected one; 0 without pairs.
    pub fn accuracy(&self) -> f64 {
        self.per_pair(self.num_preferred)
    }

    /// Sums over chosen rows as means: implicit reward and log-prob. `None` without such a row.
    pub fn chosen(&self) -> Option<(f64, f64)> {
        let n = self.num_chosen;
        (n > 0.0).then(|| (self.chosen_reward_sum / n, self.chosen_log_prob_sum / n))
    }

    /// Sums over rejected rows as means: implicit reward and log-prob. `None` without such a row.
    pub fn rejected(&self) -> Option<(f64, f64)> {
        let n = self.num_rejected;
        (n > 0.0).then(|| (self.rejected_reward_sum / n, self.rejected_log_prob_sum / n))
    }

    /// A sum over pairs as a mean; 0 without pairs.
    pub fn per_pair(&self, sum: f64) -> f64 {
        if self.num_pairs > 0.0 { sum / self.num_pairs } else { 0.0 }
    }
}

/// A preference loss with its gradient.
#[derive(Debug, Clone, PartialEq)]
pub struct PreferenceOutput {
    /// This call's share of the global loss.
    pub loss: f64,
    /// `[T]`: d loss / d log_prob, 0 where neither mask is 1.
    pub d_log_probs: Vec<f64>,
    /// Sums over pairs.
    pub metrics: PreferenceMetrics,
}

impl PreferenceInput<'_> {
    /// Check lengths, rows and numbers.
    fn check(&self, operation: &'static str) -> Result<(), Error> {
        self.batch.expect_finite(operation, "log_probs", self.log_probs)?;
        let num_rows = self.batch.num_rows();
        if let Some(pair) = self.pairs.iter().find(|p| p.chosen >= num_rows || p.rejected >= num_rows) {
            let cause = format!("pair ({}, {}) names a row beyond {num_rows}", pair.chosen, pair.rejected);
            return Err(Error::batch(operation, cause));
        }
        if let Some(mask) = self.nll_mask {
            self.batch.with_mask(mask)?.expect_finite(operation, "log_probs", self.log_probs)?;
        }
        Ok(())
    }

    /// Sum of `values` over the unmasked tokens of a row.
    fn row_sum(&self, values: &[f64], row: usize) -> f64 {
        self.batch.active(row).map(|t| values[t]).sum()
    }

    /// Mean of `values` over the unmasked tokens of a row; 0 for an empty one.
    fn row_mean(&self, values: &[f64], row: usize) -> f64 {
        self.row_sum(values, row) / self.batch.row_len(row).max(1) as f64
    }

    /// Add `coef * NLL / num_nll_tokens` of the chosen rows; returns the mean NLL's share.
    fn add_nll(&self, coef: f64, counts: &PreferenceCounts, d_log_probs: &mut [f64]) -> f64 {
        let mask = self.nll_mask.unwrap_or(self.batch.response_mask());
        let scale = 1.0 / counts.num_nll_tokens.max(1) as f64;
        let mut nll = 0.0;
        for pair in self.pairs {
            for t in self.batch.row(pair.chosen).filter(|t| mask[*t] == 1) {
                nll -= self.log_probs[t] * scale;
                d_log_probs[t] -= coef * scale;
            }
        }
        nll
    }
}

/// A loss over two scores and its derivatives.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct PairTerm {
    pub(crate) loss: f64,
    pub(crate) d_chosen: f64,
    pub(crate) d_rejected: f64,
}

impl PairTerm {
    /// A loss of the difference of the scores.
    pub(crate) fn of_difference(loss: f64, d: f64) -> Self {
        PairTerm { loss, d_chosen: d, d_rejected: -d }
    }
}
