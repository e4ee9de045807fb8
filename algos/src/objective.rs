//! What a trainer minimises in one stage: one enum over all losses, so that the trainer names no algorithm.
//!
//! Preferences come as rows: row `2 i` is the chosen response of pair `i`, row `2 i + 1` the rejected one. KTO's rows
//! are told apart by their advantage: above 0 desirable, below 0 undesirable, 0 a mismatched completion that only
//! enters the reference point; those of group distributional preferences by its sign: 0 an answer, below 0 a belief,
//! above 0 a class of beliefs with its share.

use crate::preference::{
    CpoConfig, DpoConfig, GdpoConfig, KtoConfig, KtoInput, OrpoConfig, Pair, PreferenceCounts, PreferenceInput,
    PreferenceMetrics, PreferenceOutput, cpo_loss, dpo_loss, gdpo_objective, kto_loss, orpo_loss,
};
use crate::{
    Error, GlobalCounts, LossMetrics, LossMode, LossOutput, PolicyLossConfig, PolicyLossInput, Scope, SftLossType,
    TokenBatch, policy_loss, sft_loss,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The loss of a stage, with its settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "objective", content = "settings", rename_all = "snake_case")]
#[expect(clippy::large_enum_variant, reason = "a stage has one, which is never moved about")]
pub enum Objective {
    /// Negative log-likelihood of demonstrations.
    Sft(SftLossType),
    /// A policy-gradient loss.
    Policy(PolicyLossConfig),
    /// DPO and its family, over pairs with a reference.
    Dpo(DpoConfig),
    /// CPO and SimPO, over pairs without a reference.
    Cpo(CpoConfig),
    /// ORPO, over pairs without a reference.
    Orpo(OrpoConfig),
    /// KTO, over labelled rows with a reference.
    Kto(KtoConfig),
    /// Group distributional preferences, over pairs with beliefs and a reference.
    Gdpo(GdpoConfig),
}

/// Everything an objective may read; per-token arrays are `[T]`.
#[derive(Debug, Clone, Copy, Default)]
pub struct ObjectiveInput<'a> {
    /// Rows and mask.
    pub batch: TokenBatch<'a>,
    /// Log-probs under the policy now.
    pub log_probs: &'a [f64],
    /// Entropies under the policy now.
    pub entropies: &'a [f64],
    /// Log-probs at the start of the step.
    pub old_log_probs: &'a [f64],
    /// Log-probs under the reference.
    pub ref_log_probs: Option<&'a [f64]>,
    /// Advantages, or KTO's labels.
    pub advantages: &'a [f64],
    /// Importance weights of rollout correction.
    pub rollout_is_weights: Option<&'a [f64]>,
    /// Log-probs by the engine.
    pub rollout_log_probs: Option<&'a [f64]>,
    /// Sums of squared probabilities over the vocabulary under the policy now.
    pub sum_pi_squared: Option<&'a [f64]>,
}

/// This call's share of the loss, its gradients and its sums.
#[derive(Debug, Clone, PartialEq)]
pub struct ObjectiveOutput {
    /// Shares add up over micro-batches.
    pub loss: f64,
    /// `[T]`: d loss / d log_prob.
    pub d_log_probs: Vec<f64>,
    /// `[T]`: d loss / d entropy, or empty where the loss does not read entropies.
    pub d_entropies: Vec<f64>,
    /// Sums to add up over micro-batches.
    pub metrics: LossMetrics,
    /// Further numbers by name, of an objective that sees the whole mini-batch: they do not add up.
    pub reports: Vec<(String, f64)>,
}

impl Objective {
    /// Check the settings.
    ///
    /// # Errors
    /// The first setting out of range, by name.
    pub fn validate(&self) -> Result<(), Error> {
        match self {
            Objective::Sft(_) => Ok(()),
            Objective::Policy(config) => config.validate(),
            Objective::Dpo(config) => config.validate(),
            Objective::Cpo(config) => config.validate(),
            Objective::Orpo(config) => config.validate(),
            Objective::Kto(config) => config.validate(),
            Objective::Gdpo(config) => config.validate(),
        }
    }

