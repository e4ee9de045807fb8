//! Matrix products: packed weights, the linear layer, and its two gradients.
//!
//! Weights are packed once per update in panels of 32 output columns (see [`PackedPanels`]); the gradients pack what
//! they need into scratch of the thread. One kernel ([`block`]) computes rows times one panel for all three products,
//! both formats and every instruction family. Work is split over blocks of rows and over panels, never over the summed
//! dimension, so that an output's bits depend on its own row, its own column and the reduction alone.

mod block;
mod forward;
mod grad;
mod int8;
mod native;
mod peak;
mod scratch;
mod split;
mod tile;
mod words;

use super::CpuDevice;
use super::aligned::AlignedVec;
use super::parallel::SharedMut;
use super::simd::round_bf16;
use crate::{LinearShape, PackedLinear};
use block::{Block, SingleBlock, WidenedBlock};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use temper_types::DType;
use tile::PANEL;
use words::{Format, PairOrder, RowWords, WeightPanel};

pub(crate) use forward::{asks_for_expected, fuses_swiglu, linear, linear_swiglu};
pub(crate) use grad::{input_grad, weight_grad};
pub(crate) use peak::peak_probe;

/// A packed weight.
pub(crate) enum Panels {
    /// The numbers that were given, in the dtype of the products.
    Words(PackedPanels),
    /// Bytes and scales.
    Int8(int8::Int8Panels),
}

/// Words of a packed weight: `[panel][step][32]`, a panel being 32 output rows of the weight, padded with zeros. A word
/// is one f32, or the bf16 pair of two consecutive inputs (the even one in the low half), padded to whole pairs.
pub(crate) struct PackedPanels {
    words: AlignedVec<f32>,
    /// Words of one panel.
    panel_len: usize,
    /// [`Format::Exact`] or [`Format::Pairs`].
    format: Format,
}

impl PackedPanels {
    fn zeroed(shape: LinearShape, format: Format) -> PackedPanels {
        let panel_len = format.num_words(shape.k) * PANEL;
        PackedPanels { words: AlignedVec::zeroed(shape.n.div_ceil(PANEL) * panel_len), panel_len, format }
    }

    /// Bytes of memory.
    pub(crate) fn size_bytes(&self) -> usize {
        size_of_val(&*self.words)
    }

    fn panel(&self, index: usize) -> &[f32] {
        &self.words[index * self.panel_len..(index + 1) * self.panel_len]
    }
}

/// The layout in which a packed weight rests in memory: the smallest that holds its numbers. An f32 weight of which
/// every number is one of bf16, as of a model published in it and not trained since, takes half the memory, and
/// its products, which widen it again, keep their bits.
fn resident_format(dev: &CpuDevice, weight: &[f32], k: usize, dtype: DType) -> Format {
    match dtype {
        DType::F32 if k.is_multiple_of(2) && is_bf16(dev, weight) => Format::Pairs,
        DType::F32 => Format::Exact,
        DType::Bf16 => Format::Pairs,
    }
}

/// Whether rounding to bf16, which flushes subnormals, changes none of these numbers. Stops at the first it does.
fn is_bf16(dev: &CpuDevice, numbers: &[f32]) -> bool {
    /// Numbers that are looked at before the answer is asked for.
    const CHUNK: usize = 4 << 10;
    /// Numbers of a task.
    const TASK: usize = 64 * CHUNK;
    let all = AtomicBool::new(true);
    dev.pool.run(numbers.len().div_ceil(TASK), &|task| {
        let numbers = &numbers[task * TASK..((task + 1) * TASK).min(numbers.len())];
        for chunk in numbers.chunks(CHUNK) {
            if !all.load(Relaxed) {
                return;
            }
            if chunk.iter().fold(false, |lost, x| lost | (round_bf16(*x).to_bits() != x.to_bits())) {
                all.store(false, Relaxed);
            }
        }
    });
    all.into_inner()
}

/// Pack a weight `[n, k]`.
pub(crate) fn pack(dev: &CpuDevice, weight: &[f32], shape: LinearShape, dtype: DType) -> Panels {
    let mut panels = PackedPanels::zeroed(shape, resident_format(dev, weight, shape.k, dtype));
    fill(dev, weight, shape, &mut panels);
    Panels::Words(panels)
}

