//! Backward of attention over whole sequences: probabilities are recomputed from the log-sum-exp, block by block, so
//! that memory grows with the length of a sequence and not with its square.
//!
//! A task is one key/value head of one span. It walks over blocks of query rows in ascending order and, for each, over
//! chunks of keys in ascending order, which fixes every sum. Keys and values are read as the cache rounded them; their
//! gradients pass the rounding unchanged (straight-through).
//!
//! Rows that stand before the spans of several sequences (a shared prompt) get a gradient of their keys and values
//! from each: a task leaves its part in memory of its own, and the parts are added afterwards, spans ascending.

use super::CpuDevice;
use super::attention::{KvElement, Left, Out, Right, accumulate, scores, visible, with_scratch};
use super::kv::{KvData, KvLayout, TILE, check_spans};
use super::math::{exp, load_lanes};
use super::parallel::{SharedMut, for_ranges};
use super::simd::{Kernel, Simd};
use crate::{AttentionGrad, AttnShape, SeqSpan};
use std::ops::Range;

/// (row, head) pairs of a block of query rows.
const PAIRS: usize = 48;
/// Keys handled at once.
const CHUNK: usize = 256;
const STRIDE: usize = CHUNK + 16;
/// Rows whose shared gradients one task adds up.
const ROWS_PER_SUM: usize = 64;

/// Sizes of one task.
#[derive(Clone, Copy)]
struct Sizes {
    /// Rows of the span.
    rows: usize,
    /// Slots before the span.
    before: usize,
    /// Tiles of 16 keys up to the span's last row.
    tiles: usize,
    /// Query heads of the key/value head.
    heads: usize,
    /// Rows of a block.
    block_rows: usize,
    dim: usize,
    /// K rounded up to 16.
    width: usize,
}

/// A task's own memory.
struct Scratch {
    /// Keys and values dim-major, `[tiles, K, 16]` each, zero behind the last row.
    keys_by_dim: *mut f32,
    values_by_dim: *mut f32,
    /// Keys by slot, `[16 tiles, K']`.
    keys: *mut f32,
    /// Gradients of keys and values, `[16 tiles, K']` each.
    dkeys: *mut f32,
    dvalues: *mut f32,
    /// Of the pairs of a block, `[pairs, K']` each.
    queries: *mut f32,
    douts: *mut f32,
    dqueries: *mut f32,
    /// Probabilities and gradients of scores, `[pairs, STRIDE]` each.
    probs: *mut f32,
    dscores: *mut f32,
    /// `sum(dout * out)` and log-sum-exp of each pair.
    deltas: *mut f32,
    lse: *mut f32,
}

impl Sizes {
    fn lens(&self) -> [usize; 12] {
        let (slots, pairs) = (self.tiles * TILE, self.block_rows * self.heads);
        let (by_dim, by_slot, by_pair) = (slots * self.dim, slots * self.width, pairs * self.width);
        let chunk = pairs * STRIDE;
        [by_dim, by_dim, by_slot, by_slot, by_slot, by_pair, by_pair, by_pair, chunk, chunk, pairs, pairs]
    }

    fn split(&self, mut memory: &mut [f32]) -> Scratch {
        let [keys_by_dim, values_by_dim, keys, dkeys, dvalues, queries, douts, dqueries, probs, dscores, deltas, lse] =
            self.lens().map(|len| {
                let (part, rest) = std::mem::take(&mut memory).split_at_mut(len);
                memory = rest;
                part.as_mut_ptr()
            });
        Scratch {
            keys_by_dim,
            values_by_dim,
            keys,
            dkeys,
            dvalues,
            queries,
            douts,
            dqueries,
            probs,
            dscores,
            deltas,
            lse,
        }
    }
}

/// Addresses of consecutive tiles of `stride` floats.
fn tile_table(first: *const f32, tiles: usize, stride: usize) -> Vec<*const f32> {
    (0..tiles).map(|tile| first.wrapping_add(tile * stride)).collect()
}

/// One task.
struct Task<'a> {
    args: &'a AttentionGrad<'a>,
    span: &'a SeqSpan<'a>,
    kv_head: usize,
    dqkv: SharedMut<'a, f32>,
    /// Gradients of keys and values of the slots before the span, of the slots that it sees: `[slots, 2, K]`.
    part: &'a mut [f32],
    sizes: Sizes,
    scratch: Scratch,
    keys_by_dim: Vec<*const f32>,
    values_by_dim: Vec<*const f32>,
    keys: Vec<*const f32>,
    queries: Vec<*const f32>,
    douts: Vec<*const f32>,
}

