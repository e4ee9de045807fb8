//! Rotary position embedding (Su et al., 2021), halves convention: pairs are `(i, i + K/2)`.

use super::CpuDevice;
use super::math::{load_lanes, sin_cos, store_lanes};
use super::parallel::{SharedMut, for_ranges, rows_per_task};
use super::simd::{Kernel, Simd};
use crate::AttnShape;

/// Which way to rotate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// By the position's angle.
    Forward,
    /// By minus the position's angle: the transpose, hence the backward.
    Inverse,
}

/// Rows `[cos K/2 | sin K/2]`, one per position. Angles are f64 products, functions are f64, rounded once.
pub(crate) struct CpuRopeTable {
    rows: Vec<f32>,
    half: usize,
}

impl CpuRopeTable {
    pub(crate) fn new(inv_frequencies: &[f32], num_positions: usize, attention_scaling: f32) -> Self {
        let half = inv_frequencies.len();
        let mut rows = vec![0f32; num_positions * 2 * half];
        for (position, row) in rows.chunks_exact_mut(2 * half.max(1)).enumerate() {
            for (i, frequency) in inv_frequencies.iter().enumerate() {
                let (sin, cos) = sin_cos(position as f64 * f64::from(*frequency));
                row[i] = (cos * f64::from(attention_scaling)) as f32;
                row[half + i] = (sin * f64::from(attention_scaling)) as f32;
            }
        }
        CpuRopeTable { rows, half }
    }

    pub(crate) fn num_positions(&self) -> usize {
        self.rows.len() / (2 * self.half).max(1)
    }

    fn row(&self, position: u32) -> (&[f32], &[f32]) {
        let start = position as usize * 2 * self.half;
        self.rows[start..start + 2 * self.half].split_at(self.half)
    }
}

/// Rotate `heads.len() / (2 * half)` consecutive heads in place.
struct Rotate<'a> {
    heads: &'a mut [f32],
    cos: &'a [f32],
    sin: &'a [f32],
    /// 1 or -1, on the sine.
    sign: f32,
}

impl Kernel for Rotate<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let half = self.cos.len();
        for head in self.heads.chunks_exact_mut(2 * half) {
            for start in (0..half).step_by(16) {
                let lanes = half - start;
                // SAFETY: `cos` and `sin` have `half` elements, the head has two halves, and lanes stop at their ends.
                unsafe {
                    let cos = load_lanes::<S>(self.cos.as_ptr().add(start), lanes);
                    let sin = S::mul(load_lanes::<S>(self.sin.as_ptr().add(start), lanes), S::splat(self.sign));
                    let low = head.as_mut_ptr().add(start);
                    let high = low.add(half);
                    let (a, b) = (load_lanes::<S>(low, lanes), load_lanes::<S>(high, lanes));
                    store_lanes::<S>(low, lanes, S::sub(S::mul(a, cos), S::mul(b, sin)));
                    store_lanes::<S>(high, lanes, S::fma(b, cos, S::mul(a, sin)));
                }
            }
        }
    }
}

/// Rotate queries and keys of fused rows in place.
///
/// # Panics
/// If a position lies behind the table.
pub(crate) fn rotate(
    dev: &CpuDevice,
    qkv: &mut [f32],
    positions: &[u32],
    table: &CpuRopeTable,
    (shape, direction): (AttnShape, Direction),
) {
    let width = shape.qkv_dim();
    assert_eq!(qkv.len(), positions.len() * width, "{} rows of {width}", positions.len());
    assert_eq!(2 * table.half, shape.head_dim, "frequencies and head width");
    let rotated = (shape.num_heads + shape.num_kv_heads) * shape.head_dim;
    let sign = if direction == Direction::Forward { 1.0 } else { -1.0 };
    let qkv = SharedMut::new(qkv);
    for_ranges(dev, positions.len(), rows_per_task(width), |range| {
        for row in range {
            let (cos, sin) = table.row(positions[row]);
            // SAFETY: every row belongs to one task.
            let heads = unsafe { qkv.range(row * width..row * width + rotated) };
            dev.isa.run(Rotate { heads, cos, sin, sign });
        }
    });
}
