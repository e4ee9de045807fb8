//! The LM head fused with its softmax: logits exist for a chunk of rows at a time.

mod law;
mod train;

pub(crate) use law::{BLOCK, Laws, MaxOf, Moments, PARTS, Weights, part_ids, shifted};
pub(crate) use train::train;

use super::gemm;
use super::math::{exp, ln, load_lanes, store_lanes};
use super::parallel::SharedMut;
use super::simd::{Kernel, Simd};
use super::{AlignedVec, CpuDevice};
use crate::{LmHead, LmHeadGrad, LmHeadTrain, PackedLinear, RowGrads, Store, TokenStats, View};
use std::sync::{Mutex, PoisonError};

/// Logits of a forward chunk: 16 MiB, which stays in the last-level cache.
const FORWARD_LOGITS: usize = 4 << 20;
/// Logits of a backward chunk: 96 MiB, because every chunk reads and writes the whole gradient of the weight.
pub(super) const BACKWARD_LOGITS: usize = 24 << 20;
/// Rows of a chunk at least, so that the matrix products stay efficient.
const MIN_CHUNK_ROWS: usize = 16;
/// Chunks are multiples of this where they are larger, so that row tiles come out even.
const ROW_TILE: usize = 12;

/// Memory for logits that is kept between calls.
#[derive(Default)]
pub(crate) struct LogitsMemory(Mutex<Option<AlignedVec<f32>>>);

impl LogitsMemory {
    /// Run `f` with `len` floats, contents arbitrary. A second caller at the same time gets memory of its own.
    pub(crate) fn with<R>(&self, len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
        let lock = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = lock().take().filter(|memory| memory.len() >= len);
        let mut memory = kept.unwrap_or_else(|| AlignedVec::zeroed(len));
        let result = f(&mut memory[..len]);
        *lock() = Some(memory);
        result
    }
}

/// Rows of a chunk, of which the last may have fewer: as few chunks as `floats` logits in memory allow, and those even.
/// A function of the vocabulary and the number of rows alone.
fn chunk_rows(floats: usize, vocab: usize, rows: usize) -> usize {
    let most = (floats / vocab.max(1) / ROW_TILE * ROW_TILE).max(MIN_CHUNK_ROWS);
    let even = rows.div_ceil(rows.div_ceil(most).max(1));
    even.next_multiple_of(ROW_TILE).min(most)
}

/// Raw logits of `hidden[rows, D]`, masked ids at minus infinity.
pub(super) fn masked_logits(
    dev: &CpuDevice,
    hidden: &[f32],
    head: &PackedLinear,
    masked_ids: &[u32],
    logits: &mut [f32],
) {
    let vocab = head.shape().n;
    gemm::linear(dev, hidden, head, None, (logits, Store::Write));
    if masked_ids.is_empty() {
        return;
    }
    for row in logits.chunks_exact_mut(vocab) {
        for id in masked_ids {
            row[*id as usize] = f32::NEG_INFINITY;
        }
    }
}

/// Call `f(first row, masked logits of the rows)` for every chunk of rows in ascending order.
pub(crate) fn for_chunks(
    dev: &CpuDevice,
    hidden: &[f32],
    head: &PackedLinear,
    masked_ids: &[u32],
    f: impl FnMut(usize, &mut [f32]),
) {
    for_chunks_of(dev, FORWARD_LOGITS, hidden, (head, masked_ids), f);
}

/// [`for_chunks`] with at most `floats` logits in a chunk, or [`MIN_CHUNK_ROWS`] rows.
pub(super) fn for_chunks_of(
    dev: &CpuDevice,
    floats: usize,
    hidden: &[f32],
    (head, masked_ids): (&PackedLinear, &[u32]),
    mut f: impl FnMut(usize, &mut [f32]),
) {
    let (vocab, dim) = (head.shape().n, head.shape().k);
    let rows = hidden.len() / dim;
    assert_eq!(hidden.len(), rows * dim, "hidden rows of {dim}");
    let chunk = chunk_rows(floats, vocab, rows).min(rows);
    dev.logits.with(chunk * vocab, |memory| {
        for first in (0..rows).step_by(chunk.max(1)) {
            let count = chunk.min(rows - first);
            let logits = &mut memory[..count * vocab];
            masked_logits(dev, &hidden[first * dim..(first + count) * dim], head, masked_ids, logits);
            f(first, logits);
        }
    });
}

