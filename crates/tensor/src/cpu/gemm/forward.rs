//! `out = x W^T + bias`.

use super::block::{Block, Layout, Left, Output, PanelSource};
use super::split::Grid;
use super::tile::{Ahead, MAX_TILE_ROWS, PANEL};
use super::words::{Format, PairOrder};
use super::{Body, PackedPanels, Panels, int8, operand_format, rows_to_words, run_block, scratch};
use crate::cpu::CpuDevice;
use crate::cpu::activation::Gated;
use crate::cpu::expected::{LINE, Lines, Part};
use crate::cpu::parallel::SharedMut;
use crate::{LinearShape, PackedLinear, Store};
use std::ops::Range;
use std::sync::MutexGuard;

/// Rows of a block: their inputs stay in the second cache level beside the panel.
const MAX_BLOCK_ROWS: usize = 240;
/// Blocks of up to this many rows widen bf16 weights in registers; more rows share words widened once. That is for CPUs
/// whose widening takes the place of multiplications (Skylake); on those with bf16 instructions it was faster in
/// registers for any number of rows (Zen 5).
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
    let n = w.shape.n;
    in_turns(dev, x, (w, panels, bias), (out, n), |forward, out| {
        let grid = forward.grid(out.len() / n, n);
        let out = SharedMut::new(out);
        let later = forward.later(&grid, 1);
        dev.pool.run(grid.num_tasks(), &|task| {
            let mut later = Later::part(later.as_ref(), (task, grid.num_tasks()));
            grid.for_pieces(task, |rows, panel, next| {
                let ptr = out.ptr_at(rows.start * n + panel * PANEL);
                // SAFETY: lengths were checked by `in_turns`; every task writes rows and columns of its own.
                unsafe { forward.run(rows, (panel, next), &mut later, (ptr, n, store)) }
            });
        });
    });
}

/// Whether [`linear_swiglu`] takes a fused gate and up projection: panels of both begin at their first columns.
pub(crate) fn fuses_swiglu(w: &PackedLinear) -> bool {
    matches!(w.panels, Panels::Words(_)) && w.shape.n.is_multiple_of(2 * PANEL)
}

/// `out[T, F] = silu(gate) * up` of `[gate F | up F] = x[T, k] W^T + bias`, to the bits of a linear layer and an
/// activation behind it. A task computes the same columns of both and never writes them to memory that others see.
///
/// # Panics
/// If [`fuses_swiglu`] says no.
pub(crate) fn linear_swiglu(dev: &CpuDevice, x: &[f32], w: &PackedLinear, bias: Option<&[f32]>, out: &mut [f32]) {
    let Panels::Words(panels) = &w.panels else { panic!("linear_swiglu: {w:?} in another format") };
    assert!(fuses_swiglu(w), "linear_swiglu: {w:?}");
    let ffn_dim = w.shape.n / 2;
    let num_panels = ffn_dim / PANEL;
    in_turns(dev, x, (w, panels, bias), (out, ffn_dim), |forward, out| {
        let grid = forward.grid(out.len() / ffn_dim, ffn_dim);
        let out = SharedMut::new(out);
        let later = forward.later(&grid, 2);
        dev.pool.run(grid.num_tasks(), &|task| {
            let mut later = Later::part(later.as_ref(), (task, grid.num_tasks()));
            grid.for_pieces(task, |rows, panel, next| {
                scratch::with_carry(rows.len() * 2 * PANEL, |fused| {
                    let (num_rows, ptr) = (rows.len(), out.ptr_at(rows.start * ffn_dim + panel * PANEL));
                    let gate = (fused.as_mut_ptr(), 2 * PANEL, Store::Write);
                    let up = (fused.as_mut_ptr().wrapping_add(PANEL), 2 * PANEL, Store::Write);
                    let up_panel = num_panels + panel;
                    // SAFETY: lengths were checked by `in_turns`; the sums fit this thread's memory, and every task
                    // writes rows and columns of its own.
                    unsafe {
                        forward.run(rows.clone(), (panel, Some(up_panel)), &mut later, gate);
                        forward.run(rows, (up_panel, next), &mut later, up);
                        dev.isa.run(Gated { fused: fused.as_ptr(), width: PANEL, num_rows, out: ptr, ld: ffn_dim });
                    }
                });
            });
        });
    });
}

/// Lay inputs out as the kernel's words, and call `run` with as many rows of them, and of `out[T, width]`, as are laid
/// out at once.
fn in_turns(
    dev: &CpuDevice,
    x: &[f32],
    (w, panels, bias): (&PackedLinear, &PackedPanels, Option<&[f32]>),
    (out, width): (&mut [f32], usize),
    run: impl Fn(&Forward<'_>, &mut [f32]),
) {
    let LinearShape { n, k } = w.shape;
    if out.is_empty() {
        return;
    }
    let rows = out.len() / width;
    assert!(x.len() == rows * k && out.len() == rows * width, "linear: x {} and out {} for {w:?}", x.len(), out.len());
    assert!(bias.is_none_or(|b| b.len() == n), "linear: a bias for {n} outputs");
    let format = operand_format(dev, w.dtype);
    let words = format.num_words(k);
    let forward = |x: &[f32]| Forward { dev, w, panels, bias, x: SharedX(x.as_ptr()), format, row_words: words };
    if format == Format::Exact || k == 0 {
        return run(&forward(x), out);
    }
    let turn = (LEFT_WORDS / words).max(MIN_TURN_ROWS);
    for (x, out) in x.chunks(turn * k).zip(out.chunks_mut(turn * width)) {
        scratch::with_left(x.len() / k * words, |left| {
            rows_to_words(dev, x, k, format, left);
            run(&forward(left), out);
        });
    }
}

/// Register tiles of a block of `rows` rows that need not ask for words of the next panel, if tiles are of the largest
/// kind: with as many steps as they have, two of them ask for all of it.
const fn free_tiles(rows: usize) -> usize {
    rows.div_ceil(MAX_TILE_ROWS).saturating_sub(2)
}

/// Whether products of so many rows fetch what is [expected](crate::cpu::expected). Those of fewer wait for memory
/// themselves, those of more do not fetch ahead.
pub(crate) const fn asks_for_expected(rows: usize) -> bool {
    free_tiles(rows) > 0 && rows <= MAX_AHEAD_ROWS
}

/// Lines that a product asks for beside its own.
struct Later<'a> {
    lines: MutexGuard<'a, Lines>,
    range: Range<usize>,
}

