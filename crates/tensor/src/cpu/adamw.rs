//! AdamW, elementwise.

use super::CpuDevice;
use super::math::{load_lanes, store_lanes};
use super::parallel::{ELEMENTS_PER_TASK, SharedMut, for_ranges};
use super::simd::{Kernel, Simd};
use crate::AdamWStep;

/// Factors of one step, worked out in f64 and rounded once.
#[derive(Clone, Copy)]
struct Factors {
    grad_scale: f32,
    /// `1 - lr * weight_decay`
    decay: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    /// `lr / (1 - beta1^t)`
    step_size: f32,
    /// `sqrt(1 - beta2^t)`
    root_correction2: f32,
    eps: f32,
}

/// The f64 that stands for the decimal number that a user wrote: 0.999, not the f32 nearest to it.
fn as_written(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

fn power(base: f64, mut exponent: u64) -> f64 {
    let (mut square, mut result) = (base, 1.0);
    while exponent > 0 {
        if exponent & 1 == 1 {
            result *= square;
        }
        square *= square;
        exponent >>= 1;
    }
    result
}

impl Factors {
    fn new(step: &AdamWStep) -> Self {
        let (beta1, beta2) = (as_written(step.beta1), as_written(step.beta2));
        let lr = f64::from(step.learning_rate);
        Factors {
            grad_scale: step.grad_scale,
            decay: (1.0 - lr * as_written(step.weight_decay)) as f32,
            beta1: beta1 as f32,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            step_size: (lr / (1.0 - power(beta1, step.step))) as f32,
            root_correction2: (1.0 - power(beta2, step.step)).sqrt() as f32,
            eps: step.eps,
        }
    }
}

struct Update<'a> {
    factors: Factors,
    grad: &'a [f32],
    param: &'a mut [f32],
    first: &'a mut [f32],
    second: &'a mut [f32],
}

impl Kernel for Update<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let f = self.factors;
        for start in (0..self.grad.len()).step_by(16) {
            let lanes = (self.grad.len() - start).min(16);
            // SAFETY: the four slices have equal lengths, and `lanes` elements are left in them.
            unsafe {
                let (param, first, second) = (
                    self.param.as_mut_ptr().add(start),
                    self.first.as_mut_ptr().add(start),
                    self.second.as_mut_ptr().add(start),
                );
                let g = S::mul(load_lanes::<S>(self.grad.as_ptr().add(start), lanes), S::splat(f.grad_scale));
                let m = S::mul(load_lanes::<S>(first, lanes), S::splat(f.beta1));
                let m = S::fma(S::splat(f.one_minus_beta1), g, m);
                let v = S::mul(load_lanes::<S>(second, lanes), S::splat(f.beta2));
                let v = S::fma(S::mul(S::splat(f.one_minus_beta2), g), g, v);
                let root = S::div(S::sqrt(v), S::splat(f.root_correction2));
                let p = S::mul(load_lanes::<S>(param, lanes), S::splat(f.decay));
                let ratio = S::div(m, S::add(root, S::splat(f.eps)));
                store_lanes::<S>(param, lanes, S::fma(S::splat(-f.step_size), ratio, p));
                store_lanes::<S>(first, lanes, m);
                store_lanes::<S>(second, lanes, v);
            }
        }
    }
}

/// One step in place: decay first (`p *= 1 - lr wd`), then
/// `p -= lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)`.
pub(crate) fn step(
    dev: &CpuDevice,
    step: AdamWStep,
    grad: &[f32],
    param: &mut [f32],
    (first, second): (&mut [f32], &mut [f32]),
) {
    let len = grad.len();
    assert!(param.len() == len && first.len() == len && second.len() == len, "ranges of AdamW differ in length");
    let factors = Factors::new(&step);
    let (param, first, second) = (SharedMut::new(param), SharedMut::new(first), SharedMut::new(second));
    for_ranges(dev, len, ELEMENTS_PER_TASK, |range| {
        // SAFETY: the ranges of different tasks are disjoint.
        let (param, first, second) =
            unsafe { (param.range(range.clone()), first.range(range.clone()), second.range(range.clone())) };
        dev.isa.run(Update { factors, grad: &grad[range], param, first, second });
    });
}
