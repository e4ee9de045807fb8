//! Gradients of the linear layer.

use super::block::{Block, Layout, Left, Output, PanelSource};
use super::forward::{LEFT_WORDS, MIN_TURN_ROWS, SharedX};
use super::split::Grid;
use super::tile::{GROUP_ROWS, PANEL};
use super::words::{Format, Gather, LeftGroups};
use super::{Body, operand_format, rows_to_words, run_block, scratch};
use crate::cpu::CpuDevice;
use crate::cpu::parallel::SharedMut;
use crate::{LinearShape, PackedLinear, Reduction, Store};
use temper_types::DType;

/// Rows of dx that share a gathered panel of the weight.
const INPUT_BLOCK_ROWS: usize = 480;
/// Rows of dw that share a gathered panel of x, and whose columns of dy are gathered at once.
const WEIGHT_BLOCK_ROWS: usize = 192;

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
    let row_words = format.num_words(n);
    let grid = Grid::new(dx.len() / k, k.div_ceil(PANEL), INPUT_BLOCK_ROWS, dev.pool.num_threads());
    let (dy, weight, dx) = (SharedX(dy.as_ptr()), SharedX(weight.as_ptr()), SharedMut::new(dx));
    dev.pool.run(grid.num_tasks(), &|task| {
        let (rows, panel) = grid.task(task);
        let column = panel * PANEL;
        let columns = (k - column).min(PANEL);
        let gather = Gather { ptr: weight.at(column), ld: k, num_rows: n, columns, width: PANEL, format };
        let block = Block {
            rows: rows.len(),
            steps: row_words,
            reduction: Reduction::Chain,
            numbers_per_step: format.numbers_per_word(),
            left: Left { ptr: dy.at(rows.start * row_words), layout: Layout::Rows, ld: row_words },
            panel: PanelSource::Gather(gather),
            out: Output {
                ptr: dx.ptr_at(rows.start * k + column),
                ld: k,
                columns,
                bias: std::ptr::null(),
                add: store == Store::Add,
            },

            scratch: std::ptr::null_mut(),
        };
        // SAFETY: lengths were checked by `input_grad`; every task writes rows and columns of its own.
        unsafe { run_block(dev, Body::of(format), block) }
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
    let format = operand_format(dev, dtype);
    let grid = Grid::new(n, 1, WEIGHT_BLOCK_ROWS, dev.pool.num_threads());
    let (dy, x, dw) = (SharedX(dy.as_ptr()), SharedX(x.as_ptr()), SharedMut::new(dw));
    dev.pool.run(grid.num_tasks(), &|task| {
        let (outputs, _) = grid.task(task);
        let steps = format.num_words(rows);
        let group_len = LeftGroups::group_len(steps);
        scratch::with_left(outputs.len().div_ceil(GROUP_ROWS) * group_len, |left| {
            let all = Gather { ptr: dy.at(0), ld: n, num_rows: rows, columns: outputs.len(), width: n, format };
            dev.isa.run(LeftGroups { gather: all, first: outputs.start, out: left });
            for column in (0..k).step_by(PANEL) {
                let columns = (k - column).min(PANEL);
                let gather = Gather { ptr: x.at(column), ld: k, num_rows: rows, columns, width: PANEL, format };
                let block = Block {
                    rows: outputs.len(),
                    steps,
                    reduction: Reduction::Chain,
                    numbers_per_step: format.numbers_per_word(),
                    left: Left { ptr: left.as_ptr(), layout: Layout::Groups, ld: group_len },
                    panel: PanelSource::Gather(gather),
                    out: Output {
                        ptr: dw.ptr_at(outputs.start * k + column),
                        ld: k,
                        columns,
                        bias: std::ptr::null(),
                        add: true,
                    },

                    scratch: std::ptr::null_mut(),
                };
                // SAFETY: lengths were checked above; every task writes rows of dw of its own.
                unsafe { run_block(dev, Body::of(format), block) }
            }
        });
    });
}
