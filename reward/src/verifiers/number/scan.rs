//! Finding numbers in normalised text.

use super::Percent;
use crate::exact::{Decimal, Number, Rational, digits_end, scan_decimal, small_integer};
use crate::text::braced_len;

/// Longest argument of a fraction command, so that nested unclosed braces cost linear time.
const MAX_ARGUMENT_BYTES: usize = 4096;

/// A number with the range of bytes it stands in, sign, currency and percent sign included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) start: usize,
    pub(super) end: usize,
    number: Number,
    has_percent_sign: bool,
}

impl Found {
    pub(super) fn value(&self, percent: Percent) -> Number {
        match percent {
            Percent::Hundredth if self.has_percent_sign => self.number.clone().scaled(-2),
            _ => self.number.clone(),
        }
    }
}

/// All numbers of `text`, left to right, in time linear in its length.
///
/// Digits that follow a letter or an underscore belong to a name (`x2`, `H2O`) and are passed over; so are fractions
/// with a denominator of zero.
pub(super) fn find_numbers(text: &str) -> Vec<Found> {
    let bytes = text.as_bytes();
    let (mut found, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        if !starts_number(bytes, at) {
            at += 1;
            continue;
        }
        if at > 0 && is_name_byte(bytes[at - 1]) && bytes[at] != b'\\' {
            at = digits_end(bytes, at).max(at + 1);
            continue;
        }
        match scan_magnitude(bytes, at) {
            Scan::Number(number, end) => {
                let one = with_sign_and_suffix(bytes, at, end, number);
                at = one.end;
                found.push(one);
            }
            Scan::Nothing(end) => at = end.max(at + 1),
        }
    }
    found
}

enum Scan {
    Number(Number, usize),
    /// No number here; scanning goes on at this offset.
    Nothing(usize),
}

fn starts_number(bytes: &[u8], at: usize) -> bool {
    match bytes[at] {
        b'0'..=b'9' => true,
        b'.' => {
            bytes.get(at + 1).is_some_and(u8::is_ascii_digit) && (at == 0 || !bytes[at - 1].is_ascii_alphanumeric())
        }
        b'\\' => bytes[at..].starts_with(b"\\frac"),
        _ => false,
    }
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || byte == b'_'
}

fn scan_magnitude(bytes: &[u8], at: usize) -> Scan {
    if bytes[at] == b'\\' {
        return match scan_frac_command(bytes, at) {
            Some((num, den, end)) => ratio(num, den, end),
            None => Scan::Nothing(at + b"\\frac".len()),
        };
    }
    let Some((first, end)) = scan_decimal(bytes, at) else {
        return Scan::Nothing(digits_end(bytes, at));
    };
    if bytes.get(end) == Some(&b'/') {
        return match scan_decimal(bytes, end + 1) {
            Some((den, after)) if bytes.get(after) != Some(&b'/') => ratio(first, den, after),
            _ => Scan::Number(Number::Plain(first), end),
        };
    }
    match scan_fraction_part(bytes, end).and_then(|(num, den, after)| Some((mixed(&first, &num, &den)?, after))) {
        Some((number, after)) => Scan::Number(number, after),
        None => Scan::Number(Number::Plain(first), end),
    }
}

fn ratio(num: Decimal, den: Decimal, end: usize) -> Scan {
    if den.is_zero() { Scan::Nothing(end) } else { Scan::Number(Number::Ratio(num, den), end) }
}

/// `\frac{a}{b}`, `\frac ab`, `\frac12`: numerator, denominator and the offset after them.
fn scan_frac_command(bytes: &[u8], at: usize) -> Option<(Decimal, Decimal, usize)> {
    let (num, after) = scan_frac_argument(bytes, at + b"\\frac".len())?;
    let (den, end) = scan_frac_argument(bytes, after)?;
    Some((num, den, end))
}

fn scan_frac_argument(bytes: &[u8], at: usize) -> Option<(Decimal, usize)> {
    let at = skip_spaces(bytes, at);
    if bytes.get(at)?.is_ascii_digit() {
        return Some((Decimal::new(false, &[bytes[at] - b'0'], 0), at + 1));
    }
    if bytes[at] != b'{' {
        return None;
    }
    let window = &bytes[at + 1..bytes.len().min(at + 1 + MAX_ARGUMENT_BYTES)];
    let end = at + 1 + braced_len(window)?;
    let inner = bytes[at + 1..end].trim_ascii();
    let (negative, digits) = match inner.strip_prefix(b"-") {
        Some(rest) => (true, rest.trim_ascii_start()),
        None => (false, inner),
    };
    let (decimal, length) = scan_decimal(digits, 0)?;
    (length == digits.len()).then_some((if negative { decimal.negated() } else { decimal }, end + 1))
}