/// Quantise a weight `[n, k]`.
pub(crate) fn pack_int8(dev: &CpuDevice, weight: &[f32], shape: LinearShape) -> Panels {
    Panels::Int8(int8::pack(dev, weight, shape))
}

/// Pack new values of the same shape.
pub(crate) fn repack(dev: &CpuDevice, weight: &[f32], packed: &mut PackedLinear) {
    match &mut packed.panels {
        Panels::Words(panels) => {
            let format = resident_format(dev, weight, packed.shape.k, packed.dtype);
            if format != panels.format {
                *panels = PackedPanels::zeroed(packed.shape, format);
            }
            fill(dev, weight, packed.shape, panels);
        }
        Panels::Int8(panels) => int8::repack(dev, weight, panels),
    }
}

fn fill(dev: &CpuDevice, weight: &[f32], shape: LinearShape, panels: &mut PackedPanels) {
    assert_eq!(weight.len(), shape.len(), "pack: a weight of {} numbers for {shape:?}", weight.len());
    let (panel_len, format, k) = (panels.panel_len, panels.format, shape.k);
    if shape.is_empty() {
        return;
    }
    let words = SharedMut::new(&mut panels.words);
    dev.pool.run(shape.n.div_ceil(PANEL), &|panel| {
        let rows = &weight[panel * PANEL * k..((panel + 1) * PANEL).min(shape.n) * k];
        // SAFETY: every task has a panel of its own.
        let out = unsafe { words.range(panel * panel_len..(panel + 1) * panel_len) };
        dev.isa.run(WeightPanel { rows, k, format, out });
    });
}

/// How operands of a gradient, and the left operand of a forward, are laid out on this device.
const fn operand_format(dev: &CpuDevice, dtype: DType) -> Format {
    match (dtype, dev.native_bf16) {
        (DType::F32, _) => Format::Exact,
        (DType::Bf16, true) => Format::Pairs,
        (DType::Bf16, false) => Format::Swapped,
    }
}

/// The body of a block's chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Body {
    /// f32 words.
    Single,
    /// bf16 pairs in the panel, widened in registers.
    Widened(PairOrder),
    /// bf16 pairs on both sides.
    Native,
}

impl Body {
    /// The body for operands that are both in `format`.
    const fn of(format: Format) -> Body {
        match format {
            Format::Exact | Format::Swapped => Body::Single,
            Format::Pairs => Body::Native,
        }
    }
}

/// Compute a block.
///
/// # Safety
/// The block's operands and output are as [`Block::run`] wants them, in the formats of `body`.
unsafe fn run_block(dev: &CpuDevice, body: Body, block: Block) {
    scratch::with_block(block.scratch_len(), |scratch| {
        let block = Block { scratch, ..block };
        match body {
            Body::Single => dev.isa.run(SingleBlock(block)),
            Body::Widened(PairOrder::EvenFirst) => dev.isa.run(WidenedBlock::<false>(block)),
            Body::Widened(PairOrder::OddFirst) => dev.isa.run(WidenedBlock::<true>(block)),
            Body::Native => {
                assert!(dev.native_bf16, "native pairs need a CPU that multiplies bf16");
                #[cfg(test)]
                if !crate::Isa::has_native_bf16() {
                    return dev.isa.run(tests::SoftBlock(block));
                }
                #[cfg(target_arch = "x86_64")]
                // SAFETY: the device says that the CPU has the instruction; the rest is the caller's contract.
                unsafe {
                    native::run(&block);
                }
            }
        }
    });
}

/// Lay rows of `k` numbers out as words, over the pool where that pays.
fn rows_to_words(dev: &CpuDevice, rows: &[f32], k: usize, format: Format, out: &mut [f32]) {
    let words = format.num_words(k);
    let out = SharedMut::new(out);
    super::parallel::for_ranges(dev, rows.len() / k, super::parallel::rows_per_task(k), |range| {
        // SAFETY: every task has rows of its own.
        let out = unsafe { out.range(range.start * words..range.end * words) };
        let rows = &rows[range.start * k..range.end * k];
        dev.isa.run(RowWords { rows, ld: k, numbers: 0..k, format, out, out_ld: words });
    });
}

#[cfg(test)]
mod tests;
