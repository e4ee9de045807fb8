//! Sixteen virtual f32 lanes on every instruction family, with equal bits.
//!
//! A kernel implements [`Kernel`] generically over [`Simd`]; [`Isa::run`] compiles it once per family inside a
//! function that enables the family's features, which is where the `#[inline(always)]` methods below are inlined.

mod avx2;
mod avx512;
mod portable;

use serde::Serialize;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;

/// A vector of 16 f32 lanes. Every operation gives the same bits in every implementation.
///
/// # Safety
/// Methods may only be called where the implementation's CPU features are enabled, which [`Isa::run`] guarantees.
/// Pointers must be valid for the lanes that an operation names; no alignment is required.
pub(crate) trait Simd: Copy + 'static {
    /// The vector.
    type V: Copy;
    /// Rows of a matrix tile that fill the registers beside [`Simd::TILE_VECTORS`] columns vectors.
    const TILE_ROWS: usize;
    /// Vectors per row of a matrix tile; divides 2.
    const TILE_VECTORS: usize;

    /// Ask for the cache line at `ptr`, which need not be valid.
    unsafe fn prefetch(ptr: *const f32);
    /// As [`Simd::prefetch`], but no nearer than the second cache level.
    unsafe fn prefetch_far(ptr: *const f32);
    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(ptr: *const f32) -> Self::V;
    /// The first `lanes` (at most 16) lanes from memory, the others 0.
    unsafe fn load_partial(ptr: *const f32, lanes: usize) -> Self::V;
    unsafe fn store(ptr: *mut f32, v: Self::V);
    /// Only the first `lanes` lanes to memory.
    unsafe fn store_partial(ptr: *mut f32, lanes: usize, v: Self::V);
    /// 16 bf16 numbers widened.
    unsafe fn load_bf16(ptr: *const u16) -> Self::V;
    /// 16 pairs of bf16: lane i holds numbers 2i (first) and 2i + 1 (second), widened.
    unsafe fn load_bf16_pairs(ptr: *const u16) -> (Self::V, Self::V);
    /// 16 signed bytes as numbers.
    #[inline(always)]
    unsafe fn load_i8(ptr: *const i8) -> Self::V {
        // SAFETY: the caller's bytes; the array holds 16 lanes.
        unsafe { Self::load(std::array::from_fn::<f32, 16, _>(|i| f32::from(*ptr.add(i))).as_ptr()) }
    }
    /// [`round_bf16`], lane by lane.
    #[inline(always)]
    unsafe fn round_bf16(a: Self::V) -> Self::V {
        let mut lanes = [0f32; 16];
        // SAFETY: the array holds 16 lanes.
        unsafe {
            Self::store(lanes.as_mut_ptr(), a);
            Self::load(lanes.map(round_bf16).as_ptr())
        }
    }
    /// 16 numbers as bf16, each as [`to_bf16`] gives it.
    #[inline(always)]
    unsafe fn store_bf16(ptr: *mut u16, a: Self::V) {
        let mut lanes = [0f32; 16];
        // SAFETY: the array holds 16 lanes; the caller's pointer is valid for as many.
        unsafe {
            Self::store(lanes.as_mut_ptr(), a);
            ptr.cast::<[u16; 16]>().write_unaligned(lanes.map(to_bf16));
        }
    }
    /// Pairs of bf16, rounded: the bits of lane i hold `even[i]` in the low half and `odd[i]` in the high half.
    #[inline(always)]
    unsafe fn pair_bf16(even: Self::V, odd: Self::V) -> Self::V {
        let (mut low, mut high) = ([0f32; 16], [0f32; 16]);
        // SAFETY: the arrays hold 16 lanes.
        unsafe {
            Self::store(low.as_mut_ptr(), even);
            Self::store(high.as_mut_ptr(), odd);
            let pair = |i: usize| f32::from_bits(u32::from(to_bf16(low[i])) | (u32::from(to_bf16(high[i])) << 16));
            Self::load(std::array::from_fn::<f32, 16, _>(pair).as_ptr())
        }
    }
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, one rounding.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `if a > b { a } else { b }`.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// `if a < b { a } else { b }`.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sqrt(a: Self::V) -> Self::V;
    /// To the nearest integer, ties to even.
    unsafe fn round(a: Self::V) -> Self::V;
    /// `2^n` for integral n in -126..=127.
    unsafe fn exp2_int(n: Self::V) -> Self::V;
    /// `if a < b { x } else { y }`, lane by lane.
    unsafe fn select_lt(a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// Halves, then halves again: lane i + lane i+8, then +4, +2, +1.
    unsafe fn reduce_add(a: Self::V) -> f32;
    unsafe fn reduce_max(a: Self::V) -> f32;
}

/// A computation that can be compiled for each instruction family.
pub(crate) trait Kernel {
    /// What it returns.
    type Output;
    /// Run with the lanes of `S`. Implementations are `#[inline(always)]`.
    ///
    /// # Safety
    /// The CPU must have the features of `S`.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

/// An instruction family of the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Isa {
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// AVX2 with FMA.
    Avx2,
    /// Plain Rust.
    Portable,
}