    /// What a call has to see at once. A pair's rows may fall into two micro-batches, so pairs ask for all of them.
    pub fn scope(&self) -> Scope {
        match self {
            Objective::Sft(_) => Scope::Token,
            Objective::Policy(config) => config.scope(),
            Objective::Dpo(_) | Objective::Cpo(_) | Objective::Orpo(_) | Objective::Kto(_) | Objective::Gdpo(_) => {
                Scope::MiniBatch
            }
        }
    }

    /// True where the loss reads log-probs under the reference.
    pub fn needs_reference(&self) -> bool {
        match self {
            Objective::Sft(_) | Objective::Cpo(_) | Objective::Orpo(_) => false,
            Objective::Policy(config) => config.use_kl_loss,
            Objective::Dpo(_) | Objective::Kto(_) | Objective::Gdpo(_) => true,
        }
    }

    /// The loss of a part of a mini-batch with its gradients; `counts` are those of the whole mini-batch.
    ///
    /// # Errors
    /// Those of the loss: arrays missing, of the wrong length or not finite; counts smaller than the part's own.
    pub fn evaluate(&self, input: &ObjectiveInput<'_>, counts: &GlobalCounts) -> Result<ObjectiveOutput, Error> {
        match self {
            Objective::Sft(kind) => {
                let out = sft_loss(*kind, &input.batch, input.log_probs, counts.num_tokens)?;
                Ok(likelihood(input, out.loss, out.d_log_probs))
            }
            Objective::Policy(config) => policy(config, input, counts),
            Objective::Dpo(config) => preference(input, |pairs| dpo_loss(config, pairs, &PreferenceCounts::of(pairs))),
            Objective::Cpo(config) => preference(input, |pairs| cpo_loss(config, pairs, &PreferenceCounts::of(pairs))),
            Objective::Orpo(config) => {
                preference(input, |pairs| orpo_loss(config, pairs, &PreferenceCounts::of(pairs)))
            }
            Objective::Kto(config) => labelled(config, input),
            Objective::Gdpo(config) => gdpo_objective(config, input),
        }
    }
}

fn likelihood(input: &ObjectiveInput<'_>, loss: f64, d_log_probs: Vec<f64>) -> ObjectiveOutput {
    let metrics = LossMetrics {
        num_tokens: input.batch.num_tokens() as f64,
        entropy_sum: masked_sum(&input.batch, input.entropies),
        ..LossMetrics::default()
    };
    ObjectiveOutput { loss, d_log_probs, d_entropies: Vec::new(), metrics, reports: Vec::new() }
}

fn policy(
    config: &PolicyLossConfig,
    input: &ObjectiveInput<'_>,
    counts: &GlobalCounts,
) -> Result<ObjectiveOutput, Error> {
    let old_log_probs = match config.loss_mode {
        LossMode::BypassMode => {
            let missing = Error::Missing { operation: "bypass_mode", name: "rollout_log_probs" };
            input.rollout_log_probs.ok_or(missing)?
        }
        _ => input.old_log_probs,
    };
    counts.expect_part(&input.batch)?;
    let policy_input = PolicyLossInput {
        batch: input.batch,
        log_probs: input.log_probs,
        old_log_probs,
        advantages: input.advantages,
        ref_log_probs: input.ref_log_probs,
        entropies: Some(input.entropies),
        rollout_is_weights: input.rollout_is_weights,
        rollout_log_probs: input.rollout_log_probs,
        noise_seed: noise_seed(input.log_probs),
    };
    let out = policy_loss(config, &policy_input, counts)?;
    let d_entropies = if config.entropy_coeff > 0.0 { out.d_entropies } else { Vec::new() };
    let LossOutput { loss, d_log_probs, metrics, reports, .. } = out;
    Ok(ObjectiveOutput { loss, d_log_probs, d_entropies, metrics, reports })
}

