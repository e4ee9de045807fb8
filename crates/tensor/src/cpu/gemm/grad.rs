//! Gradients of the linear layer.
//!
//! Both are products whose right operand lies row-major with the summed dimension as its rows. The summed dimension is
//! cut into segments, so that a gathered panel, and for the weight gradient the laid-out left operand too, stays in the
//! second cache level. Sums that are not complete at a segment's end rest in memory of the thread, as f32.

use super::block::{Block, Layout, Left, Output, PanelSource};
use super::forward::{LEFT_WORDS, MIN_TURN_ROWS, SharedX};
use super::tile::{Ahead, GROUP_ROWS, PANEL};
use super::words::{Format, Gather, LeftGroups};
use super::{Body, operand_format, rows_to_words, run_block, scratch};
use crate::cpu::CpuDevice;
use crate::cpu::parallel::SharedMut;
use crate::{LinearShape, PackedLinear, Reduction, Store};
use std::ops::Range;
use temper_types::DType;

/// Rows of dx that share a gathered panel of the weight.
const INPUT_ROWS: usize = 480;
/// Numbers of n in a segment of an input gradient. Even, like every segment, so that no pair is cut.
const INPUT_SEGMENT: usize = 640;
/// Rows of x and dy in a segment of a weight gradient, where one segment of twice as many does not hold them all.
const WEIGHT_SEGMENT: usize = 256;
/// Numbers of dy that are laid out at once: they stay in the second cache level.
const WEIGHT_NUMBERS: usize = 144 << 10;
/// Rows of dw in a task at least, where there are so many, so that a gathered panel is used often enough.
const MIN_TASK_ROWS: usize = 96;
/// Fewest rows of dx in a block that is cut only to keep all threads busy.
const MIN_EVEN_ROWS: usize = 12;
/// Tasks per thread behind which an uneven last round no longer matters.
const ENOUGH_ROUNDS: usize = 10;

/// A product `out[rows, width] (=|+=) left right[sum, width]` cut into tasks, each some rows times some panels.
#[derive(Clone, Copy)]
struct Cut {
    rows: usize,
    sum: usize,
    width: usize,
    segment: usize,
    block_rows: usize,
    group_panels: usize,
}

impl Cut {
    /// Tasks of one panel and at most [`INPUT_ROWS`] rows: in whole rounds of the threads, or so many that an uneven
    /// last round does not matter.
    fn by_panels((rows, sum, width): (usize, usize, usize), num_threads: usize) -> Cut {
        let (num_panels, least) = (width.div_ceil(PANEL), rows.div_ceil(INPUT_ROWS).max(1));
        let even = |num_blocks: &usize| {
            let num_tasks = num_blocks * num_panels;
            num_tasks.is_multiple_of(num_threads) || num_tasks >= ENOUGH_ROUNDS * num_threads
        };
        let num_blocks = (least..).take_while(|num_blocks| rows / num_blocks >= MIN_EVEN_ROWS).find(even);
        Cut::new((rows, sum, width), num_blocks.unwrap_or(least), 1, INPUT_SEGMENT)
    }

    /// Tasks of all panels and as many rows as can be laid out, in whole rounds of the threads; where rows are few, the
    /// threads share the panels.
    fn by_rows((rows, sum, width): (usize, usize, usize), num_threads: usize) -> Cut {
        let segment = if sum <= 2 * WEIGHT_SEGMENT { sum.max(1) } else { WEIGHT_SEGMENT };
        let (num_panels, least) = (width.div_ceil(PANEL), rows.div_ceil(WEIGHT_NUMBERS / segment).max(1));
        let even = least.next_multiple_of(num_threads);
        let (num_blocks, num_groups) =
            if rows / even >= MIN_TASK_ROWS { (even, 1) } else { (least, num_threads.min(num_panels)) };
        Cut::new((rows, sum, width), num_blocks, num_panels.div_ceil(num_groups), segment)
    }