/// Copies keys and values out of the cache, zero behind the last row, and clears their gradients.
struct Gather<'a, E> {
    task: &'a Task<'a>,
    data: &'a [E],
    layout: &'a KvLayout,
}

impl<E: KvElement> Kernel for Gather<'_, E> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Sizes { rows, before, tiles, dim, width, .. } = self.task.sizes;
        let scratch = &self.task.scratch;
        // SAFETY: tiles lie inside the checked block table; destinations inside scratch.
        unsafe {
            let slots = tiles * TILE;
            std::ptr::write_bytes(scratch.dkeys, 0, slots * width);
            std::ptr::write_bytes(scratch.dvalues, 0, slots * width);
            std::ptr::write_bytes(scratch.keys, 0, slots * width);
            std::ptr::write_bytes(scratch.values_by_dim, 0, slots * dim);
            for tile in 0..tiles {
                let stored = TILE.min(before + rows - tile * TILE);
                let offset = self.layout.keys(self.task.args.layer, self.task.span.blocks, tile, self.task.kv_head);
                let source = self.data[offset..].as_ptr();
                let by_dim = scratch.keys_by_dim.add(tile * TILE * dim);
                let mut lanes = [0f32; TILE];
                for d in 0..dim {
                    S::store(lanes.as_mut_ptr(), E::load::<S>(source.add(d * TILE)));
                    lanes[stored..].fill(0.0);
                    S::store(by_dim.add(d * TILE), S::load(lanes.as_ptr()));
                    for (slot, x) in lanes.iter().enumerate() {
                        *scratch.keys.add((tile * TILE + slot) * width + d) = *x;
                    }
                }
                let values = source.add(self.layout.values_offset());
                let by_dim = scratch.values_by_dim.add(tile * TILE * dim);
                for slot in 0..stored {
                    for first in (0..dim).step_by(16) {
                        S::store(lanes.as_mut_ptr(), E::load::<S>(values.add(slot * width + first)));
                        for (d, x) in lanes.iter().enumerate().take(dim - first) {
                            *by_dim.add((first + d) * TILE + slot) = *x;
                        }
                    }
                }
            }
        }
    }
}

