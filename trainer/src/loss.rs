//! From what the policy says of response tokens to the objective's loss and gradients.

use crate::Error;
use crate::micro_batch::Columns;
use std::ops::Range;
use temper_algos::{GlobalCounts, Objective, ObjectiveInput, ObjectiveOutput, TokenBatch, widen};
use temper_proto::TrainRow;
use temper_tensor::{RowGrads, TokenStats};

/// What the policy says of response tokens, end to end.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PolicyStats<'a> {
    pub(crate) log_probs: &'a [f32],
    pub(crate) entropies: &'a [f32],
    pub(crate) sum_pi_squared: &'a [f32],
}

/// The objective over some rows.
///
/// # Errors
/// Those of the objective, or columns of the wrong length.
pub(crate) fn evaluate(
    objective: &Objective,
    rows: &[TrainRow],
    says: PolicyStats<'_>,
    counts: &GlobalCounts,
) -> Result<ObjectiveOutput, Error> {
    let (log_probs, entropies) = (widen(says.log_probs), widen(says.entropies));
    let columns = Columns::gather(rows, &log_probs)?;
    let input = ObjectiveInput {
        batch: TokenBatch::new(&columns.offsets, &columns.response_mask)?,
        log_probs: &log_probs,
        entropies: &entropies,
        old_log_probs: &columns.old_log_probs,
        ref_log_probs: Some(&columns.ref_log_probs[..]).filter(|v| !v.is_empty()),
        advantages: &columns.advantages,
        rollout_is_weights: Some(&columns.rollout_weights[..]).filter(|v| !v.is_empty()),
        rollout_log_probs: Some(&columns.rollout_log_probs[..]).filter(|v| !v.is_empty()),
        sum_pi_squared: Some(&widen(says.sum_pi_squared)[..]),
    };
    Ok(objective.evaluate(&input, counts)?)
}

/// The gradients of some rows out of those of a whole mini-batch.
pub(crate) fn pick_gradients(out: &ObjectiveOutput, rows: &[TrainRow], places: &[usize]) -> RowGrads {
    let mut starts = Vec::with_capacity(rows.len());
    let mut end = 0;
    for row in rows {
        starts.push(end);
        end += row.sequence.response_token_ids.len();
    }
    let mut picked = RowGrads::default();
    for place in places {
        let start = starts[*place];
        let one = slice_gradients(out, start..start + rows[*place].sequence.response_token_ids.len());
        picked.d_log_probs.extend(one.d_log_probs);
        picked.d_entropies.extend(one.d_entropies);
    }
    picked
}

/// The gradients of a range of tokens.
pub(crate) fn slice_gradients(out: &ObjectiveOutput, tokens: Range<usize>) -> RowGrads {
    let narrow = |values: &[f64]| values.iter().map(|v| *v as f32).collect();
    let d_entropies = if out.d_entropies.is_empty() { &[][..] } else { &out.d_entropies[tokens.clone()] };
    RowGrads { d_log_probs: narrow(&out.d_log_probs[tokens]), d_entropies: narrow(d_entropies) }
}

/// The objective of a micro-batch whose tokens become known block by block; its gradient at a token depends on no
/// other token's log-prob ([`temper_algos::Scope::Token`]).
pub(crate) struct BlockLoss<'a> {
    objective: &'a Objective,
    rows: &'a [TrainRow],
    counts: GlobalCounts,
    /// What is known. A token to come counts as unchanged since the start of the step: its numbers are finite, and its
    /// gradient is not read.
    known: TokenStats,
    whole: Option<ObjectiveOutput>,
    failed: Option<Error>,
}

impl<'a> BlockLoss<'a> {
    /// Nothing is known.
    pub(crate) fn new(objective: &'a Objective, rows: &'a [TrainRow], counts: GlobalCounts) -> Self {
        let mut known = TokenStats::default();
        for row in rows {
            let end = known.log_probs.len() + row.sequence.response_token_ids.len();
            known.log_probs.extend_from_slice(&row.old_log_probs);
            known.log_probs.resize(end, 0.0);
        }
        known.entropies = vec![0.0; known.log_probs.len()];
        known.sum_squares = known.entropies.clone();
        BlockLoss { objective, rows, counts, known, whole: None, failed: None }
    }

    /// Take in what the policy says of a range of tokens, and give their gradients: zeros once the objective has
    /// failed.
    pub(crate) fn take(&mut self, tokens: Range<usize>, said: &TokenStats) -> RowGrads {
        self.known.log_probs[tokens.clone()].copy_from_slice(&said.log_probs);
        self.known.entropies[tokens.clone()].copy_from_slice(&said.entropies);
        self.known.sum_squares[tokens.clone()].copy_from_slice(&said.sum_squares);
        let none = RowGrads { d_log_probs: vec![0.0; tokens.len()], d_entropies: Vec::new() };
        if self.failed.is_some() {
            return none;
        }
        match self.evaluate() {
            Ok(out) => {
                let grads = slice_gradients(&out, tokens.clone());
                self.whole = (tokens.len() == self.known.log_probs.len()).then_some(out);
                grads
            }
            Err(error) => {
                self.failed = Some(error);
                none
            }
        }
    }

    /// The objective over all tokens, which are all known.
    ///
    /// # Errors
    /// Those of the objective.
    pub(crate) fn finish(self) -> Result<ObjectiveOutput, Error> {
        match (self.failed, self.whole) {
            (Some(error), _) => Err(error),
            (None, Some(out)) => Ok(out),
            (None, None) => evaluate_known(self.objective, self.rows, &self.known, &self.counts),
        }
    }

    fn evaluate(&self) -> Result<ObjectiveOutput, Error> {
        evaluate_known(self.objective, self.rows, &self.known, &self.counts)
    }
}

