//! Earlier responses for lenient replay, read back from the run's trajectories.
//!
//! Owns: which step last trained on a prompt of the stage. The responses themselves stay on disk, in `rollouts/`, which
//! resume cuts back to the checkpoint: so a resumed run offers what the uninterrupted one did, and no engine has to
//! remember anything.

use crate::{Controller, Error, ReplaySpec};
use std::collections::BTreeMap;
use std::path::PathBuf;
use temper_data::trajectories::read_step;
use temper_proto::{EarlierResponse, GroupRequest, Reuse};
use temper_types::{PromptId, Sample, Step};

/// Where the last response to each prompt of a stage lies.
#[derive(Debug, Default)]
pub(crate) struct EarlierSteps {
    stage: usize,
    /// Steps up to this one are known.
    known: u64,
    steps: BTreeMap<PromptId, u64>,
}

impl EarlierSteps {
    fn add(&mut self, step: u64, samples: &[Sample]) {
        self.steps.extend(samples.iter().map(|sample| (sample.prompt_id, step)));
        self.known = step;
    }
}

/// Earlier responses that a batch is offered.
pub(crate) struct Offers {
    lenience: f32,
    steps: BTreeMap<PromptId, u64>,
    rollouts: PathBuf,
}

impl Offers {
    /// Give every request the responses of the last pass over its prompt that was recorded.
    pub(crate) fn make(&self, requests: &mut [GroupRequest]) -> Result<(), Error> {
        let mut by_step: BTreeMap<u64, Vec<&mut GroupRequest>> = BTreeMap::new();
        for request in requests {
            if let Some(step) = self.steps.get(&request.prompt_id) {
                by_step.entry(*step).or_default().push(request);
            }
        }
        for (step, requests) in by_step {
            let samples = read_step(&self.rollouts, Step(step))?;
            requests.into_iter().for_each(|request| request.reuse = reuse(request, &samples, self.lenience));
        }
        Ok(())
    }
}

impl Controller {
    /// What a batch that begins now is offered, where replay is lenient.
    pub(crate) fn offers(&mut self) -> Result<Option<Offers>, Error> {
        let ReplaySpec::Lenient { lenience } = self.spec.replay else { return Ok(None) };
        self.find_earlier_steps()?;
        Ok(Some(Offers { lenience, steps: self.earlier.steps.clone(), rollouts: self.dir.rollouts() }))
    }

    /// Learn of the steps of this stage that were recorded since the last call.
    fn find_earlier_steps(&mut self) -> Result<(), Error> {
        if self.earlier.known == 0 || self.earlier.stage != self.state.stage {
            let known = self.state.step - self.state.stage_step;
            self.earlier = EarlierSteps { stage: self.state.stage, known, steps: BTreeMap::new() };
        }
        for step in self.earlier.known + 1..=self.state.step {
            let samples = self.recorded(step)?;
            self.earlier.add(step, &samples);
        }
        Ok(())
    }

    fn recorded(&self, step: u64) -> Result<Vec<Sample>, Error> {
        Ok(read_step(&self.dir.rollouts(), Step(step))?)
    }
}

/// The responses of `samples` to the prompt of `request`, by sample index; `None` where there are none.
fn reuse(request: &GroupRequest, samples: &[Sample], lenience: f32) -> Option<Reuse> {
    let mut responses = vec![EarlierResponse::default(); request.seeds.len()];
    let is_of_prompt =
        |sample: &&Sample| sample.prompt_id == request.prompt_id && sample.prompt_token_ids == request.prompt_token_ids;
    for sample in samples.iter().filter(is_of_prompt) {
        if let Some(response) = responses.get_mut(sample.sample_index.0 as usize) {
            response.token_ids.clone_from(&sample.response_token_ids);
            response.log_probs.clone_from(&sample.rollout_log_probs);
            response.policy_versions.clone_from(&sample.policy_versions);
        }
    }
    responses.iter().any(|response| !response.token_ids.is_empty()).then_some(Reuse { lenience, responses })
}
