//! An array of 16 numbers in plain Rust: the reference for the other families, and the path of other CPUs.

use super::{Simd, from_bf16};

/// Portable lanes.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

type Lanes = [f32; 16];

#[inline(always)]
fn zip(a: Lanes, b: Lanes, f: impl Fn(f32, f32) -> f32) -> Lanes {
    std::array::from_fn(|i| f(a[i], b[i]))
}

#[inline(always)]
fn reduce(mut a: Lanes, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = 8;
    while width > 0 {
        for i in 0..width {
            a[i] = f(a[i], a[i + width]);
        }
        width /= 2;
    }
    a[0]
}

// SAFETY of every block below: the trait's contract says that pointers are valid for the lanes named.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one contract for all methods, stated on the trait")]
impl Simd for Portable {
    type V = Lanes;
    const TILE_ROWS: usize = 4;
    const TILE_VECTORS: usize = 1;

    #[inline(always)]
    unsafe fn prefetch(_ptr: *const f32) {}
    #[inline(always)]
    unsafe fn prefetch_far(_ptr: *const f32) {}
    #[inline(always)]
    unsafe fn splat(x: f32) -> Lanes {
        [x; 16]
    }
    #[inline(always)]
    unsafe fn load(ptr: *const f32) -> Lanes {
        unsafe { ptr.cast::<Lanes>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_partial(ptr: *const f32, lanes: usize) -> Lanes {
        std::array::from_fn(|i| if i < lanes { unsafe { *ptr.add(i) } } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn store(ptr: *mut f32, v: Lanes) {
        unsafe { ptr.cast::<Lanes>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn store_partial(ptr: *mut f32, lanes: usize, v: Lanes) {
        for (i, x) in v.iter().enumerate().take(lanes) {
            unsafe { *ptr.add(i) = *x }
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(ptr: *const u16) -> Lanes {
        std::array::from_fn(|i| from_bf16(unsafe { *ptr.add(i) }))
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(ptr: *const u16) -> (Lanes, Lanes) {
        let first = std::array::from_fn(|i| from_bf16(unsafe { *ptr.add(2 * i) }));
        let second = std::array::from_fn(|i| from_bf16(unsafe { *ptr.add(2 * i + 1) }));
        (first, second)
    }
    #[inline(always)]
    unsafe fn add(a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |x, y| x + y)
    }
    #[inline(always)]
    unsafe fn sub(a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |x, y| x - y)
    }
    #[inline(always)]
    unsafe fn mul(a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |x, y| x * y)
    }
    #[inline(always)]
    unsafe fn div(a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |x, y| x / y)
    }
    #[inline(always)]
    unsafe fn fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn max(a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |x, y| if x > y { x } else { y })
    }
    #[inline(always)]
    unsafe fn min(a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |x, y| if x < y { x } else { y })
    }
    #[inline(always)]
    unsafe fn sqrt(a: Lanes) -> Lanes {
        a.map(f32::sqrt)
    }
    #[inline(always)]
    unsafe fn round(a: Lanes) -> Lanes {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    unsafe fn exp2_int(n: Lanes) -> Lanes {
        n.map(|x| f32::from_bits(((x as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn select_lt(a: Lanes, b: Lanes, x: Lanes, y: Lanes) -> Lanes {
        std::array::from_fn(|i| if a[i] < b[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    unsafe fn reduce_add(a: Lanes) -> f32 {
        reduce(a, |x, y| x + y)
    }
    #[inline(always)]
    unsafe fn reduce_max(a: Lanes) -> f32 {
        reduce(a, |x, y| if x > y { x } else { y })
    }
}
