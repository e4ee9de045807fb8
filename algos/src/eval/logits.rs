//! Log-probs of labelled tokens out of logits, and the way back of their gradients.

use super::case::{Case, Grid};
use crate::Error;
use crate::distribution::{token_gradient, token_statistics};

/// Logits of B sequences of L positions, where position `t` predicts token `t + 1`.
pub(super) struct Logits {
    pub(super) num_rows: usize,
    pub(super) len: usize,
    pub(super) grid: Grid,
}

impl Logits {
    pub(super) fn read(case: &Case<'_>, key: &str) -> Result<Logits, Error> {
        let (num_rows, len, grid) = case.cube(key)?;
        if num_rows == 0 || len == 0 || grid.cols == 0 {
            return Err(case.bad(key, "expected at least one row, position and vocabulary entry"));
        }
        Ok(Logits { num_rows, len, grid })
    }

    /// Log-probs of tokens `1..` of every row, `[B, L - 1]`; a label below 0 is taken as token 0.
    pub(super) fn log_probs(&self, labels: &[f64]) -> Result<Vec<f64>, Error> {
        let mut out = Vec::with_capacity(self.num_rows * (self.len - 1));
        for (position, label) in self.predictions(labels) {
            out.push(token_statistics(self.grid.row(position), label, 1.0)?.log_prob);
        }
        Ok(out)
    }

    /// Gradient with respect to all logits from that of the log-probs.
    pub(super) fn gradient(&self, labels: &[f64], d_log_probs: &[f64]) -> Result<Vec<f64>, Error> {
        let vocab = self.grid.cols;
        let mut out = vec![0.0; self.grid.data.len()];
        for ((position, label), d) in self.predictions(labels).zip(d_log_probs) {
            if *d != 0.0 {
                let gradient = token_gradient(self.grid.row(position), label, 1.0, *d, 0.0)?;
                out[position * vocab..(position + 1) * vocab].copy_from_slice(&gradient);
            }
        }
        Ok(out)
    }

    /// Positions that predict, with the token they predict.
    fn predictions<'a>(&'a self, labels: &'a [f64]) -> impl Iterator<Item = (usize, usize)> + 'a {
        let next = |row: usize, t: usize| (row * self.len + t, labels[row * self.len + t + 1].max(0.0) as usize);
        (0..self.num_rows).flat_map(move |row| (0..self.len - 1).map(move |t| next(row, t)))
    }

    /// Mask over predictions, `[B, L - 1]`, from a test of tokens `1..`.
    pub(super) fn shifted_mask(&self, values: &[f64], test: impl Fn(f64) -> bool) -> Vec<u8> {
        let row = |row: usize| (1..self.len).map(move |t| row * self.len + t);
        (0..self.num_rows).flat_map(row).map(|at| u8::from(test(values[at]))).collect()
    }
}
