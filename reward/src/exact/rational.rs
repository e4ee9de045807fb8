//! Rationals over `i128` in lowest terms. Every operation is checked.

use super::{Decimal, Overflow};

/// A rational in lowest terms with a positive denominator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rational {
    num: i128,
    den: i128,
}

impl Rational {
    pub(crate) const ZERO: Rational = Rational { num: 0, den: 1 };
    pub(crate) const ONE: Rational = Rational { num: 1, den: 1 };

    pub(crate) fn integer(value: i128) -> Self {
        Rational { num: value, den: 1 }
    }

    /// `num / den` reduced.
    ///
    /// # Errors
    /// Where a sign cannot be turned within the range. The denominator is not zero.
    fn reduced(num: i128, den: i128) -> Result<Self, Overflow> {
        let divisor = common_divisor(num, den);
        let (num, den) = (num / divisor, den / divisor);
        if den > 0 {
            return Ok(Rational { num, den });
        }
        Ok(Rational { num: num.checked_neg().ok_or(Overflow)?, den: den.checked_neg().ok_or(Overflow)? })
    }

    pub(crate) fn from_decimal(decimal: &Decimal) -> Result<Self, Overflow> {
        let mut num: i128 = 0;
        for &digit in decimal.digits() {
            num = num.checked_mul(10).and_then(|n| n.checked_add(i128::from(digit))).ok_or(Overflow)?;
        }
        if decimal.is_negative() {
            num = -num;
        }
        let power = u32::try_from(decimal.exponent().unsigned_abs()).map_err(|_| Overflow)?;
        let scale = 10i128.checked_pow(power).ok_or(Overflow)?;
        if decimal.exponent() < 0 {
            return Rational::reduced(num, scale);
        }
        Ok(Rational::integer(num.checked_mul(scale).ok_or(Overflow)?))
    }

    pub(crate) fn is_zero(self) -> bool {
        self.num == 0
    }

    /// The value, where it is an integer.
    pub(crate) fn as_integer(self) -> Option<i128> {
        (self.den == 1).then_some(self.num)
    }

    pub(crate) fn num(self) -> i128 {
        self.num
    }

    pub(crate) fn den(self) -> i128 {
        self.den
    }

    pub(crate) fn negated(self) -> Result<Self, Overflow> {
        Ok(Rational { num: self.num.checked_neg().ok_or(Overflow)?, den: self.den })
    }

    pub(crate) fn plus(self, other: Self) -> Result<Self, Overflow> {
        let left = self.num.checked_mul(other.den).ok_or(Overflow)?;
        let right = other.num.checked_mul(self.den).ok_or(Overflow)?;
        let num = left.checked_add(right).ok_or(Overflow)?;
        Rational::reduced(num, self.den.checked_mul(other.den).ok_or(Overflow)?)
    }

    pub(crate) fn times(self, other: Self) -> Result<Self, Overflow> {
        // Crossing factors are divided out first, so that a product overflows only where its lowest terms do.
        let a = Rational::reduced(self.num, other.den)?;
        let b = Rational::reduced(other.num, self.den)?;
        let num = a.num.checked_mul(b.num).ok_or(Overflow)?;
        Rational::reduced(num, a.den.checked_mul(b.den).ok_or(Overflow)?)
    }

    /// `1 / self`; `None` for zero.
    pub(crate) fn inverse(self) -> Option<Result<Self, Overflow>> {
        (self.num != 0).then(|| Rational::reduced(self.den, self.num))
    }
}

/// The greatest common divisor of two sizes, at least 1. Where it is 2^127, which no `i128` holds, 1 stands in:
/// a common divisor all the same.
pub(crate) fn common_divisor(a: i128, b: i128) -> i128 {
    let (mut a, mut b) = (a.unsigned_abs(), b.unsigned_abs());
    while b != 0 {
        (a, b) = (b, a % b);
    }
    i128::try_from(a.max(1)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exact::scan_decimal;
    use proptest::prelude::*;

    fn ratio(num: i128, den: i128) -> Rational {
        Rational::reduced(num, den).expect("the test's numbers are small")
    }

    proptest! {
        #[test]
        fn small_rationals_obey_the_field_laws(a in -99i128..99, b in 1i128..99, c in -99i128..99, d in 1i128..99) {
            let (x, y) = (ratio(a, b), ratio(c, -d));
            prop_assert_eq!(x.plus(y), y.plus(x));
            prop_assert_eq!(x.plus(y)?.times(x), x.times(x)?.plus(y.times(x)?));
            prop_assert_eq!(x.plus(x.negated()?), Ok(Rational::ZERO));
            if let Some(inverse) = x.inverse() {
                prop_assert_eq!(x.times(inverse?), Ok(Rational::ONE));
            }
        }
    }

    impl From<Overflow> for TestCaseError {
        fn from(_: Overflow) -> Self {
            TestCaseError::fail("overflow of small numbers")
        }
    }

    #[test]
    fn overflow_is_an_error() {
        let max = Rational::integer(i128::MAX);
        assert_eq!(max.plus(Rational::ONE), Err(Overflow));
        assert_eq!(max.times(max), Err(Overflow));
        assert_eq!(Rational::integer(i128::MIN).negated(), Err(Overflow));
        let (huge, _) = scan_decimal(b"1e39", 0).expect("a literal");
        assert_eq!(Rational::from_decimal(&huge), Err(Overflow));
        let (fits, _) = scan_decimal(b"1e38", 0).expect("a literal");
        assert_eq!(Rational::from_decimal(&fits).map(Rational::as_integer), Ok(Some(10i128.pow(38))));
    }
}
