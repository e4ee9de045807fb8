//! Weights as signed bytes: `out = x W^T + bias` with f32 inputs, for generation alone.
//!
//! An output's inputs are cut into groups of 64, each with a scale of its own ([`quantize`]). A product sums every
//! group as one chain of fused multiply-adds over ascending inputs, the bytes widened to f32, then adds the groups'
//! sums, each times its scale, in ascending order ([`tile`]). That order is the same for every number of rows, on every
//! instruction family and thread; inputs are never rounded.

mod quantize;
mod tile;

use super::forward::SharedX;
use super::scratch;
use super::split::Grid;
use crate::cpu::CpuDevice;
use crate::cpu::aligned::AlignedVec;
use crate::cpu::parallel::SharedMut;
use crate::{LinearShape, Store};
use quantize::QuantizedPanel;
use tile::{Piece, Target};

/// Outputs of a panel: a step of it is one cache line.
const PANEL: usize = 64;
/// Inputs of an output that share a scale.
const GROUP: usize = 64;
/// Rows of a block: their inputs stay in the second cache level.
const MAX_BLOCK_ROWS: usize = 240;

/// A weight `[n, k]` in panels of 64 outputs; those behind the last are zeros.
pub(crate) struct Int8Panels {
    /// `[panel][k][64]`.
    bytes: AlignedVec<i8>,
    /// `[panel][group][64]`.
    scales: AlignedVec<f32>,
    shape: LinearShape,
}

impl Int8Panels {
    fn num_groups(&self) -> usize {
        self.shape.k.div_ceil(GROUP)
    }

    /// Bytes of memory.
    pub(crate) fn size_bytes(&self) -> usize {
        size_of_val(&*self.bytes) + size_of_val(&*self.scales)
    }
}

/// Quantise a weight.
pub(crate) fn pack(dev: &CpuDevice, weight: &[f32], shape: LinearShape) -> Int8Panels {
    let num_panels = shape.n.div_ceil(PANEL);
    let bytes = AlignedVec::zeroed(num_panels * shape.k * PANEL);
    let scales = AlignedVec::zeroed(num_panels * shape.k.div_ceil(GROUP) * PANEL);
    let mut panels = Int8Panels { bytes, scales, shape };
    repack(dev, weight, &mut panels);
    panels
}

/// Quantise new values of the same shape.
pub(crate) fn repack(dev: &CpuDevice, weight: &[f32], panels: &mut Int8Panels) {
    let (shape, num_groups) = (panels.shape, panels.num_groups());
    assert_eq!(weight.len(), shape.len(), "quantize: a weight of {} numbers for {shape:?}", weight.len());
    if shape.is_empty() {
        return;
    }
    let (bytes, scales) = (SharedMut::new(&mut panels.bytes), SharedMut::new(&mut panels.scales));
    let (panel_bytes, panel_scales) = (shape.k * PANEL, num_groups * PANEL);
    dev.pool.run(shape.n.div_ceil(PANEL), &|panel| {
        let rows = &weight[panel * PANEL * shape.k..((panel + 1) * PANEL).min(shape.n) * shape.k];
        // SAFETY: every task has a panel of its own.
        let (bytes, scales) = unsafe {
            (
                bytes.range(panel * panel_bytes..(panel + 1) * panel_bytes),
                scales.range(panel * panel_scales..(panel + 1) * panel_scales),
            )
        };
        dev.isa.run(QuantizedPanel { rows, k: shape.k, bytes, scales });
    });
}

/// `out[T, n] (=|+=) x[T, k] W^T + bias`.
pub(crate) fn linear(
    dev: &CpuDevice,
    x: &[f32],
    (w, bias): (&Int8Panels, Option<&[f32]>),
    (out, store): (&mut [f32], Store),
) {
    let LinearShape { n, k } = w.shape;
    if out.is_empty() {
        return;
    }
    let rows = out.len() / n;
    assert!(
        x.len() == rows * k && out.len() == rows * n,
        "linear: x {} and out {} for {:?}",
        x.len(),
        out.len(),
        w.shape
    );
    assert!(bias.is_none_or(|b| b.len() == n), "linear: a bias for {n} outputs");
    let grid = Grid::new(rows, n.div_ceil(PANEL), MAX_BLOCK_ROWS, dev.pool.num_threads());
    let (x, out) = (SharedX(x.as_ptr()), SharedMut::new(out));
    dev.pool.run(grid.num_tasks(), &|task| {
        grid.for_pieces(task, |rows, panel, _next| {
            let column = panel * PANEL;
            scratch::with_block(tile::scratch_len(rows.len()), |scratch| {
                let piece = Piece {
                    rows: rows.len(),
                    k,
                    left: x.at(rows.start * k),
                    bytes: w.bytes[panel * k * PANEL..].as_ptr(),
                    scales: w.scales[panel * w.num_groups() * PANEL..].as_ptr(),
                    target: Target {
                        ptr: out.ptr_at(rows.start * n + column),
                        ld: n,
                        columns: (n - column).min(PANEL),
                        bias: bias.map_or(std::ptr::null(), |b| b[column..].as_ptr()),
                        store,
                    },
                    scratch,
                };
                dev.isa.run(piece);
            });
        });
    });
}
