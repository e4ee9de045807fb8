//! Elementary functions of our own, with equal bits on every instruction family.
//!
//! Vector functions work on the 16 virtual lanes; scalar functions are f64 code with `+ - * /` only. The platform's
//! libm is never called, because its results differ between systems.

use super::simd::Simd;

/// Below this, [`exp`] is exactly 0: the result would be subnormal.
pub(crate) const EXP_UNDERFLOW: f32 = -87.33;
/// Above this, [`exp`] stays at its value here, just under the largest f32.
const EXP_LARGEST: f32 = 88.0;
const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// ln 2 in two parts; the high part has nine significant bits, so that `n * LN2_HIGH` is exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// Of `(e^r - 1 - r) / r^2` on `|r| <= ln(2) / 2`, highest degree first (Cephes `expf`).
const EXP_POLYNOMIAL: [f32; 6] = [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1];

/// Up to 16 lanes from memory, the others 0.
///
/// # Safety
/// As [`Simd::load_partial`].
#[inline(always)]
pub(crate) unsafe fn load_lanes<S: Simd>(ptr: *const f32, lanes: usize) -> S::V {
    // SAFETY: passed on to the caller.
    unsafe { if lanes >= 16 { S::load(ptr) } else { S::load_partial(ptr, lanes) } }
}

/// Up to 16 lanes to memory.
///
/// # Safety
/// As [`Simd::store_partial`].
#[inline(always)]
pub(crate) unsafe fn store_lanes<S: Simd>(ptr: *mut f32, lanes: usize, v: S::V) {
    // SAFETY: passed on to the caller.
    unsafe { if lanes >= 16 { S::store(ptr, v) } else { S::store_partial(ptr, lanes, v) } }
}

/// `e^x` within 2 ulp; exactly 1 at 0, exactly 0 below [`EXP_UNDERFLOW`], NaN at NaN.
///
/// # Safety
/// As every method of [`Simd`].
#[inline(always)]
pub(crate) unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    // SAFETY: arithmetic on lanes whose features the caller enabled.
    unsafe {
        // The second operand wins against NaN, so that NaN passes through.
        let clamped = S::max(S::splat(-88.0), S::min(S::splat(EXP_LARGEST), x));
        let n = S::max(S::splat(-126.0), S::round(S::mul(clamped, S::splat(LOG2_E))));
        let r = S::fma(n, S::splat(-LN2_LOW), S::fma(n, S::splat(-LN2_HIGH), clamped));
        let mut p = S::splat(EXP_POLYNOMIAL[0]);
        for c in &EXP_POLYNOMIAL[1..] {
            p = S::fma(p, r, S::splat(*c));
        }
        let y = S::add(S::fma(S::mul(r, r), p, r), S::splat(1.0));
        S::select_lt(x, S::splat(EXP_UNDERFLOW), S::splat(0.0), S::mul(y, S::exp2_int(n)))
    }
}

/// `1 / (1 + e^-x)`.
///
/// # Safety
/// As every method of [`Simd`].
#[inline(always)]
pub(crate) unsafe fn sigmoid<S: Simd>(x: S::V) -> S::V {
    // SAFETY: arithmetic on lanes whose features the caller enabled.
    unsafe {
        let one = S::splat(1.0);
        S::div(one, S::add(one, exp::<S>(S::sub(S::splat(0.0), x))))
    }
}

/// Natural logarithm of a number of at least 0, within 2 ulp. `ln(0)` is minus infinity.
pub(crate) fn ln(x: f64) -> f64 {
    if x == 0.0 {
        return f64::NEG_INFINITY;
    }
    if !(x > 0.0 && x < f64::INFINITY) {
        return if x == f64::INFINITY { x } else { f64::NAN };
    }
    let (x, shift) = if x < f64::MIN_POSITIVE { (x * (1u64 << 54) as f64, 54.0) } else { (x, 0.0) };
    let bits = x.to_bits();
    let mut exponent = ((bits >> 52) as i64 - 1023) as f64 - shift;
    let mut mantissa = f64::from_bits((bits & 0x000f_ffff_ffff_ffff) | 0x3ff0_0000_0000_0000);
    if mantissa > std::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        exponent += 1.0;
    }
    // ln m = 2 atanh(s), s = (m - 1) / (m + 1), |s| <= 0.172: 12 terms of the series are below 2^-60.
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let s2 = s * s;
    let mut sum = 0.0;
    for k in (1..=12).rev() {
        sum = (sum + 1.0 / f64::from(2 * k + 1)) * s2;
    }
    // The high part of ln 2 has 33 bits, so that its product with the exponent is exact.
    const LN2_HIGH: f64 = f64::from_bits(0x3fe6_2e42_fee0_0000);
    const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    let log_mantissa = 2.0 * s + 2.0 * s * sum;
    exponent * LN2_HIGH + (log_mantissa + exponent * LN2_LOW)
}

/// Sine and cosine of an angle in radians, `|x| <= 1e6`, within 1e-12.
pub(crate) fn sin_cos(x: f64) -> (f64, f64) {
    // pi / 2 in three parts of 33 bits, so that the first two products with a quadrant below 2^20 are exact.
    const PART_1: f64 = f64::from_bits(0x3ff9_21fb_5440_0000);
    const PART_2: f64 = f64::from_bits(0x3dd0_b461_1a60_0000);
    const PART_3: f64 = f64::from_bits(0x3ba3_198a_2e03_7073);
    let quadrant = (x * std::f64::consts::FRAC_2_PI).round_ties_even();
    let r = ((x - quadrant * PART_1) - quadrant * PART_2) - quadrant * PART_3;
    let (sin, cos) = sin_cos_near_zero(r);
    match (quadrant as i64) & 3 {
        0 => (sin, cos),
        1 => (cos, -sin),
        2 => (-sin, -cos),
        _ => (-cos, sin),
    }
}

/// Taylor series on `|r| <= pi / 4`; the first terms left out are below 1e-17.
fn sin_cos_near_zero(r: f64) -> (f64, f64) {
    let r2 = r * r;
    let (mut sin, mut cos) = (1.0, 1.0);
    for k in (1..=9).rev() {
        let n = f64::from(2 * k);
        sin = 1.0 - sin * r2 / (n * (n + 1.0));
        cos = 1.0 - cos * r2 / ((n - 1.0) * n);
    }
    (sin * r, cos)
}

#[cfg(test)]
mod tests;
