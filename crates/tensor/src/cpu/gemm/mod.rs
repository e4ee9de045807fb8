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
use crate::{LinearShape, PackedLinear};
use block::{Block, SingleBlock, WidenedBlock};
use temper_types::DType;
use tile::PANEL;
use words::{Format, RowWords, WeightPanel};

pub(crate) use forward::linear;
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
}

impl PackedPanels {
    fn panel(&self, index: usize) -> &[f32] {
        &self.words[index * self.panel_len..(index + 1) * self.panel_len]
    }
}

/// The layout in which a packed weight rests in memory.
const fn resident_format(dtype: DType) -> Format {
    match dtype {
        DType::F32 => Format::Exact,
        DType::Bf16 => Format::Pairs,
    }
}

/// Pack a weight `[n, k]`.
pub(crate) fn pack(dev: &CpuDevice, weight: &[f32], shape: LinearShape, dtype: DType) -> Panels {
    let panel_len = resident_format(dtype).num_words(shape.k) * PANEL;
    let words = AlignedVec::zeroed(shape.n.div_ceil(PANEL) * panel_len);
    let mut panels = PackedPanels { words, panel_len };
    fill(dev, weight, (shape, dtype), &mut panels);
    Panels::Words(panels)
}

/// Quantise a weight `[n, k]`.
pub(crate) fn pack_int8(dev: &CpuDevice, weight: &[f32], shape: LinearShape) -> Panels {
    Panels::Int8(int8::pack(dev, weight, shape))
}

/// Pack new values of the same shape.
pub(crate) fn repack(dev: &CpuDevice, weight: &[f32], packed: &mut PackedLinear) {
    match &mut packed.panels {
        Panels::Words(panels) => fill(dev, weight, (packed.shape, packed.dtype), panels),
        Panels::Int8(panels) => int8::repack(dev, weight, panels),
    }
}

fn fill(dev: &CpuDevice, weight: &[f32], (shape, dtype): (LinearShape, DType), panels: &mut PackedPanels) {
    assert_eq!(weight.len(), shape.len(), "pack: a weight of {} numbers for {shape:?}", weight.len());
    let (panel_len, k) = (panels.panel_len, shape.k);
    if shape.is_empty() {
        return;
    }
    let words = SharedMut::new(&mut panels.words);
    dev.pool.run(shape.n.div_ceil(PANEL), &|panel| {
        let rows = &weight[panel * PANEL * k..((panel + 1) * PANEL).min(shape.n) * k];
        // SAFETY: every task has a panel of its own.
        let out = unsafe { words.range(panel * panel_len..(panel + 1) * panel_len) };
        dev.isa.run(WeightPanel { rows, k, format: resident_format(dtype), out });
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
    Widened,
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
            Body::Widened => dev.isa.run(WidenedBlock(block)),
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
