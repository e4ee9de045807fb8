//! Scalar functions that stay exact in the tails.

/// Cutting a number to a range.
pub(crate) trait Cut {
    /// `min(max(self, low), high)`: defined for any bounds, where `f64::clamp` panics.
    fn cut(self, low: f64, high: f64) -> f64;
}

/// Whether `cut(x, low, high)` has the derivative 1, as in torch 2.15: between two bounds not on the bounds themselves,
/// at a single bound (the other infinite) on it too.
pub(crate) fn cut_passes(x: f64, low: f64, high: f64) -> bool {
    if low.is_finite() && high.is_finite() { low < x && x < high } else { low <= x && x <= high }
}

impl Cut for f64 {
    fn cut(self, low: f64, high: f64) -> f64 {
        self.max(low).min(high)
    }
}

/// `1 / (1 + e^-x)`.
pub(crate) fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 {
        1.0 / (1.0 + (-x).exp())
    } else {
        let e = x.exp();
        e / (1.0 + e)
    }
}

/// `ln sigmoid(x)`.
pub(crate) fn log_sigmoid(x: f64) -> f64 {
    if x >= 0.0 { -(-x).exp().ln_1p() } else { x - x.exp().ln_1p() }
}

/// `ln sum_i e^{z_i}`; negative infinity for an empty slice.
pub(crate) fn log_sum_exp(z: &[f64]) -> f64 {
    let top = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if !top.is_finite() {
        return top;
    }
    top + z.iter().map(|v| (v - top).exp()).sum::<f64>().ln()
}

/// `z - log_sum_exp(z)`.
pub(crate) fn log_softmax(z: &[f64]) -> Vec<f64> {
    let total = log_sum_exp(z);
    z.iter().map(|v| v - total).collect()
}