    fn new((rows, sum, width): (usize, usize, usize), num_blocks: usize, group_panels: usize, most: usize) -> Cut {
        let segment = sum.div_ceil(sum.div_ceil(most).max(1)).next_multiple_of(2).max(2);
        let block_rows = rows.div_ceil(num_blocks).next_multiple_of(GROUP_ROWS);
        Cut { rows, sum, width, segment, block_rows, group_panels }
    }

    fn num_tasks(&self) -> usize {
        self.rows.div_ceil(self.block_rows) * self.width.div_ceil(PANEL).div_ceil(self.group_panels)
    }

    /// Rows and panels of a task; panels run fastest.
    fn task(&self, index: usize) -> (Range<usize>, Range<usize>) {
        let num_panels = self.width.div_ceil(PANEL);
        let num_groups = num_panels.div_ceil(self.group_panels);
        let (row, panel) = (index / num_groups * self.block_rows, index % num_groups * self.group_panels);
        (row..(row + self.block_rows).min(self.rows), panel..(panel + self.group_panels).min(num_panels))
    }

    /// The segments in ascending order; one that is empty where there is nothing to sum.
    fn segments(&self) -> impl Iterator<Item = Range<usize>> {
        let cut = *self;
        (0..cut.sum.max(1)).step_by(cut.segment).map(move |start| start..(start + cut.segment).min(cut.sum))
    }

    /// Words of memory for sums that are not complete: none where one segment completes them.
    fn carry_len(&self, rows: usize, panels: usize) -> usize {
        if self.sum > self.segment { rows * panels * PANEL } else { 0 }
    }
}

/// The operands and the result of a product, for its tasks.
#[derive(Clone, Copy)]
struct Product<'a> {
    cut: Cut,
    right: SharedX,
    format: Format,
    out: SharedMut<'a, f32>,
    store: Store,
}

impl Product<'_> {
    /// The block of some rows and one panel over a segment: it takes up the sums in `carry` unless the segment is the
    /// first, and leaves them there unless it is the last.
    fn block(&self, left: Left, (rows, panel): (Range<usize>, usize), sum: Range<usize>, carry: *mut f32) -> Block {
        let (width, column) = (self.cut.width, panel * PANEL);
        let columns = (width - column).min(PANEL);
        let ptr = self.right.at(sum.start * width + column);
        let gather = Gather { ptr, ld: width, num_rows: sum.len(), columns, format: self.format };
        let bias = std::ptr::null();
        let out = if sum.end == self.cut.sum {
            let ptr = self.out.ptr_at(rows.start * width + column);
            Output { ptr, ld: width, columns, bias, add: self.store == Store::Add }
        } else {
            Output { ptr: carry, ld: PANEL, columns: PANEL, bias, add: false }
        };
        Block {
            rows: rows.len(),
            steps: self.format.num_words(sum.len()),
            reduction: Reduction::Chain,
            numbers_per_step: self.format.numbers_per_word(),
            left,
            panel: PanelSource::Gather(gather),
            out,
            seed: if sum.start == 0 { std::ptr::null() } else { carry },
            ahead: Ahead::NONE,
            scratch: std::ptr::null_mut(),
        }
    }
}

/// `dx[T, k] (=|+=) dy[T, n] W`: one chain over ascending n.
pub(crate) fn input_grad(
    dev: &CpuDevice,
    dy: &[f32],
    weight: &[f32],
    packed: &PackedLinear,
    (dx, store): (&mut [f32], Store),
) {
    let (n, k) = (packed.shape.n, packed.shape.k);
    if dx.is_empty() {
        return;
    }
    let rows = dx.len() / k;
    assert!(dy.len() == rows * n && dx.len() == rows * k, "input_grad: dy {} and dx {}", dy.len(), dx.len());
    assert_eq!(weight.len(), packed.shape.len(), "input_grad: the weight of {packed:?}");
    let format = operand_format(dev, packed.dtype);
    if format == Format::Exact || n == 0 {
        input_grad_words(dev, dy, (weight, packed.shape, format), (dx, store));
        return;
    }
    let words = format.num_words(n);
    let turn = (LEFT_WORDS / words).max(MIN_TURN_ROWS);
    for (dy, dx) in dy.chunks(turn * n).zip(dx.chunks_mut(turn * k)) {
        scratch::with_left(dy.len() / n * words, |left| {
            rows_to_words(dev, dy, n, format, left);
            input_grad_words(dev, left, (weight, packed.shape, format), (dx, store));
        });
    }
}

