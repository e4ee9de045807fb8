//! Statistics over the tokens that a mask selects.
//!
//! Masked values are never read, so a NaN behind the mask has no effect.

use crate::{Error, TokenBatch};

/// Sum of the selected values, in order.
pub fn masked_sum(values: &[f64], mask: &[u8]) -> f64 {
    values.iter().zip(mask).filter(|(_, m)| **m == 1).map(|(v, _)| v).sum()
}

/// Mean of the selected values; 0 where none is selected.
pub fn masked_mean(values: &[f64], mask: &[u8]) -> f64 {
    let count = mask.iter().filter(|m| **m == 1).count();
    if count == 0 { 0.0 } else { masked_sum(values, mask) / count as f64 }
}

/// Variance of the selected values, divided by `n - 1`.
///
/// # Errors
/// Where fewer than two values are selected.
pub fn masked_var(values: &[f64], mask: &[u8]) -> Result<f64, Error> {
    let count = mask.iter().filter(|m| **m == 1).count();
    if count < 2 {
        return Err(Error::batch("masked_var", format!("expected two or more unmasked tokens, got {count}")));
    }
    Ok(masked_var_biased(values, mask) * count as f64 / (count - 1) as f64)
}

/// Variance of the selected values, divided by `n`; 0 where none is selected.
pub fn masked_var_biased(values: &[f64], mask: &[u8]) -> f64 {
    let mean = masked_mean(values, mask);
    let squares: Vec<f64> = values.iter().map(|v| (v - mean) * (v - mean)).collect();
    masked_mean(&squares, mask)
}

/// What whitening does with the mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shift {
    /// The result has mean 0.
    Center,
    /// The result keeps the mean of the input.
    KeepMean,
}

/// Scale to unit variance: `(x - mean) / sqrt(var + 1e-8)` on the mask (unbiased variance), 0 elsewhere.
///
/// # Errors
/// Where fewer than two values are selected.
pub fn masked_whiten(values: &[f64], mask: &[u8], shift: Shift) -> Result<Vec<f64>, Error> {
    let mean = masked_mean(values, mask);
    let scale = (masked_var(values, mask)? + 1e-8).sqrt().recip();
    let back = if shift == Shift::Center { 0.0 } else { mean };
    let whiten = |(v, m): (&f64, &u8)| if *m == 1 { (v - mean) * scale + back } else { 0.0 };
    Ok(values.iter().zip(mask).map(whiten).collect())
}

/// Repeat one number per row over the row's unmasked tokens; 0 elsewhere.
pub(crate) fn broadcast(batch: &TokenBatch, per_row: &[f64]) -> Vec<f64> {
    let mut out = vec![0.0; batch.num_slots()];
    for (i, value) in per_row.iter().enumerate() {
        batch.active(i).for_each(|t| out[t] = *value);
    }
    out
}
