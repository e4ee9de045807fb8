//! bf16 pairs multiplied by `vdpbf16ps`: the odd product joins the sum first, then the even one.

#[cfg(target_arch = "x86_64")]
use super::block::Block;
#[cfg(target_arch = "x86_64")]
use super::tile::Product;
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::{Avx512, Simd};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// bf16 pairs on both sides.
#[cfg(target_arch = "x86_64")]
struct NativePair;

// SAFETY of every block below: only `run` names this product, and it enables the features.
#[cfg(target_arch = "x86_64")]
#[allow(clippy::undocumented_unsafe_blocks, reason = "one contract for all methods, stated on the trait")]
impl Product for NativePair {
    type S = Avx512;
    const LEFT_WORDS: usize = 1;
    const MAX_ROWS: usize = Avx512::TILE_ROWS;
    type A = __m512i;
    type B = __m512i;

    #[inline(always)]
    unsafe fn load_a(ptr: *const f32) -> __m512i {
        unsafe { _mm512_set1_epi32(*ptr.cast::<i32>()) }
    }
    #[inline(always)]
    unsafe fn load_b(ptr: *const f32) -> __m512i {
        unsafe { _mm512_loadu_si512(ptr.cast()) }
    }
    #[inline(always)]
    unsafe fn mac(a: __m512i, b: __m512i, acc: __m512) -> __m512 {
        unsafe { _mm512_dpbf16_ps(acc, as_pairs(a), as_pairs(b)) }
    }
}

/// The same bits as 32 bf16 numbers.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
#[allow(unnecessary_transmutes, reason = "the conversion has no intrinsic of its own")]
fn as_pairs(words: __m512i) -> __m512bh {
    // SAFETY: both types are 64 bytes of plain numbers.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(words) }
}

/// Multiply pairs in registers `rounds` times with twelve chains; returns a number that keeps them alive.
///
/// # Safety
/// The CPU has AVX-512 BF16.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi1,bmi2")]
pub(super) unsafe fn probe(rounds: usize) -> f32 {
    let (a, b) = (_mm512_set1_epi32(std::hint::black_box(0x3f80_3f80)), _mm512_set1_epi32(0x3a00_3a00));
    let mut sums = [_mm512_set1_ps(1.0); super::peak::NUM_CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, as_pairs(a), as_pairs(b));
        }
    }
    sums.iter().map(|sum| _mm512_reduce_add_ps(*sum)).sum()
}

/// Run a block whose operands are bf16 pairs.
///
/// # Safety
/// As [`Block::run`], and the CPU has AVX-512 BF16.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi1,bmi2")]
pub(super) unsafe fn run(block: &Block) {
    // SAFETY: this function enables the features; the rest is the caller's contract.
    unsafe { block.run::<NativePair>() }
}