impl Task<'_> {
    /// First query head's element of `row` in a `[T, H*K]` or fused row.
    fn query_start(&self, row: usize, width: usize) -> usize {
        (self.span.row_start + row) * width + self.kv_head * self.sizes.heads * self.sizes.dim
    }

    /// Queries, output gradients, deltas and log-sum-exps of the block of `rows` from `first` on.
    ///
    /// # Safety
    /// The features of `S` are enabled, and scratch has the task's sizes.
    #[inline(always)]
    unsafe fn load_block<S: Simd>(&self, first: usize, rows: usize) {
        let Sizes { heads, dim, width, .. } = self.sizes;
        let (args, shape) = (self.args, self.args.shape);
        for row in 0..rows {
            let q_row = &args.qkv.data[self.query_start(first + row, shape.qkv_dim())..][..heads * dim];
            let out_start = self.query_start(first + row, shape.out_dim());
            let dout_row = &args.dout.data[out_start..][..heads * dim];
            let out_row = &args.out.data[out_start..][..heads * dim];
            let lse_start = (self.span.row_start + first + row) * shape.num_heads + self.kv_head * heads;
            for head in 0..heads {
                let pair = row * heads + head;
                // SAFETY: lanes stop at the head's end; `pair` is inside scratch.
                unsafe {
                    let mut delta = S::splat(0.0);
                    for d in (0..dim).step_by(16) {
                        let source = head * dim + d;
                        let dout = load_lanes::<S>(dout_row.as_ptr().add(source), dim - d);
                        let out = load_lanes::<S>(out_row.as_ptr().add(source), dim - d);
                        delta = S::fma(dout, out, delta);
                        let query = load_lanes::<S>(q_row.as_ptr().add(source), dim - d);
                        S::store(self.scratch.queries.add(pair * width + d), query);
                        S::store(self.scratch.douts.add(pair * width + d), dout);
                        S::store(self.scratch.dqueries.add(pair * width + d), S::splat(0.0));
                    }
                    *self.scratch.deltas.add(pair) = S::reduce_add(delta);
                    *self.scratch.lse.add(pair) = args.lse.data[lse_start + head];
                }
            }
        }
    }

    /// One block of query rows against one chunk of keys (`tiles` of the sequence).
    ///
    /// # Safety
    /// As [`Task::load_block`], which came before.
    #[inline(always)]
    unsafe fn block_by_chunk<S: Simd>(&self, (first, rows): (usize, usize), tiles: Range<usize>) {
        let Sizes { before, heads, dim, width, .. } = self.sizes;
        let (pairs, vectors, keys) = (rows * heads, width / 16, tiles.len() * TILE);
        let by_pair = |ptr: *mut f32| Left { ptr, rows: pairs, row_stride: width, step: 1 };
        let by_key = |ptr: *mut f32| Left { ptr, rows: keys, row_stride: 1, step: STRIDE };
        let chunk = |ptr: *mut f32| Out { ptr, row_stride: STRIDE };
        let scratch = &self.scratch;
        // SAFETY: pairs and tiles are inside scratch; keys behind the last row are zero.
        unsafe {
            let (k, v) = (&self.keys_by_dim[tiles.clone()], &self.values_by_dim[tiles.clone()]);
            let operands = [(scratch.queries, k, scratch.probs), (scratch.douts, v, scratch.dscores)];
            for (rows, tiles, target) in operands {
                scores::<S, f32>(by_pair(rows), tiles, dim, chunk(target));
            }
            for pair in 0..pairs {
                let (seen, end) = visible(&self.args.shape, before + first + pair / heads);
                let start = tiles.start * TILE;
                self.score_grads::<S>(pair, (seen as f32 - start as f32, end as f32 - start as f32), keys);
            }
            // dQ += dS K, dK += dS^T Q, dV += P^T dO
            let slots = tiles.start * TILE * width;
            let by_pair = Left { ptr: scratch.dscores, rows: pairs, row_stride: STRIDE, step: 1 };
            let products = [
                (by_pair, &self.keys[tiles.clone()], keys, scratch.dqueries),
                (by_key(scratch.dscores), &self.queries[..], pairs, scratch.dkeys.add(slots)),
                (by_key(scratch.probs), &self.douts[..], pairs, scratch.dvalues.add(slots)),
            ];
            for (left, tiles, depth, target) in products {
                let out = Out { ptr: target, row_stride: width };
                accumulate::<S, f32>(left, Right { tiles, stride: width, vectors }, (0, depth), out);
            }
        }
    }

    /// From scores and `dout V^T` of a pair: probabilities and gradients of scores; both 0 outside `seen..end`.
    ///
    /// # Safety
    /// As [`Task::block_by_chunk`].
    #[inline(always)]
    unsafe fn score_grads<S: Simd>(&self, pair: usize, (seen, end): (f32, f32), keys: usize) {
        const LANES: [f32; 16] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
        // SAFETY: `keys` columns of row `pair` are inside scratch.
        unsafe {
            let (probs, dscores) = (self.scratch.probs.add(pair * STRIDE), self.scratch.dscores.add(pair * STRIDE));
            let scale = S::splat(self.args.shape.scale);
            let (lse, delta) = (S::splat(*self.scratch.lse.add(pair)), S::splat(*self.scratch.deltas.add(pair)));
            let (lanes, zero) = (S::load(LANES.as_ptr()), S::splat(0.0));
            for key in (0..keys).step_by(TILE) {
                let index = S::add(lanes, S::splat(key as f32));
                let prob = exp::<S>(S::sub(S::mul(S::load(probs.add(key)), scale), lse));
                let dscore = S::mul(S::mul(prob, S::sub(S::load(dscores.add(key)), delta)), scale);
                for (target, x) in [(probs, prob), (dscores, dscore)] {
                    let from_first = S::select_lt(index, S::splat(seen), zero, x);
                    S::store(target.add(key), S::select_lt(index, S::splat(end), from_first, zero));
                }
            }
        }
    }

    /// Write the block's query gradients to the fused rows.
    fn store_queries(&self, first: usize, rows: usize) {
        let Sizes { heads, dim, width, .. } = self.sizes;
        for row in 0..rows {
            let start = self.query_start(first + row, self.args.shape.qkv_dim());
            // SAFETY: the query heads of a key/value head belong to one task; pairs are inside scratch.
            unsafe {
                let target = self.dqkv.range(start..start + heads * dim).as_mut_ptr();
                for head in 0..heads {
                    let source = self.scratch.dqueries.add((row * heads + head) * width);
                    std::ptr::copy_nonoverlapping(source, target.add(head * dim), dim);
                }
            }
        }
    }

    /// Write the gradients of keys and values: of the span's rows to the fused rows, of the slots before it to `part`.
    fn store_keys_and_values(&mut self) {
        let (shape, Sizes { rows, before, dim, width, .. }) = (self.args.shape, self.sizes);
        let Scratch { dkeys, dvalues, .. } = self.scratch;
        let (seen, _) = visible(&shape, before);
        for (slot, both) in (seen..before).zip(self.part.chunks_exact_mut(2 * dim)) {
            for (source, target) in [dkeys, dvalues].into_iter().zip(both.chunks_exact_mut(dim)) {
                // SAFETY: `slot` is inside scratch, which this task owns.
                unsafe { target.copy_from_slice(std::slice::from_raw_parts(source.add(slot * width), dim)) };
            }
        }
        for row in 0..rows {
            let starts = kv_columns(&shape, self.span.row_start + row, self.kv_head);
            for (source, start) in [dkeys, dvalues].into_iter().zip(starts) {
                // SAFETY: the columns of a key/value head belong to one task; slots are inside scratch.
                unsafe {
                    let target = self.dqkv.range(start..start + dim).as_mut_ptr();
                    std::ptr::copy_nonoverlapping(source.add((before + row) * width), target, dim);
                }
            }
        }
    }
}

