//! Two 256-bit registers.
#![cfg(target_arch = "x86_64")]

use super::Simd;
use std::arch::x86_64::*;

/// AVX2 lanes: lanes 0..8 and 8..16.
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

/// Lane i + lane i+4, then +2, then +1.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks, reason = "called where AVX is enabled, as the trait's contract says")]
pub(super) unsafe fn reduce_add_8(a: __m256) -> f32 {
    unsafe {
        let four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }
}

/// As [`reduce_add_8`], with the maximum.
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks, reason = "called where AVX is enabled, as the trait's contract says")]
pub(super) unsafe fn reduce_max_8(a: __m256) -> f32 {
    unsafe {
        let four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
        let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
    }
}

macro_rules! lanewise {
    ($($name:ident($($arg:ident),+) = $intrinsic:ident;)+) => {
        $(#[inline(always)]
        unsafe fn $name($($arg: [__m256; 2]),+) -> [__m256; 2] {
            unsafe { [$intrinsic($($arg[0]),+), $intrinsic($($arg[1]),+)] }
        })+
    };
}

// SAFETY of every block below: the trait's contract says that the features are enabled and pointers valid.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one contract for all methods, stated on the trait")]
impl Simd for Avx2 {
    type V = [__m256; 2];
    const TILE_ROWS: usize = 6;
    const TILE_VECTORS: usize = 1;

    #[inline(always)]
    unsafe fn prefetch(ptr: *const f32) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(ptr.cast()) }
    }
    #[inline(always)]
    unsafe fn prefetch_far(ptr: *const f32) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(ptr.cast()) }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    unsafe fn load(ptr: *const f32) -> Self::V {
        unsafe { [_mm256_loadu_ps(ptr), _mm256_loadu_ps(ptr.add(8))] }
    }
    #[inline(always)]
    unsafe fn load_partial(ptr: *const f32, lanes: usize) -> Self::V {
        unsafe {
            let mut full = [0f32; 16];
            std::ptr::copy_nonoverlapping(ptr, full.as_mut_ptr(), lanes);
            Self::load(full.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn store(ptr: *mut f32, v: Self::V) {
        unsafe {
            _mm256_storeu_ps(ptr, v[0]);
            _mm256_storeu_ps(ptr.add(8), v[1]);
        }
    }
    #[inline(always)]
    unsafe fn store_partial(ptr: *mut f32, lanes: usize, v: Self::V) {
        unsafe {
            let mut full = [0f32; 16];
            Self::store(full.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(full.as_ptr(), ptr, lanes);
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(ptr: *const u16) -> Self::V {
        unsafe {
            let widen = |p: *const u16| {
                let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
            };
            [widen(ptr), widen(ptr.add(8))]
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(ptr: *const u16) -> (Self::V, Self::V) {
        unsafe {
            let words = [_mm256_loadu_si256(ptr.cast()), _mm256_loadu_si256(ptr.add(16).cast())];
            let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            let first = words.map(|w| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(w)));
            let second = words.map(|w| _mm256_castsi256_ps(_mm256_and_si256(w, high)));
            (first, second)
        }
    }
    #[inline(always)]
    unsafe fn load_i8(ptr: *const i8) -> Self::V {
        unsafe {
            let widen = |p: *const i8| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())));
            [widen(ptr), widen(ptr.add(8))]
        }
    }
    lanewise! {
        add(a, b) = _mm256_add_ps;
        sub(a, b) = _mm256_sub_ps;
        mul(a, b) = _mm256_mul_ps;
        div(a, b) = _mm256_div_ps;
        fma(a, b, c) = _mm256_fmadd_ps;
        max(a, b) = _mm256_max_ps;
        min(a, b) = _mm256_min_ps;
        sqrt(a) = _mm256_sqrt_ps;
    }
    #[inline(always)]
    unsafe fn round(a: Self::V) -> Self::V {
        unsafe { a.map(|x| _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x)) }
    }
    #[inline(always)]
    unsafe fn exp2_int(n: Self::V) -> Self::V {
        unsafe {
            n.map(|x| {
                let biased = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
            })
        }
    }
    #[inline(always)]
    unsafe fn select_lt(a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V {
        unsafe {
            let pick = |i: usize| _mm256_blendv_ps(y[i], x[i], _mm256_cmp_ps::<_CMP_LT_OQ>(a[i], b[i]));
            [pick(0), pick(1)]
        }
    }
    #[inline(always)]
    unsafe fn reduce_add(a: Self::V) -> f32 {
        unsafe { reduce_add_8(_mm256_add_ps(a[0], a[1])) }
    }
    #[inline(always)]
    unsafe fn reduce_max(a: Self::V) -> f32 {
        unsafe { reduce_max_8(_mm256_max_ps(a[0], a[1])) }
    }
}
