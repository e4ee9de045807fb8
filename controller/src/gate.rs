//! Between two steps: what others asked of the run takes effect.

use crate::control::{Directive, Setting};
use crate::{Controller, Error, Stage};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use temper_proto::Snapshot;

/// Settings that can change while a stage runs.
const LEARNING_RATE: &str = "learning_rate";
const TEMPERATURE: &str = "temperature";
const KL_COEF: &str = "kl_coef";

impl Controller {
    /// Wait while the run is paused, write checkpoints that were asked for, and give the stage with the settings that
    /// were changed; `None` where the run is to end now. `last` is the last checkpoint.
    pub(crate) fn gate(&mut self, stage: Stage, last: &mut Option<PathBuf>) -> Result<Option<Stage>, Error> {
        self.control.at(stage.name(), self.state.step, self.state.version);
        loop {
            let stop = self.stop.clone();
            let settings = self.settings(&self.adjusted(stage.clone()));
            match self.control.gate(settings, || stop.load(Ordering::SeqCst)) {
                Directive::Go(changes) => {
                    for (key, value) in changes {
                        self.change(&key, value)?;
                    }
                    return Ok(Some(self.adjusted(stage)));
                }
                Directive::Snapshot => {
                    let path = self.snapshot(last)?;
                    let path = path.to_string_lossy().into_owned();
                    self.control.answer_snapshot(Snapshot { path, step: self.state.step });
                }
                Directive::Drain => {
                    self.snapshot(last)?;
                    return Ok(None);
                }
            }
        }
    }

    /// The checkpoint of this step, written where there is none.
    fn snapshot(&mut self, last: &mut Option<PathBuf>) -> Result<PathBuf, Error> {
        let name = format!("step-{}", self.state.step);
        match last {
            Some(path) if path.ends_with(&name) => Ok(path.clone()),
            _ => {
                let path = self.checkpoint()?;
                *last = Some(path.clone());
                Ok(path)
            }
        }
    }

    /// What can be changed in a stage, with the values that its next step has.
    fn settings(&self, stage: &Stage) -> BTreeMap<String, Setting> {
        let mut settings = BTreeMap::new();
        settings.insert(LEARNING_RATE.to_owned(), Setting::from(stage.optimizer().learning_rate));
        if let Stage::Policy(policy) = stage {
            // A sample that goes on has tokens of the temperature that it began with.
            if policy.partial_rollouts.is_none() {
                let lead = (self.queue.len() as u64, self.lead(policy.steps, 1) as u64);
                let value = f64::from(policy.sampling.temperature);
                settings.insert(TEMPERATURE.to_owned(), Setting { value, lead });
            }
            if let (true, Some(coef)) = (policy.algorithm.kl_in_reward.use_kl_in_reward, self.state.kl_coef) {
                settings.insert(KL_COEF.to_owned(), Setting::from(coef));
            }
        }
        settings
    }

    fn change(&mut self, key: &str, value: f64) -> Result<(), Error> {
        match key {
            KL_COEF => self.state.kl_coef = Some(value),
            _ => {
                self.state.settings.insert(key.to_owned(), value.to_string());
            }
        }
        let ahead = if key == TEMPERATURE { self.queue.len() as u64 } else { 0 };
        let step = self.state.step + 1 + ahead;
        self.record.event("set", &[("key", json!(key)), ("value", json!(value)), ("step", json!(step))])
    }

    /// The stage with its changed settings.
    fn adjusted(&self, mut stage: Stage) -> Stage {
        let value = |key: &str| self.state.settings.get(key).and_then(|text| text.parse::<f64>().ok());
        if let Some(rate) = value(LEARNING_RATE) {
            stage.optimizer_mut().learning_rate = rate;
        }
        if let (Some(temperature), Stage::Policy(policy)) = (value(TEMPERATURE), &mut stage) {
            policy.sampling.temperature = temperature as f32;
        }
        stage
    }
}
