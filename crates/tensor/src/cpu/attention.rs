//! Causal attention over the paged cache: one kernel for decode, prefill and training.
//!
//! # Order of summation
//! Of a (row, head), all of it fixed by absolute slots: a score is a chain over ascending d, then times `scale`. Slots
//! are cut into chunks of 512. In a chunk: the exact maximum, exponentials, their sums in 16 lanes (slot mod 16) over
//! ascending tiles joined by the tree, and the weighted values as a chain over ascending slots. Chunks are merged in
//! ascending order, each rescaled by `e^(m - max)`. A slot outside `t - window + 1..=t` is never read into a sum.
//!
//! # Sharing
//! A task is a block of query rows of one key/value head; its query heads share every load of keys and values.

mod tiles;

pub(crate) use tiles::{KvElement, Left, Out, Right, accumulate, scores};

use super::CpuDevice;
use super::kv::{KvData, KvLayout, TILE, check_spans};
use super::math::{exp, ln};
use super::parallel::SharedMut;
use super::reused::with_reused;
use super::simd::{Kernel, Simd};
use crate::{AttnShape, KvCache, SeqSpan};
use std::cell::Cell;
use std::cmp::Ordering;

/// Slots of a chunk.
const CHUNK: usize = 512;
/// Distance between two rows of scores: off a power of two, so that rows do not share cache sets.
const SCORE_STRIDE: usize = CHUNK + 16;
/// (row, head) pairs that a task handles at once.
const PAIRS_PER_TASK: usize = 24;
/// Multiply-adds below which attention runs on the caller.
const INLINE_WORK: usize = 64 * 1024;

thread_local! {
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    static TASKS: Cell<Vec<Task>> = const { Cell::new(Vec::new()) };
}

/// Run `f` with at least `len` floats of the thread's own memory, contents arbitrary.
pub(crate) fn with_scratch<R>(len: usize, f: impl FnOnce(&mut [f32]) -> R) -> R {
    with_reused(&SCRATCH, |scratch| {
        if scratch.len() < len {
            scratch.resize(len, 0.0);
        }
        f(&mut scratch[..len])
    })
}

/// Slots that the row at slot `t` sees.
#[inline(always)]
pub(crate) fn visible(shape: &AttnShape, t: usize) -> (usize, usize) {
    let first = shape.window.map_or(0, |window| (t + 1).saturating_sub(window));
    (first, t + 1)
}

/// Some consecutive rows of one span, and one key/value head.
#[derive(Clone, Copy)]
struct Task {
    span: usize,
    first_row: usize,
    num_rows: usize,
    kv_head: usize,
}

/// Everything that a task reads.
struct Block<'a, E> {
    task: Task,
    span: &'a SeqSpan<'a>,
    shape: &'a AttnShape,
    qkv: &'a [f32],
    data: &'a [E],
    layout: &'a KvLayout,
    layer: usize,
    out: SharedMut<'a, f32>,
    lse: Option<SharedMut<'a, f32>>,
}

/// A task's own memory. Pairs are row-major: pair `row * heads + head`.
struct Scratch {
    /// `[pairs, K]`
    queries: *mut f32,
    /// `[pairs, SCORE_STRIDE]`
    scores: *mut f32,
    /// Weighted values of all chunks so far, `[pairs, K']`.
    sums: *mut f32,
    /// Weighted values of this chunk, `[pairs, K']`.
    chunk_sums: *mut f32,
    /// Largest score and sum of exponentials of all chunks so far, `[pairs]` each.
    max: *mut f32,
    total: *mut f32,
    /// Largest score and sum of exponentials of this chunk, `[pairs, 2]`.
    chunk_stats: *mut [f32; 2],
}

impl Scratch {
    fn len(pairs: usize, layout: &KvLayout) -> usize {
        pairs * (layout.head_dim + SCORE_STRIDE + 2 * layout.value_stride + 4)
    }

    fn split(memory: &mut [f32], pairs: usize, layout: &KvLayout) -> Scratch {
        let (queries, rest) = memory.split_at_mut(pairs * layout.head_dim);
        let (scores, rest) = rest.split_at_mut(pairs * SCORE_STRIDE);
        let (sums, rest) = rest.split_at_mut(pairs * layout.value_stride);
        let (chunk_sums, rest) = rest.split_at_mut(pairs * layout.value_stride);
        let (max, rest) = rest.split_at_mut(pairs);
        let (total, chunk_stats) = rest.split_at_mut(pairs);
        Scratch {
            queries: queries.as_mut_ptr(),
            scores: scores.as_mut_ptr(),
            sums: sums.as_mut_ptr(),
            chunk_sums: chunk_sums.as_mut_ptr(),
            max: max.as_mut_ptr(),
            total: total.as_mut_ptr(),
            chunk_stats: chunk_stats.as_mut_ptr().cast(),
        }
    }
}

