//! The grammar of simple answers, evaluated while it is read.
//!
//! ```text
//! sum     := product (('+' | '-') product)*
//! product := factor (('*' | '/') factor | power)*      juxtaposition multiplies, except before a number
//! factor  := ('+' | '-') factor | power
//! power   := atom '%'? ('^' exponent)?
//! atom    := number | mixed | symbol | '(' sum ')' | '{' sum '}' | \frac argument argument | \sqrt[index] argument
//! ```

use super::value::{EvalError, Value};
use crate::exact::{Decimal, Rational, digits_end, scan_decimal};

/// Nesting beyond which an expression is no simple answer.
const MAX_DEPTH: usize = 32;

/// The exact value of an expression.
///
/// # Errors
/// `Syntax` where the text is no expression of the grammar, else what stands in the way of its value.
pub(super) fn evaluate(text: &str) -> Result<Value, EvalError> {
    let mut parser = Parser { bytes: text.as_bytes(), at: 0, depth: 0, failed: None };
    let value = parser.sum()?;
    parser.skip_spaces();
    match parser.failed {
        _ if parser.at < parser.bytes.len() => Err(EvalError::Syntax),
        Some(error) => Err(error),
        None => Ok(value),
    }
}

struct Parser<'a> {
    bytes: &'a [u8],
    at: usize,
    depth: usize,
    /// The first operation without a result. Reading goes on after it, because a syntax error outranks it: what is no
    /// expression has no value to miss.
    failed: Option<EvalError>,
}