/// Where the keys and the values of a row's key/value head begin in the fused rows.
fn kv_columns(shape: &AttnShape, row: usize, kv_head: usize) -> [usize; 2] {
    let keys = row * shape.qkv_dim() + (shape.num_heads + kv_head) * shape.head_dim;
    [keys, keys + shape.num_kv_heads * shape.head_dim]
}

impl Kernel for &mut Task<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Sizes { rows, before, block_rows, .. } = self.sizes;
        // SAFETY: the family's features are enabled, and scratch has the task's sizes.
        unsafe {
            for first in (0..rows).step_by(block_rows) {
                let count = block_rows.min(rows - first);
                self.load_block::<S>(first, count);
                let (seen, _) = visible(&self.args.shape, before + first);
                let end_tile = (before + first + count).div_ceil(TILE);
                let mut tile = seen / TILE;
                while tile < end_tile {
                    let chunk_end = (tile / (CHUNK / TILE) + 1) * (CHUNK / TILE);
                    self.block_by_chunk::<S>((first, count), tile..chunk_end.min(end_tile));
                    tile = chunk_end;
                }
                self.store_queries(first, count);
            }
        }
        self.store_keys_and_values();
    }
}

/// The parts of all tasks that a later pass adds up.
struct Parts<'a> {
    args: &'a AttentionGrad<'a>,
    /// Where the parts of each span begin; those of its key/value heads follow one another.
    starts: Vec<usize>,
    len: usize,
}

impl<'a> Parts<'a> {
    fn new(args: &'a AttentionGrad<'a>) -> Self {
        let mut parts = Parts { args, starts: Vec::with_capacity(args.spans.len()), len: 0 };
        for span in 0..args.spans.len() {
            parts.starts.push(parts.len);
            parts.len += args.shape.num_kv_heads * parts.head_len(span);
        }
        parts
    }

    /// Slots before the span that its first row sees, and with it all that any of its rows sees.
    fn slots(&self, span: usize) -> Range<usize> {
        let before = self.args.spans[span].first_slot;
        visible(&self.args.shape, before).0.min(before)..before
    }

    fn head_len(&self, span: usize) -> usize {
        if self.args.spans[span].num_rows == 0 { 0 } else { self.slots(span).len() * 2 * self.args.shape.head_dim }
    }

    fn range(&self, span: usize, kv_head: usize) -> Range<usize> {
        let (start, len) = (self.starts[span], self.head_len(span));
        start + kv_head * len..start + (kv_head + 1) * len
    }

    /// Add what all spans hold of the gradients of keys and values of `rows`, spans ascending.
    fn add_to(&self, memory: &[f32], rows: Range<usize>, dqkv: SharedMut<'_, f32>) {
        let (shape, dim) = (&self.args.shape, self.args.shape.head_dim);
        let outside = |prefix: &[u32]| match prefix {
            [first, .., last] => *first as usize >= rows.end || (*last as usize) < rows.start,
            one => one.first().is_none_or(|row| !rows.contains(&(*row as usize))),
        };
        for (index, prefix) in self.args.prefixes.iter().enumerate() {
            if outside(prefix) || self.head_len(index) == 0 {
                continue;
            }
            let slots = self.slots(index);
            let first = prefix.partition_point(|row| (*row as usize) < rows.start);
            let end = prefix.partition_point(|row| (*row as usize) < rows.end);
            for slot in first.max(slots.start)..end {
                for kv_head in 0..shape.num_kv_heads {
                    let part = &memory[self.range(index, kv_head)][(slot - slots.start) * 2 * dim..][..2 * dim];
                    let starts = kv_columns(shape, prefix[slot] as usize, kv_head);
                    for (source, start) in part.chunks_exact(dim).zip(starts) {
                        // SAFETY: the rows of different tasks are disjoint.
                        let target = unsafe { dqkv.range(start..start + dim) };
                        target.iter_mut().zip(source).for_each(|(sum, x)| *sum += x);
                    }
                }
            }
        }
    }
}

