//! A curriculum by pass rate: prompts that are always or never solved teach nothing and are passed over for a while.
//!
//! The running pass rate of a prompt is an exponential average over its groups. A prompt is admitted where it is new,
//! where its rate lies within the band, or where it was passed over often enough to be asked again.

use crate::Error;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Settings of the curriculum.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CurriculumConfig {
    /// Draw prompts by their pass rates.
    pub enable: bool,
    /// Lowest rate that is admitted.
    pub min_pass_rate: f64,
    /// Highest rate that is admitted.
    pub max_pass_rate: f64,
    /// A response passes at this reward or more.
    pub correct_at: f64,
    /// Weight of the newest group in the running rate.
    pub smoothing: f64,
    /// A prompt out of the band is asked again after so many times that it was passed over.
    pub revisit_after: u32,
}

impl Default for CurriculumConfig {
    fn default() -> Self {
        CurriculumConfig {
            enable: false,
            min_pass_rate: 0.05,
            max_pass_rate: 0.95,
            correct_at: 1.0,
            smoothing: 0.5,
            revisit_after: 3,
        }
    }
}

impl CurriculumConfig {
    /// Check every range.
    ///
    /// # Errors
    /// The first setting out of range, by name.
    pub fn validate(&self) -> Result<(), Error> {
        let unit = 0.0..=1.0;
        if !unit.contains(&self.min_pass_rate) {
            return Err(Error::setting("curriculum.min_pass_rate", self.min_pass_rate, "a number from 0 to 1"));
        }
        if !unit.contains(&self.max_pass_rate) || self.max_pass_rate < self.min_pass_rate {
            let expected = "a number from min_pass_rate to 1";
            return Err(Error::setting("curriculum.max_pass_rate", self.max_pass_rate, expected));
        }
        if !(self.smoothing > 0.0 && self.smoothing <= 1.0) {
            return Err(Error::setting("curriculum.smoothing", self.smoothing, "a number above 0, at most 1"));
        }
        if self.correct_at.is_nan() {
            return Err(Error::setting("curriculum.correct_at", self.correct_at, "a number"));
        }
        Ok(())
    }
}

/// What is known of one prompt.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PassRate {
    /// The running rate.
    pub rate: f64,
    /// How often it was passed over since it was last asked.
    pub num_skipped: u32,
}

/// Running pass rates by the prompt's row in its dataset.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PassRates {
    prompts: BTreeMap<u64, PassRate>,
}

impl PassRates {
    /// True where the prompt is to be asked; else that it was passed over is counted.
    pub fn admit(&mut self, config: &CurriculumConfig, row: u64) -> bool {
        let Some(known) = self.prompts.get_mut(&row) else { return true };
        let is_in_band = (config.min_pass_rate..=config.max_pass_rate).contains(&known.rate);
        if is_in_band || known.num_skipped >= config.revisit_after {
            return true;
        }
        known.num_skipped += 1;
        false
    }

    /// Take in the rewards of a group; none (no response could be scored) change nothing.
    pub fn observe(&mut self, config: &CurriculumConfig, row: u64, rewards: &[f64]) {
        if rewards.is_empty() {
            return;
        }
        let passed = rewards.iter().filter(|r| **r >= config.correct_at).count() as f64 / rewards.len() as f64;
        let rate = match self.prompts.get(&row) {
            Some(known) => known.rate + config.smoothing * (passed - known.rate),
            None => passed,
        };
        self.prompts.insert(row, PassRate { rate, num_skipped: 0 });
    }

    /// Number of prompts that were asked, and the mean of their rates (0 without any).
    pub fn summary(&self) -> (usize, f64) {
        let total: f64 = self.prompts.values().map(|p| p.rate).sum();
        (self.prompts.len(), total / self.prompts.len().max(1) as f64)
    }
}

/// Stored as `"rate skipped"`, the rate in the shortest decimals that give the same number back.
impl Serialize for PassRate {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{} {}", self.rate, self.num_skipped))
    }
}

impl<'de> Deserialize<'de> for PassRate {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let parsed = text.split_once(' ').and_then(|(rate, skipped)| {
            Some(PassRate { rate: rate.parse().ok()?, num_skipped: skipped.parse().ok()? })
        });
        parsed.ok_or_else(|| serde::de::Error::custom(format!("`{text}` is no pass rate: expected RATE SKIPPED")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_out_of_the_band_are_passed_over_and_asked_again() {
        let config = CurriculumConfig { revisit_after: 2, smoothing: 0.25, ..CurriculumConfig::default() };
        let mut rates = PassRates::default();
        assert!(rates.admit(&config, 7), "a new prompt is asked");
        rates.observe(&config, 7, &[1.0, 1.0]);
        assert_eq!([0; 3].map(|_| rates.admit(&config, 7)), [false, false, true]);
        rates.observe(&config, 7, &[1.0, 0.0]);
        assert_eq!(rates.summary(), (1, 0.875));
        assert!(rates.admit(&config, 7), "0.875 lies in the band");
        rates.observe(&config, 8, &[]);
        assert_eq!(rates.summary().0, 1, "a group without rewards says nothing");
    }

    #[test]
    fn rates_come_back_from_text_to_the_bit() {
        let config = CurriculumConfig { smoothing: 0.3, ..CurriculumConfig::default() };
        let mut rates = PassRates::default();
        for i in 0..200u64 {
            let rewards: Vec<f64> = (0..7).map(|k| f64::from(u8::from((i * 31 + k * 17) % 5 < 2))).collect();
            rates.observe(&config, i % 40, &rewards);
            rates.admit(&config, i % 23);
        }
        let text = serde_json::to_string(&rates).expect("plain data");
        assert_eq!(serde_json::from_str::<PassRates>(&text).expect("reads back"), rates);
        assert!(serde_json::from_str::<PassRates>("{\"1\": \"x 1\"}").is_err());
    }

    #[test]
    fn a_bad_band_is_refused() {
        let bad = [
            CurriculumConfig { min_pass_rate: 0.8, max_pass_rate: 0.2, ..CurriculumConfig::default() },
            CurriculumConfig { min_pass_rate: -0.1, ..CurriculumConfig::default() },
            CurriculumConfig { smoothing: 0.0, ..CurriculumConfig::default() },
        ];
        assert!(bad.iter().all(|config| config.validate().is_err()));
        assert!(CurriculumConfig::default().validate().is_ok());
    }
}
