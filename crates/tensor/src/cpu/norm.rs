//! RMS norms of rows and of the heads of fused projection rows.
//!
//! A row's sum of squares is one chain per lane over ascending columns, joined by the fixed tree. Gradients of weights
//! sum rows in fixed groups of [`ROWS_PER_PARTIAL`], and the groups in ascending order.

use super::CpuDevice;
use super::elementwise::column_sums;
use super::math::{load_lanes, store_lanes};
use super::parallel::{SharedMut, for_ranges, rows_per_task};
use super::simd::{Kernel, Simd};
use crate::{AttnShape, HeadNorm, HeadNormGrad, NormGrad, NormShape};

/// Rows whose contribution to a weight's gradient is summed before groups are joined.
const ROWS_PER_PARTIAL: usize = 32;

/// `out = x * rstd * weight`; returns rstd.
struct Forward<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    out: &'a mut [f32],
    eps: f32,
}

impl Kernel for Forward<'_> {
    type Output = f32;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        let dim = self.x.len();
        // SAFETY: the three slices have `dim` elements, and lanes stop at the end.
        unsafe {
            let mut sum = S::splat(0.0);
            for start in (0..dim).step_by(16) {
                let x = load_lanes::<S>(self.x.as_ptr().add(start), dim - start);
                sum = S::fma(x, x, sum);
            }
            let rstd = 1.0 / (S::reduce_add(sum) / dim as f32 + self.eps).sqrt();
            for start in (0..dim).step_by(16) {
                let x = load_lanes::<S>(self.x.as_ptr().add(start), dim - start);
                let w = load_lanes::<S>(self.weight.as_ptr().add(start), dim - start);
                let y = S::mul(S::mul(x, S::splat(rstd)), w);
                store_lanes::<S>(self.out.as_mut_ptr().add(start), dim - start, y);
            }
            rstd
        }
    }
}

/// Backward of one row: `dx = rstd (dy w - x rstd^2 mean(dy w x))` replaces or joins `dx`, `dweight += dy x rstd`.
/// `dx` may be the memory of `dy`.
struct Backward<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    rstd: f32,
    dy: *const f32,
    dx: *mut f32,
    dweight: &'a mut [f32],
    /// 1 adds to `dx`, 0 replaces it.
    keep: f32,
}

impl Kernel for Backward<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let dim = self.x.len();
        // SAFETY: all operands have `dim` elements, and lanes stop at the end; `dy` is read before `dx` is written.
        unsafe {
            let mut dot = S::splat(0.0);
            for start in (0..dim).step_by(16) {
                let x = load_lanes::<S>(self.x.as_ptr().add(start), dim - start);
                let w = load_lanes::<S>(self.weight.as_ptr().add(start), dim - start);
                dot = S::fma(S::mul(load_lanes::<S>(self.dy.add(start), dim - start), w), x, dot);
            }
            let mean = S::reduce_add(dot) / dim as f32;
            let (rstd, pull) = (S::splat(self.rstd), S::splat(-(self.rstd * self.rstd * self.rstd * mean)));
            for start in (0..dim).step_by(16) {
                let lanes = dim - start;
                let x = load_lanes::<S>(self.x.as_ptr().add(start), lanes);
                let w = load_lanes::<S>(self.weight.as_ptr().add(start), lanes);
                let dy = load_lanes::<S>(self.dy.add(start), lanes);
                let (dx, dw) = (self.dx.add(start), self.dweight.as_mut_ptr().add(start));
                store_lanes::<S>(dw, lanes, S::fma(dy, S::mul(x, rstd), load_lanes::<S>(dw, lanes)));
                let gradient = S::fma(x, pull, S::mul(S::mul(dy, w), rstd));
                let kept = if self.keep == 0.0 { gradient } else { S::add(load_lanes::<S>(dx, lanes), gradient) };
                store_lanes::<S>(dx, lanes, kept);
            }
        }
    }
}

/// `out[T, D] = x / sqrt(mean(x^2) + eps) * weight`; `rstd[T]` where asked for.
pub(crate) fn rms_norm(
    dev: &CpuDevice,
    (x, weight): (&[f32], &[f32]),
    shape: NormShape,
    out: &mut [f32],
    rstd: Option<&mut [f32]>,
) {
    let NormShape { rows, dim, eps } = shape;
    assert!(x.len() == rows * dim && out.len() == x.len() && weight.len() == dim, "operands of {shape:?}");
    let out = SharedMut::new(out);
    let rstd = rstd.map(|r| SharedMut::new(&mut r[..rows]));
    for_ranges(dev, rows, rows_per_task(dim), |range| {
        for row in range {
            // SAFETY: every row belongs to one task.
            let row_out = unsafe { out.range(row * dim..(row + 1) * dim) };
            let r = dev.isa.run(Forward { x: &x[row * dim..(row + 1) * dim], weight, out: row_out, eps });
            if let Some(rstd) = &rstd {
                // SAFETY: as above.
                unsafe { rstd.set(row, r) };
            }
        }
    });
}

