//! Group Distributional Preference Optimization, from logits of the chosen sequences.

use super::case::{Case, Results};
use super::logits::Logits;
use crate::Error;
use crate::math::log_softmax;
use crate::preference::{GdpoConfig, GdpoInput, GdpoOutput, gdpo_loss};
use std::ops::Range;

/// Where a row's belief text lies.
struct Text {
    /// Position whose logits give the law over the classes: the last of the prompt.
    law_at: usize,
    /// The text's tokens among the predictions.
    predictions: Range<usize>,
}

/// Logits, labels and class tokens of one case, checked.
struct Beliefs {
    logits: Logits,
    labels: Vec<f64>,
    classes: Vec<usize>,
    texts: Vec<Text>,
}

impl Beliefs {
    fn read(case: &Case<'_>) -> Result<Beliefs, Error> {
        let logits = Logits::read(case, "logits")?;
        let labels = case.sized("chosen_labels", logits.grid.rows)?;
        let classes: Vec<usize> =
            case.numbers("class_token_ids")?.unwrap_or_default().iter().map(|id| *id as usize).collect();
        if classes.is_empty() || classes.iter().any(|id| *id >= logits.grid.cols) {
            return Err(case.bad("class_token_ids", "expected tokens of the vocabulary"));
        }
        let end_token = case.num("end_token", -1.0)?;
        let width = logits.len - 1;
        let text = |row: usize| {
            let labels = &labels[row * logits.len..(row + 1) * logits.len];
            let first = labels.iter().position(|label| *label != -100.0).unwrap_or(1).max(1);
            let end = labels.iter().position(|label| *label == end_token).unwrap_or(logits.len).max(first);
            Text { law_at: row * logits.len + first - 1, predictions: row * width + first - 1..row * width + end - 1 }
        };
        let texts = (0..logits.num_rows).map(text).collect();
        Ok(Beliefs { texts, logits, labels, classes })
    }

    fn law(&self, text: &Text) -> Vec<f64> {
        log_softmax(self.logits.grid.row(text.law_at))
    }

    /// Gradient with respect to the logits: through the belief text and through the laws over the classes.
    fn gradient(&self, out: &GdpoOutput) -> Result<Vec<f64>, Error> {
        let mut d_log_probs = vec![0.0; self.logits.num_rows * (self.logits.len - 1)];
        for (text, d) in self.texts.iter().zip(&out.d_belief_log_probs) {
            d_log_probs[text.predictions.clone()].fill(*d);
        }
        let mut gradient = self.logits.gradient(&self.labels, &d_log_probs)?;
        let vocab = self.logits.grid.cols;
        for (text, d) in self.texts.iter().zip(out.d_class_log_probs.chunks(self.classes.len())) {
            let total: f64 = d.iter().sum();
            let slot = &mut gradient[text.law_at * vocab..(text.law_at + 1) * vocab];
            slot.iter_mut().zip(&self.law(text)).for_each(|(g, l)| *g -= total * l.exp());
            self.classes.iter().zip(d).for_each(|(id, d)| slot[*id] += d);
        }
        Ok(gradient)
    }
}

/// The authors' loss with its gradients.
pub(super) fn run(case: &Case<'_>) -> Result<Results, Error> {
    let beliefs = Beliefs::read(case)?;
    let (num_rows, k) = (beliefs.logits.num_rows, beliefs.classes.len());
    let targets = case.sized("belief_probs", num_rows * k)?;
    let log_probs = beliefs.logits.log_probs(&beliefs.labels)?;
    let class_log_probs: Vec<f64> = beliefs
        .texts
        .iter()
        .flat_map(|text| {
            let law = beliefs.law(text);
            beliefs.classes.iter().map(move |id| law[*id]).collect::<Vec<_>>()
        })
        .collect();
    let texts: Vec<&[f64]> = beliefs.texts.iter().map(|text| &log_probs[text.predictions.clone()]).collect();
    let ratio = |policy: &str, reference: &str| -> Result<Vec<f64>, Error> {
        let (policy, reference) = (case.sized(policy, num_rows)?, case.sized(reference, num_rows)?);
        Ok(policy.iter().zip(&reference).map(|(p, r)| p - r).collect())
    };
    let input = GdpoInput {
        belief_probs: &targets,
        class_log_probs: &class_log_probs,
        belief_log_probs: &texts,
        chosen_log_ratios: &ratio("policy_chosen_logps", "reference_chosen_logps")?,
        rejected_log_ratios: &ratio("policy_rejected_logps", "reference_rejected_logps")?,
    };
    let config = GdpoConfig { beta: case.num("beta", 0.1)?, label_smoothing: case.num("label_smoothing", 0.0)? };
    let out = gdpo_loss(&config, &input)?;
    let losses: Vec<f64> = out.dpo_losses.iter().zip(&out.belief_log_probs).map(|(dpo, b)| out.kl + dpo - b).collect();
    let mass: Vec<f64> = class_log_probs.chunks(k).map(|row| row.iter().map(|l| l.exp()).sum()).collect();
    Ok(Results::default()
        .num("loss", out.loss)
        .vector("losses", &losses)
        .num("kl", out.kl)
        .vector("belief_logps", &out.belief_log_probs)
        .vector("dpo_losses", &out.dpo_losses)
        .vector("class_mass", &mass)
        .grad_cube("logits", (beliefs.logits.len, beliefs.logits.grid.cols), &beliefs.gradient(&out)?)
        .grad_vector("policy_chosen_logps", &out.d_chosen)
        .grad_vector("policy_rejected_logps", &out.d_chosen.iter().map(|d| -d).collect::<Vec<_>>()))
}