/// What one task writes.
struct Outputs<'a> {
    dqkv: SharedMut<'a, f32>,
    part: &'a mut [f32],
}

fn run_task<E: KvElement>(
    dev: &CpuDevice,
    args: &AttentionGrad<'_>,
    (span, kv_head): (&SeqSpan<'_>, usize),
    data: &[E],
    outputs: Outputs<'_>,
) {
    let layout = &args.cache.pool.layout;
    let (heads, dim) = (args.shape.num_heads / args.shape.num_kv_heads, args.shape.head_dim);
    let (rows, before, block_rows, width) =
        (span.num_rows, span.first_slot, (PAIRS / heads).max(1), layout.value_stride);
    let sizes = Sizes { rows, before, tiles: (before + rows).div_ceil(TILE), heads, block_rows, dim, width };
    with_scratch(sizes.lens().iter().sum(), |memory| {
        let scratch = sizes.split(memory);
        let pair_tiles = (block_rows * heads).div_ceil(TILE);
        let mut task = Task {
            keys_by_dim: tile_table(scratch.keys_by_dim, sizes.tiles, TILE * dim),
            values_by_dim: tile_table(scratch.values_by_dim, sizes.tiles, TILE * dim),
            keys: tile_table(scratch.keys, sizes.tiles, TILE * width),
            queries: tile_table(scratch.queries, pair_tiles, TILE * width),
            douts: tile_table(scratch.douts, pair_tiles, TILE * width),
            args,
            span,
            kv_head,
            dqkv: outputs.dqkv,
            part: outputs.part,
            sizes,
            scratch,
        };
        dev.isa.run(Gather { task: &task, data, layout });
        dev.isa.run(&mut task);
    });
}

/// Assert that the arguments fit together, so that tasks may trust them.
fn check(args: &AttentionGrad<'_>, rows: usize, dqkv: &[f32]) {
    let shape = args.shape;
    check_spans(shape, args.spans, rows, (args.cache, args.layer));
    assert_eq!(dqkv.len(), args.qkv.len(), "gradient of {rows} fused rows");
    assert!(args.out.len() == rows * shape.out_dim() && args.dout.len() == args.out.len(), "outputs of {rows} rows");
    assert_eq!(args.lse.len(), rows * shape.num_heads, "log-sum-exps of {rows} rows");
    assert_eq!(args.prefixes.len(), args.spans.len(), "rows before each of the spans");
    for (span, prefix) in args.spans.iter().zip(args.prefixes) {
        assert_eq!(prefix.len(), span.first_slot, "rows that stand before {span:?}");
        let ascending = prefix.windows(2).all(|two| two[0] < two[1]);
        assert!(ascending && prefix.last().is_none_or(|row| (*row as usize) < rows), "rows that stand before {span:?}");
    }
}

/// Gradient with respect to the fused rows (queries, keys and values after RoPE) of every span, written.
///
/// # Panics
/// If the parts of `args` disagree.
pub(crate) fn attention_grad(dev: &CpuDevice, args: AttentionGrad<'_>, dqkv: &mut [f32]) {
    let shape = args.shape;
    let rows = args.qkv.len() / shape.qkv_dim();
    check(&args, rows, dqkv);
    let spans: Vec<usize> = (0..args.spans.len()).filter(|index| args.spans[*index].num_rows > 0).collect();
    let parts = Parts::new(&args);
    let mut memory = vec![0.0; parts.len];
    let (dqkv, shared) = (SharedMut::new(dqkv), SharedMut::new(&mut memory));
    dev.pool.run(spans.len() * shape.num_kv_heads, &|index| {
        let (span, kv_head) = (spans[index / shape.num_kv_heads], index % shape.num_kv_heads);
        // SAFETY: every task has a range of its own.
        let outputs = Outputs { dqkv, part: unsafe { shared.range(parts.range(span, kv_head)) } };
        let task = (&args.spans[span], kv_head);
        match &args.cache.pool.data {
            KvData::F32(data) => run_task(dev, &args, task, data, outputs),
            KvData::Bf16(data) => run_task(dev, &args, task, data, outputs),
        }
    });
    if parts.len > 0 {
        for_ranges(dev, rows, ROWS_PER_SUM, |rows| parts.add_to(&memory, rows, dqkv));
    }
}
