//! The layouts of native bf16 on CPUs without it: pairs on both sides, multiplied by widening them.

use super::block::Block;
use super::tile::Product;
use crate::cpu::simd::{Isa, Kernel, Simd};
use crate::{CpuConfig, CpuDevice, DType, Device, LinearShape, Reduction, Store};

/// What `vdpbf16ps` does, in two fused multiply-adds.
struct SoftPair<S>(std::marker::PhantomData<S>);

// SAFETY of every block below: the trait's contract is that of the lanes.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one contract for all methods, stated on the trait")]
impl<S: Simd> Product for SoftPair<S> {
    type S = S;
    const LEFT_WORDS: usize = 1;
    const MAX_ROWS: usize = S::TILE_ROWS;
    type A = (S::V, S::V);
    type B = (S::V, S::V);

    #[inline(always)]
    unsafe fn load_a(ptr: *const f32) -> Self::A {
        unsafe {
            let word = *ptr.cast::<u32>();
            (S::splat(f32::from_bits(word << 16)), S::splat(f32::from_bits(word & 0xffff_0000)))
        }
    }
    #[inline(always)]
    unsafe fn load_b(ptr: *const f32) -> Self::B {
        unsafe { S::load_bf16_pairs(ptr.cast()) }
    }
    #[inline(always)]
    unsafe fn mac((a_even, a_odd): Self::A, (b_even, b_odd): Self::B, acc: S::V) -> S::V {
        unsafe { S::fma(a_even, b_even, S::fma(a_odd, b_odd, acc)) }
    }
}

/// A native block on a CPU without the instruction.
pub(super) struct SoftBlock(pub(super) Block);

impl Kernel for SoftBlock {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's contract.
        unsafe { self.0.run::<SoftPair<S>>() }
    }
}

/// All results of a layer on one device, as bits.
fn results(dev: &CpuDevice, rows: usize, shape: LinearShape, reduction: Reduction) -> Vec<u32> {
    let LinearShape { n, k } = shape;
    let numbers = |len: usize, seed: usize| {
        let at = |i: usize| ((i + seed).wrapping_mul(2_654_435_761) >> 5 & 0xffff) as f32 / 32768.0 - 1.0;
        dev.upload(&(0..len).map(at).collect::<Vec<_>>())
    };
    let (w, x, dy) = (numbers(n * k, 1), numbers(rows * k, 2), numbers(rows * n, 3));
    let packed = dev.pack(w.all(), shape, DType::Bf16, reduction);
    let (mut out, mut dx, mut dw) = (dev.zeros(rows * n), dev.zeros(rows * k), numbers(n * k, 4));
    dev.linear(x.all(), &packed, None, out.all_mut(), Store::Write);
    dev.linear_input_grad(dy.all(), w.all(), &packed, dx.all_mut(), Store::Write);
    dev.linear_weight_grad(dy.all(), x.all(), shape, DType::Bf16, dw.all_mut());
    let mut bits = Vec::new();
    for buffer in [&out, &dx, &dw] {
        let mut host = vec![0.0; buffer.len()];
        dev.read(buffer.all(), &mut host);
        bits.extend(host.iter().map(|x| x.to_bits()));
    }
    bits
}

#[test]
fn pairs_on_both_sides_give_the_bits_of_widened_words() {
    let config = CpuConfig { num_threads: 2, isa: Isa::Avx512.is_available().then_some(Isa::Avx512) };
    let (mut pairs, mut widened) = (CpuDevice::new(config), CpuDevice::new(config));
    (pairs.native_bf16, widened.native_bf16) = (true, false);
    for (rows, n, k) in
        [(1, 1, 1), (7, 70, 33), (9, 65, 100), (31, 130, 129), (250, 40, 50), (1301, 7, 3), (3, 1301, 9)]
    {
        let shape = LinearShape { n, k };
        for reduction in [Reduction::Chain, Reduction::Groups8] {
            let (a, b) = (results(&pairs, rows, shape, reduction), results(&widened, rows, shape, reduction));
            assert_eq!(a, b, "{rows} rows, {shape:?}, {reduction:?}");
        }
    }
}