fn check(args: &LmHead<'_>) {
    let shape = args.head.shape();
    assert_eq!(args.hidden.len(), args.targets.len() * shape.k, "one target per hidden row of {}", shape.k);
    assert!(args.temperature > 0.0, "temperature {} of log-probs is more than 0", args.temperature);
    assert!(args.targets.iter().all(|&id| (id as usize) < shape.n), "a target lies behind the vocabulary {}", shape.n);
}

/// Log-probs, entropies and sums of squares of targets.
pub(crate) fn stats(dev: &CpuDevice, args: LmHead<'_>) -> TokenStats {
    check(&args);
    let (vocab, inv_temperature) = (args.head.shape().n, 1.0 / args.temperature);
    let mut stats = TokenStats::default();
    for_chunks(dev, args.hidden.data, args.head, args.masked_ids, |first, logits| {
        let laws = Laws::new(dev, logits, &vec![inv_temperature; logits.len() / vocab], Moments::Take);
        add_stats(&mut stats, &laws, logits, (&args.targets[first..], inv_temperature));
    });
    stats
}

/// Add what the laws of some rows say of their targets.
fn add_stats(stats: &mut TokenStats, laws: &Laws, logits: &[f32], (targets, inv_temperature): (&[u32], f32)) {
    let vocab = logits.len() / laws.max.len().max(1);
    for row in 0..laws.max.len() {
        let logit = logits[row * vocab + targets[row] as usize];
        stats.log_probs.push(laws.log_prob(row, logit, inv_temperature));
        stats.entropies.push(laws.entropy(row) as f32);
        stats.sum_squares.push(laws.sum_squares(row) as f32);
    }
}

/// Logits of a range of ids become the gradient of the loss with respect to them, but for the target's part.
struct LogitGrads<'a> {
    logits: &'a mut [f32],
    inv_temperature: f32,
    max: f32,
    log_total: f32,
    inv_total: f32,
    entropy: f32,
    d_log_prob: f32,
    d_entropy: f32,
}

impl Kernel for LogitGrads<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for start in (0..self.logits.len()).step_by(16) {
            let lanes = self.logits.len() - start;
            // SAFETY: lanes stop at the slice's end.
            unsafe {
                let ptr = self.logits.as_mut_ptr().add(start);
                let x = shifted::<S>(load_lanes::<S>(ptr, lanes), self.inv_temperature, self.max);
                let p = S::mul(exp::<S>(x), S::splat(self.inv_total));
                // -dH p (ln p + H) - dlogp p, where ln p stays finite so that p = 0 gives 0.
                let log_p = S::sub(S::max(S::splat(-100.0), x), S::splat(self.log_total));
                let surprise = S::add(log_p, S::splat(self.entropy));
                let factor = S::fma(S::splat(-self.d_entropy), surprise, S::splat(-self.d_log_prob));
                store_lanes::<S>(ptr, lanes, S::mul(S::mul(p, factor), S::splat(self.inv_temperature)));
            }
        }
    }
}

