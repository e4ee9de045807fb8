//! The rate of multiply-adds that never leave the registers: what a matrix product can at most reach.

use crate::cpu::CpuDevice;
use crate::cpu::simd::{Isa, Kernel, Simd};
use temper_types::DType;

/// Independent chains, enough to hide the latency of a multiply-add.
pub(super) const NUM_CHAINS: usize = 12;
const ROUNDS: usize = 400_000;

struct Probe {
    rounds: usize,
}

impl Kernel for Probe {
    type Output = f32;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        // A vector of 16 lanes takes two registers on families with 16 of them.
        let chains = if S::TILE_VECTORS > 1 { NUM_CHAINS } else { NUM_CHAINS / 2 };
        // SAFETY: the caller's contract; nothing touches memory.
        unsafe {
            let (a, b) = (S::splat(std::hint::black_box(0.999)), S::splat(std::hint::black_box(0.001)));
            let mut sums = [S::splat(1.0); NUM_CHAINS];
            for _ in 0..self.rounds {
                for sum in sums.iter_mut().take(chains) {
                    *sum = S::fma(*sum, a, b);
                }
            }
            let mut total = 0.0;
            for sum in sums {
                total += S::reduce_add(sum);
            }
            total
        }
    }
}

/// Keep every thread multiplying and adding for some milliseconds; returns the number of operations.
pub(crate) fn peak_probe(dev: &CpuDevice, dtype: DType) -> usize {
    let threads = dev.pool.num_threads();
    let native = dtype == DType::Bf16 && dev.native_bf16;
    dev.pool.run(threads, &|_| {
        std::hint::black_box(probe(dev, native));
    });
    let (chains, operations) = match (native, dev.isa) {
        (true, _) => (NUM_CHAINS, 4),
        (false, Isa::Avx512) => (NUM_CHAINS, 2),
        (false, Isa::Avx2 | Isa::Portable) => (NUM_CHAINS / 2, 2),
    };
    threads * ROUNDS * chains * 16 * operations
}

fn probe(dev: &CpuDevice, native: bool) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if native {
        // SAFETY: the device says that the CPU has the instruction.
        return unsafe { super::native::probe(ROUNDS) };
    }
    debug_assert!(!native, "only x86-64 multiplies bf16 natively");
    dev.isa.run(Probe { rounds: ROUNDS })
}
