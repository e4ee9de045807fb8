//! The gated activation of the feed-forward block.

use super::CpuDevice;
use super::math::{load_lanes, sigmoid, store_lanes};
use super::parallel::{SharedMut, for_ranges, rows_per_task};
use super::simd::{Kernel, Simd};

/// `silu(gate) * up`.
#[inline(always)]
unsafe fn gated<S: Simd>(gate: S::V, up: S::V) -> S::V {
    // SAFETY: the caller's CPU has the lanes.
    unsafe { S::mul(S::mul(gate, sigmoid::<S>(gate)), up) }
}

/// `silu(gate) * up` of rows `[gate width | up width]` that follow one another; `width` is a multiple of 16.
pub(super) struct Gated {
    /// `[num_rows, 2 width]`.
    pub(super) fused: *const f32,
    pub(super) width: usize,
    pub(super) num_rows: usize,
    /// `width` numbers of each row, rows `ld` apart.
    pub(super) out: *mut f32,
    pub(super) ld: usize,
}

impl Kernel for Gated {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for row in 0..self.num_rows {
            for column in (0..self.width).step_by(16) {
                // SAFETY: the caller's pointers are valid for the rows.
                unsafe {
                    let gate = self.fused.add(row * 2 * self.width + column);
                    let out = gated::<S>(S::load(gate), S::load(gate.add(self.width)));
                    S::store(self.out.add(row * self.ld + column), out);
                }
            }
        }
    }
}

/// One range of columns of one row: `out = silu(gate) * up`.
struct Forward<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Forward<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for start in (0..self.out.len()).step_by(16) {
            let lanes = (self.out.len() - start).min(16);
            // SAFETY: the three slices have equal lengths, and `lanes` elements are left in them.
            unsafe {
                let gate = load_lanes::<S>(self.gate.as_ptr().add(start), lanes);
                let up = load_lanes::<S>(self.up.as_ptr().add(start), lanes);
                store_lanes::<S>(self.out.as_mut_ptr().add(start), lanes, gated::<S>(gate, up));
            }
        }
    }
}

/// One range of columns of one row of the backward.
struct Backward<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    dout: &'a [f32],
    dgate: &'a mut [f32],
    dup: &'a mut [f32],
}

impl Kernel for Backward<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for start in (0..self.dout.len()).step_by(16) {
            let lanes = (self.dout.len() - start).min(16);
            // SAFETY: the five slices have equal lengths, and `lanes` elements are left in them.
            unsafe {
                let gate = load_lanes::<S>(self.gate.as_ptr().add(start), lanes);
                let up = load_lanes::<S>(self.up.as_ptr().add(start), lanes);
                let dout = load_lanes::<S>(self.dout.as_ptr().add(start), lanes);
                let s = sigmoid::<S>(gate);
                // silu'(g) = s (1 + g (1 - s))
                let one = S::splat(1.0);
                let slope = S::mul(s, S::fma(gate, S::sub(one, s), one));
                store_lanes::<S>(self.dgate.as_mut_ptr().add(start), lanes, S::mul(S::mul(dout, up), slope));
                store_lanes::<S>(self.dup.as_mut_ptr().add(start), lanes, S::mul(dout, S::mul(gate, s)));
            }
        }
    }
}

/// `out[T, F] = silu(gate) * up` of rows `[gate F | up F]`.
pub(crate) fn swiglu(dev: &CpuDevice, gate_up: &[f32], ffn_dim: usize, out: &mut [f32]) {
    assert_eq!(gate_up.len(), 2 * out.len(), "fused rows have twice the output's width");
    let (rows, out) = (out.len() / ffn_dim, SharedMut::new(out));
    for_ranges(dev, rows, rows_per_task(2 * ffn_dim), |range| {
        for row in range {
            let (gate, up) = gate_up[row * 2 * ffn_dim..(row + 1) * 2 * ffn_dim].split_at(ffn_dim);
            // SAFETY: every row belongs to one task.
            let out = unsafe { out.range(row * ffn_dim..(row + 1) * ffn_dim) };
            dev.isa.run(Forward { gate, up, out });
        }
    });
}

/// Gradient of [`swiglu`] with respect to the fused rows, written.
pub(crate) fn swiglu_grad(dev: &CpuDevice, gate_up: &[f32], ffn_dim: usize, dout: &[f32], dgate_up: &mut [f32]) {
    assert_eq!(gate_up.len(), 2 * dout.len(), "fused rows have twice the output's width");
    assert_eq!(gate_up.len(), dgate_up.len(), "a gradient has its operand's shape");
    let (rows, dgate_up) = (dout.len() / ffn_dim, SharedMut::new(dgate_up));
    for_ranges(dev, rows, rows_per_task(2 * ffn_dim), |range| {
        for row in range {
            let fused = row * 2 * ffn_dim..(row + 1) * 2 * ffn_dim;
            let (gate, up) = gate_up[fused.clone()].split_at(ffn_dim);
            // SAFETY: every row belongs to one task.
            let (dgate, dup) = unsafe { dgate_up.range(fused) }.split_at_mut(ffn_dim);
            let dout = &dout[row * ffn_dim..(row + 1) * ffn_dim];
            dev.isa.run(Backward { gate, up, dout, dgate, dup });
        }
    });
}
