//! Group distributional preferences over the rows of a mini-batch.
//!
//! Rows are told apart by the sign of their advantage. 0: the answers of a pair, chosen and rejected in turn, to a
//! prompt that ends with the belief. Below 0: the belief of a pair, in the pairs' order, to the prompt without it.
//! Above 0: one token that names a class of beliefs, to the same prompt; the advantage is the class's share in the
//! target law. Classes without a share need no row.

use super::PreferenceMetrics;
use super::gdpo::{GdpoConfig, GdpoInput, gdpo_loss};
use crate::batch::require_tokens;
use crate::objective::{ObjectiveInput, ObjectiveOutput};
use crate::{Error, LossMetrics};

/// Rows of a mini-batch by what they are.
#[derive(Debug, Default)]
struct Rows {
    answers: Vec<usize>,
    beliefs: Vec<usize>,
    /// With the share of the class.
    classes: Vec<(usize, f64)>,
}

/// The loss over whole mini-batches, with its gradient.
///
/// # Errors
/// A setting out of range; rows that do not form pairs with a belief each; an array that is missing, has the wrong
/// length or is not finite.
pub(crate) fn gdpo_objective(config: &GdpoConfig, input: &ObjectiveInput<'_>) -> Result<ObjectiveOutput, Error> {
    let batch = &input.batch;
    batch.expect_finite("gdpo", "log_probs", input.log_probs)?;
    batch.expect_finite("gdpo", "advantages", input.advantages)?;
    let reference = require_tokens(batch, "gdpo", "ref_log_probs", input.ref_log_probs)?;
    let rows = Rows::of(input)?;
    let sum = |values: &[f64], row: usize| -> f64 { batch.active(row).map(|t| values[t]).sum() };
    let ratios: Vec<f64> = rows.answers.iter().map(|r| sum(input.log_probs, *r) - sum(reference, *r)).collect();
    let side = |first: usize| -> Vec<f64> { ratios.iter().skip(first).step_by(2).copied().collect() };
    let beliefs: Vec<Vec<f64>> =
        rows.beliefs.iter().map(|row| batch.active(*row).map(|t| input.log_probs[t]).collect()).collect();
    let (chosen, rejected) = (side(0), side(1));
    let out = gdpo_loss(
        config,
        &GdpoInput {
            belief_probs: &rows.classes.iter().map(|(_, share)| *share).collect::<Vec<f64>>(),
            class_log_probs: &rows.classes.iter().map(|(row, _)| sum(input.log_probs, *row)).collect::<Vec<f64>>(),
            belief_log_probs: &beliefs.iter().map(Vec::as_slice).collect::<Vec<&[f64]>>(),
            chosen_log_ratios: &chosen,
            rejected_log_ratios: &rejected,
        },
    )?;
    let mut d_log_probs = vec![0.0; batch.num_slots()];
    let mut spread = |row: usize, d: f64| batch.active(row).for_each(|t| d_log_probs[t] = d);
    let mut preference = PreferenceMetrics::default();
    for (i, pair) in rows.answers.chunks_exact(2).enumerate() {
        spread(pair[0], out.d_chosen[i]);
        spread(pair[1], -out.d_chosen[i]);
        spread(rows.beliefs[i], out.d_belief_log_probs[i]);
        let log_probs = (sum(input.log_probs, pair[0]), sum(input.log_probs, pair[1]));
        preference.add_pair((config.beta * chosen[i], config.beta * rejected[i]), log_probs);
    }
    rows.classes.iter().zip(&out.d_class_log_probs).for_each(|((row, _), d)| spread(*row, *d));
    let mean = out.belief_log_probs.iter().sum::<f64>() / out.belief_log_probs.len().max(1) as f64;
    let entropy_sum = (0..batch.num_slots()).filter(|t| batch.is_active(*t)).filter_map(|t| input.entropies.get(t));
    let metrics = LossMetrics {
        num_tokens: batch.num_tokens() as f64,
        entropy_sum: entropy_sum.sum(),
        preference,
        ..LossMetrics::default()
    };
    let reports = vec![("belief_kl".to_owned(), out.kl), ("belief_log_prob".to_owned(), mean)];
    Ok(ObjectiveOutput { loss: out.loss, d_log_probs, d_entropies: Vec::new(), metrics, reports })
}

