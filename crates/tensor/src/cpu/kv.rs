//! Storage of the paged cache.
//!
//! A block of `block_size` slots is `block_size / 16` tiles, and a tile holds for each key/value head its keys
//! dim-major, `[K][16 slots]`, then its values, `[16 slots][K']`, with K' = K rounded up to 16. Attention walks over
//! tiles, so its numbers do not depend on the block size. Memory that was never written is zero or stale; no kernel
//! reads a slot behind a row's own.

use super::attention::KvElement;
use super::math::load_lanes;
use super::parallel::SharedMut;
use super::reused::with_reused;
use super::simd::{Kernel, Simd};
use super::{AlignedVec, CpuDevice};
use crate::{AttnShape, KvCache, KvCacheSpec, SeqSpan};
use std::cell::Cell;
use std::ops::Range;
use temper_types::DType;

/// Slots in a tile.
pub(crate) const TILE: usize = 16;
/// Elements of a job below which appending runs on the caller. Slots of different sequences share no cache line, so
/// that a few of them already take longer than it takes to start a job.
const INLINE_ELEMENTS: usize = 4 * 1024;

/// The pool's memory in its own format.
pub(crate) enum KvData {
    F32(AlignedVec<f32>),
    Bf16(AlignedVec<u16>),
}

/// Where things lie, in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct KvLayout {
    /// K.
    pub(crate) head_dim: usize,
    /// K rounded up to 16: the distance between two slots' values.
    pub(crate) value_stride: usize,
    /// Keys and values of one head in one tile.
    head_elements: usize,
    tile_elements: usize,
    tiles_per_block: usize,
    num_blocks: usize,
}

impl KvLayout {
    fn new(spec: &KvCacheSpec) -> Self {
        let value_stride = spec.head_dim.next_multiple_of(16);
        let head_elements = TILE * (spec.head_dim + value_stride);
        KvLayout {
            head_dim: spec.head_dim,
            value_stride,
            head_elements,
            tile_elements: spec.num_kv_heads * head_elements,
            tiles_per_block: spec.block_size / TILE,
            num_blocks: spec.num_blocks,
        }
    }

    fn block_elements(&self) -> usize {
        self.tiles_per_block * self.tile_elements
    }

    /// Offset of a head's keys in tile `tile` of a sequence; its values follow [`KvLayout::values_offset`] later.
    #[inline(always)]
    pub(crate) fn keys(&self, layer: usize, blocks: &[u32], tile: usize, kv_head: usize) -> usize {
        let block = blocks[tile / self.tiles_per_block] as usize;
        debug_assert!(block < self.num_blocks, "block {block} of {}", self.num_blocks);
        ((layer * self.num_blocks + block) * self.tiles_per_block + tile % self.tiles_per_block) * self.tile_elements
            + kv_head * self.head_elements
    }

    /// Distance from a head's keys to its values within a tile.
    pub(crate) fn values_offset(&self) -> usize {
        TILE * self.head_dim
    }
}

/// The CPU's cache: one allocation for all layers.
pub(crate) struct CpuKvPool {
    pub(crate) data: KvData,
    pub(crate) layout: KvLayout,
}

impl CpuKvPool {
    pub(crate) fn new(spec: &KvCacheSpec) -> Self {
        assert!(
            spec.block_size > 0 && spec.block_size.is_multiple_of(TILE),
            "block_size is a multiple of 16: {spec:?}"
        );
        let layout = KvLayout::new(spec);
        let len = spec.num_layers * spec.num_blocks * layout.block_elements();
        let data = match spec.dtype {
            DType::F32 => KvData::F32(AlignedVec::zeroed(len)),
            DType::Bf16 => KvData::Bf16(AlignedVec::zeroed(len)),
        };
        CpuKvPool { data, layout }
    }
}

/// Assert that spans name rows of the batch and blocks of the cache, so that kernels may trust them.
pub(crate) fn check_spans(shape: AttnShape, spans: &[SeqSpan<'_>], rows: usize, (cache, layer): (&KvCache, usize)) {
    let spec = &cache.spec;
    assert!(layer < spec.num_layers, "layer {layer} of {}", spec.num_layers);
    assert_eq!((shape.num_kv_heads, shape.head_dim), (spec.num_kv_heads, spec.head_dim), "heads of {spec:?}");
    assert_eq!(shape.num_heads % shape.num_kv_heads, 0, "query heads per key/value head");
    for span in spans {
        assert!(span.row_start + span.num_rows <= rows, "span {span:?} of {rows} rows");
        let needed = (span.first_slot + span.num_rows).div_ceil(spec.block_size);
        assert!(span.blocks.len() >= needed, "span needs {needed} blocks of {}: {span:?}", spec.block_size);
        let known = span.blocks[..needed].iter().all(|&block| (block as usize) < spec.num_blocks);
        assert!(known, "a block of {span:?} lies behind the cache's {}", spec.num_blocks);
    }
}

/// Rows of one span whose keys and values, of all heads, go to their slots.
struct Append<'a, E> {
    data: SharedMut<'a, E>,
    layout: &'a KvLayout,
    shape: &'a AttnShape,
    layer: usize,
    span: &'a SeqSpan<'a>,
    /// Rows of the span.
    offsets: Range<usize>,
    /// Fused rows of the batch.
    qkv: &'a [f32],
}