impl<E: KvElement> Block<'_, E> {
    fn heads(&self) -> usize {
        self.shape.num_heads / self.shape.num_kv_heads
    }

    fn pairs(&self) -> usize {
        self.task.num_rows * self.heads()
    }

    /// Slot of the block's row `row`.
    fn slot(&self, row: usize) -> usize {
        self.span.first_slot + self.task.first_row + row
    }

    fn batch_row(&self, row: usize) -> usize {
        self.span.row_start + self.task.first_row + row
    }

    fn gather_queries(&self, scratch: &Scratch) {
        let (width, dim, heads) = (self.shape.qkv_dim(), self.shape.head_dim, self.heads());
        for row in 0..self.task.num_rows {
            let start = self.batch_row(row) * width + self.task.kv_head * heads * dim;
            let source = &self.qkv[start..start + heads * dim];
            // SAFETY: `queries` holds `pairs * K` floats, `heads * K` for each row.
            unsafe {
                std::ptr::copy_nonoverlapping(source.as_ptr(), scratch.queries.add(row * heads * dim), heads * dim);
            }
        }
    }

    /// # Safety
    /// The features of `S` are enabled, and `scratch` was split for this block.
    #[inline(always)]
    unsafe fn attend<S: Simd>(&self, scratch: &Scratch) {
        let last = self.slot(self.task.num_rows - 1);
        let (first_seen, _) = visible(self.shape, self.slot(0));
        // SAFETY: every pointer stays inside scratch as split for `pairs`, and tiles inside the checked block table.
        unsafe {
            for pair in 0..self.pairs() {
                *scratch.max.add(pair) = f32::NEG_INFINITY;
                *scratch.total.add(pair) = 0.0;
            }
            for chunk in first_seen / CHUNK..=last / CHUNK {
                let start = chunk * CHUNK;
                let first_tile = first_seen.max(start) / TILE;
                let end_tile = (last + 1).min(start + CHUNK).div_ceil(TILE);
                let mut keys = [self.data.as_ptr(); CHUNK / TILE];
                let mut values = keys;
                for tile in first_tile..end_tile {
                    let offset = self.layout.keys(self.layer, self.span.blocks, tile, self.task.kv_head);
                    keys[tile - start / TILE] = self.data[offset..].as_ptr();
                    values[tile - start / TILE] = self.data[offset + self.layout.values_offset()..].as_ptr();
                }
                let tiles = first_tile - start / TILE..end_tile - start / TILE;
                let dim = self.shape.head_dim;
                let left = Left { ptr: scratch.queries, rows: self.pairs(), row_stride: dim, step: 1 };
                let out = Out { ptr: scratch.scores.add(tiles.start * TILE), row_stride: SCORE_STRIDE };
                scores::<S, E>(left, &keys[tiles], dim, out);
                self.finish_chunk::<S>(scratch, start, &values);
            }
        }
    }

    /// Slots of the chunk at `start` that `row` sees, relative to `start`; empty where first >= end.
    #[inline(always)]
    fn visible_in_chunk(&self, row: usize, start: usize) -> (usize, usize) {
        let (first, end) = visible(self.shape, self.slot(row));
        (first.saturating_sub(start), end.saturating_sub(start).min(CHUNK))
    }

    /// Softmax of every pair, weighted values, and the merge with the chunks before.
    ///
    /// # Safety
    /// As [`Block::attend`]; `values` holds the tiles of the chunk at `start`.
    #[inline(always)]
    unsafe fn finish_chunk<S: Simd>(&self, scratch: &Scratch, start: usize, values: &[*const E]) {
        let (heads, rows, width) = (self.heads(), self.task.num_rows, self.layout.value_stride);
        let right = Right { tiles: values, stride: width, vectors: width / 16 };
        let left = |row: usize, rows: usize| Left {
            ptr: scratch.scores.wrapping_add(row * heads * SCORE_STRIDE),
            rows: rows * heads,
            row_stride: SCORE_STRIDE,
            step: 1,
        };
        let out = |row: usize| Out { ptr: scratch.chunk_sums.wrapping_add(row * heads * width), row_stride: width };
        // SAFETY: pointers stay inside scratch; key ranges are what each row sees, all of it stored.
        unsafe {
            std::ptr::write_bytes(scratch.chunk_sums, 0, self.pairs() * width);
            for row in 0..rows {
                let range = self.visible_in_chunk(row, start);
                for pair in row * heads..(row + 1) * heads {
                    let scores = scratch.scores.add(pair * SCORE_STRIDE);
                    *scratch.chunk_stats.add(pair) = softmax_parts::<S>(scores, range, self.shape.scale);
                }
            }
            // Slots that every row sees share their loads; each row's own slots before and after are added apart, so
            // that the slots of a row still come in ascending order.
            let common = (self.visible_in_chunk(rows - 1, start).0, self.visible_in_chunk(0, start).1);
            let common = if common.0 < common.1 { common } else { (usize::MAX, usize::MAX) };
            for step in 0..2 * rows + 1 {
                let (row, num_rows) = if step == rows { (0, rows) } else { (step % (rows + 1), 1) };
                let (first, end) = self.visible_in_chunk(row, start);
                let keys = match step.cmp(&rows) {
                    Ordering::Less => (first, end.min(common.0)),
                    Ordering::Equal => common,
                    Ordering::Greater => (common.1, end),
                };
                accumulate::<S, E>(left(row, num_rows), right, keys, out(row));
            }
            for pair in 0..self.pairs() {
                merge::<S>(scratch, pair, width);
            }
        }
    }

    /// Divide by the totals and store.
    ///
    /// # Safety
    /// As [`Block::attend`].
    #[inline(always)]
    unsafe fn store<S: Simd>(&self, scratch: &Scratch) {
        let (heads, dim) = (self.heads(), self.shape.head_dim);
        for row in 0..self.task.num_rows {
            for head in 0..heads {
                let pair = row * heads + head;
                let position = self.batch_row(row) * self.shape.num_heads + self.task.kv_head * heads + head;
                // SAFETY: every (row, head) belongs to one task; lanes stop at the head's end.
                unsafe {
                    let (max, total) = (*scratch.max.add(pair), *scratch.total.add(pair));
                    let (sums, share) = (scratch.sums.add(pair * self.layout.value_stride), S::splat(1.0 / total));
                    let out = self.out.range(position * dim..(position + 1) * dim);
                    for d in (0..dim).step_by(16) {
                        let value = S::mul(S::load(sums.add(d)), share);
                        super::math::store_lanes::<S>(out.as_mut_ptr().add(d), dim - d, value);
                    }
                    if let Some(lse) = &self.lse {
                        lse.set(position, (f64::from(max) + ln(f64::from(total))) as f32);
                    }
                }
            }
        }
    }
}

