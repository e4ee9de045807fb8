//! Gradients of the linear layer.
//!
//! Both are products whose right operand lies row-major with the summed dimension as its rows. The summed dimension is
//! cut into segments, so that a gathered panel and the laid-out left operand stay in the second cache level while a
//! task's panels pass over them. Sums that are not complete at a segment's end rest in memory of the thread, as f32.

use super::block::{Block, Layout, Left, Output, PanelSource};
use super::forward::SharedX;
use super::tile::{Ahead, GROUP_ROWS, PANEL};
use super::words::{Format, Gather, LeftGroups, RowWords};
use super::{Body, operand_format, run_block, scratch};
use crate::cpu::CpuDevice;
use crate::cpu::parallel::SharedMut;
use crate::{LinearShape, PackedLinear, Reduction, Store};
use std::ops::Range;
use temper_types::DType;

/// Rows of dx that share a gathered panel of the weight.
const INPUT_ROWS: usize = 720;
/// The same where rows of dy are laid out.
const LAID_OUT_ROWS: usize = 348;
/// f32 rows of dy of up to this many numbers are read where they are, panel after panel. Longer ones are laid out a
/// segment at a time for all panels: by the next panel the caches would have lost them, and where their distance is a
/// power of two they crowd into few sets.
const IN_PLACE_SUM: usize = 8192;
/// Numbers of n in a segment of an input gradient at most. Even, like every segment, so that no pair is cut.
const INPUT_SEGMENT: usize = 640;
/// Rows of x and dy in a segment of a weight gradient, where one segment of twice as many does not hold them all.
const WEIGHT_SEGMENT: usize = 256;
/// Numbers of dy that are laid out at once: they stay in the second cache level.
const LEFT_NUMBERS: usize = 144 << 10;
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
    /// Tasks of one panel and at most [`INPUT_ROWS`] rows, in whole rounds of the threads, or so many that an uneven
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

    /// Tasks of all panels and at most [`LAID_OUT_ROWS`] rows, in whole rounds of the threads; where rows are few, as
    /// [`Cut::by_panels`].
    fn by_laid_out_rows((rows, sum, width): (usize, usize, usize), num_threads: usize) -> Cut {
        let num_blocks = rows.div_ceil(LAID_OUT_ROWS).max(1).next_multiple_of(num_threads);
        if rows / num_blocks < MIN_EVEN_ROWS {
            return Cut::by_panels((rows, sum, width), num_threads);
        }
        let segment = (LEFT_NUMBERS / rows.div_ceil(num_blocks)).min(INPUT_SEGMENT) / 2 * 2;
        Cut::new((rows, sum, width), num_blocks, width.div_ceil(PANEL), segment)
    }

    /// Tasks of all panels and as many rows as can be laid out, in whole rounds of the threads; where rows are few, the
    /// threads share the panels.
    fn by_rows((rows, sum, width): (usize, usize, usize), num_threads: usize) -> Cut {
        let segment = if sum <= 2 * WEIGHT_SEGMENT { sum.max(1) } else { WEIGHT_SEGMENT };
        let (num_panels, least) = (width.div_ceil(PANEL), rows.div_ceil(LEFT_NUMBERS / segment).max(1));
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
            later: Ahead::NONE,
            scratch: std::ptr::null_mut(),
        }
    }

    /// Compute a task. `lay_out(segment, run)` lays the left operand of a segment out and calls `run` with it.
    fn run_task(
        &self,
        dev: &CpuDevice,
        (rows, panels): (Range<usize>, Range<usize>),
        lay_out: impl Fn(Range<usize>, &dyn Fn(Left)),
    ) {
        scratch::with_carry(self.cut.carry_len(rows.len(), panels.len()), |carry| {
            let carry = carry.as_mut_ptr();
            for sum in self.cut.segments() {
                lay_out(sum.clone(), &|left| {
                    for panel in panels.clone() {
                        let carry = carry.wrapping_add((panel - panels.start) * rows.len() * PANEL);
                        let block = self.block(left, (rows.clone(), panel), sum.clone(), carry);
                        // SAFETY: lengths were checked by the product's function; every task writes rows or columns of
                        // its own.
                        unsafe { run_block(dev, Body::of(self.format), block) }
                    }
                });
            }
        });
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
    let in_place = format == Format::Exact && n <= IN_PLACE_SUM;
    let cut = if in_place { Cut::by_panels } else { Cut::by_laid_out_rows };
    let cut = cut((rows, n, k), dev.pool.num_threads());
    let product = Product { cut, right: SharedX(weight.as_ptr()), format, out: SharedMut::new(dx), store };
    dev.pool.run(cut.num_tasks(), &|task| {
        let (rows, panels) = cut.task(task);
        let (count, dy) = (rows.len(), &dy[rows.start * n..rows.end * n]);
        product.run_task(dev, (rows, panels), |sum, run| {
            if in_place {
                return run(Left { ptr: dy[sum.start..].as_ptr(), layout: Layout::Rows, ld: n });
            }
            let ld = RowWords::spread(format.num_words(sum.len()));
            scratch::with_left(count * ld, |left| {
                dev.isa.run(RowWords { rows: dy, ld: n, numbers: sum, format, out: left, out_ld: ld });
                run(Left { ptr: left.as_ptr(), layout: Layout::Rows, ld });
            });
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
    dev.pool.run(cut.num_tasks(), &|task| {
        let (outputs, panels) = cut.task(task);
        let (first, count) = (outputs.start, outputs.len());
        product.run_task(dev, (outputs, panels), |sum, run| {
            let group_len = LeftGroups::group_len(format.num_words(sum.len()));
            scratch::with_left(count.div_ceil(GROUP_ROWS) * group_len, |left| {
                let ptr = dy.at(sum.start * n + first);
                let gather = Gather { ptr, ld: n, num_rows: sum.len(), columns: count, format };
                dev.isa.run(LeftGroups { gather, readable: n - first, out: left });
                run(Left { ptr: left.as_ptr(), layout: Layout::Groups, ld: group_len });
            });
        });
    });
}
