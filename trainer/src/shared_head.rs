//! A value head on the policy's own trunk: `V_t = w h_t + b` of the normed hidden state before the LM head.
//!
//! One update moves policy, trunk and head: the value loss times its coefficient adds its gradient to the policy's, all
//! of it is clipped together, and the stage's optimizer steps both. The head is kept in f64 beside the policy's weights
//! and starts at 0, so that the first update moves the head alone by the value loss; it is no part of the language
//! model that a checkpoint holds, but of the trainer's state.

use crate::Error;
use crate::optimizer::{StepSize, clip_scale};
use serde::{Deserialize, Serialize};
use std::path::Path;
use temper_actor::{PackedPolicy, TrainArena, TrainBatch};
use temper_algos::optim::{AdamConfig, Decay, OptimizerConfig as Rule, OptimizerState, SecondMoment, total_norm};
use temper_algos::{GlobalCounts, SharedValueLossConfig, TokenBatch, ValueLossInput, value_loss};
use temper_proto::{OptimizerConfig, TrainRow, UpdateReport};

const FILE: &str = "shared_head.json";
const FORMAT: u32 = 1;

/// The head, its moments, and what the update under way has added up.
#[derive(Debug)]
pub(crate) struct SharedHead {
    config: SharedValueLossConfig,
    /// `[D + 1]`: the weight, then the bias.
    params: Vec<f64>,
    state: OptimizerState,
    grads: Vec<f64>,
    sums: Sums,
}

/// Shares of the value loss that add up over micro-batches.
#[derive(Debug, Default)]
struct Sums {
    loss: f64,
    value_sum: f64,
    num_clipped: f64,
}

/// In a checkpoint: numbers as the bits of their f64, so that they come back as they were.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HeadFile {
    format: u32,
    num_updates: u64,
    params: Vec<u64>,
    exp_avg: Vec<u64>,
    exp_avg_sq: Vec<u64>,
}

impl SharedHead {
    /// A head of zeros on a trunk of `hidden_size`.
    pub(crate) fn new(config: SharedValueLossConfig, hidden_size: usize) -> Self {
        let n = hidden_size + 1;
        SharedHead {
            config,
            params: vec![0.0; n],
            state: OptimizerState::new(n),
            grads: vec![0.0; n],
            sums: Sums::default(),
        }
    }

    /// Values at the target rows of a batch, nothing kept.
    pub(crate) fn values(&self, policy: &PackedPolicy, batch: &TrainBatch, arena: &mut TrainArena) -> Vec<f32> {
        self.read(&policy.hidden_only(batch, arena)).into_iter().map(|v| v as f32).collect()
    }

    fn read(&self, hidden: &[f32]) -> Vec<f64> {
        let (weight, bias) = self.params.split_at(self.params.len() - 1);
        let value = |row: &[f32]| row.iter().zip(weight).map(|(h, w)| f64::from(*h) * w).sum::<f64>() + bias[0];
        hidden.chunks_exact(weight.len()).map(value).collect()
    }

    /// Forget what an update that failed has added up.
    pub(crate) fn start_update(&mut self) {
        self.grads.fill(0.0);
        self.sums = Sums::default();
    }

    /// Add the value loss of one micro-batch; gives its gradient with respect to `hidden`, `[R, D]`.
    pub(crate) fn accumulate(
        &mut self,
        hidden: &[f32],
        rows: &[TrainRow],
        counts: &GlobalCounts,
    ) -> Result<Vec<f32>, Error> {
        let columns = Columns::gather(rows);
        let predictions = self.read(hidden);
        let input = ValueLossInput {
            batch: TokenBatch::new(&columns.offsets, &columns.mask)?,
            predictions: &predictions,
            old_values: &columns.old_values,
            returns: &columns.returns,
        };
        counts.expect_part(&input.batch)?;
        let out = value_loss(&self.config.value_loss, &input, counts)?;
        self.sums.loss += out.loss;
        self.sums.num_clipped += out.num_clipped as f64;
        let active = predictions.iter().zip(&columns.mask).filter(|(_, mask)| **mask == 1);
        self.sums.value_sum += active.map(|(v, _)| v).sum::<f64>();
        let width = self.params.len() - 1;
        let mut d_hidden = vec![0.0; hidden.len()];
        for (t, (row, d_row)) in hidden.chunks_exact(width).zip(d_hidden.chunks_exact_mut(width)).enumerate() {
            let d = self.config.vf_coef * out.d_predictions[t];
            self.grads[width] += d;
            for i in 0..width {
                self.grads[i] += d * f64::from(row[i]);
                d_row[i] = (d * self.params[i]) as f32;
            }
        }
        Ok(d_hidden)
    }

    /// What was added up: sums, then the gradient.
    pub(crate) fn numbers(&self) -> Vec<f64> {
        let Sums { loss, value_sum, num_clipped } = self.sums;
        [&[loss, value_sum, num_clipped], &self.grads[..]].concat()
    }

