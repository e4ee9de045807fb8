//! The critic's loss: squared error against returns, clipped around the old values.
//!
//! `L = 1/2 agg(max((v - R)^2, (clamp(v, V - c, V + c) - R)^2))`; the gradient is 0 where the clamp holds and its
//! branch is the larger, and split in halves on every tie (a value on a bound, two equal branches).
//!
//! # Source
//! verl's `compute_value_loss`.

use crate::kl::Dual;
use crate::loss::{GlobalCounts, LossAggMode, agg_loss, larger, smaller};
use crate::{Error, TokenBatch};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings of the value loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ValueLossConfig {
    /// Half-width of the clip range around the old value; 0 is no clipping.
    pub cliprange_value: f64,
    /// How token losses become one number.
    pub loss_agg_mode: LossAggMode,
}

impl Default for ValueLossConfig {
    fn default() -> Self {
        ValueLossConfig { cliprange_value: 0.5, loss_agg_mode: LossAggMode::TokenMean }
    }
}

/// The value loss of a head on the policy's own trunk: a part of the policy's loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SharedValueLossConfig {
    /// Weight of the value loss beside the policy's.
    pub vf_coef: f64,
    /// The value loss.
    pub value_loss: ValueLossConfig,
}

impl SharedValueLossConfig {
    /// Check every range.
    ///
    /// # Errors
    /// The first setting out of range, by name.
    pub fn validate(&self) -> Result<(), Error> {
        let coef = self.vf_coef;
        if !(coef > 0.0 && coef.is_finite()) {
            return Err(Error::setting("vf_coef", coef, "a number above 0"));
        }
        self.value_loss.validate()
    }
}

/// What the value loss reads; all `[T]`.
#[derive(Debug, Clone, Copy, Default)]
pub struct ValueLossInput<'a> {
    /// Rows and mask.
    pub batch: TokenBatch<'a>,
    /// The critic's values now.
    pub predictions: &'a [f64],
    /// The critic's values at the start of the step.
    pub old_values: &'a [f64],
    /// Targets.
    pub returns: &'a [f64],
}

/// A value loss with its gradient.
#[derive(Debug, Clone, PartialEq)]
pub struct ValueLossOutput {
    /// This call's share of the global loss.
    pub loss: f64,
    /// `[T]`: d loss / d prediction, 0 where the mask is 0.
    pub d_predictions: Vec<f64>,
    /// Number of tokens at which the clipped branch is larger.
    pub num_clipped: usize,
}

impl ValueLossConfig {
    /// Check every range.
    ///
    /// # Errors
    /// A clip range that is negative or not finite.
    pub fn validate(&self) -> Result<(), Error> {
        let c = self.cliprange_value;
        if c >= 0.0 && c.is_finite() { Ok(()) } else { Err(Error::setting("cliprange_value", c, "a number from 0")) }
    }
}

/// Compute the value loss with its gradient.
///
/// # Errors
/// A setting out of range; an array of the wrong length or not finite.
pub fn value_loss(
    config: &ValueLossConfig,
    input: &ValueLossInput<'_>,
    counts: &GlobalCounts,
) -> Result<ValueLossOutput, Error> {
    config.validate()?;
    let batch = &input.batch;
    batch.expect_finite("value_loss", "predictions", input.predictions)?;
    batch.expect_finite("value_loss", "old_values", input.old_values)?;
    batch.expect_finite("value_loss", "returns", input.returns)?;
    let mut losses = vec![0.0; batch.num_slots()];
    let mut d_predictions = vec![0.0; batch.num_slots()];
    let mut num_clipped = 0;
    for t in (0..batch.num_slots()).filter(|t| batch.is_active(*t)) {
        let (v, target, old) = (input.predictions[t], input.returns[t], input.old_values[t]);
        let plain = half_square(Dual { value: v, d: 1.0 }, target);
        let bound = |value| Dual { value, d: 0.0 };
        let under = smaller(Dual { value: v, d: 1.0 }, bound(old + config.cliprange_value));
        let clipped = half_square(larger(under, bound(old - config.cliprange_value)), target);
        let loss = if config.cliprange_value > 0.0 { larger(plain, clipped) } else { plain };
        num_clipped += usize::from(config.cliprange_value > 0.0 && clipped.value > plain.value);
        losses[t] = loss.value;
        d_predictions[t] = loss.d;
    }
    let (loss, weights) = agg_loss(config.loss_agg_mode, batch, &losses, counts)?;
    d_predictions.iter_mut().zip(&weights).for_each(|(d, w)| *d *= w);
    Ok(ValueLossOutput { loss, d_predictions, num_clipped })
}

fn half_square(v: Dual, target: f64) -> Dual {
    let error = v.value - target;
    Dual { value: 0.5 * error * error, d: error * v.d }
}
