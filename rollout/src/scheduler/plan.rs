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
    /// Number of rows; in decode 1 and one for each drafted token that is verified.
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
    /// Draws. At most one per sequence, or one for each of its last token and the drafted ones, in order.
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

    /// Draws, one slice for each sequence: the draw after its known tokens, then one after each drafted token.
    pub fn draws_by_sequence(&self) -> impl Iterator<Item = &[Draw]> {
        self.draws.chunk_by(|a, b| a.key == b.key)
    }

    /// Number of rows.
    pub fn num_rows(&self) -> usize {
        self.work.iter().map(|work| work.num_rows).sum()
    }
}