impl Isa {
    /// The best family that this CPU has.
    pub fn detect() -> Isa {
        [Isa::Avx512, Isa::Avx2].into_iter().find(|isa| isa.is_available()).unwrap_or(Isa::Portable)
    }

    /// True where this CPU has the family.
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            match self {
                Isa::Avx512 => {
                    is_x86_feature_detected!("avx512f")
                        && is_x86_feature_detected!("avx512bw")
                        && is_x86_feature_detected!("avx512dq")
                        && is_x86_feature_detected!("avx512vl")
                        && is_x86_feature_detected!("fma")
                }
                Isa::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
                Isa::Portable => true,
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Isa::Portable
        }
    }

    /// True where the CPU multiplies bf16 pairs natively (`vdpbf16ps`).
    pub fn has_native_bf16() -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            Isa::Avx512.is_available() && is_x86_feature_detected!("avx512bf16")
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            false
        }
    }

    /// Run `kernel` with this family's lanes.
    ///
    /// # Panics
    /// If the CPU lacks the family (checked when a device is made; an assertion here would cost in small kernels).
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        debug_assert!(self.is_available(), "the device was made for a family that this CPU has");
        match self {
            // SAFETY: a device is only made for an available family.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { run_avx512(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { run_avx2(kernel) },
            // SAFETY: the portable lanes need no feature.
            _ => unsafe { kernel.run::<portable::Portable>() },
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi1,bmi2")]
unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: this function enables the features, and its caller checked the CPU.
    unsafe { kernel.run::<avx512::Avx512>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2")]
unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: this function enables the features, and its caller checked the CPU.
    unsafe { kernel.run::<avx2::Avx2>() }
}

/// Nearest bf16 (ties to even), subnormal results flushed to zero, NaN kept quiet.
#[inline(always)]
pub(crate) fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        return ((bits >> 16) as u16) | 0x0040;
    }
    let rounded = ((bits.wrapping_add(0x7fff + ((bits >> 16) & 1))) >> 16) as u16;
    if rounded & 0x7f80 == 0 { rounded & 0x8000 } else { rounded }
}

/// The f32 that a bf16 stands for.
#[inline(always)]
pub(crate) fn from_bf16(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// The nearest number that bf16 holds.
#[inline(always)]
pub(crate) fn round_bf16(x: f32) -> f32 {
    from_bf16(to_bf16(x))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both lane-wise roundings of `even` and `odd`, 16 numbers each.
    struct Roundings<'a>(&'a [f32], &'a [f32]);

    impl Kernel for Roundings<'_> {
        type Output = ([u32; 32], [u16; 16]);
        #[inline(always)]
        unsafe fn run<S: Simd>(self) -> ([u32; 32], [u16; 16]) {
            let (mut out, mut stored) = ([0f32; 32], [0u16; 16]);
            // SAFETY: the slices and the arrays hold 16 numbers each.
            unsafe {
                let (even, odd) = (S::load(self.0.as_ptr()), S::load(self.1.as_ptr()));
                S::store(out.as_mut_ptr(), S::round_bf16(even));
                S::store(out.as_mut_ptr().add(16), S::pair_bf16(even, odd));
                S::store_bf16(stored.as_mut_ptr(), even);
            }
            (out.map(f32::to_bits), stored)
        }
    }

    #[test]
    fn lanes_round_to_bf16_like_the_scalar_function() {
        let special = [0.0, -0.0, f32::NAN, -f32::NAN, f32::INFINITY, f32::MAX, f32::MIN_POSITIVE, -1e-39];
        let edges = [0x3f80_8000, 0x3f81_8000, 0x007f_ffff, 0x007f_8000, 0x7fff_ffff, 0x7f80_0001].map(f32::from_bits);
        let spread = (0..4096u32).map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b1)));
        let numbers: Vec<f32> = special.into_iter().chain(edges).chain(spread).collect();
        for isa in [Isa::Avx512, Isa::Avx2, Isa::Portable].into_iter().filter(|isa| isa.is_available()) {
            for window in numbers.windows(32) {
                let (even, odd) = window.split_at(16);
                let (got, stored) = isa.run(Roundings(even, odd));
                for i in 0..16 {
                    let pair = u32::from(to_bf16(even[i])) | (u32::from(to_bf16(odd[i])) << 16);
                    assert_eq!(got[i], round_bf16(even[i]).to_bits(), "{isa:?}: {:x}", even[i].to_bits());
                    assert_eq!(stored[i], to_bf16(even[i]), "{isa:?}: {:x}", even[i].to_bits());
                    assert_eq!(got[16 + i], pair, "{isa:?}: {:x}, {:x}", even[i].to_bits(), odd[i].to_bits());
                }
            }
        }
    }
}
