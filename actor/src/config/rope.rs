//! Rotary position embedding: frequencies and their scaling.

use super::keys::Keys;
use crate::error::Result;
use crate::exact_math::{exp, ln};

/// Base and scaling of the rotary embedding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies, `rope_theta`.
    pub theta: f64,
    /// How they are scaled.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are scaled for contexts longer than those of pre-training.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Every frequency is divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3: long wavelengths are divided by `factor`, short ones kept, those between interpolated.
    Llama3 {
        /// The divisor of long wavelengths.
        factor: f64,
        /// Wavelengths over `original_max_position_embeddings / low_freq_factor` are long.
        low_freq_factor: f64,
        /// Wavelengths under `original_max_position_embeddings / high_freq_factor` are short.
        high_freq_factor: f64,
        /// Context length of pre-training.
        original_max_position_embeddings: f64,
    },
}

impl RopeConfig {
    /// Frequencies of the `head_dim / 2` pairs, computed in f64 and rounded once.
    ///
    /// # Source
    /// Su et al. 2021 (`theta^(-2i / head_dim)`); the Llama 3.1 model card's reference code for `Llama3`.
    pub fn inv_frequencies(&self, head_dim: usize) -> Vec<f32> {
        let ln_theta = ln(self.theta);
        let frequency = |pair: usize| exp(-ln_theta * (2 * pair) as f64 / head_dim as f64);
        (0..head_dim / 2).map(|pair| self.scaling.scale(frequency(pair)) as f32).collect()
    }
}

impl RopeScaling {
    fn scale(self, frequency: f64) -> f64 {
        match self {
            RopeScaling::Default => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: context,
            } => {
                let wavelength = 2.0 * std::f64::consts::PI / frequency;
                if wavelength < context / high {
                    frequency
                } else if wavelength > context / low {
                    frequency / factor
                } else {
                    let smooth = (context / wavelength - low) / (high - low);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }
}

/// Read the rotary keys of a configuration in either form. `default_theta` stands where the classic form leaves the
/// base out.
pub(super) fn parse(keys: &Keys, default_theta: Option<f64>) -> Result<RopeConfig> {
    keys.require("partial_rotary_factor", &1.0.into())?;
    let v5 = nested(keys, "rope_parameters", "rope_parameters.")?;
    let classic = nested(keys, "rope_scaling", "rope_scaling.")?;
    let theta = match (&v5, default_theta) {
        (Some(v5), _) if v5.get("rope_theta").is_some() => v5.required_positive("rope_theta")?,
        (_, Some(default)) => keys.positive("rope_theta")?.unwrap_or(default),
        (_, None) => keys.required_positive("rope_theta")?,
    };
    if !(1.0 + 1e-6..=1e12).contains(&theta) {
        return Err(keys.error("rope_theta", "a number over 1, at most 1e12"));
    }
    let scaling = v5.or(classic).map_or(Ok(RopeScaling::Default), |object| parse_scaling(&object, keys))?;
    Ok(RopeConfig { theta, scaling })
}

fn nested<'a>(keys: &Keys<'a>, key: &str, prefix: &'a str) -> Result<Option<Keys<'a>>> {
    let Some(value) = keys.get(key) else { return Ok(None) };
    let map = value.as_object().ok_or_else(|| keys.error(key, "an object or null"))?;
    Ok(Some(Keys { map, file: keys.file, prefix }))
}

fn parse_scaling(object: &Keys, top: &Keys) -> Result<RopeScaling> {
    object.require("partial_rotary_factor", &1.0.into())?;
    let type_key = if object.get("rope_type").is_some() { "rope_type" } else { "type" };
    match object.text(type_key)? {
        Some("default") => Ok(RopeScaling::Default),
        None if object.map.keys().all(|key| key == "rope_theta") => Ok(RopeScaling::Default),
        Some("linear") => Ok(RopeScaling::Linear { factor: parse_factor(object)? }),
        Some("llama3") => {
            let low = object.required_positive("low_freq_factor")?;
            let high = object.required_positive("high_freq_factor")?;
            if high <= low {
                return Err(object.error("high_freq_factor", format!("more than low_freq_factor = {low}")));
            }
            let original = "original_max_position_embeddings";
            let context = match object.positive(original)? {
                Some(context) => context,
                None => top.required_positive(original)?,
            };
            Ok(RopeScaling::Llama3 {
                factor: parse_factor(object)?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: context,
            })
        }
        Some(_) | None => Err(object.error(type_key, "one of default, linear, llama3")),
    }
}

/// By what wavelengths are stretched: so little and so much that every frequency is a number.
fn parse_factor(object: &Keys) -> Result<f64> {
    let factor = object.required_positive("factor")?;
    if !(1e-6..=1e6).contains(&factor) {
        return Err(object.error("factor", "a number from 1e-6 to 1e6"));
    }
    Ok(factor)
}