impl Later<'_> {
    /// Those of task `index` of `count`.
    fn part<'a>(later: Option<&'a Later<'_>>, task: (usize, usize)) -> Part<'a> {
        later.map_or(Part::NONE, |later| later.lines.part(&later.range, task))
    }
}

/// A product of inputs that are laid out as words.
struct Forward<'a> {
    dev: &'a CpuDevice,
    w: &'a PackedLinear,
    panels: &'a PackedPanels,
    bias: Option<&'a [f32]>,
    x: SharedX,
    /// Format of the inputs.
    format: Format,
    /// Words of an input row.
    row_words: usize,
}

impl Forward<'_> {
    /// How `rows` rows of `columns` outputs are cut into tasks.
    fn grid(&self, rows: usize, columns: usize) -> Grid {
        Grid::new(rows, columns.div_ceil(PANEL), MAX_BLOCK_ROWS, self.dev.pool.num_threads())
    }

    /// What tiles ask for that no panel needs, in a product whose pieces have `panels` panels each.
    fn later(&self, grid: &Grid, panels: usize) -> Option<Later<'_>> {
        let rows = grid.block_rows();
        if !asks_for_expected(rows) {
            return None;
        }
        let mut lines = self.dev.expected.take()?;
        let (_, steps) = self.steps(self.body(rows, 0).0);
        let range = lines.next(free_tiles(rows) * steps * grid.num_units() * panels);
        Some(Later { lines, range })
    }

    /// The body for `rows` rows times one panel, and how it reads the panel.
    fn body(&self, rows: usize, panel: usize) -> (Body, PanelSource) {
        forward_body(self.dev, (self.format, self.panels.format), rows, self.panels.panel(panel).as_ptr())
    }

    /// Numbers of a step, and steps of a sum.
    fn steps(&self, body: Body) -> (usize, usize) {
        let numbers_per_step = if body == Body::Single { 1 } else { 2 };
        (numbers_per_step, self.row_words * self.format.numbers_per_word() / numbers_per_step)
    }

    /// Compute rows times one panel, fetching the panel that is read next and lines of `later`, to rows `ld` apart.
    ///
    /// # Safety
    /// Inputs are laid out for `rows`; `out` is valid for them and the panel's columns, and nobody else's meanwhile.
    unsafe fn run(
        &self,
        rows: Range<usize>,
        (panel, next): (usize, Option<usize>),
        later: &mut Part<'_>,
        (out, ld, store): (*mut f32, usize, Store),
    ) {
        let (panels, column) = (self.panels, panel * PANEL);
        let fetches_ahead = panels.words.len() > LARGE_WEIGHT_WORDS || rows.len() <= MAX_AHEAD_ROWS;
        let next = next.filter(|_| fetches_ahead).map(|next| panels.panel(next));
        let (body, source) = self.body(rows.len(), panel);
        let (numbers_per_step, steps) = self.steps(body);
        let (address, num_lines) = later.next(free_tiles(rows.len()) * steps);
        let block = Block {
            rows: rows.len(),
            steps,
            reduction: self.w.reduction,
            numbers_per_step,
            left: Left { ptr: self.x.at(rows.start * self.row_words), layout: Layout::Rows, ld: self.row_words },
            panel: source,
            out: Output {
                ptr: out,
                ld,
                columns: (self.w.shape.n - column).min(PANEL),
                bias: self.bias.map_or(std::ptr::null(), |b| b[column..].as_ptr()),
                add: store == Store::Add,
            },
            seed: std::ptr::null(),
            ahead: next.map_or(Ahead::NONE, |words| Ahead { ptr: words.as_ptr(), len: words.len() }),
            later: Ahead { ptr: address.cast(), len: num_lines * LINE / size_of::<f32>() },
            scratch: std::ptr::null_mut(),
        };
        // SAFETY: the caller's contract.
        unsafe { run_block(self.dev, body, block) }
    }
}

/// The body for a block of a forward whose inputs and weights are in these formats, and how it reads a panel.
fn forward_body(
    dev: &CpuDevice,
    (inputs, weights): (Format, Format),
    rows: usize,
    panel: *const f32,
) -> (Body, PanelSource) {
    let order = match (inputs, weights) {
        (Format::Pairs, _) => return (Body::Native, PanelSource::Resident(panel)),
        (_, Format::Exact | Format::Swapped) => return (Body::Single, PanelSource::Resident(panel)),
        (Format::Exact, Format::Pairs) => PairOrder::EvenFirst,
        (Format::Swapped, Format::Pairs) => PairOrder::OddFirst,
    };
    if dev.native_bf16 || rows <= MAX_WIDENED_ROWS {
        (Body::Widened(order), PanelSource::Resident(panel))
    } else {
        (Body::Single, PanelSource::Widen(panel, order))
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
