//! What one step computes.

use super::SeqKey;
use crate::BlockCopy;

/// Consecutive rows of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// The sequence.
    pub key: SeqKey,
    /// Slot of the first row.
    pub first_slot: usize,
    /// Number of rows; 1 in decode. Verification of a draft is a decode with more rows.
    pub num_rows: usize,
}

/// A token to draw from a computed row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Draw {
    /// The sequence that gets the token.
    pub key: SeqKey,
    /// Row of the batch whose logits decide; often another sequence's where a prompt is shared.
    pub row: u32,
    /// Slot of the drawn token in its sequence; it names the noise.
    pub slot: usize,
}

/// Copies to make, rows to compute and tokens to draw, in this order. Its memory is reused from step to step.
#[derive(Debug, Default)]
pub struct Plan {
    /// Copy-on-write of shared blocks.
    pub copies: Vec<BlockCopy>,
    /// Rows; work item `i` takes the rows of the batch that follow item `i - 1`'s.
    pub work: Vec<Work>,
    /// Draws. At most one per sequence without speculation.
    pub draws: Vec<Draw>,
    /// Sequences that gave up their blocks for this step.
    pub num_preempted: usize,
}

impl Plan {
    pub(super) fn clear(&mut self) {
        self.copies.clear();
        self.work.clear();
        self.draws.clear();
        self.num_preempted = 0;
    }

    /// Number of rows.
    pub fn num_rows(&self) -> usize {
        self.work.iter().map(|work| work.num_rows).sum()
    }
}