fn preference(
    input: &ObjectiveInput<'_>,
    loss: impl Fn(&PreferenceInput<'_>) -> Result<PreferenceOutput, Error>,
) -> Result<ObjectiveOutput, Error> {
    let num_rows = input.batch.num_rows();
    if !num_rows.is_multiple_of(2) {
        let cause = format!("{num_rows} rows do not form pairs: expected chosen and rejected rows in turn");
        return Err(Error::batch("preference", cause));
    }
    let pairs: Vec<Pair> = (0..num_rows / 2).map(|i| Pair { chosen: 2 * i, rejected: 2 * i + 1 }).collect();
    let log_sum_sq_probs = input.sum_pi_squared.map(|sums| sums.iter().map(|sum| sum.ln()).collect::<Vec<f64>>());
    let out = loss(&PreferenceInput {
        batch: input.batch,
        pairs: &pairs,
        log_probs: input.log_probs,
        ref_log_probs: input.ref_log_probs,
        log_sum_sq_probs: log_sum_sq_probs.as_deref(),
        ..PreferenceInput::default()
    })?;
    let mut result = likelihood(input, out.loss, out.d_log_probs);
    result.metrics.preference = out.metrics;
    Ok(result)
}

fn labelled(config: &KtoConfig, input: &ObjectiveInput<'_>) -> Result<ObjectiveOutput, Error> {
    let batch = &input.batch;
    batch.expect_finite("kto", "log_probs", input.log_probs)?;
    batch.expect_tokens("advantages", input.advantages)?;
    let missing = Error::Missing { operation: "kto", name: "ref_log_probs" };
    let reference = input.ref_log_probs.ok_or(missing)?;
    batch.expect_finite("kto", "ref_log_probs", reference)?;
    let sum = |values: &[f64], row: usize| -> f64 { batch.active(row).map(|t| values[t]).sum() };
    let label = |row: usize| batch.row(row).next().map_or(0.0, |t| input.advantages[t]);
    let (rows, mismatched): (Vec<usize>, Vec<usize>) = (0..batch.num_rows()).partition(|row| label(*row) != 0.0);
    let column = |values: &[f64]| -> Vec<f64> { rows.iter().map(|row| sum(values, *row)).collect() };
    let (now, base) = (column(input.log_probs), column(reference));
    let labels: Vec<bool> = rows.iter().map(|row| label(*row) > 0.0).collect();
    let kl: Vec<f64> = mismatched.iter().map(|row| sum(input.log_probs, *row) - sum(reference, *row)).collect();
    let kto = KtoInput { log_probs: &now, ref_log_probs: &base, labels: &labels, kl_log_ratios: &kl };
    let out = kto_loss(config, &kto, rows.len() as u64)?;
    let mut d_log_probs = vec![0.0; batch.num_slots()];
    let mut metrics = PreferenceMetrics::default();
    for (i, row) in rows.iter().enumerate() {
        batch.active(*row).for_each(|t| d_log_probs[t] = out.d_log_probs[i]);
        metrics.add_labelled(labels[i], config.beta * (now[i] - base[i]), now[i]);
    }
    let mut result = likelihood(input, out.loss, d_log_probs);
    result.metrics.preference = metrics;
    Ok(result)
}

/// Seed of a loss's random choices: a function of the numbers it reads, so that a resumed run repeats them.
fn noise_seed(log_probs: &[f64]) -> u64 {
    log_probs.iter().fold(0x9E37_79B9_7F4A_7C15, |seed, v| (seed ^ v.to_bits()).wrapping_mul(0x0000_0100_0000_01B3))
}

fn masked_sum(batch: &TokenBatch<'_>, values: &[f64]) -> f64 {
    values.iter().enumerate().filter(|(t, _)| batch.is_active(*t)).map(|(_, v)| v).sum()
}
