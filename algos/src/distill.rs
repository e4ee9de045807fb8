//! Distillation from a teacher: forward KL over the teacher's top k, and the generalised Jensen-Shannon divergence.
//!
//! These losses see whole distributions; a device fuses them with its LM head and is tested against these functions.
//!
//! # Source
//! Top-k forward KL: verl's on-policy distillation. Generalised JSD: GKD, arXiv 2306.13649.

use crate::Error;
use crate::batch::expect_len;
use crate::math::log_softmax;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings of a distillation stage's loss: the mean of a divergence over the tokens that take part.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DistillConfig {
    /// 0: KL(teacher || student); 1: KL(student || teacher); between: generalised Jensen-Shannon divergence.
    pub beta: f64,
    /// Divides the logits of both.
    pub temperature: f64,
    /// Forward KL over so many of the teacher's most likely tokens, which needs `beta = 0`; 0: the whole vocabulary.
    pub top_k: usize,
}

impl Default for DistillConfig {
    fn default() -> Self {
        DistillConfig { beta: 0.5, temperature: 1.0, top_k: 0 }
    }
}

impl DistillConfig {
    /// Check every range.
    ///
    /// # Errors
    /// The first setting out of range, by name.
    pub fn validate(&self) -> Result<(), Error> {
        check_divergence(self.beta, self.temperature)?;
        if self.top_k > 0 && self.beta != 0.0 {
            return Err(Error::setting("beta", self.beta, "0 with top_k, which is a forward KL"));
        }
        Ok(())
    }
}

fn check_divergence(beta: f64, temperature: f64) -> Result<(), Error> {
    if !(0.0..=1.0).contains(&beta) {
        return Err(Error::setting("beta", beta, "a number from 0 to 1"));
    }
    if !(temperature > 0.0 && temperature.is_finite()) {
        return Err(Error::setting("temperature", temperature, "a number above 0"));
    }
    Ok(())
}

/// Divergence at one position and its gradient with respect to the student's logits.
#[derive(Debug, Clone, PartialEq)]
pub struct Divergence {
    /// The divergence.
    pub value: f64,
    /// `[V]`: its gradient.
    pub d_logits: Vec<f64>,
    /// Mass that the student gives to the teacher's top k (1 where the whole vocabulary is used).
    pub student_mass: f64,
    /// Mass that the teacher gives to its top k (1 where the whole vocabulary is used).
    pub teacher_mass: f64,
}

/// `sum_k p_k (log p_k - log q_k)` over the teacher's top k, nothing renormalised; both log-probs are cut from below at
/// `log_prob_min_clamp`, beyond which no gradient flows.
///
/// # Errors
/// Lists of different lengths, or an id outside the vocabulary.
pub fn forward_kl_top_k(
    student_logits: &[f64],
    teacher_log_probs: &[f64],
    teacher_ids: &[usize],
    log_prob_min_clamp: Option<f64>,
) -> Result<Divergence, Error> {
    expect_len("teacher_topk_ids", teacher_log_probs.len(), teacher_ids.len())?;
    let student = log_softmax(student_logits);
    let floor = log_prob_min_clamp.unwrap_or(f64::NEG_INFINITY);
    let mut out = Divergence { value: 0.0, d_logits: vec![0.0; student.len()], student_mass: 0.0, teacher_mass: 0.0 };
    let mut flowing = 0.0;
    for (log_p, id) in teacher_log_probs.iter().zip(teacher_ids) {
        let log_q = *student.get(*id).ok_or_else(|| {
            Error::batch("forward_kl_top_k", format!("id {id} is outside the vocabulary of {}", student.len()))
        })?;
        let bounded = log_p.max(floor);
        out.value += bounded.exp() * (bounded - log_q.max(floor));
        out.student_mass += log_q.exp();
        out.teacher_mass += log_p.exp();
        if log_q >= floor {
            out.d_logits[*id] -= bounded.exp();
            flowing += bounded.exp();
        }
    }
    out.d_logits.iter_mut().zip(&student).for_each(|(d, log_q)| *d += flowing * log_q.exp());
    Ok(out)
}

/// Generalised JSD between two laws over one vocabulary at a temperature: `beta = 0` is KL(teacher || student),
/// `beta = 1` is KL(student || teacher), else `beta KL(t || m) + (1 - beta) KL(s || m)`, `m = (1 - beta) s + beta t`.
///
/// # Errors
/// Vocabularies of different sizes; `beta` outside 0 to 1; a temperature that is not above 0.
pub fn generalized_jsd(
    student_logits: &[f64],
    teacher_logits: &[f64],
    beta: f64,
    temperature: f64,
) -> Result<Divergence, Error> {
    expect_len("teacher_logits", student_logits.len(), teacher_logits.len())?;
    check_divergence(beta, temperature)?;
    let scaled = |z: &[f64]| log_softmax(&z.iter().map(|v| v / temperature).collect::<Vec<_>>());
    let (student, teacher) = (scaled(student_logits), scaled(teacher_logits));
    let mut value = 0.0;
    // Derivative with respect to the student's probabilities, up to a constant that the softmax removes.
    let d_probs: Vec<f64> = student
        .iter()
        .zip(&teacher)
        .map(|(s, t)| {
            let (term, d) = jsd_term(*s, *t, beta);
            value += term;
            d
        })
        .collect();
    let probs: Vec<f64> = student.iter().map(|s| s.exp()).collect();
    let mean: f64 = probs.iter().zip(&d_probs).map(|(p, d)| p * d).sum();
    let d_logits = probs.iter().zip(&d_probs).map(|(p, d)| p * (d - mean) / temperature).collect();
    Ok(Divergence { value, d_logits, student_mass: 1.0, teacher_mass: 1.0 })
}

/// One vocabulary entry's part of the divergence, and its derivative with respect to the student's probability.
fn jsd_term(s: f64, t: f64, beta: f64) -> (f64, f64) {
    let (p, q) = (s.exp(), t.exp());
    if beta == 0.0 {
        return (q * (t - s), -(t - s).exp());
    }
    if beta == 1.0 {
        return (p * (s - t), s - t + 1.0);
    }
    let mix = (1.0 - beta) * p + beta * q;
    let m = mix.ln();
    let value = beta * q * (t - m) + (1.0 - beta) * p * (s - m);
    // d/dp: the parts through the mixture add up to a constant.
    (value, (1.0 - beta) * (s - m))
}