impl Parser<'_> {
    /// The result of an operation, or a stand-in for it once one has failed.
    fn result(&mut self, result: Result<Value, EvalError>) -> Value {
        result.unwrap_or_else(|error| {
            self.failed.get_or_insert(error);
            Value::rational(Rational::ONE)
        })
    }

    fn sum(&mut self) -> Result<Value, EvalError> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(EvalError::NotSimple);
        }
        let mut value = self.product()?;
        loop {
            if self.accept(b"+") {
                let right = self.product()?;
                value = self.result(value.plus(&right));
            } else if self.accept(b"-") {
                let right = self.product()?.negated();
                let right = self.result(right);
                value = self.result(value.plus(&right));
            } else {
                self.depth -= 1;
                return Ok(value);
            }
        }
    }

    fn product(&mut self) -> Result<Value, EvalError> {
        let mut value = self.factor()?;
        loop {
            if self.accept(b"*") {
                let right = self.factor()?;
                value = self.result(value.times(&right));
            } else if self.accept(b"/") {
                let right = self.factor()?;
                value = self.result(value.divided_by(&right));
            } else if self.starts_juxtaposed() {
                let right = self.power()?;
                value = self.result(value.times(&right));
            } else {
                return Ok(value);
            }
        }
    }

    fn factor(&mut self) -> Result<Value, EvalError> {
        let mut negative = false;
        loop {
            if self.accept(b"-") {
                negative = !negative;
            } else if !self.accept(b"+") {
                let value = self.power()?;
                return Ok(if negative { self.result(value.negated()) } else { value });
            }
        }
    }

    fn power(&mut self) -> Result<Value, EvalError> {
        let mut value = self.atom()?;
        if self.accept(b"%") {
            value = self.result(value.divided_by(&Value::rational(Rational::integer(100))));
        }
        if self.accept(b"^") {
            let exponent = self.exponent()?;
            value = self.result(value.to_power(&exponent));
        }
        Ok(value)
    }

    fn atom(&mut self) -> Result<Value, EvalError> {
        self.skip_spaces();
        match self.bytes.get(self.at) {
            Some(b'0'..=b'9' | b'.') => self.number(),
            Some(b'(') => self.bracketed(b"(", b")"),
            Some(b'{') => self.bracketed(b"{", b"}"),
            Some(b'\\') => self.command(),
            Some(letter) if letter.is_ascii_alphabetic() => self.symbols(),
            _ => Err(EvalError::Syntax),
        }
    }

    fn bracketed(&mut self, open: &[u8], close: &[u8]) -> Result<Value, EvalError> {
        self.expect(open)?;
        let value = self.sum()?;
        self.expect(close)?;
        Ok(value)
    }

    /// A decimal, or an integer with a fraction after it (`1 1/2`, `1\frac{1}{2}`).
    fn number(&mut self) -> Result<Value, EvalError> {
        let (decimal, end) = scan_decimal(self.bytes, self.at).ok_or(EvalError::Syntax)?;
        let is_integer = self.bytes[self.at..end].iter().all(u8::is_ascii_digit);
        self.at = end;
        let value = self.rational(&decimal);
        if !is_integer {
            return Ok(value);
        }
        Ok(match self.fraction_part() {
            Some(fraction) => self.result(value.plus(&fraction)),
            None => value,
        })
    }

    fn rational(&mut self, decimal: &Decimal) -> Value {
        let result = Rational::from_decimal(decimal).map(Value::rational).map_err(EvalError::from);
        self.result(result)
    }

    /// The proper fraction of a mixed number.
    fn fraction_part(&mut self) -> Option<Value> {
        let (start, failed) = (self.at, self.failed);
        let fraction =
            if self.bytes[self.at..].starts_with(b"\\frac") { self.command().ok() } else { self.slashed_fraction() };
        let is_proper = |value: &Value| value.as_rational().is_some_and(|r| r.num() >= 0 && r.num() < r.den());
        let fraction = fraction.filter(is_proper);
        if fraction.is_none() || self.failed != failed {
            (self.at, self.failed) = (start, failed);
            return None;
        }
        fraction
    }

    /// ` 1/2` after an integer.
    fn slashed_fraction(&mut self) -> Option<Value> {
        let num_end = digits_end(self.bytes, self.at + 1);
        if self.bytes.get(self.at) != Some(&b' ') || self.bytes.get(num_end) != Some(&b'/') {
            return None;
        }
        let den_end = digits_end(self.bytes, num_end + 1);
        let (num, _) = scan_decimal(&self.bytes[..num_end], self.at + 1)?;
        let (den, _) = scan_decimal(&self.bytes[..den_end], num_end + 1)?;
        self.at = den_end;
        self.rational(&num).divided_by(&self.rational(&den)).ok()
    }

    fn command(&mut self) -> Result<Value, EvalError> {
        if self.accept(b"\\frac") {
            let (num, den) = (self.argument()?, self.argument()?);
            return Ok(self.result(num.divided_by(&den)));
        }
        if self.accept(b"\\sqrt") {
            return self.root();
        }
        if self.accept(b"\\pi") {
            return Ok(Value::symbol('\u{3C0}'));
        }
        if self.accept(b"\\infty") {
            return Ok(Value::symbol('\u{221E}'));
        }
        Err(EvalError::Syntax)
    }

    fn root(&mut self) -> Result<Value, EvalError> {
        let mut index = 2;
        if self.accept(b"[") {
            let value = self.sum()?.as_rational().and_then(Rational::as_integer);
            self.expect(b"]")?;
            // An index of 0 has no root, which is what an index that is no integer comes to.
            index = value.unwrap_or(0);
        }
        let radicand = self.argument()?;
        Ok(self.result(radicand.root(index)))
    }

    /// What stands after `^`. `2^10` is 1024, as it is meant and not as LaTeX would set it.
    fn exponent(&mut self) -> Result<Value, EvalError> {
        let negative = self.accept(b"-");
        self.skip_spaces();
        let end = digits_end(self.bytes, self.at);
        if !negative && end == self.at {
            return self.argument();
        }
        let (digits, _) = scan_decimal(&self.bytes[..end], self.at).ok_or(EvalError::Syntax)?;
        self.at = end;
        let value = self.rational(&if negative { digits.negated() } else { digits });
        Ok(value)
    }

    /// What a command takes: a group in braces or brackets, one digit, or one atom.
    fn argument(&mut self) -> Result<Value, EvalError> {
        self.skip_spaces();
        match self.bytes.get(self.at) {
            Some(digit @ b'0'..=b'9') => {
                self.at += 1;
                Ok(Value::rational(Rational::integer(i128::from(digit - b'0'))))
            }
            Some(letter) if letter.is_ascii_alphabetic() => {
                self.at += 1;
                Ok(Value::symbol(char::from(*letter)))
            }
            _ => self.atom(),
        }
    }

    /// One or two letters, each a symbol; `pi` and `sqrt(...)` by name. A longer word is no mathematics.
    fn symbols(&mut self) -> Result<Value, EvalError> {
        let rest = &self.bytes[self.at..];
        let length = rest.iter().take_while(|b| b.is_ascii_alphabetic()).count();
        let word = &rest[..length];
        match word {
            b"pi" => {
                self.at += length;
                Ok(Value::symbol('\u{3C0}'))
            }
            b"sqrt" => {
                self.at += length;
                let radicand = self.bracketed(b"(", b")")?;
                Ok(self.result(radicand.root(2)))
            }
            [letter] | [letter, _] => {
                self.at += 1;
                Ok(Value::symbol(char::from(*letter)))
            }
            _ => Err(EvalError::Syntax),
        }
    }

    fn starts_juxtaposed(&mut self) -> bool {
        self.skip_spaces();
        self.bytes.get(self.at).is_some_and(|b| matches!(b, b'(' | b'{' | b'\\') || b.is_ascii_alphabetic())
    }

    fn accept(&mut self, token: &[u8]) -> bool {
        self.skip_spaces();
        let found = self.bytes[self.at..].starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    fn expect(&mut self, token: &[u8]) -> Result<(), EvalError> {
        if self.accept(token) { Ok(()) } else { Err(EvalError::Syntax) }
    }

    fn skip_spaces(&mut self) {
        self.at += self.bytes[self.at..].iter().take_while(|&&b| b == b' ').count();
    }
}
