//! Decimal literals, kept as digits so that no length of answer loses one.

use super::Overflow;

/// Digits beyond which ratios are not multiplied out; two plain decimals are compared at any length.
const MAX_PRODUCT_DIGITS: usize = 2000;
/// Digits of a written exponent beyond which a literal is no number.
const MAX_EXPONENT_DIGITS: usize = 9;

/// `± digits * 10^exponent` in normal form: no leading or trailing zero digit, zero is empty, positive, exponent 0.
/// Two decimals are the same number exactly where they are equal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Decimal {
    negative: bool,
    digits: Vec<u8>,
    exponent: i64,
}

impl Decimal {
    /// The number with these decimal digits (values 0 to 9), most significant first.
    pub(crate) fn new(negative: bool, digits: &[u8], exponent: i64) -> Self {
        let start = digits.iter().position(|&d| d != 0).unwrap_or(digits.len());
        let end = digits.iter().rposition(|&d| d != 0).map_or(start, |last| last + 1);
        if start == end {
            return Decimal { negative: false, digits: Vec::new(), exponent: 0 };
        }
        let trimmed = (digits.len() - end) as i64;
        Decimal { negative, digits: digits[start..end].to_vec(), exponent: exponent + trimmed }
    }

    pub(crate) fn is_zero(&self) -> bool {
        self.digits.is_empty()
    }

    pub(crate) fn is_negative(&self) -> bool {
        self.negative
    }

    pub(crate) fn digits(&self) -> &[u8] {
        &self.digits
    }

    pub(crate) fn exponent(&self) -> i64 {
        self.exponent
    }

    pub(crate) fn negated(self) -> Self {
        Decimal { negative: !self.negative && !self.is_zero(), ..self }
    }

    /// The number times `10^power`.
    pub(crate) fn scaled(self, power: i64) -> Self {
        if self.is_zero() { self } else { Decimal { exponent: self.exponent + power, ..self } }
    }

    fn times(&self, other: &Self) -> Result<Self, Overflow> {
        let (a, b) = (&self.digits, &other.digits);
        if a.len() > MAX_PRODUCT_DIGITS || b.len() > MAX_PRODUCT_DIGITS {
            return Err(Overflow);
        }
        let mut columns = vec![0u32; a.len() + b.len()];
        for (i, &x) in a.iter().enumerate() {
            for (j, &y) in b.iter().enumerate() {
                columns[i + j + 1] += u32::from(x) * u32::from(y);
            }
        }
        let mut digits = vec![0u8; columns.len()];
        let mut carry = 0;
        for (digit, column) in digits.iter_mut().zip(&columns).rev() {
            let sum = column + carry;
            (*digit, carry) = ((sum % 10) as u8, sum / 10);
        }
        Ok(Decimal::new(self.negative != other.negative, &digits, self.exponent + other.exponent))
    }

    /// The nearest f64; infinite where the number is out of its range.
    fn to_f64(&self) -> f64 {
        let digits: String = self.digits.iter().map(|&d| char::from(b'0' + d)).collect();
        let sign = if self.negative { "-" } else { "" };
        format!("{sign}{}e{}", if digits.is_empty() { "0" } else { &digits }, self.exponent)
            .parse()
            .expect("a sign, digits and an exponent are a float literal")
    }
}

/// A decimal or a ratio of two, the denominator not zero.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Number {
    Plain(Decimal),
    Ratio(Decimal, Decimal),
}

impl Number {
    /// Exact equality.
    ///
    /// # Errors
    /// Where a ratio has more digits than are multiplied out.
    pub(crate) fn equals(&self, other: &Self) -> Result<bool, Overflow> {
        match (self, other) {
            (Number::Plain(a), Number::Plain(b)) => Ok(a == b),
            (Number::Plain(a), Number::Ratio(n, d)) | (Number::Ratio(n, d), Number::Plain(a)) => Ok(a.times(d)? == *n),
            (Number::Ratio(a, b), Number::Ratio(c, d)) => Ok(a.times(d)? == c.times(b)?),
        }
    }

    /// The nearest f64 (a ratio is rounded three times); infinite or not a number where it is out of range.
    pub(crate) fn to_f64(&self) -> f64 {
        match self {
            Number::Plain(a) => a.to_f64(),
            Number::Ratio(n, d) => n.to_f64() / d.to_f64(),
        }
    }

    pub(crate) fn negated(self) -> Self {
        match self {
            Number::Plain(a) => Number::Plain(a.negated()),
            Number::Ratio(n, d) => Number::Ratio(n.negated(), d),
        }
    }

