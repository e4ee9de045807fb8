//! How the losses of tokens become one number, by counts over the whole global batch.
//!
//! Every mode is a weight per row: `loss = sum_i w_i sum_t m_it L_it`. The weights depend on global counts and on the
//! row itself only, so neither the split into micro-batches, nor packing order, nor the number of ranks changes a bit
//! of the gradient; sums over ranks are plain sums (verl multiplies by dp_size and averages instead).

use crate::{Error, TokenBatch};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Aggregation of token losses; the names are verl's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LossAggMode {
    /// Sum over tokens / number of tokens (DAPO).
    #[default]
    TokenMean,
    /// Sum over tokens.
    TokenSum,
    /// Mean over sequences of the sum over tokens.
    SeqMeanTokenSum,
    /// The same / `loss_scale_factor`, a constant such as the longest response (Dr.GRPO).
    SeqMeanTokenSumNorm,
    /// Mean over sequences of the mean over tokens (GRPO).
    SeqMeanTokenMean,
}

/// Counts over the whole global mini-batch: all micro-batches, all ranks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GlobalCounts {
    /// Number of unmasked tokens.
    pub num_tokens: u64,
    /// Number of sequences with at least one unmasked token.
    pub num_sequences: u64,
    /// Number of rows, those without unmasked tokens included (geo_mean divides by it).
    pub num_rows: u64,
    /// Divisor of seq-mean-token-sum-norm: longest response in tokens.
    pub loss_scale_factor: f64,
}

impl GlobalCounts {
    /// Counts of a batch that is the whole mini-batch.
    pub fn of(batch: &TokenBatch, loss_scale_factor: f64) -> Self {
        GlobalCounts {
            num_tokens: batch.num_tokens() as u64,
            num_sequences: batch.num_sequences() as u64,
            num_rows: batch.num_rows() as u64,
            loss_scale_factor,
        }
    }

    /// Check that a part of the mini-batch is not larger than the whole.
    ///
    /// # Errors
    /// Counts smaller than the batch's own.
    pub fn expect_part(&self, batch: &TokenBatch) -> Result<(), Error> {
        let (tokens, sequences) = (batch.num_tokens() as u64, batch.num_sequences() as u64);
        if self.num_tokens >= tokens && self.num_sequences >= sequences {
            return Ok(());
        }
        let cause = format!(
            "global counts ({} tokens, {} sequences) are smaller than the batch's own ({tokens}, {sequences})",
            self.num_tokens, self.num_sequences
        );
        Err(Error::batch("loss aggregation", cause))
    }

    /// Counts of two disjoint parts of one mini-batch together; the larger scale factor stays.
    #[must_use]
    pub fn merge(self, other: GlobalCounts) -> GlobalCounts {
        GlobalCounts {
            num_tokens: self.num_tokens + other.num_tokens,
            num_sequences: self.num_sequences + other.num_sequences,
            num_rows: self.num_rows + other.num_rows,
            loss_scale_factor: self.loss_scale_factor.max(other.loss_scale_factor),
        }
    }
}

impl LossAggMode {
    /// Weight of every token of each row, `[B]`; 0 where nothing takes part (verl's token-mean gives NaN there).
    ///
    /// # Errors
    /// A scale factor that is not above 0 where the mode divides by it.
    pub fn row_weights(self, batch: &TokenBatch, counts: &GlobalCounts) -> Result<Vec<f64>, Error> {
        if self == LossAggMode::SeqMeanTokenSumNorm
            && !(counts.loss_scale_factor > 0.0 && counts.loss_scale_factor.is_finite())
        {
            return Err(Error::setting("loss_scale_factor", counts.loss_scale_factor, "a number above 0"));
        }
        Ok((0..batch.num_rows()).map(|i| self.row_weight(batch.row_len(i), counts)).collect())
    }

    fn row_weight(self, row_len: usize, counts: &GlobalCounts) -> f64 {
        if row_len == 0 {
            return 0.0;
        }
        let sequences = counts.num_sequences as f64;
        match self {
            LossAggMode::TokenMean => 1.0 / counts.num_tokens as f64,
            LossAggMode::TokenSum => 1.0,
            LossAggMode::SeqMeanTokenSum => 1.0 / sequences,
            LossAggMode::SeqMeanTokenSumNorm => 1.0 / sequences / counts.loss_scale_factor,
            LossAggMode::SeqMeanTokenMean => 1.0 / sequences / row_len as f64,
        }
    }
}

/// Aggregate per-token losses: the number, and the weight of every token (`[T]`, 0 where the mask is 0).
///
/// # Errors
/// As [`LossAggMode::row_weights`]; a loss that is not finite.
pub fn agg_loss(
    mode: LossAggMode,
    batch: &TokenBatch,
    losses: &[f64],
    counts: &GlobalCounts,
) -> Result<(f64, Vec<f64>), Error> {
    batch.expect_finite("agg_loss", "losses", losses)?;
    let weights = crate::masked::broadcast(batch, &mode.row_weights(batch, counts)?);
    let active = (0..batch.num_slots()).filter(|t| batch.is_active(*t));
    Ok((active.map(|t| losses[t] * weights[t]).sum(), weights))
}
