//! Direct preference optimisation and its family, over batches of pairs.
//!
//! `loss = sum_k weight_k mean_pairs L_k(f(log-ratio of chosen), f(log-ratio of rejected))`. Log-ratios are sums over
//! completion tokens; `ld_alpha` weighs the tokens beyond the shorter response; `use_weighting` multiplies a pair's
//! loss
//! by the detached `exp(mean(log p - log sum p^2))` of both rows. sft is the token-mean likelihood of chosen rows.
//!
//! # Source
//! TRL's DPOTrainer; LD-DPO 2409.06411, WPO 2406.11827.

use super::aot::{Sorted, sorted_terms};
use super::dpo_pair::{self, DpoLossType, FDivergence};
use super::{Pair, PairTerm, PreferenceCounts, PreferenceInput, PreferenceMetrics, PreferenceOutput};
use crate::batch::require_tokens;
use crate::kl::Dual;
use crate::{Error, Scope};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings of the family.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DpoConfig {
    /// The losses that are added up.
    pub loss_type: Vec<DpoLossType>,
    /// One weight per loss; empty is all ones.
    pub loss_weights: Vec<f64>,
    /// Strength of the pull towards the reference.
    pub beta: f64,
    /// Share of labels taken to be wrong (cdpo, robust, exo_pair, aot).
    pub label_smoothing: f64,
    /// How a log-ratio becomes a score.
    pub f_divergence_type: FDivergence,
    /// Order of the alpha divergence.
    pub f_alpha_divergence_coef: f64,
    /// Temperature of discopop.
    pub discopop_tau: f64,
    /// Weight of the tokens beyond the shorter response (LD-DPO); absent: 1.
    pub ld_alpha: Option<f64>,
    /// Weigh pairs by their probability under the policy (WPO).
    pub use_weighting: bool,
}

impl Default for DpoConfig {
    fn default() -> Self {
        DpoConfig {
            loss_type: vec![DpoLossType::Sigmoid],
            loss_weights: Vec::new(),
            beta: 0.1,
            label_smoothing: 0.0,
            f_divergence_type: FDivergence::ReverseKl,
            f_alpha_divergence_coef: 0.5,
            discopop_tau: 0.05,
            ld_alpha: None,
            use_weighting: false,
        }
    }
}

impl DpoConfig {
    /// Check every range.
    ///
    /// # Errors
    /// The first setting out of range, by name.
    pub fn validate(&self) -> Result<(), Error> {
        let above_zero = |name, v: f64| {
            if v > 0.0 && v.is_finite() { Ok(()) } else { Err(Error::setting(name, v, "a number above 0")) }
        };
        above_zero("beta", self.beta)?;
        above_zero("discopop_tau", self.discopop_tau)?;
        if self.loss_type.is_empty() {
            return Err(Error::setting("loss_type", "[]", "at least one loss"));
        }
        if !self.loss_weights.is_empty() && self.loss_weights.len() != self.loss_type.len() {
            return Err(Error::setting("loss_weights", self.loss_weights.len(), "one weight per loss_type"));
        }
        let e = self.label_smoothing;
        if !(0.0..0.5).contains(&e) {
            return Err(Error::setting("label_smoothing", e, "a number from 0 to below 0.5"));
        }
        if e == 0.0 && self.loss_type.contains(&DpoLossType::ExoPair) {
            return Err(Error::setting("label_smoothing", e, "a number above 0 for exo_pair (the paper uses 1e-3)"));
        }
        match self.ld_alpha {
            Some(alpha) if !(0.0..=1.0).contains(&alpha) => {
                Err(Error::setting("ld_alpha", alpha, "a number from 0 to 1"))
            }
            _ => Ok(()),
        }
    }

    /// What the loss has to see at once.
    pub fn scope(&self) -> Scope {
        let averages_weights = self.use_weighting && self.loss_type.contains(&DpoLossType::Sft);
        let whole = averages_weights || self.loss_type.iter().any(|kind| kind.sorts());
        if whole { Scope::MiniBatch } else { Scope::Sequence }
    }
}

/// One pair's numbers.
pub(super) struct Scored {
    pub(super) pair: Pair,
    /// Log-ratios of chosen and rejected.
    pub(super) ratios: (f64, f64),
    /// Policy log-probs of chosen and rejected.
    pub(super) policy: (f64, f64),
    /// Number of tokens of chosen and rejected.
    lens: (f64, f64),
    /// Detached weight of the pair.
    pub(super) weight: f64,
}

