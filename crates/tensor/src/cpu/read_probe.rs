//! The rate of plain reads: what a product with few rows can at most reach.

use super::CpuDevice;
use super::simd::{Kernel, Simd};
use crate::View;

/// Sums side by side, so that memory is what is waited for.
const NUM_SUMS: usize = 4;

struct Sum<'a> {
    values: &'a [f32],
}

impl Kernel for Sum<'_> {
    type Output = f32;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        // SAFETY: the caller's contract; every load lies within one whole chunk.
        unsafe {
            let mut sums = [S::splat(0.0); NUM_SUMS];
            for chunk in self.values.chunks_exact(16 * NUM_SUMS) {
                for (index, sum) in sums.iter_mut().enumerate() {
                    *sum = S::add(*sum, S::load(chunk.as_ptr().add(16 * index)));
                }
            }
            sums.into_iter().map(|sum| S::reduce_add(sum)).sum()
        }
    }
}

/// Every thread reads a part of `memory` from end to end.
pub(crate) fn read_probe(dev: &CpuDevice, memory: View<'_>) {
    let threads = dev.pool.num_threads();
    let part = memory.data.len().div_ceil(threads).next_multiple_of(16 * NUM_SUMS);
    dev.pool.run(threads, &|thread| {
        let values = memory.data.chunks(part).nth(thread).unwrap_or_default();
        std::hint::black_box(dev.isa.run(Sum { values }));
    });
}