fn input_grad_words(
    dev: &CpuDevice,
    dy: &[f32],
    (weight, shape, format): (&[f32], LinearShape, Format),
    (dx, store): (&mut [f32], Store),
) {
    let (n, k) = (shape.n, shape.k);
    let cut = Cut::by_panels((dx.len() / k, n, k), dev.pool.num_threads());
    let (dy, right) = (SharedX(dy.as_ptr()), SharedX(weight.as_ptr()));
    let product = Product { cut, right, format, out: SharedMut::new(dx), store };
    let row_words = format.num_words(n);
    dev.pool.run(cut.num_tasks(), &|task| {
        let (rows, panels) = cut.task(task);
        scratch::with_carry(cut.carry_len(rows.len(), 1), |carry| {
            for sum in cut.segments() {
                let ptr = dy.at(rows.start * row_words + format.num_words(sum.start));
                let left = Left { ptr, layout: Layout::Rows, ld: row_words };
                let block = product.block(left, (rows.clone(), panels.start), sum, carry.as_mut_ptr());
                // SAFETY: lengths were checked by `input_grad`; every task writes rows and columns of its own.
                unsafe { run_block(dev, Body::of(format), block) }
            }
        });
    });
}

/// `dw[n, k] += dy[T, n]^T x[T, k]`: one chain over ascending rows from zero, added to dw with one rounding.
pub(crate) fn weight_grad(
    dev: &CpuDevice,
    (dy, x): (&[f32], &[f32]),
    shape: LinearShape,
    dtype: DType,
    dw: &mut [f32],
) {
    let (n, k) = (shape.n, shape.k);
    assert_eq!(dw.len(), shape.len(), "weight_grad: dw for {shape:?}");
    if dw.is_empty() || x.is_empty() {
        return;
    }
    let rows = x.len() / k;
    assert!(x.len() == rows * k && dy.len() == rows * n, "weight_grad: dy {} and x {}", dy.len(), x.len());
    let cut = Cut::by_rows((n, rows, k), dev.pool.num_threads());
    let format = operand_format(dev, dtype);
    let product = Product { cut, right: SharedX(x.as_ptr()), format, out: SharedMut::new(dw), store: Store::Add };
    let dy = SharedX(dy.as_ptr());
    dev.pool.run(cut.num_tasks(), &|task| weight_grad_task(dev, &product, dy, cut.task(task)));
}

fn weight_grad_task(
    dev: &CpuDevice,
    product: &Product<'_>,
    dy: SharedX,
    (outputs, panels): (Range<usize>, Range<usize>),
) {
    let (cut, format, ld) = (product.cut, product.format, product.cut.rows);
    scratch::with_carry(cut.carry_len(outputs.len(), panels.len()), |carry| {
        for sum in cut.segments() {
            let group_len = LeftGroups::group_len(format.num_words(sum.len()));
            scratch::with_left(outputs.len().div_ceil(GROUP_ROWS) * group_len, |left| {
                let ptr = dy.at(sum.start * ld + outputs.start);
                let gather = Gather { ptr, ld, num_rows: sum.len(), columns: outputs.len(), format };
                dev.isa.run(LeftGroups { gather, readable: ld - outputs.start, out: left });
                for panel in panels.clone() {
                    let index = panel - panels.start;
                    let carry = carry.as_mut_ptr().wrapping_add(index * outputs.len() * PANEL);
                    let left = Left { ptr: left.as_ptr(), layout: Layout::Groups, ld: group_len };
                    let block = product.block(left, (outputs.clone(), panel), sum.clone(), carry);
                    // SAFETY: lengths were checked by `weight_grad`; every task writes rows or columns of its own.
                    unsafe { run_block(dev, Body::of(format), block) }
                }
            });
        }
    });
}
