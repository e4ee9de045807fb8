//! The layout of a batch: rows of tokens packed end to end, and which tokens take part.

use crate::Error;
use std::ops::Range;

/// Rows of response tokens packed end to end, with a mask.
///
/// # Shape
/// `offsets` is `[B + 1]`, ascending from 0 to `T`; `response_mask` is `[T]` of 0 and 1. Every per-token array that
/// is passed beside a batch is `[T]`; every per-row array is `[B]`. Row `i` is `offsets[i]..offsets[i + 1]`; rows may
/// be empty, and a masked token (an observation of a tool, say) keeps its place.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenBatch<'a> {
    offsets: &'a [usize],
    response_mask: &'a [u8],
}

impl Default for TokenBatch<'_> {
    fn default() -> Self {
        TokenBatch { offsets: &[0], response_mask: &[] }
    }
}

impl<'a> TokenBatch<'a> {
    /// Check the layout and wrap it.
    ///
    /// # Errors
    /// If `offsets` does not ascend from 0 to the length of the mask, or the mask holds anything but 0 and 1.
    pub fn new(offsets: &'a [usize], response_mask: &'a [u8]) -> Result<Self, Error> {
        if offsets.first() != Some(&0) || offsets.windows(2).any(|w| w[0] > w[1]) {
            return Err(Error::batch("batch layout", "offsets must ascend from 0"));
        }
        let end = offsets.last().copied().unwrap_or(0);
        expect_len("response_mask", end, response_mask.len())?;
        match response_mask.iter().position(|m| *m > 1) {
            Some(at) => Err(Error::batch("batch layout", format!("response_mask[{at}] is neither 0 nor 1"))),
            None => Ok(TokenBatch { offsets, response_mask }),
        }
    }

    /// The same rows under another mask.
    ///
    /// # Errors
    /// A mask of the wrong length, or one that holds anything but 0 and 1.
    pub fn with_mask<'b>(&self, response_mask: &'b [u8]) -> Result<TokenBatch<'b>, Error>
    where
        'a: 'b,
    {
        TokenBatch::new(self.offsets, response_mask)
    }

    /// Number of rows, B.
    pub fn num_rows(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Number of tokens, T, masked ones included.
    pub fn num_slots(&self) -> usize {
        self.response_mask.len()
    }

    /// Number of tokens that take part.
    pub fn num_tokens(&self) -> usize {
        self.response_mask.iter().filter(|m| **m == 1).count()
    }

    /// Number of rows with at least one token that takes part.
    pub fn num_sequences(&self) -> usize {
        (0..self.num_rows()).filter(|i| self.response_mask[self.row(*i)].contains(&1)).count()
    }

    /// Where row `i` lies in the per-token arrays.
    pub fn row(&self, i: usize) -> Range<usize> {
        self.offsets[i]..self.offsets[i + 1]
    }

    /// The rows in order.
    pub fn rows(&self) -> impl Iterator<Item = Range<usize>> + use<'a> {
        self.offsets.windows(2).map(|w| w[0]..w[1])
    }

    /// The mask, `[T]`.
    pub fn response_mask(&self) -> &'a [u8] {
        self.response_mask
    }

    /// True where token `t` takes part.
    pub fn is_active(&self, t: usize) -> bool {
        self.response_mask[t] == 1
    }

    /// Positions of the tokens of row `i` that take part, ascending.
    pub fn active(&self, i: usize) -> impl DoubleEndedIterator<Item = usize> + use<'a> {
        let mask = self.response_mask;
        self.row(i).filter(move |t| mask[*t] == 1)
    }

    /// Number of tokens of row `i` that take part.
    pub fn row_len(&self, i: usize) -> usize {
        self.active(i).count()
    }

    /// Check the length of a per-token array.
    pub(crate) fn expect_tokens(&self, name: &'static str, values: &[f64]) -> Result<(), Error> {
        expect_len(name, self.num_slots(), values.len())
    }

    /// Check the length of a per-row array.
    pub(crate) fn expect_rows<T>(&self, name: &'static str, values: &[T]) -> Result<(), Error> {
        expect_len(name, self.num_rows(), values.len())
    }

    /// Check that a per-token array is `[T]` and finite wherever the mask is 1.
    pub(crate) fn expect_finite(
        &self,
        operation: &'static str,
        name: &'static str,
        values: &[f64],
    ) -> Result<(), Error> {
        self.expect_tokens(name, values)?;
        for (i, row) in self.rows().enumerate() {
            let start = row.start;
            if let Some(t) = row.into_iter().find(|t| self.is_active(*t) && !values[*t].is_finite()) {
                return Err(Error::NonFinite { operation, name, row: i, token: t - start, value: values[t] });
            }
        }
        Ok(())
    }

    /// Check that a per-row array is `[B]` and finite.
    pub(crate) fn expect_finite_rows(
        &self,
        operation: &'static str,
        name: &'static str,
        values: &[f64],
    ) -> Result<(), Error> {
        self.expect_rows(name, values)?;
        match values.iter().position(|v| !v.is_finite()) {
            Some(row) => Err(Error::NonFinite { operation, name, row, token: 0, value: values[row] }),
            None => Ok(()),
        }
    }
}

/// Check a length.
pub(crate) fn expect_len(name: &'static str, expected: usize, got: usize) -> Result<(), Error> {
    if expected == got { Ok(()) } else { Err(Error::Length { name, expected, got }) }
}

/// Unwrap an optional per-token array, checked for length and finiteness on the mask.
pub(crate) fn require_tokens<'a>(
    batch: &TokenBatch,
    operation: &'static str,
    name: &'static str,
    values: Option<&'a [f64]>,
) -> Result<&'a [f64], Error> {
    let values = values.ok_or(Error::Missing { operation, name })?;
    batch.expect_finite(operation, name, values)?;
    Ok(values)
}

/// Convert a slice of f32 to the f64 in which all maths is done.
pub fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}