/// `dx += ...`, `dweight += ...`.
pub(crate) fn rms_norm_grad(dev: &CpuDevice, args: NormGrad<'_>, dx: &mut [f32], dweight: &mut [f32]) {
    let NormShape { rows, dim, .. } = args.shape;
    let (x, weight, dy) = (args.x.data, args.weight.data, args.dy.data);
    assert!(x.len() == rows * dim && dy.len() == x.len() && dx.len() == x.len(), "rows of {:?}", args.shape);
    assert!(weight.len() == dim && dweight.len() == dim && args.rstd.len() >= rows, "weight of {:?}", args.shape);
    let groups = rows.div_ceil(ROWS_PER_PARTIAL);
    let mut partial = vec![0f32; groups * dim];
    let (dx, sums) = (SharedMut::new(dx), SharedMut::new(&mut partial));
    for_ranges(dev, groups, rows_per_task(4 * dim).div_ceil(ROWS_PER_PARTIAL), |range| {
        for row in range.start * ROWS_PER_PARTIAL..(range.end * ROWS_PER_PARTIAL).min(rows) {
            let (group, span) = (row / ROWS_PER_PARTIAL, row * dim..(row + 1) * dim);
            // SAFETY: every row and every group belongs to one task.
            let (dx, dweight) =
                unsafe { (dx.range(span.clone()).as_mut_ptr(), sums.range(group * dim..(group + 1) * dim)) };
            let (x, dy, rstd) = (&x[span.clone()], dy[span].as_ptr(), args.rstd.data[row]);
            dev.isa.run(Backward { x, weight, rstd, dy, dx, dweight, keep: 1.0 });
        }
    });
    column_sums(dev, &partial, dweight);
}

/// Norm every query and key head of fused rows into `out`; values are copied. `rstd` is `[T, H + G]`.
pub(crate) fn head_norm(dev: &CpuDevice, args: HeadNorm<'_>, out: &mut [f32], rstd: Option<&mut [f32]>) {
    let AttnShape { num_heads, num_kv_heads, head_dim, .. } = args.shape;
    let (width, num_normed) = (args.shape.qkv_dim(), num_heads + num_kv_heads);
    check_head_norm(&args, out.len());
    let (qkv, out) = (args.qkv.data, SharedMut::new(out));
    let rstd = rstd.map(|r| SharedMut::new(&mut r[..args.rows * num_normed]));
    for_ranges(dev, args.rows, rows_per_task(width), |range| {
        for row in range {
            // SAFETY: every row belongs to one task.
            let row_out = unsafe { out.range(row * width..(row + 1) * width) };
            let row_in = &qkv[row * width..(row + 1) * width];
            for head in 0..num_normed {
                let weight = if head < num_heads { args.q_weight.data } else { args.k_weight.data };
                let span = head * head_dim..(head + 1) * head_dim;
                let (x, out) = (&row_in[span.clone()], &mut row_out[span]);
                let r = dev.isa.run(Forward { x, weight, out, eps: args.eps });
                if let Some(rstd) = &rstd {
                    // SAFETY: as above.
                    unsafe { rstd.set(row * num_normed + head, r) };
                }
            }
            row_out[num_normed * head_dim..].copy_from_slice(&row_in[num_normed * head_dim..]);
        }
    });
}

/// Backward of [`head_norm`]: the gradient rows are replaced in place, the weights' gradients added to.
pub(crate) fn head_norm_grad(dev: &CpuDevice, args: HeadNorm<'_>, rstd: &[f32], grad: HeadNormGrad<'_>) {
    let AttnShape { num_heads, num_kv_heads, head_dim, .. } = args.shape;
    let (width, num_normed) = (args.shape.qkv_dim(), num_heads + num_kv_heads);
    check_head_norm(&args, grad.dqkv.len());
    assert_eq!(rstd.len(), args.rows * num_normed, "rstd of {} rows of {num_normed} heads", args.rows);
    let groups = args.rows.div_ceil(ROWS_PER_PARTIAL);
    // Of each group of rows: the query weight's gradient, then the key weight's.
    let mut partial = vec![0f32; groups * 2 * head_dim];
    let (dqkv, sums) = (SharedMut::new(grad.dqkv.data), SharedMut::new(&mut partial));
    for_ranges(dev, groups, 1, |range| {
        for row in range.start * ROWS_PER_PARTIAL..(range.end * ROWS_PER_PARTIAL).min(args.rows) {
            for head in 0..num_normed {
                let is_key = usize::from(head >= num_heads);
                let weight = if is_key == 0 { args.q_weight.data } else { args.k_weight.data };
                let span = row * width + head * head_dim..row * width + (head + 1) * head_dim;
                let start = (row / ROWS_PER_PARTIAL * 2 + is_key) * head_dim;
                // SAFETY: every row and every group belongs to one task.
                let (dx, dweight) =
                    unsafe { (dqkv.range(span.clone()).as_mut_ptr(), sums.range(start..start + head_dim)) };
                let rstd = rstd[row * num_normed + head];
                let x = &args.qkv.data[span];
                dev.isa.run(Backward { x, weight, rstd, dy: dx.cast_const(), dx, dweight, keep: 0.0 });
            }
        }
    });
    let mut both = vec![0f32; 2 * head_dim];
    column_sums(dev, &partial, &mut both);
    let add = |sums: &[f32], dst: &mut [f32]| dst.iter_mut().zip(sums).for_each(|(d, s)| *d += s);
    add(&both[..head_dim], grad.dq_weight.data);
    add(&both[head_dim..], grad.dk_weight.data);
}

fn check_head_norm(args: &HeadNorm<'_>, out_len: usize) {
    let AttnShape { head_dim, .. } = args.shape;
    let len = args.rows * args.shape.qkv_dim();
    assert!(args.qkv.len() == len && out_len == len, "{} rows of {:?}", args.rows, args.shape);
    assert!(args.q_weight.len() == head_dim && args.k_weight.len() == head_dim, "head norm weights of {head_dim}");
}
