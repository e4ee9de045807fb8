//! Exact values: sums of rational multiples of square roots and powers of symbols.

use crate::exact::{Overflow, Rational, common_divisor};
use std::collections::BTreeMap;

/// Terms of a value beyond which it is no simple answer.
const MAX_TERMS: usize = 64;
/// Size of an exponent beyond which a power is no simple answer.
const MAX_EXPONENT: i128 = 256;
/// Largest radicand whose square factors are looked for.
const MAX_RADICAND: i128 = 10_000_000_000;

/// Why an expression has no value here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EvalError {
    /// It is not written in the grammar of simple answers.
    Syntax,
    /// It divides by zero.
    DivisionByZero,
    /// It exceeds 128-bit rationals.
    Overflow,
    /// It is well-formed but beyond this arithmetic, such as the root of a sum.
    NotSimple,
}

impl From<Overflow> for EvalError {
    fn from(_: Overflow) -> Self {
        EvalError::Overflow
    }
}

/// What a term's coefficient multiplies: the root of a square-free integer and powers of symbols.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Monomial {
    radicand: i128,
    symbols: BTreeMap<char, i128>,
}

impl Monomial {
    fn one() -> Self {
        Monomial { radicand: 1, symbols: BTreeMap::new() }
    }
}

/// A sum of terms in normal form: no zero coefficient, so that two values are equal exactly where they compare equal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Value {
    terms: BTreeMap<Monomial, Rational>,
}

impl Value {
    pub(super) fn rational(value: Rational) -> Self {
        Value::term(Monomial::one(), value)
    }

    pub(super) fn symbol(name: char) -> Self {
        Value::term(Monomial { radicand: 1, symbols: BTreeMap::from([(name, 1)]) }, Rational::ONE)
    }

    fn term(monomial: Monomial, coefficient: Rational) -> Self {
        let mut terms = BTreeMap::new();
        if !coefficient.is_zero() {
            terms.insert(monomial, coefficient);
        }
        Value { terms }
    }

    /// The value, where it is a rational.
    pub(super) fn as_rational(&self) -> Option<Rational> {
        match self.terms.len() {
            0 => Some(Rational::ZERO),
            1 => self.terms.get(&Monomial::one()).copied(),
            _ => None,
        }
    }

    pub(super) fn negated(&self) -> Result<Self, EvalError> {
        let negate = |(m, c): (&Monomial, &Rational)| Ok((m.clone(), c.negated()?));
        Ok(Value { terms: self.terms.iter().map(negate).collect::<Result<_, Overflow>>()? })
    }

    pub(super) fn plus(mut self, other: &Self) -> Result<Self, EvalError> {
        for (monomial, &coefficient) in &other.terms {
            self.add_term(monomial.clone(), coefficient)?;
        }
        Ok(self)
    }

    pub(super) fn times(&self, other: &Self) -> Result<Self, EvalError> {
        let mut product = Value { terms: BTreeMap::new() };
        for (a, &x) in &self.terms {
            for (b, &y) in &other.terms {
                let (monomial, factor) = multiply_monomials(a, b)?;
                product.add_term(monomial, x.times(y)?.times(factor)?)?;
            }
        }
        Ok(product)
    }

    pub(super) fn divided_by(&self, other: &Self) -> Result<Self, EvalError> {
        self.times(&other.inverse()?)
    }

    /// `1 / self`, for one term or a sum of two square roots (by its conjugate).
    fn inverse(&self) -> Result<Self, EvalError> {
        let mut terms = self.terms.iter();
        match (terms.next(), terms.next(), terms.next()) {
            (None, ..) => Err(EvalError::DivisionByZero),
            (Some((monomial, coefficient)), None, _) => {
                let symbols = monomial.symbols.iter().map(|(&name, &power)| (name, -power)).collect();
                let root = Rational::integer(monomial.radicand);
                let inverse = coefficient.times(root)?.inverse().ok_or(EvalError::DivisionByZero)??;
                Ok(Value::term(Monomial { radicand: monomial.radicand, symbols }, inverse))
            }
            (Some((a, &x)), Some((b, &y)), None) if a.symbols.is_empty() && b.symbols.is_empty() => {
                let conjugate = Value::term(a.clone(), x).plus(&Value::term(b.clone(), y.negated()?))?;
                let norm = self.times(&conjugate)?.as_rational().ok_or(EvalError::NotSimple)?;
                let scale = norm.inverse().ok_or(EvalError::DivisionByZero)??;
                conjugate.times(&Value::rational(scale))
            }
            _ => Err(EvalError::NotSimple),
        }
    }

