//! Exact arithmetic on the numbers that answers are made of: decimal literals of any length, ratios of them, and
//! rationals over `i128` whose overflow is an error.

mod decimal;
mod rational;

pub(crate) use decimal::{Decimal, Number, digits_end, scan_decimal, small_integer};
pub(crate) use rational::{Rational, common_divisor};

/// A result that does not fit the arithmetic it was asked of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Overflow;
