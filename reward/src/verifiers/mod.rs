//! The verifiers, one a file: pure functions from a response (and a ground truth) to a value.
//!
//! Invariants: no verifier panics on any input, every one runs in time bounded by a small polynomial of the input's
//! length, and one that cannot decide returns a [`Cause`] instead of a number.

pub(crate) mod contains;
pub(crate) mod exact_match;
pub(crate) mod format;
pub(crate) mod json;
pub(crate) mod length;
pub(crate) mod math;
pub(crate) mod number;
pub(crate) mod overlong;
pub(crate) mod regex;

use crate::error::Cause;

/// 1 for a pass, 0 for a miss.
pub(crate) fn pass(passed: bool) -> Result<f64, Cause> {
    Ok(f64::from(u8::from(passed)))
}