    pub(super) fn to_power(&self, exponent: &Self) -> Result<Self, EvalError> {
        let exponent = exponent.as_rational().ok_or(EvalError::NotSimple)?;
        if exponent.den() == 2 {
            return self.root(2)?.integer_power(exponent.num());
        }
        self.integer_power(exponent.as_integer().ok_or(EvalError::NotSimple)?)
    }

    fn integer_power(&self, exponent: i128) -> Result<Self, EvalError> {
        if exponent.unsigned_abs() > MAX_EXPONENT.unsigned_abs() {
            return Err(EvalError::Overflow);
        }
        if exponent == 0 && self.terms.is_empty() {
            return Err(EvalError::NotSimple);
        }
        let base = if exponent < 0 { self.inverse()? } else { self.clone() };
        let mut power = Value::rational(Rational::ONE);
        for _ in 0..exponent.unsigned_abs() {
            power = power.times(&base)?;
        }
        Ok(power)
    }

    /// The real `index`-th root of a rational: any square root of one that is not negative, else exact roots only.
    pub(super) fn root(&self, index: i128) -> Result<Self, EvalError> {
        let value = self.as_rational().ok_or(EvalError::NotSimple)?;
        if index == 2 {
            return square_root(value);
        }
        if !(3..=MAX_EXPONENT).contains(&index) || (value.num() < 0 && index % 2 == 0) {
            return Err(EvalError::NotSimple);
        }
        let (num, den) = (exact_root(value.num(), index)?, exact_root(value.den(), index)?);
        Value::rational(Rational::integer(num)).divided_by(&Value::rational(Rational::integer(den)))
    }

    fn add_term(&mut self, monomial: Monomial, coefficient: Rational) -> Result<(), EvalError> {
        let sum = self.terms.get(&monomial).copied().unwrap_or(Rational::ZERO).plus(coefficient)?;
        if sum.is_zero() {
            self.terms.remove(&monomial);
        } else {
            self.terms.insert(monomial, sum);
        }
        if self.terms.len() > MAX_TERMS { Err(EvalError::NotSimple) } else { Ok(()) }
    }
}

/// The product of two monomials and the rational that comes out of the roots: `√a √b = g √(ab / g²)`, `g = gcd(a, b)`.
fn multiply_monomials(a: &Monomial, b: &Monomial) -> Result<(Monomial, Rational), EvalError> {
    let common = common_divisor(a.radicand, b.radicand);
    let radicand = (a.radicand / common).checked_mul(b.radicand / common).ok_or(EvalError::Overflow)?;
    let mut symbols = a.symbols.clone();
    for (&name, &power) in &b.symbols {
        let sum = symbols.entry(name).or_insert(0);
        *sum += power;
        if sum.abs() > MAX_EXPONENT {
            return Err(EvalError::Overflow);
        }
    }
    symbols.retain(|_, power| *power != 0);
    Ok((Monomial { radicand, symbols }, Rational::integer(common)))
}

/// `√(p/q) = √(pq) / q`, square factors taken out.
fn square_root(value: Rational) -> Result<Value, EvalError> {
    if value.num() < 0 {
        return Err(EvalError::NotSimple);
    }
    let radicand = value.num().checked_mul(value.den()).ok_or(EvalError::Overflow)?;
    let (outside, inside) = take_out_squares(radicand)?;
    let scale = Rational::integer(value.den()).inverse().ok_or(EvalError::DivisionByZero)??;
    Ok(Value::term(Monomial { radicand: inside, symbols: BTreeMap::new() }, Rational::integer(outside).times(scale)?))
}

/// `n = outside² * inside` with `inside` square-free, by trial division.
fn take_out_squares(n: i128) -> Result<(i128, i128), EvalError> {
    let root = n.isqrt();
    if root * root == n {
        return Ok((root, 1));
    }
    if n > MAX_RADICAND {
        return Err(EvalError::Overflow);
    }
    let (mut outside, mut inside, mut divisor) = (1, n, 2);
    while divisor * divisor <= inside {
        while inside % (divisor * divisor) == 0 {
            inside /= divisor * divisor;
            outside *= divisor;
        }
        divisor += 1;
    }
    Ok((outside, inside))
}

/// The integer whose `index`-th power is `n`, by bisection.
fn exact_root(n: i128, index: i128) -> Result<i128, EvalError> {
    let power = u32::try_from(index).map_err(|_| EvalError::NotSimple)?;
    let target = n.checked_abs().ok_or(EvalError::Overflow)?;
    let (mut low, mut high) = (0i128, 1i128 << 43);
    while low < high {
        let middle = (low + high) / 2;
        if middle.checked_pow(power).is_none_or(|p| p >= target) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    if low.checked_pow(power) == Some(target) { Ok(low * n.signum()) } else { Err(EvalError::NotSimple) }
}