    /// The number times `10^power`.
    pub(crate) fn scaled(self, power: i64) -> Self {
        match self {
            Number::Plain(a) => Number::Plain(a.scaled(power)),
            Number::Ratio(n, d) => Number::Ratio(n.scaled(power), d),
        }
    }
}

/// Read an unsigned decimal at `start`: `1234`, `1,234`, `1.5`, `.5`, `1.5e-3`. Gives it with the offset after it.
///
/// A comma belongs to the number where groups of three follow a first group of one to three, and no further digit.
pub(crate) fn scan_decimal(text: &[u8], start: usize) -> Option<(Decimal, usize)> {
    let mut digits = Vec::new();
    let mut at = scan_integer_part(text, start, &mut digits);
    let mut exponent = 0;
    if text.get(at) == Some(&b'.') && text.get(at + 1).is_some_and(u8::is_ascii_digit) {
        let end = digits_end(text, at + 1);
        digits.extend(text[at + 1..end].iter().map(|d| d - b'0'));
        exponent = -((end - at - 1) as i64);
        at = end;
    }
    if digits.is_empty() {
        return None;
    }
    if matches!(text.get(at), Some(b'e' | b'E')) {
        let signed = usize::from(matches!(text.get(at + 1), Some(b'+' | b'-')));
        let (from, to) = (at + 1 + signed, digits_end(text, at + 1 + signed));
        if to > from {
            let power = small_integer(&text[from..to])?;
            exponent += if text[at + 1] == b'-' { -power } else { power };
            at = to;
        }
    }
    Some((Decimal::new(false, &digits, exponent), at))
}

/// A run of ASCII digits as a number, unless it is too long for an exponent.
pub(crate) fn small_integer(digits: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(digits).ok()?;
    if digits.len() > MAX_EXPONENT_DIGITS { None } else { text.parse().ok() }
}

/// The offset after the digits that start at `from`.
pub(crate) fn digits_end(text: &[u8], from: usize) -> usize {
    let count = text.get(from..).unwrap_or_default().iter().take_while(|b| b.is_ascii_digit()).count();
    from + count
}

fn scan_integer_part(text: &[u8], start: usize, digits: &mut Vec<u8>) -> usize {
    let end = digits_end(text, start);
    digits.extend(text[start.min(end)..end].iter().map(|d| d - b'0'));
    if !(1..=3).contains(&(end - start)) {
        return end;
    }
    let mut grouped = end;
    while text.get(grouped) == Some(&b',') && digits_end(text, grouped + 1) == grouped + 4 {
        digits.extend(text[grouped + 1..grouped + 4].iter().map(|d| d - b'0'));
        grouped += 4;
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decimal(text: &str) -> (Decimal, usize) {
        scan_decimal(text.as_bytes(), 0).expect("the test's literal is a number")
    }

    #[test]
    fn literals_are_read_to_their_end() {
        for (text, end) in
            [("1,234", 5), ("1,2345", 1), ("12,345.5x", 8), ("42.", 2), (".5", 2), ("1e5", 3), ("1e", 1), ("007", 3)]
        {
            assert_eq!(decimal(text).1, end, "{text}");
        }
        assert_eq!(scan_decimal(b"1e9999999999", 0), None);
        assert_eq!(scan_decimal(b".", 0), None);
        assert_eq!(scan_decimal(b"", 0), None);
    }

    #[test]
    fn spellings_of_one_number_are_equal() {
        for group in [["42", "42.0", "4.2e1"], ["1,000", "1e3", "1000.00"], ["0", "0.0", "0e7"], [".5", "0.50", "5e-1"]]
        {
            assert_eq!(decimal(group[0]).0, decimal(group[1]).0, "{group:?}");
            assert_eq!(decimal(group[0]).0, decimal(group[2]).0, "{group:?}");
        }
    }

    #[test]
    fn ratios_are_compared_exactly_at_any_size() {
        let huge = format!("1{}", "0".repeat(50));
        let ratio = |n: &str, d: &str| Number::Ratio(decimal(n).0, decimal(d).0);
        assert_eq!(ratio(&huge, "2").equals(&Number::Plain(decimal("5e49").0)), Ok(true));
        assert_eq!(ratio("1", "3").equals(&ratio("2", "6")), Ok(true));
        assert_eq!(ratio("1", "3").equals(&Number::Plain(decimal("0.3333333333333333333333").0)), Ok(false));
        assert_eq!(ratio("99", "98").equals(&ratio("98", "97")), Ok(false));
        let long = "7".repeat(MAX_PRODUCT_DIGITS + 1);
        assert_eq!(ratio(&long, "3").equals(&ratio("1", &long)), Err(Overflow));
    }
}