impl<E: KvElement> Kernel for Append<'_, E> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (shape, dim, width) = (self.shape, self.shape.head_dim, self.shape.qkv_dim());
        for offset in self.offsets.clone() {
            let row = self.span.row_start + offset;
            let row = &self.qkv[row * width..(row + 1) * width];
            let (keys, values) = row[shape.num_heads * dim..].split_at(shape.num_kv_heads * dim);
            let slot = self.span.first_slot + offset;
            for kv_head in 0..shape.num_kv_heads {
                let head = kv_head * dim..(kv_head + 1) * dim;
                let base = self.layout.keys(self.layer, self.span.blocks, slot / TILE, kv_head);
                // SAFETY: the lanes' features are the caller's promise; every slot belongs to one row.
                unsafe { self.store::<S>((&keys[head.clone()], &values[head]), base, slot % TILE) }
            }
        }
    }
}

impl<E: KvElement> Append<'_, E> {
    /// One head's key and value to slot `lane` of the tile at `base`.
    ///
    /// # Safety
    /// As every method of [`Simd`]; no other task writes the slot.
    #[inline(always)]
    unsafe fn store<S: Simd>(&self, (key, value): (&[f32], &[f32]), base: usize, lane: usize) {
        let first = base + self.layout.values_offset() + lane * self.layout.value_stride;
        for d in (0..key.len()).step_by(16) {
            let lanes = (key.len() - d).min(16);
            let mut rounded = [E::default(); 16];
            // SAFETY: `lanes` numbers are left in both slices, the array holds 16, and a slot's values have room for
            // whole vectors, whose last numbers stay 0; `ptr_at` checks the bound of a key's last number.
            unsafe {
                E::store::<S>(rounded.as_mut_ptr(), load_lanes::<S>(key.as_ptr().add(d), lanes));
                self.data.ptr_at(base + (d + lanes - 1) * TILE + lane);
                let keys = self.data.ptr_at(base + d * TILE + lane);
                for (i, number) in rounded[..lanes].iter().enumerate() {
                    keys.add(i * TILE).write(*number);
                }
                let values = self.data.range(first + d..first + d + 16);
                E::store::<S>(values.as_mut_ptr(), load_lanes::<S>(value.as_ptr().add(d), lanes));
            }
        }
    }
}

/// Store keys and values of fused rows at their slots, rounded to the cache's dtype.
pub(crate) fn append(
    dev: &CpuDevice,
    qkv: &[f32],
    shape: AttnShape,
    spans: &[SeqSpan<'_>],
    (cache, layer): (&mut KvCache, usize),
) {
    check_spans(shape, spans, qkv.len() / shape.qkv_dim(), (cache, layer));
    let layout = cache.pool.layout;
    match &mut cache.pool.data {
        KvData::F32(data) => append_rows(dev, qkv, (&shape, spans), (SharedMut::new(data), &layout, layer)),
        KvData::Bf16(data) => append_rows(dev, qkv, (&shape, spans), (SharedMut::new(data), &layout, layer)),
    }
}

thread_local! {
    /// Span and first row of each piece of an append.
    static PIECES: Cell<Vec<(usize, usize)>> = const { Cell::new(Vec::new()) };
}

fn append_rows<E: KvElement>(
    dev: &CpuDevice,
    qkv: &[f32],
    (shape, spans): (&AttnShape, &[SeqSpan<'_>]),
    (data, layout, layer): (SharedMut<'_, E>, &KvLayout, usize),
) {
    // Pieces of at most 16 rows, so that a long prefill is shared among threads.
    let of_span =
        |(index, span): (usize, &SeqSpan<'_>)| (0..span.num_rows).step_by(TILE).map(move |offset| (index, offset));
    with_reused(&PIECES, |pieces| {
        pieces.clear();
        pieces.extend(spans.iter().enumerate().flat_map(of_span));
        let job = |piece: usize| {
            let (index, first) = pieces[piece];
            let span = &spans[index];
            let offsets = first..(first + TILE).min(span.num_rows);
            dev.isa.run(Append { data, layout, shape, layer, span, offsets, qkv });
        };
        let kv_elements = 2 * shape.num_kv_heads * shape.head_dim * spans.iter().map(|s| s.num_rows).sum::<usize>();
        if kv_elements < INLINE_ELEMENTS {
            (0..pieces.len()).for_each(job);
        } else {
            dev.pool.run(pieces.len(), &job);
        }
    });
}

/// Tell the next products what attention over these spans will read.
pub(crate) fn expect(dev: &CpuDevice, (cache, layer): (&KvCache, usize), spans: &[SeqSpan<'_>]) {
    let layout = &cache.pool.layout;
    let (first, element_bytes) = match &cache.pool.data {
        KvData::F32(data) => (data.as_ptr().cast::<u8>(), size_of::<f32>()),
        KvData::Bf16(data) => (data.as_ptr().cast::<u8>(), size_of::<u16>()),
    };
    let block_bytes = layout.block_elements() * element_bytes;
    let of_layer = first.wrapping_add(layer * layout.num_blocks * block_bytes);
    let used = |span: &SeqSpan<'_>| (span.first_slot + span.num_rows).div_ceil(cache.spec.block_size);
    let blocks = spans.iter().flat_map(|span| span.blocks.iter().take(used(span)));
    dev.expected.replace((of_layer, block_bytes), blocks.copied());
}

/// Copy a block, all layers.
pub(crate) fn copy_block(cache: &mut KvCache, from: u32, to: u32) {
    let spec = cache.spec;
    assert!(from.max(to) < spec.num_blocks as u32, "copy of block {from} to {to} of {}", spec.num_blocks);
    let block = cache.pool.layout.block_elements();
    for layer in 0..spec.num_layers {
        let first = |index: u32| (layer * spec.num_blocks + index as usize) * block;
        let (source, target) = (first(from)..first(from) + block, first(to));
        match &mut cache.pool.data {
            KvData::F32(data) => data.copy_within(source, target),
            KvData::Bf16(data) => data.copy_within(source, target),
        }
    }
}
