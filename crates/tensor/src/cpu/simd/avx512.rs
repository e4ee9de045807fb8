//! One 512-bit register.
#![cfg(target_arch = "x86_64")]

use super::Simd;
use std::arch::x86_64::*;

/// AVX-512 lanes.
#[derive(Clone, Copy)]
pub(crate) struct Avx512;

// SAFETY of every block below: the trait's contract says that the features are enabled and pointers valid.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one contract for all methods, stated on the trait")]
impl Simd for Avx512 {
    type V = __m512;
    const TILE_ROWS: usize = 12;
    const TILE_VECTORS: usize = 2;

    #[inline(always)]
    unsafe fn prefetch(ptr: *const f32) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(ptr.cast()) }
    }
    #[inline(always)]
    unsafe fn prefetch_far(ptr: *const f32) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(ptr.cast()) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(ptr: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(ptr) }
    }
    #[inline(always)]
    unsafe fn load_partial(ptr: *const f32, lanes: usize) -> __m512 {
        unsafe { _mm512_maskz_loadu_ps(mask(lanes), ptr) }
    }
    #[inline(always)]
    unsafe fn store(ptr: *mut f32, v: __m512) {
        unsafe { _mm512_storeu_ps(ptr, v) }
    }
    #[inline(always)]
    unsafe fn store_partial(ptr: *mut f32, lanes: usize, v: __m512) {
        unsafe { _mm512_mask_storeu_ps(ptr, mask(lanes), v) }
    }
    #[inline(always)]
    unsafe fn load_bf16(ptr: *const u16) -> __m512 {
        unsafe {
            let half = _mm256_loadu_si256(ptr.cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(ptr: *const u16) -> (__m512, __m512) {
        unsafe {
            let words = _mm512_loadu_si512(ptr.cast());
            let first = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words));
            let second = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(0xffff_0000_u32 as i32)));
            (first, second)
        }
    }
    #[inline(always)]
    unsafe fn load_i8(ptr: *const i8) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(ptr.cast()))) }
    }
    #[inline(always)]
    unsafe fn round_bf16(a: __m512) -> __m512 {
        unsafe {
            let bits = _mm512_castps_si512(a);
            let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
            let rounded = _mm512_and_si512(sum, high);
            let below_normal = _mm512_testn_epi32_mask(rounded, _mm512_set1_epi32(0x7f80_0000));
            let sign = _mm512_set1_epi32(i32::MIN);
            let flushed = _mm512_mask_and_epi32(rounded, below_normal, rounded, sign);
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, a);
            let quiet = _mm512_set1_epi32(0x0040_0000);
            _mm512_castsi512_ps(_mm512_mask_or_epi32(flushed, nan, _mm512_and_si512(bits, high), quiet))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(ptr: *mut u16, a: __m512) {
        unsafe {
            let high = _mm512_srli_epi32::<16>(_mm512_castps_si512(Self::round_bf16(a)));
            _mm256_storeu_si256(ptr.cast(), _mm512_cvtepi32_epi16(high));
        }
    }
    #[inline(always)]
    unsafe fn pair_bf16(even: __m512, odd: __m512) -> __m512 {
        unsafe {
            let low = _mm512_srli_epi32::<16>(_mm512_castps_si512(Self::round_bf16(even)));
            _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_castps_si512(Self::round_bf16(odd))))
        }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sqrt(a: __m512) -> __m512 {
        unsafe { _mm512_sqrt_ps(a) }
    }
    #[inline(always)]
    unsafe fn round(a: __m512) -> __m512 {
        unsafe { _mm512_roundscale_ps::<0>(a) }
    }
    #[inline(always)]
    unsafe fn exp2_int(n: __m512) -> __m512 {
        unsafe {
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        }
    }
    #[inline(always)]
    unsafe fn select_lt(a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x) }
    }
    #[inline(always)]
    unsafe fn reduce_add(a: __m512) -> f32 {
        unsafe {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            super::avx2::reduce_add_8(eight)
        }
    }
    #[inline(always)]
    unsafe fn reduce_max(a: __m512) -> f32 {
        unsafe {
            let eight = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            super::avx2::reduce_max_8(eight)
        }
    }
}

#[inline(always)]
fn mask(lanes: usize) -> u16 {
    debug_assert!(lanes <= 16, "a vector has 16 lanes");
    ((1u32 << lanes) - 1) as u16
}