    /// Replace it by that of all ranks.
    pub(crate) fn take_in(&mut self, numbers: &[f64]) {
        if let Some(([loss, value_sum, num_clipped], grads)) = numbers.split_first_chunk() {
            self.sums = Sums { loss: *loss, value_sum: *value_sum, num_clipped: *num_clipped };
            self.grads.copy_from_slice(grads);
        }
    }

    /// Norm of the gradient that was added up.
    pub(crate) fn grad_norm(&self) -> Result<f64, Error> {
        let norm = total_norm(&self.grads);
        let bad = || Error::NonFiniteGradient { tensor: "the value head".to_owned(), sum_squares: norm * norm };
        if norm.is_finite() { Ok(norm) } else { Err(bad()) }
    }

    /// Add the value loss to what an update reports.
    pub(crate) fn report(&self, counts: &GlobalCounts, report: &mut UpdateReport) {
        let num_tokens = counts.num_tokens.max(1) as f64;
        report.loss += self.config.vf_coef * self.sums.loss;
        report.metrics.extend([
            ("value_loss".to_owned(), self.sums.loss),
            ("value_clipfrac".to_owned(), self.sums.num_clipped / num_tokens),
            ("value_mean".to_owned(), self.sums.value_sum / num_tokens),
        ]);
    }

    /// One AdamW step, clipped by the norm of the whole update.
    pub(crate) fn step(&mut self, optimizer: &OptimizerConfig, size: StepSize) -> Result<(), Error> {
        let scale = clip_scale(optimizer, size.grad_norm);
        let grads: Vec<f64> = self.grads.iter().map(|g| g * scale).collect();
        let rule = Rule::Adam(AdamConfig {
            lr: size.learning_rate,
            betas: (optimizer.beta1, optimizer.beta2),
            eps: optimizer.eps,
            weight_decay: optimizer.weight_decay,
            decay: Decay::Decoupled,
            second_moment: SecondMoment::Running,
        });
        Ok(self.state.step(&rule, &mut self.params, &grads)?)
    }

    /// The head and its moments, as text.
    pub(crate) fn to_text(&self) -> String {
        let bits = |values: &[f64]| values.iter().map(|v| v.to_bits()).collect();
        let file = HeadFile {
            format: FORMAT,
            num_updates: self.state.step,
            params: bits(&self.params),
            exp_avg: bits(&self.state.first),
            exp_avg_sq: bits(&self.state.second),
        };
        serde_json::to_string(&file).expect("a state is plain data")
    }

    /// Write the head into the directory of a trainer's state.
    pub(crate) fn save(&self, dir: &Path) -> Result<(), Error> {
        let path = dir.join(FILE);
        std::fs::write(&path, self.to_text() + "\n").map_err(Error::io("write", &path))
    }

    /// Read it back.
    pub(crate) fn restore(&mut self, dir: &Path) -> Result<(), Error> {
        let path = dir.join(FILE);
        let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        self.set_text(&text).map_err(|problem| Error::State { path, problem })
    }

    /// Be what [`SharedHead::to_text`] gave; or what is wrong with it.
    pub(crate) fn set_text(&mut self, text: &str) -> Result<(), String> {
        let file: HeadFile = serde_json::from_str(text).map_err(|e| e.to_string())?;
        if file.format != FORMAT {
            return Err(format!("format {}: this binary reads format {FORMAT}", file.format));
        }
        for values in [&file.params, &file.exp_avg, &file.exp_avg_sq] {
            if values.len() != self.params.len() {
                return Err(format!("has {} numbers: expected {}", values.len(), self.params.len()));
            }
        }
        let numbers = |bits: Vec<u64>| bits.into_iter().map(f64::from_bits).collect();
        self.params = numbers(file.params);
        self.state.first = numbers(file.exp_avg);
        self.state.second = numbers(file.exp_avg_sq);
        self.state.step = file.num_updates;
        Ok(())
    }
}

/// Per-token arrays of consecutive rows end to end.
#[derive(Debug, Default)]
pub(crate) struct Columns {
    pub(crate) offsets: Vec<usize>,
    pub(crate) mask: Vec<u8>,
    pub(crate) old_values: Vec<f64>,
    pub(crate) returns: Vec<f64>,
}

impl Columns {
    pub(crate) fn gather(rows: &[TrainRow]) -> Self {
        let mut columns = Columns { offsets: vec![0], ..Columns::default() };
        for row in rows {
            columns.mask.extend_from_slice(&row.sequence.response_mask);
            columns.old_values.extend(row.values.iter().map(|v| f64::from(*v)));
            columns.returns.extend_from_slice(&row.returns);
            columns.offsets.push(columns.mask.len());
        }
        columns
    }
}
