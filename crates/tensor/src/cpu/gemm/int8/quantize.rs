//! From f32 to bytes and scales.

use super::{GROUP, PANEL};
use crate::cpu::simd::{Kernel, Simd};

/// Largest byte; -128 is not used, so that the numbers lie symmetrically.
const LARGEST: f32 = 127.0;
/// Added to a number of less than 2^22, this leaves the nearest integer (ties to even) in the low bits of the sum.
const ROUNDING: f32 = 12_582_912.0;
/// Bits of infinity; those of every finite magnitude are less.
const INFINITE: u32 = 0x7f80_0000;

/// One panel of a weight: 64 of its rows, some of which may not exist.
///
/// With `m` the largest magnitude of a group, its scale is `m / 127` and its bytes are the numbers times `127 / m`,
/// rounded to the nearest integer, ties to even. A group whose `127 / m` is not finite (m below 2^-121) is zero; one
/// with a number that is not finite has scale NaN, so that what is computed with it is not a number either.
pub(super) struct QuantizedPanel<'a> {
    /// The rows that exist, each of `k` numbers.
    pub(super) rows: &'a [f32],
    /// Numbers of a row.
    pub(super) k: usize,
    /// `[k][64]`.
    pub(super) bytes: &'a mut [i8],
    /// `[group][64]`.
    pub(super) scales: &'a mut [f32],
}

impl Kernel for QuantizedPanel<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let groups = self.bytes.chunks_mut(GROUP * PANEL).zip(self.scales.chunks_exact_mut(PANEL));
        for (group, (bytes, scales)) in groups.enumerate() {
            let numbers = group * GROUP..(group * GROUP + GROUP).min(self.k);
            for (row, (scale, column)) in self.rows.chunks_exact(self.k).zip(scales.iter_mut().zip(0..)) {
                *scale = quantize_group(&row[numbers.clone()], bytes, column);
            }
        }
    }
}

/// Write the bytes of one output's group to `bytes[..][column]`, and give its scale.
#[inline(always)]
fn quantize_group(numbers: &[f32], bytes: &mut [i8], column: usize) -> f32 {
    let largest = numbers.iter().fold(0, |largest: u32, x| largest.max(x.to_bits() & 0x7fff_ffff));
    let magnitude = f32::from_bits(largest);
    let factor = LARGEST / magnitude;
    if largest >= INFINITE || !factor.is_finite() {
        bytes.chunks_exact_mut(PANEL).for_each(|step| step[column] = 0);
        return if largest >= INFINITE { f32::NAN } else { 0.0 };
    }
    let mut rounded = [0i8; GROUP];
    for (byte, x) in rounded.iter_mut().zip(numbers) {
        *byte = (x * factor + ROUNDING).to_bits() as i8;
    }
    for (step, byte) in bytes.chunks_exact_mut(PANEL).zip(rounded) {
        step[column] = byte;
    }
    magnitude / LARGEST
}