fn evaluate_known(
    objective: &Objective,
    rows: &[TrainRow],
    known: &TokenStats,
    counts: &GlobalCounts,
) -> Result<ObjectiveOutput, Error> {
    let says =
        PolicyStats { log_probs: &known.log_probs, entropies: &known.entropies, sum_pi_squared: &known.sum_squares };
    evaluate(objective, rows, says, counts)
}

#[cfg(test)]
mod tests {
    use super::{BlockLoss, PolicyStats, evaluate, slice_gradients};
    use temper_algos::{GlobalCounts, LossAggMode, LossMode, Objective, PolicyLossConfig, Scope, SftLossType};
    use temper_proto::{TokenSequence, TrainRow};
    use temper_tensor::TokenStats;
    use temper_types::uniform53;

    const LENGTHS: [usize; 4] = [7, 1, 12, 5];

    /// Numbers from 0 to 1.
    fn numbers(count: usize, seed: u64) -> Vec<f32> {
        (0..count as u64).map(|i| uniform53(seed, i) as f32).collect()
    }

    fn negated(values: Vec<f32>) -> Vec<f32> {
        values.into_iter().map(|x| -3.0 * x - 0.01).collect()
    }

    /// The last row comes without old log-probs, as those of a step's first mini-batch do.
    fn rows() -> Vec<TrainRow> {
        let row = |index: usize| {
            let (len, seed) = (LENGTHS[index], 10 * index as u64);
            let sequence = TokenSequence {
                prompt_token_ids: vec![1, 2],
                response_token_ids: vec![3; len],
                response_mask: (0..len).map(|i| u8::from(i % 4 != 3)).collect(),
            };
            TrainRow {
                old_log_probs: if index == 3 { Vec::new() } else { negated(numbers(len, seed)) },
                rollout_log_probs: negated(numbers(len, seed + 1)),
                ref_log_probs: negated(numbers(len, seed + 2)),
                advantages: numbers(len, seed + 3).iter().map(|x| f64::from(*x) - 0.4).collect(),
                ..TrainRow::demonstration(sequence)
            }
        };
        (0..LENGTHS.len()).map(row).collect()
    }

    fn objectives() -> Vec<Objective> {
        let modes = [
            LossMode::Vanilla,
            LossMode::Cispo,
            LossMode::Sapo,
            LossMode::Gpg,
            LossMode::Reinforce,
            LossMode::DppoTv,
            LossMode::DppoKl,
            LossMode::Dro,
        ];
        let with_mode = |(index, mode)| {
            let loss_agg_mode = [LossAggMode::TokenMean, LossAggMode::SeqMeanTokenMean][index % 2];
            let config = PolicyLossConfig {
                loss_mode: mode,
                loss_agg_mode,
                entropy_coeff: 0.1,
                use_kl_loss: true,
                dro_beta: 0.3,
                ..PolicyLossConfig::default()
            };
            Objective::Policy(config)
        };
        modes.into_iter().enumerate().map(with_mode).chain([Objective::Sft(SftLossType::Nll)]).collect()
    }

    /// Whatever the blocks, a token's gradient has the bits that it has when all tokens are known at once.
    #[test]
    fn blocks_of_tokens_give_the_gradients_of_the_whole() {
        let (rows, total) = (rows(), LENGTHS.iter().sum::<usize>());
        let said = TokenStats {
            log_probs: negated(numbers(total, 77)),
            entropies: numbers(total, 78),
            sum_squares: numbers(total, 79),
        };
        let counts = GlobalCounts { num_tokens: 20, num_sequences: 4, num_rows: 4, loss_scale_factor: 8.0 };
        for objective in objectives() {
            assert_eq!(objective.scope(), Scope::Token, "{objective:?}");
            let says = PolicyStats {
                log_probs: &said.log_probs,
                entropies: &said.entropies,
                sum_pi_squared: &said.sum_squares,
            };
            let want = evaluate(&objective, &rows, says, &counts).expect("finite numbers");
            for block in [1, 4, 9, total] {
                let mut loss = BlockLoss::new(&objective, &rows, counts);
                for start in (0..total).step_by(block) {
                    let tokens = start..(start + block).min(total);
                    let part = TokenStats {
                        log_probs: said.log_probs[tokens.clone()].to_vec(),
                        entropies: said.entropies[tokens.clone()].to_vec(),
                        sum_squares: said.sum_squares[tokens.clone()].to_vec(),
                    };
                    assert_eq!(loss.take(tokens.clone(), &part), slice_gradients(&want, tokens), "{objective:?}");
                }
                assert_eq!(loss.finish().expect("finite numbers"), want, "{objective:?} in blocks of {block}");
            }
        }
    }

    /// A number that is not finite fails the micro-batch, and every block from there on has no gradient.
    #[test]
    fn a_block_that_is_not_finite_fails_the_whole() {
        let (rows, objective) = (rows(), Objective::Sft(SftLossType::Nll));
        let counts = GlobalCounts { num_tokens: 20, num_sequences: 4, num_rows: 4, loss_scale_factor: 8.0 };
        let mut loss = BlockLoss::new(&objective, &rows, counts);
        let said = |x: f32| TokenStats { log_probs: vec![x; 5], entropies: vec![0.5; 5], sum_squares: vec![0.5; 5] };
        assert!(loss.take(0..5, &said(-1.0)).d_log_probs.iter().any(|d| *d != 0.0));
        assert!(loss.take(5..10, &said(f32::NAN)).d_log_probs.iter().all(|d| *d == 0.0));
        assert!(loss.take(10..15, &said(-1.0)).d_log_probs.iter().all(|d| *d == 0.0));
        loss.finish().expect_err("a log-prob is not a number");
    }
}
