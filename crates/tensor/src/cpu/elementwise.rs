//! Kernels over flat ranges and sums over rows.

use super::CpuDevice;
use super::math::{load_lanes, store_lanes};
use super::parallel::{ELEMENTS_PER_TASK, SharedMut, for_ranges};
use super::simd::{Kernel, Simd};

/// Elements whose squares are summed in one fixed order before the blocks are joined.
const SUM_BLOCK: usize = 4096;
/// Columns that one task of [`column_sums`] handles.
const COLUMN_STRIP: usize = 64;

/// `dst = decay * dst + gain * src`.
struct Blend<'a> {
    src: &'a [f32],
    dst: &'a mut [f32],
    decay: f32,
    gain: f32,
}

impl Kernel for Blend<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for start in (0..self.dst.len()).step_by(16) {
            let lanes = (self.dst.len() - start).min(16);
            // SAFETY: both slices have the same length, and `lanes` elements are left in them.
            unsafe {
                let (src, dst) = (self.src.as_ptr().add(start), self.dst.as_mut_ptr().add(start));
                let old = S::mul(S::splat(self.decay), load_lanes::<S>(dst, lanes));
                store_lanes::<S>(dst, lanes, S::fma(S::splat(self.gain), load_lanes::<S>(src, lanes), old));
            }
        }
    }
}

fn blend(dev: &CpuDevice, src: &[f32], dst: &mut [f32], (decay, gain): (f32, f32)) {
    assert_eq!(src.len(), dst.len(), "source and destination differ in length");
    let (len, dst) = (dst.len(), SharedMut::new(dst));
    for_ranges(dev, len, ELEMENTS_PER_TASK, |range| {
        // SAFETY: the ranges of different tasks are disjoint.
        let dst = unsafe { dst.range(range.clone()) };
        dev.isa.run(Blend { src: &src[range], dst, decay, gain });
    });
}

/// `dst += src`.
pub(crate) fn add(dev: &CpuDevice, src: &[f32], dst: &mut [f32]) {
    blend(dev, src, dst, (1.0, 1.0));
}

/// `dst = decay * dst + (1 - decay) * src`.
pub(crate) fn lerp(dev: &CpuDevice, src: &[f32], decay: f32, dst: &mut [f32]) {
    blend(dev, src, dst, (decay, 1.0 - decay));
}

/// Squares of one block in eight f64 chains, joined by a tree.
struct SquareSum<'a>(&'a [f32]);

impl Kernel for SquareSum<'_> {
    type Output = f64;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f64 {
        let mut chains = [0f64; 8];
        let whole = self.0.chunks_exact(8);
        let rest = whole.remainder();
        for eight in whole {
            for (chain, x) in chains.iter_mut().zip(eight) {
                *chain += f64::from(*x) * f64::from(*x);
            }
        }
        for (chain, x) in chains.iter_mut().zip(rest) {
            *chain += f64::from(*x) * f64::from(*x);
        }
        let [a, b, c, d, e, f, g, h] = chains;
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }
}

/// Sum of squares: fixed blocks in f64, joined in ascending order.
pub(crate) fn sum_squares(dev: &CpuDevice, x: &[f32]) -> f64 {
    let mut blocks = vec![0f64; x.len().div_ceil(SUM_BLOCK)];
    let (num_blocks, shared) = (blocks.len(), SharedMut::new(&mut blocks));
    for_ranges(dev, num_blocks, 8, |range| {
        // SAFETY: the ranges of different tasks are disjoint.
        let sums = unsafe { shared.range(range.clone()) };
        for (sum, block) in sums.iter_mut().zip(range) {
            let end = ((block + 1) * SUM_BLOCK).min(x.len());
            *sum = dev.isa.run(SquareSum(&x[block * SUM_BLOCK..end]));
        }
    });
    blocks.iter().sum()
}

/// Add the columns of row-major `rows` (`stride` wide) from `first` on to `sums`, rows ascending.
struct ColumnSums<'a> {
    rows: &'a [f32],
    stride: usize,
    first: usize,
    sums: &'a mut [f32],
}

impl Kernel for ColumnSums<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let num_rows = self.rows.len() / self.stride;
        for column in (0..self.sums.len()).step_by(16) {
            let lanes = (self.sums.len() - column).min(16);
            // SAFETY: `first + sums.len() <= stride`, so the lanes stay inside every row and inside `sums`.
            unsafe {
                let mut source = self.rows.as_ptr().add(self.first + column);
                let mut total = S::splat(0.0);
                for _ in 0..num_rows {
                    total = S::add(total, load_lanes::<S>(source, lanes));
                    source = source.wrapping_add(self.stride);
                }
                let sum = self.sums.as_mut_ptr().add(column);
                store_lanes::<S>(sum, lanes, S::add(load_lanes::<S>(sum, lanes), total));
            }
        }
    }
}

/// `sums[n] += sum over rows of rows[T, n]`, rows ascending; strips of columns are independent.
pub(crate) fn column_sums(dev: &CpuDevice, rows: &[f32], sums: &mut [f32]) {
    let stride = sums.len();
    if rows.is_empty() {
        return;
    }
    assert_eq!(rows.len() % stride, 0, "{} elements are not rows of {stride}", rows.len());
    let grain = if rows.len() < 2 * ELEMENTS_PER_TASK { stride } else { COLUMN_STRIP };
    let sums = SharedMut::new(sums);
    for_ranges(dev, stride, grain, |range| {
        // SAFETY: the ranges of different tasks are disjoint.
        let sums = unsafe { sums.range(range.clone()) };
        dev.isa.run(ColumnSums { rows, stride, first: range.start, sums });
    });
}
