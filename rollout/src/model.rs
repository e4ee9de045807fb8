//! What the engine needs of a model, so that scheduling can be tested without one.

use crate::{BlockCopy, Error};
use temper_tensor::{SampleRow, Sampled, SeqSpan};
use temper_types::{DType, PolicyVersion};

/// What a model can take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelLimits {
    /// V, number of token ids.
    pub vocab_size: usize,
    /// Number of ids that can be drawn: those that are not masked.
    pub num_drawable_ids: usize,
    /// Positions that a sequence may have, prompt and response together.
    pub max_positions: usize,
    /// Number format of stored K/V.
    pub kv_dtype: DType,
}

/// The rows of one engine step, and which of them a token is drawn from.
#[derive(Debug, Clone, Copy)]
pub struct StepBatch<'a> {
    /// Token of each row, `[T]`.
    pub token_ids: &'a [u32],
    /// Position of each row in its sequence, `[T]`.
    pub positions: &'a [u32],
    /// Which rows belong to which sequence; they cover the rows in order.
    pub spans: &'a [SeqSpan<'a>],
    /// Row of each draw; a row may occur many times (the siblings of a group draw from one prompt row).
    pub draw_rows: &'a [u32],
    /// How each draw is made, one per entry of `draw_rows`.
    pub draws: &'a [SampleRow<'a>],
}

/// What one step gave.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepOutput {
    /// The weights that computed it.
    pub version: PolicyVersion,
    /// One token per draw.
    pub sampled: Vec<Sampled>,
}

/// A causal model over a paged K/V pool of its own. The output of a row depends only on the weights and on the tokens
/// at slots `0..=t` of its sequence, as stored through its block table.
pub trait Model: Send {
    /// What the model can take.
    fn limits(&self) -> ModelLimits;

    /// True where `id`, below the limits' `vocab_size`, is masked: it has no mass and is never drawn.
    fn is_masked(&self, id: u32) -> bool {
        let _ = id;
        false
    }

    /// The weights that the next step would run.
    ///
    /// # Errors
    /// Where the weights cannot be read.
    fn version(&self) -> Result<PolicyVersion, Error>;

    /// Copy blocks of the pool, in order.
    fn copy_blocks(&mut self, copies: &[BlockCopy]);

    /// Store K/V of every row, then compute every row and draw; `output` is overwritten.
    ///
    /// # Errors
    /// Where the weights cannot be read; nothing the engine relies on has changed then.
    fn step(&mut self, batch: StepBatch<'_>, output: &mut StepOutput) -> Result<(), Error>;

    /// Give the pool's memory back; the next step takes it anew. Only while no sequence runs: what it held is lost.
    /// Gives the number of bytes.
    fn release_kv(&mut self) -> usize {
        0
    }

    /// Draw again from rows of the last [`Model::step`].
    ///
    /// # Errors
    /// Where the weights cannot be read.
    fn draw_again(&mut self, draw_rows: &[u32], draws: &[SampleRow<'_>]) -> Result<Vec<Sampled>, Error>;
}