/// Compute the loss of a batch of pairs; `counts` are those of the whole mini-batch.
///
/// # Errors
/// A setting out of range; an array that is missing, has the wrong length or is not finite; a pair beyond the batch.
pub fn dpo_loss(
    config: &DpoConfig,
    input: &PreferenceInput<'_>,
    counts: &PreferenceCounts,
) -> Result<PreferenceOutput, Error> {
    config.validate()?;
    input.check("dpo")?;
    let reference = require_tokens(&input.batch, "dpo", "ref_log_probs", input.ref_log_probs)?;
    let token_weights = token_weights(config, input);
    let scored = score(config, input, reference, &token_weights)?;
    let scale = 1.0 / counts.num_pairs.max(1) as f64;
    let mut out = PreferenceOutput {
        loss: 0.0,
        d_log_probs: vec![0.0; input.batch.num_slots()],
        metrics: metrics(config, &scored),
    };
    for (k, kind) in config.loss_type.iter().enumerate() {
        let weight = config.loss_weights.get(k).copied().unwrap_or(1.0);
        if *kind == DpoLossType::Sft {
            let weight = weight * mean_weight(&scored);
            let nll = input.add_nll(weight, counts, &mut out.d_log_probs);
            out.metrics.nll_loss = nll;
            out.loss += weight * nll;
            continue;
        }
        let terms = terms(*kind, config, &scored);
        for (one, term) in scored.iter().zip(terms) {
            out.loss += weight * scale * term.loss;
            let rows = [(one.pair.chosen, term.d_chosen), (one.pair.rejected, term.d_rejected)];
            for (row, d) in rows {
                for t in input.batch.active(row) {
                    out.d_log_probs[t] += weight * scale * d * token_weights[t];
                }
            }
        }
    }
    Ok(out)
}

/// Mean weight of the pairs, by which the likelihood counts; 1 without weighting.
fn mean_weight(scored: &[Scored]) -> f64 {
    if scored.is_empty() { 1.0 } else { scored.iter().map(|one| one.weight).sum::<f64>() / scored.len() as f64 }
}

/// Losses of all pairs, derivatives with respect to the rows' log-ratios.
fn terms(kind: DpoLossType, config: &DpoConfig, scored: &[Scored]) -> Vec<PairTerm> {
    match kind {
        DpoLossType::Aot => sorted_terms(config, scored, Sorted::Margins),
        DpoLossType::AotUnpaired => sorted_terms(config, scored, Sorted::Scores),
        _ => scored.iter().map(|one| pair_term(kind, config, one)).collect(),
    }
}

fn pair_term(kind: DpoLossType, config: &DpoConfig, one: &Scored) -> PairTerm {
    let f = |x: f64, len: f64| {
        let divergence = if kind.reads_log_ratios() { FDivergence::ReverseKl } else { config.f_divergence_type };
        let score = divergence.score(x, config.f_alpha_divergence_coef);
        let len = if kind.is_length_averaged() { len.max(1.0) } else { 1.0 };
        Dual { value: score.value / len, d: score.d / len }
    };
    let (c, j) = (f(one.ratios.0, one.lens.0), f(one.ratios.1, one.lens.1));
    let term = dpo_pair::term(kind, config, c.value, j.value);
    PairTerm {
        loss: term.loss * one.weight,
        d_chosen: term.d_chosen * c.d * one.weight,
        d_rejected: term.d_rejected * j.d * one.weight,
    }
}

/// Weight of every token in its row's log-prob: 1, or `ld_alpha` beyond the shorter response of the pair.
fn token_weights(config: &DpoConfig, input: &PreferenceInput<'_>) -> Vec<f64> {
    let mut weights = vec![1.0; input.batch.num_slots()];
    let Some(alpha) = config.ld_alpha else { return weights };
    for pair in input.pairs {
        let shared = input.batch.row_len(pair.chosen).min(input.batch.row_len(pair.rejected));
        for row in [pair.chosen, pair.rejected] {
            input.batch.active(row).skip(shared).for_each(|t| weights[t] = alpha);
        }
    }
    weights
}

fn score(
    config: &DpoConfig,
    input: &PreferenceInput<'_>,
    reference: &[f64],
    weights: &[f64],
) -> Result<Vec<Scored>, Error> {
    let confidence = if config.use_weighting {
        let squares = require_tokens(&input.batch, "use_weighting", "log_sum_sq_probs", input.log_sum_sq_probs)?;
        input.log_probs.iter().zip(squares).map(|(p, s)| p - s).collect()
    } else {
        Vec::new()
    };
    let sum = |values: &[f64], row: usize| -> f64 { input.batch.active(row).map(|t| values[t] * weights[t]).sum() };
    let ratio = |row| sum(input.log_probs, row) - sum(reference, row);
    let one = |pair: &Pair| {
        let (c, j) = (pair.chosen, pair.rejected);
        let weight = if config.use_weighting {
            (input.row_mean(&confidence, c) + input.row_mean(&confidence, j)).exp()
        } else {
            1.0
        };
        Scored {
            pair: *pair,
            ratios: (ratio(c), ratio(j)),
            policy: (sum(input.log_probs, c), sum(input.log_probs, j)),
            lens: (input.batch.row_len(c) as f64, input.batch.row_len(j) as f64),
            weight,
        }
    };
    Ok(input.pairs.iter().map(one).collect())
}

fn metrics(config: &DpoConfig, scored: &[Scored]) -> PreferenceMetrics {
    let mut metrics = PreferenceMetrics::default();
    for one in scored {
        let rewards = (config.beta * one.ratios.0, config.beta * one.ratios.1);
        metrics.add_pair(rewards, one.policy);
    }
    metrics
}