impl Rows {
    fn of(input: &ObjectiveInput<'_>) -> Result<Self, Error> {
        let batch = &input.batch;
        let mut rows = Rows::default();
        for row in 0..batch.num_rows() {
            match batch.active(row).next().map_or(0.0, |t| input.advantages[t]) {
                share if share > 0.0 && batch.row_len(row) == 1 => rows.classes.push((row, share)),
                share if share > 0.0 => {
                    let cause = format!("row {row} has {} tokens: a class is named by one", batch.row_len(row));
                    return Err(Error::batch("gdpo", cause));
                }
                mark if mark < 0.0 => rows.beliefs.push(row),
                _ => rows.answers.push(row),
            }
        }
        if rows.answers.len() == 2 * rows.beliefs.len() {
            return Ok(rows);
        }
        let (answers, beliefs) = (rows.answers.len(), rows.beliefs.len());
        let cause = format!("{answers} answers and {beliefs} beliefs: expected two answers, in turn, and one belief");
        Err(Error::batch("gdpo", cause))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{GlobalCounts, Objective, TokenBatch};

    /// Two pairs: answers of 2 and 1, 1 and 3 tokens; beliefs of 2 and 1; laws of (.7, .3) and (1).
    const OFFSETS: [usize; 10] = [0, 2, 3, 5, 6, 7, 8, 11, 12, 13];
    const MARKS: [f64; 13] = [0.0, 0.0, 0.0, -1.0, -1.0, 0.7, 0.3, 0.0, 0.0, 0.0, 0.0, -1.0, 1.0];
    const CONFIG: GdpoConfig = GdpoConfig { beta: 0.5, label_smoothing: 0.1 };

    fn log_probs() -> Vec<f64> {
        (0..13).map(|t| -0.2 - 0.3 * f64::from((t * 7) % 5)).collect()
    }

    fn evaluate(log_probs: &[f64], marks: &[f64]) -> Result<ObjectiveOutput, Error> {
        let mask = [1; 13];
        let reference = vec![-0.8; 13];
        let input = ObjectiveInput {
            batch: TokenBatch::new(&OFFSETS, &mask).expect("nine rows"),
            log_probs,
            ref_log_probs: Some(&reference),
            advantages: marks,
            ..ObjectiveInput::default()
        };
        Objective::Gdpo(CONFIG)
            .evaluate(&input, &GlobalCounts { num_tokens: 13, num_sequences: 9, num_rows: 9, loss_scale_factor: 1.0 })
    }

    #[test]
    fn rows_give_the_loss_of_the_formula() {
        let lp = log_probs();
        let out = evaluate(&lp, &MARKS).expect("a loss");
        let ratio = |range: std::ops::Range<usize>| range.map(|t| lp[t] + 0.8).sum::<f64>();
        let dpo = |x: f64| 0.9 * (1.0 + (-x).exp()).ln() + 0.1 * (1.0 + x.exp()).ln();
        let pairs = dpo(0.5 * (ratio(0..2) - ratio(2..3))) + dpo(0.5 * (ratio(7..8) - ratio(8..11)));
        let kl = 0.7 * (0.7_f64.ln() - lp[5]) + 0.3 * (0.3_f64.ln() - lp[6]) - lp[12];
        let belief = (lp[3] + lp[4]) / 2.0 + lp[11];
        assert!((out.loss - (pairs + kl - belief) / 2.0).abs() < 1e-12, "{}", out.loss);
        assert_eq!(out.metrics.preference.num_pairs, 2.0);
        assert!((out.reports[0].1 - kl / 2.0).abs() < 1e-12 && (out.reports[1].1 - belief / 2.0).abs() < 1e-12);
    }

    #[test]
    fn the_gradient_agrees_with_central_differences() {
        let lp = log_probs();
        let out = evaluate(&lp, &MARKS).expect("a loss");
        for t in 0..lp.len() {
            let at = |step: f64| {
                let mut moved = lp.clone();
                moved[t] += step;
                evaluate(&moved, &MARKS).expect("a loss").loss
            };
            let expected = (at(1e-6) - at(-1e-6)) / 2e-6;
            assert!((out.d_log_probs[t] - expected).abs() < 1e-8, "token {t}: {} {expected}", out.d_log_probs[t]);
        }
    }

    #[test]
    fn rows_that_do_not_belong_together_are_refused() {
        let mut no_belief = MARKS;
        no_belief[11] = 0.0;
        let mut long_class = MARKS;
        long_class[3] = 0.5;
        for (marks, says) in [(no_belief, "5 answers and 1 beliefs"), (long_class, "row 2 has 2 tokens")] {
            let error = evaluate(&log_probs(), &marks).expect_err(says).to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