/// Scale the scores, turn those in `first..end` into `e^(s - max)`, and give the maximum and the sum. Scores of the
/// touched tiles outside the range become 0 and join no sum. An empty range gives (-inf, 0).
///
/// # Safety
/// The tiles of `first..end` are readable and writable at `scores`.
#[inline(always)]
unsafe fn softmax_parts<S: Simd>(scores: *mut f32, (first, end): (usize, usize), scale: f32) -> [f32; 2] {
    const LANES: [f32; 16] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
    if first >= end {
        return [f32::NEG_INFINITY, 0.0];
    }
    let tiles = first / TILE * TILE..end;
    // SAFETY: whole tiles, as the caller promised.
    unsafe {
        let (lowest, lanes) = (S::splat(f32::NEG_INFINITY), S::load(LANES.as_ptr()));
        let (first, end) = (S::splat(first as f32), S::splat(end as f32));
        let mut max = lowest;
        for slot in tiles.clone().step_by(TILE) {
            let scaled = S::mul(S::load(scores.add(slot)), S::splat(scale));
            let index = S::add(lanes, S::splat(slot as f32));
            let masked = S::select_lt(index, end, S::select_lt(index, first, lowest, scaled), lowest);
            S::store(scores.add(slot), masked);
            max = S::max(max, masked);
        }
        let max = S::reduce_max(max);
        let mut sum = S::splat(0.0);
        for slot in tiles.step_by(TILE) {
            let weight = exp::<S>(S::sub(S::load(scores.add(slot)), S::splat(max)));
            S::store(scores.add(slot), weight);
            sum = S::add(sum, weight);
        }
        [max, S::reduce_add(sum)]
    }
}

