//! Forward, loss and backward of the LM head in one walk over the rows.
//!
//! A block of rows goes from hidden state to logits, laws, the loss's word and gradients of the logits while it is in
//! the last-level cache. Gradients of rows that have any gather in memory until a backward chunk is full, because
//! every chunk reads and writes the whole gradient of the weight.

use super::{BACKWARD_LOGITS, FORWARD_LOGITS, add_stats, check, chunk_rows, logit_grads, masked_logits};
use super::{Laws, LogitRows, Moments, gather, rows_with_gradient, scatter};
use crate::cpu::{CpuDevice, gemm};
use crate::{LmHead, LmHeadTrain, RowLoss, Store, TokenStats};

/// Gradients of logits that wait for their matrix products.
struct Chunk<'a> {
    memory: &'a mut [f32],
    /// Which row of the batch each row of the memory is of, ascending.
    rows: Vec<usize>,
}

/// `dhidden[T, D]` is written, `dweight[V, D]` added to; every logit is computed once.
pub(crate) fn train(
    dev: &CpuDevice,
    args: LmHeadTrain<'_>,
    loss: &mut RowLoss<'_>,
    (dhidden, dweight): (&mut [f32], &mut [f32]),
) -> TokenStats {
    let forward = args.forward;
    check(&forward);
    assert_eq!(dhidden.len(), forward.hidden.len(), "gradient of hidden rows");
    let (vocab, num_rows) = (forward.head.shape().n, forward.targets.len());
    let block = chunk_rows(FORWARD_LOGITS, vocab, num_rows).clamp(1, num_rows.max(1));
    let capacity = chunk_rows(BACKWARD_LOGITS, vocab, num_rows).min(num_rows).next_multiple_of(block);
    let mut stats = TokenStats::default();
    dhidden.fill(0.0);
    dev.logits.with(capacity * vocab, |memory| {
        let mut chunk = Chunk { memory, rows: Vec::with_capacity(capacity) };
        for first in (0..num_rows).step_by(block) {
            let count = block.min(num_rows - first);
            if chunk.rows.len() + count > capacity {
                chunk.multiply(dev, &args, (&mut *dhidden, &mut *dweight));
            }
            chunk.add_block(dev, &forward, (first, count), (loss, &mut stats));
        }
        chunk.multiply(dev, &args, (&mut *dhidden, &mut *dweight));
    });
    stats
}

impl Chunk<'_> {
    /// Take in the gradients of `count` rows from `first` on, but for rows that have none.
    fn add_block(
        &mut self,
        dev: &CpuDevice,
        forward: &LmHead<'_>,
        (first, count): (usize, usize),
        (loss, stats): (&mut RowLoss<'_>, &mut TokenStats),
    ) {
        let (shape, inv_temperature) = (forward.head.shape(), 1.0 / forward.temperature);
        let hidden = &forward.hidden.data[first * shape.k..(first + count) * shape.k];
        let start = self.rows.len() * shape.n;
        let logits = &mut self.memory[start..start + count * shape.n];
        masked_logits(dev, hidden, forward.head, forward.masked_ids, logits);
        let laws = Laws::new(dev, logits, &vec![inv_temperature; count], Moments::Take);
        let mut said = TokenStats::default();
        add_stats(&mut said, &laws, logits, (&forward.targets[first..], inv_temperature));
        let grads = loss(first..first + count, &said);
        let rows = rows_with_gradient((&grads.d_log_probs, &grads.d_entropies), count);
        for (place, row) in rows.iter().enumerate().filter(|(place, row)| place != *row) {
            logits.copy_within(row * shape.n..(row + 1) * shape.n, place * shape.n);
        }
        let of = LogitRows { laws: &laws, rows: &rows, first, outputs: (&grads.d_log_probs, &grads.d_entropies) };
        logit_grads(dev, forward, of, &mut logits[..rows.len() * shape.n]);
        self.rows.extend(rows.iter().map(|row| first + row));
        stats.log_probs.extend(said.log_probs);
        stats.entropies.extend(said.entropies);
        stats.sum_squares.extend(said.sum_squares);
    }

    /// Multiply out what has gathered, and forget it.
    fn multiply(&mut self, dev: &CpuDevice, args: &LmHeadTrain<'_>, (dhidden, dweight): (&mut [f32], &mut [f32])) {
        let (head, all) = (args.forward.head, args.forward.hidden.data);
        let (dim, logits) = (head.shape().k, &self.memory[..self.rows.len() * head.shape().n]);
        let rows = std::mem::take(&mut self.rows);
        let Some((first, last)) = rows.first().zip(rows.last()) else { return };
        if last - first + 1 == rows.len() {
            let span = first * dim..(last + 1) * dim;
            gemm::input_grad(dev, logits, args.weight.data, head, (&mut dhidden[span.clone()], Store::Write));
            gemm::weight_grad(dev, (logits, &all[span]), head.shape(), head.dtype(), dweight);
            return;
        }
        let hidden = gather(all, dim, &rows);
        let mut picked = vec![0.0; hidden.len()];
        gemm::input_grad(dev, logits, args.weight.data, head, (&mut picked, Store::Write));
        gemm::weight_grad(dev, (logits, &hidden), head.shape(), head.dtype(), dweight);
        scatter(&picked, dim, &rows, dhidden);
    }
}
