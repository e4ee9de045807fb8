//! Reference maths of the optimizers, in f64: what a device's kernel is tested against.
//!
//! # Source
//! `torch.optim` (AdamW, Adam, SGD, RMSprop) and `torch.nn.utils.clip_grad_norm_`.

use crate::Error;
use crate::batch::expect_len;

/// Rule of Adam's weight decay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decay {
    /// `p *= 1 - lr * weight_decay` before the step (AdamW).
    Decoupled,
    /// `g += weight_decay * p` (Adam).
    L2,
}

/// Which second moment divides Adam's step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SecondMoment {
    /// The running one.
    Running,
    /// The largest so far (amsgrad).
    Largest,
}

/// Settings of AdamW and Adam.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamConfig {
    /// Learning rate.
    pub lr: f64,
    /// Decays of the two moments.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Weight decay.
    pub weight_decay: f64,
    /// How the decay acts.
    pub decay: Decay,
    /// Which second moment is used.
    pub second_moment: SecondMoment,
}

/// Settings of stochastic gradient descent.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SgdConfig {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the velocity; 0 for none. Its first value is the first gradient.
    pub momentum: f64,
    /// `g += weight_decay * p`.
    pub weight_decay: f64,
    /// Where the velocity is looked up.
    pub lookahead: Lookahead,
}

/// Form of momentum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lookahead {
    /// Step along the velocity.
    Plain,
    /// Step along `g + momentum * velocity`.
    Nesterov,
}

/// Settings of RMSprop.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RmspropConfig {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the mean square.
    pub alpha: f64,
    /// Added to its root.
    pub eps: f64,
    /// `g += weight_decay * p`.
    pub weight_decay: f64,
}

/// An optimizer with its settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum OptimizerConfig {
    /// AdamW and Adam.
    Adam(AdamConfig),
    /// Stochastic gradient descent.
    Sgd(SgdConfig),
    /// RMSprop.
    Rmsprop(RmspropConfig),
}

/// State of an optimizer over `n` parameters.
#[derive(Debug, Clone, PartialEq)]
pub struct OptimizerState {
    /// Number of steps taken.
    pub step: u64,
    /// First moment or velocity, `[n]`.
    pub first: Vec<f64>,
    /// Second moment, `[n]`.
    pub second: Vec<f64>,
    /// Largest second moment, `[n]`.
    pub largest: Vec<f64>,
}

impl OptimizerState {
    /// State before the first step.
    pub fn new(num_params: usize) -> Self {
        let zeros = || vec![0.0; num_params];
        OptimizerState { step: 0, first: zeros(), second: zeros(), largest: zeros() }
    }

    /// Take one step in place.
    ///
    /// # Errors
    /// If `params`, `grads` and the state do not have one length.
    pub fn step(&mut self, config: &OptimizerConfig, params: &mut [f64], grads: &[f64]) -> Result<(), Error> {
        expect_len("params", self.first.len(), params.len())?;
        expect_len("grads", self.first.len(), grads.len())?;
        self.step += 1;
        for (i, (p, g)) in params.iter_mut().zip(grads).enumerate() {
            match config {
                OptimizerConfig::Adam(adam) => self.adam(adam, i, p, *g),
                OptimizerConfig::Sgd(sgd) => self.sgd(sgd, i, p, *g),
                OptimizerConfig::Rmsprop(rmsprop) => self.rmsprop(rmsprop, i, p, *g),
            }
        }
        Ok(())
    }

    fn adam(&mut self, config: &AdamConfig, i: usize, p: &mut f64, g: f64) {
        let (beta1, beta2) = config.betas;
        let g = match config.decay {
            Decay::Decoupled => {
                *p *= 1.0 - config.lr * config.weight_decay;
                g
            }
            Decay::L2 => g + config.weight_decay * *p,
        };
        self.first[i] += (g - self.first[i]) * (1.0 - beta1);
        self.second[i] = beta2 * self.second[i] + (1.0 - beta2) * g * g;
        self.largest[i] = self.largest[i].max(self.second[i]);
        let second = match config.second_moment {
            SecondMoment::Running => self.second[i],
            SecondMoment::Largest => self.largest[i],
        };
        let steps = i32::try_from(self.step).unwrap_or(i32::MAX);
        let (correction1, correction2) = (1.0 - beta1.powi(steps), 1.0 - beta2.powi(steps));
        *p -= config.lr / correction1 * self.first[i] / (second.sqrt() / correction2.sqrt() + config.eps);
    }

    fn sgd(&mut self, config: &SgdConfig, i: usize, p: &mut f64, g: f64) {
        let g = g + config.weight_decay * *p;
        if config.momentum == 0.0 {
            *p -= config.lr * g;
            return;
        }
        self.first[i] = if self.step == 1 { g } else { config.momentum * self.first[i] + g };
        let direction = match config.lookahead {
            Lookahead::Plain => self.first[i],
            Lookahead::Nesterov => g + config.momentum * self.first[i],
        };
        *p -= config.lr * direction;
    }

    fn rmsprop(&mut self, config: &RmspropConfig, i: usize, p: &mut f64, g: f64) {
        let g = g + config.weight_decay * *p;
        self.second[i] = config.alpha * self.second[i] + (1.0 - config.alpha) * g * g;
        *p -= config.lr * g / (self.second[i].sqrt() + config.eps);
    }
}

/// L2 norm of all gradients together.
pub fn total_norm(grads: &[f64]) -> f64 {
    grads.iter().map(|g| g * g).sum::<f64>().sqrt()
}

/// Factor that brings a gradient of norm `total_norm` down to `max_norm`: `min(max_norm / (total_norm + 1e-6), 1)`.
pub fn clip_coefficient(total_norm: f64, max_norm: f64) -> f64 {
    (max_norm / (total_norm + 1e-6)).min(1.0)
}

/// Scale gradients down to `max_norm` in place; returns the norm before.
pub fn clip_grad_norm(grads: &mut [f64], max_norm: f64) -> f64 {
    let norm = total_norm(grads);
    let coefficient = clip_coefficient(norm, max_norm);
    grads.iter_mut().for_each(|g| *g *= coefficient);
    norm
}