/// Join a chunk's sums of one pair to those before; a chunk of which the row sees nothing leaves every bit alone.
///
/// # Safety
/// As [`Block::attend`].
#[inline(always)]
unsafe fn merge<S: Simd>(scratch: &Scratch, pair: usize, width: usize) {
    // SAFETY: `pair` is inside scratch, whose rows of sums are `width` (a multiple of 16) wide.
    unsafe {
        let [chunk_max, chunk_total] = *scratch.chunk_stats.add(pair);
        if chunk_total == 0.0 {
            return;
        }
        let (max, total) = (scratch.max.add(pair), scratch.total.add(pair));
        let (sums, chunk_sums) = (scratch.sums.add(pair * width), scratch.chunk_sums.add(pair * width));
        if *total == 0.0 {
            (*max, *total) = (chunk_max, chunk_total);
            std::ptr::copy_nonoverlapping(chunk_sums, sums, width);
            return;
        }
        let joint = if chunk_max > *max { chunk_max } else { *max };
        let old = exp::<S>(S::splat(*max - joint));
        let new = exp::<S>(S::splat(chunk_max - joint));
        for d in (0..width).step_by(16) {
            let kept = S::mul(S::load(sums.add(d)), old);
            S::store(sums.add(d), S::fma(S::load(chunk_sums.add(d)), new, kept));
        }
        *max = joint;
        let sum = S::fma(S::splat(chunk_total), new, S::mul(S::splat(*total), old));
        S::store_partial(total, 1, sum);
    }
}

/// A block and its scratch, which is taken outside so that all vector code inlines into the family's function.
struct Attend<'a, E> {
    block: &'a Block<'a, E>,
    scratch: Scratch,
}

impl<E: KvElement> Kernel for Attend<'_, E> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the family's features are enabled, and scratch was split for this block.
        unsafe {
            self.block.attend::<S>(&self.scratch);
            self.block.store::<S>(&self.scratch);
        }
    }
}

fn run_block<E: KvElement>(dev: &CpuDevice, block: &Block<'_, E>) {
    with_scratch(Scratch::len(block.pairs(), block.layout), |memory| {
        let scratch = Scratch::split(memory, block.pairs(), block.layout);
        block.gather_queries(&scratch);
        dev.isa.run(Attend { block, scratch });
    });
}

fn list_tasks(shape: &AttnShape, spans: &[SeqSpan<'_>], tasks: &mut Vec<Task>) {
    let rows_per_task = (PAIRS_PER_TASK / (shape.num_heads / shape.num_kv_heads)).max(1);
    tasks.clear();
    for (index, span) in spans.iter().enumerate() {
        for first_row in (0..span.num_rows).step_by(rows_per_task) {
            let num_rows = rows_per_task.min(span.num_rows - first_row);
            tasks.extend((0..shape.num_kv_heads).map(|kv_head| Task { span: index, first_row, num_rows, kv_head }));
        }
    }
}

/// Multiply-adds of a call, for the choice between one thread and the pool.
fn work(shape: &AttnShape, spans: &[SeqSpan<'_>]) -> usize {
    let pairs: usize = spans.iter().map(|span| span.num_rows * (span.first_slot + span.num_rows)).sum();
    2 * pairs * shape.out_dim()
}

/// Causal attention of query rows over the cache: `out[T, H*K]`, and `lse[T, H]` where asked for.
pub(crate) fn attention(
    dev: &CpuDevice,
    qkv: &[f32],
    (cache, layer): (&KvCache, usize),
    shape: AttnShape,
    spans: &[SeqSpan<'_>],
    (out, lse): (&mut [f32], Option<&mut [f32]>),
) {
    let rows = qkv.len() / shape.qkv_dim();
    check_spans(shape, spans, rows, (cache, layer));
    assert_eq!(out.len(), rows * shape.out_dim(), "output of {rows} rows of {}", shape.out_dim());
    let out = SharedMut::new(out);
    let lse = lse.map(|lse| SharedMut::new(&mut lse[..rows * shape.num_heads]));
    let layout = &cache.pool.layout;
    with_reused(&TASKS, |tasks| {
        list_tasks(&shape, spans, tasks);
        let run_task = |index: usize| {
            let task = tasks[index];
            let (span, shape) = (&spans[task.span], &shape);
            match &cache.pool.data {
                KvData::F32(data) => run_block(dev, &Block { task, span, shape, qkv, data, layout, layer, out, lse }),
                KvData::Bf16(data) => run_block(dev, &Block { task, span, shape, qkv, data, layout, layer, out, lse }),
            }
        };
        if work(&shape, spans) < INLINE_WORK {
            (0..tasks.len()).for_each(run_task);
        } else {
            dev.pool.run(tasks.len(), &run_task);
        }
    });
}
