//! Sizes and state of AdamW's steps, shared by the policy and the models with a scalar head.

use crate::Error;
use crate::store::Store;
use temper_actor::{ParamStore, TensorSlot};
use temper_proto::OptimizerConfig;
use temper_tensor::{AdamWStep, Device};

/// First and second moments, and how many updates they have seen.
#[derive(Debug)]
pub(crate) struct Moments {
    pub(crate) first: Store,
    pub(crate) second: Store,
    pub(crate) num_updates: u64,
}

/// The size of one step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StepSize {
    pub(crate) learning_rate: f64,
    /// Global norm of the gradient before clipping.
    pub(crate) grad_norm: f64,
}

/// Global gradient norm, in f64.
///
/// # Errors
/// A gradient that is not finite, by the name of its tensor.
pub(crate) fn finite_norm(device: &dyn Device, grads: &ParamStore) -> Result<f64, Error> {
    let sum = grads.sum_squares(device);
    if sum.is_finite() {
        return Ok(sum.sqrt());
    }
    let squares = |(unit, slot): (usize, &TensorSlot)| {
        let sum_squares = device.sum_squares(grads.unit(unit).buffer().view(slot.range.clone()));
        (!sum_squares.is_finite()).then(|| Error::NonFiniteGradient { tensor: slot.name.clone(), sum_squares })
    };
    let named = grads.tensors().find_map(squares);
    Err(named.unwrap_or(Error::NonFiniteGradient { tensor: "all tensors together".to_owned(), sum_squares: sum }))
}

/// Clipping as torch's `clip_grad_norm_`: scale by `max / (norm + 1e-6)` where that is below 1.
pub(crate) fn clip_scale(optimizer: &OptimizerConfig, grad_norm: f64) -> f64 {
    let max_norm = optimizer.max_grad_norm;
    if max_norm > 0.0 { (max_norm / (grad_norm + 1e-6)).min(1.0) } else { 1.0 }
}

pub(crate) fn adamw_step(optimizer: &OptimizerConfig, size: StepSize, step: u64) -> AdamWStep {
    AdamWStep {
        learning_rate: size.learning_rate as f32,
        beta1: optimizer.beta1 as f32,
        beta2: optimizer.beta2 as f32,
        eps: optimizer.eps as f32,
        weight_decay: optimizer.weight_decay as f32,
        step,
        grad_scale: clip_scale(optimizer, size.grad_norm) as f32,
    }
}
