//! `out = x W^T + bias`.

use super::block::{Block, Layout, Left, Output, PanelSource};
use super::split::Grid;
use super::tile::{Ahead, PANEL};
use super::words::Format;
use super::{Body, PackedPanels, Panels, int8, operand_format, rows_to_words, run_block, scratch};
use crate::cpu::CpuDevice;
use crate::cpu::parallel::SharedMut;
use crate::{PackedLinear, Store};
use temper_types::DType;

/// Rows of a block: their inputs stay in the second cache level beside the panel.
const MAX_BLOCK_ROWS: usize = 240;
/// Blocks of up to this many rows widen bf16 weights in registers; more rows share words widened once.
const MAX_WIDENED_ROWS: usize = 64;
/// Blocks of up to this many rows fetch the next panel while they multiply: it takes about as long to arrive. For more
/// rows the requests cost more than the wait, unless the weight is so large that no cache ever holds it.
const MAX_AHEAD_ROWS: usize = 96;
const LARGE_WEIGHT_WORDS: usize = 8 << 20;
/// Words of laid-out inputs in scratch at once (32 MiB, or a few rows); more rows run in turns.
const LEFT_WORDS: usize = 8 << 20;
/// Rows of a turn at least, so that a panel is read for more than a few rows.
const MIN_TURN_ROWS: usize = 96;

/// `out[T, n] (=|+=) x[T, k] W^T + bias`.
pub(crate) fn linear(
    dev: &CpuDevice,
    x: &[f32],
    w: &PackedLinear,
    bias: Option<&[f32]>,
    (out, store): (&mut [f32], Store),
) {
    let panels = match &w.panels {
        Panels::Words(panels) => panels,
        Panels::Int8(panels) => return int8::linear(dev, x, (panels, bias), (out, store)),
    };
    let (n, k) = (w.shape.n, w.shape.k);
    if out.is_empty() {
        return;
    }
    let rows = out.len() / n;
    assert!(x.len() == rows * k && out.len() == rows * n, "linear: x {} and out {} for {w:?}", x.len(), out.len());
    assert!(bias.is_none_or(|b| b.len() == n), "linear: a bias for {n} outputs");
    let format = operand_format(dev, w.dtype);
    if format == Format::Exact || k == 0 {
        linear_words(dev, x, (w, panels, bias), (out, store));
        return;
    }
    let words = format.num_words(k);
    let turn = (LEFT_WORDS / words).max(MIN_TURN_ROWS);
    for (x, out) in x.chunks(turn * k).zip(out.chunks_mut(turn * n)) {
        scratch::with_left(x.len() / k * words, |left| {
            rows_to_words(dev, x, k, format, left);
            linear_words(dev, left, (w, panels, bias), (out, store));
        });
    }
}

/// As [`linear`], with the rows of x laid out as words.
fn linear_words(
    dev: &CpuDevice,
    x: &[f32],
    (w, panels, bias): (&PackedLinear, &PackedPanels, Option<&[f32]>),
    (out, store): (&mut [f32], Store),
) {
    let (n, k) = (w.shape.n, w.shape.k);
    let row_words = operand_format(dev, w.dtype).num_words(k);
    let grid = Grid::new(out.len() / n, n.div_ceil(PANEL), MAX_BLOCK_ROWS, dev.pool.num_threads());
    let (x, out) = (SharedX(x.as_ptr()), SharedMut::new(out));
    let fetches_ahead = panels.words.len() > LARGE_WEIGHT_WORDS;
    dev.pool.run(grid.num_tasks(), &|task| {
        grid.for_pieces(task, |rows, panel, next| {
            let column = panel * PANEL;
            let next = next.filter(|_| fetches_ahead || rows.len() <= MAX_AHEAD_ROWS).map(|next| panels.panel(next));
            let ahead = next.map_or(Ahead::NONE, |words| Ahead { ptr: words.as_ptr(), len: words.len() });
            let (body, words_per_step) = forward_body(dev, w.dtype, rows.len());
            let words = panels.panel(panel).as_ptr();
            let widen = w.dtype == DType::Bf16 && body == Body::Single;
            let block = Block {
                rows: rows.len(),
                steps: row_words / words_per_step,
                reduction: w.reduction,
                numbers_per_step: if body == Body::Single { 1 } else { 2 },
                left: Left { ptr: x.at(rows.start * row_words), layout: Layout::Rows, ld: row_words },
                panel: if widen { PanelSource::Widen(words) } else { PanelSource::Resident(words) },
                out: Output {
                    ptr: out.ptr_at(rows.start * n + column),
                    ld: n,
                    columns: (n - column).min(PANEL),
                    bias: bias.map_or(std::ptr::null(), |b| b[column..].as_ptr()),
                    add: store == Store::Add,
                },
                seed: std::ptr::null(),
                ahead,
                scratch: std::ptr::null_mut(),
            };
            // SAFETY: lengths were checked by `linear`; every task writes rows and columns of its own.
            unsafe { run_block(dev, body, block) }
        })
    });
}

/// The body for a block of a forward, and the words of the left operand that one step of it reads.
fn forward_body(dev: &CpuDevice, dtype: DType, rows: usize) -> (Body, usize) {
    match (dtype, dev.native_bf16) {
        (DType::F32, _) => (Body::Single, 1),
        (DType::Bf16, true) => (Body::Native, 1),
        (DType::Bf16, false) if rows <= MAX_WIDENED_ROWS => (Body::Widened, 2),
        (DType::Bf16, false) => (Body::Single, 1),
    }
}

/// The address of a readable operand, for tasks.
#[derive(Clone, Copy)]
pub(super) struct SharedX(pub(super) *const f32);

// SAFETY: the memory is only read while the job runs.
unsafe impl Sync for SharedX {}

impl SharedX {
    pub(super) fn at(&self, index: usize) -> *const f32 {
        self.0.wrapping_add(index)
    }
}