/// `dhidden[T, D]` is written, `dweight[V, D]` added to; logits are recomputed by row chunks. Rows without a gradient
/// take no part: they get zeros and add nothing.
pub(crate) fn grad(dev: &CpuDevice, args: LmHeadGrad<'_>, dhidden: &mut [f32], dweight: &mut [f32]) {
    let LmHeadGrad { forward, weight, d_log_probs, d_entropies } = args;
    check(&forward);
    assert_eq!(dhidden.len(), forward.hidden.len(), "gradient of hidden rows");
    let (dim, num_rows) = (forward.head.shape().k, forward.targets.len());
    let rows = rows_with_gradient((d_log_probs, d_entropies), num_rows);
    let pick = |from: &[f32], rows: &[usize]| rows.iter().filter_map(|row| from.get(*row).copied()).collect();
    let mut known = |asked: std::ops::Range<usize>, _: &TokenStats| RowGrads {
        d_log_probs: pick(d_log_probs, &rows[asked.clone()]),
        d_entropies: pick(d_entropies, &rows[asked]),
    };
    if rows.len() == num_rows {
        train(dev, LmHeadTrain { forward, weight }, &mut known, (dhidden, dweight));
        return;
    }
    let hidden = gather(forward.hidden.data, dim, &rows);
    let targets: Vec<u32> = rows.iter().map(|row| forward.targets[*row]).collect();
    let picked = LmHead { hidden: View { data: &hidden }, targets: &targets, ..forward };
    let mut d_picked = vec![0.0; hidden.len()];
    train(dev, LmHeadTrain { forward: picked, weight }, &mut known, (&mut d_picked, dweight));
    dhidden.fill(0.0);
    scatter(&d_picked, dim, &rows, dhidden);
}

/// `rows` of `from[_, dim]`, one after another.
fn gather(from: &[f32], dim: usize, rows: &[usize]) -> Vec<f32> {
    rows.iter().flat_map(|row| &from[row * dim..(row + 1) * dim]).copied().collect()
}

/// Write rows that follow one another to where `rows` stand in `to[_, dim]`.
fn scatter(from: &[f32], dim: usize, rows: &[usize], to: &mut [f32]) {
    for (row, values) in rows.iter().zip(from.chunks_exact(dim)) {
        to[row * dim..(row + 1) * dim].copy_from_slice(values);
    }
}

/// Which of `count` rows the loss depends on, given its gradients in the rows' log-probs and entropies.
fn rows_with_gradient((d_log_probs, d_entropies): (&[f32], &[f32]), count: usize) -> Vec<usize> {
    assert_eq!(d_log_probs.len(), count, "one log-prob gradient per row");
    assert!(d_entropies.is_empty() || d_entropies.len() == count, "one entropy gradient per row, or none");
    (0..count).filter(|row| d_log_probs[*row] != 0.0 || d_entropies.get(*row).is_some_and(|d| *d != 0.0)).collect()
}

/// Rows whose logits become gradients: some of those that follow `first`, of which all are in `laws` and `outputs`.
#[derive(Clone, Copy)]
struct LogitRows<'a> {
    laws: &'a Laws,
    rows: &'a [usize],
    first: usize,
    /// d loss / d log-prob, and d loss / d entropy or nothing.
    outputs: (&'a [f32], &'a [f32]),
}

/// Turn the logits of some rows into gradients with respect to them.
fn logit_grads(dev: &CpuDevice, forward: &LmHead<'_>, of: LogitRows<'_>, logits: &mut [f32]) {
    let (vocab, inv_temperature) = (forward.head.shape().n, 1.0 / forward.temperature);
    let (laws, (d_log_probs, d_entropies)) = (of.laws, of.outputs);
    let shared = SharedMut::new(logits);
    dev.pool.run(of.rows.len() * PARTS, &|task| {
        let (place, ids) = (task / PARTS, part_ids(vocab, task % PARTS));
        let row = of.rows[place];
        // SAFETY: every (place, part) belongs to one task.
        let logits = unsafe { shared.range(place * vocab + ids.start..place * vocab + ids.end) };
        dev.isa.run(LogitGrads {
            logits,
            inv_temperature,
            max: laws.max[row],
            log_total: ln(laws.total[row]) as f32,
            inv_total: (1.0 / laws.total[row]) as f32,
            entropy: if d_entropies.is_empty() { 0.0 } else { laws.entropy(row) as f32 },
            d_log_prob: d_log_probs[row],
            d_entropy: d_entropies.get(row).copied().unwrap_or(0.0),
        });
    });
    for (row, grads) in of.rows.iter().zip(logits.chunks_exact_mut(vocab)) {
        grads[forward.targets[of.first + row] as usize] += d_log_probs[*row] * inv_temperature;
        for id in forward.masked_ids {
            grads[*id as usize] = 0.0;
        }
    }
}