/// The fraction of a mixed number: ` 1/2` or `\frac{1}{2}` after an integer.
fn scan_fraction_part(bytes: &[u8], at: usize) -> Option<(Decimal, Decimal, usize)> {
    if bytes[at..].starts_with(b"\\frac") {
        return scan_frac_command(bytes, at);
    }
    if bytes.get(at) != Some(&b' ') {
        return None;
    }
    let num_end = digits_end(bytes, at + 1);
    if bytes.get(num_end) != Some(&b'/') {
        return None;
    }
    let den_end = digits_end(bytes, num_end + 1);
    let (num, _) = scan_decimal(&bytes[..num_end], at + 1)?;
    let (den, _) = scan_decimal(&bytes[..den_end], num_end + 1)?;
    let plain = !matches!(bytes.get(den_end), Some(b'/' | b'.' | b','));
    plain.then_some((num, den, den_end))
}

/// `whole + num/den`, where the three are integers that fit exact arithmetic and the fraction is proper.
fn mixed(whole: &Decimal, num: &Decimal, den: &Decimal) -> Option<Number> {
    let integer = |d: &Decimal| Rational::from_decimal(d).ok()?.as_integer();
    let (whole, num, den) = (integer(whole)?, integer(num)?, integer(den)?);
    if num < 0 || num >= den {
        return None;
    }
    let total = whole.checked_mul(den)?.checked_add(num)?;
    Some(Number::Ratio(decimal_of(total), decimal_of(den)))
}

fn decimal_of(value: i128) -> Decimal {
    let digits: Vec<u8> = value.unsigned_abs().to_string().bytes().map(|b| b - b'0').collect();
    Decimal::new(value < 0, &digits, 0)
}

fn with_sign_and_suffix(bytes: &[u8], at: usize, end: usize, number: Number) -> Found {
    let (negative, start) = scan_sign(bytes, at);
    let (power, mut end) = scan_power_of_ten(bytes, end).unwrap_or((0, end));
    let sign_at = skip_spaces(bytes, end);
    let has_percent_sign = bytes.get(sign_at) == Some(&b'%');
    if has_percent_sign {
        end = sign_at + 1;
    }
    let number = if negative { number.negated() } else { number };
    Found { start, end, number: number.scaled(power), has_percent_sign }
}

/// Whether a minus belongs to the number at `at`, and where the number starts with its sign and currency.
///
/// A minus after a letter, digit or closing bracket is an operator or a hyphen.
fn scan_sign(bytes: &[u8], at: usize) -> (bool, usize) {
    let before = |at: usize| at.checked_sub(1).map(|i| bytes[i]);
    let mut start = at;
    if before(start) == Some(b'$') {
        start -= 1;
    }
    if !matches!(before(start), Some(b'-' | b'+')) {
        return (false, start);
    }
    let sign = start - 1;
    if before(sign).is_some_and(|b| b.is_ascii_alphanumeric() || matches!(b, b')' | b']' | b'}')) {
        return (false, start);
    }
    let with_currency = if start == at && before(sign) == Some(b'$') { sign - 1 } else { sign };
    (bytes[sign] == b'-', with_currency)
}

/// ` \times 10^{-3}` and its relatives after a number: the power and the offset after it.
fn scan_power_of_ten(bytes: &[u8], at: usize) -> Option<(i64, usize)> {
    let at = skip_spaces(bytes, at);
    let rest = &bytes[at..];
    let operator = [&b"\\times"[..], b"\\cdot", b"*", b"x"].into_iter().find(|op| rest.starts_with(op))?;
    let base = skip_spaces(bytes, at + operator.len());
    if !bytes[base..].starts_with(b"10^") {
        return None;
    }
    let mut digits = base + 3;
    let braced = bytes.get(digits) == Some(&b'{');
    digits += usize::from(braced);
    let negative = bytes.get(digits) == Some(&b'-');
    digits += usize::from(negative);
    let end = digits_end(bytes, digits);
    let power = small_integer(&bytes[digits..end])?;
    if braced && bytes.get(end) != Some(&b'}') {
        return None;
    }
    Some((if negative { -power } else { power }, end + usize::from(braced)))
}

fn skip_spaces(bytes: &[u8], at: usize) -> usize {
    at + bytes.get(at..).unwrap_or_default().iter().take_while(|&&b| b == b' ').count()
}
