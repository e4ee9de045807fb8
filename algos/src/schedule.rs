//! Learning-rate schedules as multipliers of the base rate.
//!
//! Warm-up rises linearly from `init_lr_ratio` to 1 over `num_warmup_steps`. Then: constant stays; cosine follows
//! `max(min, (1 - min) / 2 * cos(2 pi num_cycles p) + (1 + min) / 2)`; linear falls to `min_lr_ratio`; wsd stays for
//! `stable_ratio` of the remaining steps, then follows the cosine. Step 0 is the first update, whose multiplier is
//! `init_lr_ratio` unless `zero_indexed_step` is off, which counts it as step 1.
//!
//! # Source
//! verl's `get_{cosine,constant,wsd}_schedule_with_warmup`; linear as in transformers.

use crate::Error;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// Shape of the schedule after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleType {
    /// Stays at 1.
    #[default]
    Constant,
    /// A cosine to `min_lr_ratio`.
    Cosine,
    /// A straight line to `min_lr_ratio`.
    Linear,
    /// Warm-up, stable, decay.
    Wsd,
}

/// Settings of a schedule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LrScheduleConfig {
    /// The shape.
    #[serde(rename = "type")]
    pub kind: ScheduleType,
    /// Number of steps of warm-up.
    pub num_warmup_steps: u64,
    /// Multiplier at the start of the warm-up.
    pub init_lr_ratio: f64,
    /// Multiplier at the end.
    pub min_lr_ratio: f64,
    /// Periods of the cosine; 0.5 goes down once.
    pub num_cycles: f64,
    /// Share of the steps after warm-up in which wsd stays at 1.
    pub stable_ratio: f64,
    /// Count the first update as step 0; off: as step 1.
    pub zero_indexed_step: bool,
}

impl Default for LrScheduleConfig {
    fn default() -> Self {
        LrScheduleConfig {
            kind: ScheduleType::Constant,
            num_warmup_steps: 0,
            init_lr_ratio: 0.0,
            min_lr_ratio: 0.0,
            num_cycles: 0.5,
            stable_ratio: 0.9,
            zero_indexed_step: true,
        }
    }
}

impl LrScheduleConfig {
    /// Check every range.
    ///
    /// # Errors
    /// The first setting out of range, by name.
    pub fn validate(&self) -> Result<(), Error> {
        let unit = |name, v: f64| {
            if (0.0..=1.0).contains(&v) { Ok(()) } else { Err(Error::setting(name, v, "a number from 0 to 1")) }
        };
        unit("init_lr_ratio", self.init_lr_ratio)?;
        unit("min_lr_ratio", self.min_lr_ratio)?;
        unit("stable_ratio", self.stable_ratio)?;
        if !self.num_cycles.is_finite() || self.num_cycles < 0.0 {
            return Err(Error::setting("num_cycles", self.num_cycles, "a number from 0"));
        }
        Ok(())
    }

    /// Multiplier of the update number `step` (from 0) out of `num_training_steps`.
    pub fn multiplier(&self, step: u64, num_training_steps: u64) -> f64 {
        let step = if self.zero_indexed_step { step } else { step + 1 };
        let warmup = self.num_warmup_steps;
        if step < warmup {
            return self.init_lr_ratio + (1.0 - self.init_lr_ratio) * step as f64 / warmup.max(1) as f64;
        }
        let remaining = num_training_steps.saturating_sub(warmup);
        let past = step - warmup;
        let progress = past as f64 / remaining.max(1) as f64;
        match self.kind {
            ScheduleType::Constant => 1.0,
            ScheduleType::Cosine => {
                let cosine = (2.0 * PI * self.num_cycles * progress).cos();
                let (half, middle) = (0.5 * (1.0 - self.min_lr_ratio), 0.5 * (1.0 + self.min_lr_ratio));
                (cosine * half + middle).max(self.min_lr_ratio)
            }
            ScheduleType::Linear => self.min_lr_ratio + (1.0 - self.min_lr_ratio) * (1.0 - progress).max(0.0),
            ScheduleType::Wsd => self.stable_then_decay(past, remaining),
        }
    }

    fn stable_then_decay(&self, past: u64, remaining: u64) -> f64 {
        let stable = (remaining as f64 * self.stable_ratio) as u64;
        if past < stable {
            return 1.0;
        }
        if past >= remaining {
            return self.min_lr_ratio;
        }
        let progress = (past - stable) as f64 / (remaining - stable).max(1) as f64;
        let value = (0.5 * (1.0 + (2.0 * PI * self.num_cycles * progress).cos())).max(0.0);
        (1.0 - self.min_lr_ratio) * value + self.min_lr_ratio
    }
}
