//! Drafts by a smaller model of the same vocabulary.
//!
//! The draft model has an engine of its own, with a K/V pool of its own, and is asked for all samples at once. It draws
//! with the same noise as the model that is drafted for (the same seed at the same slot), so that it says the same
//! wherever both laws put the drawn number over the same token. What it stored of a sample is found again by its prefix
//! cache; only the tokens of a block that is not full are computed anew.

use super::calibration::Cell;
use super::{Draft, DraftContext, Drafter, DrafterKind, GroupStart};
use crate::engine::{Engine, EngineOptions};
use crate::model::{Model, ModelLimits};
use crate::{Error, SchedulerLimits, SpeculationConfig, SystemClock};
use std::collections::HashMap;
use std::sync::Arc;
use temper_proto::GroupRequest;
use temper_types::{GroupId, SamplingParams};

/// Drafts from a model. See the module.
pub struct ModelDrafter<M> {
    engine: Engine<M>,
    next_group: u64,
    /// Drafts of this step by group and sample.
    drafts: HashMap<(GroupId, usize), Vec<u32>>,
}

impl<M: Model> ModelDrafter<M> {
    /// Draft with `model`, whose pool `limits` describes, for a model of `target` limits.
    ///
    /// # Errors
    /// Where the models have other vocabularies.
    pub fn new(model: M, limits: SchedulerLimits, target: ModelLimits) -> Result<Self, Error> {
        let own = model.limits();
        if own.vocab_size != target.vocab_size {
            return Err(Error::Model(format!(
                "the draft model has {} token ids, the model it drafts for has {}: expected one vocabulary",
                own.vocab_size, target.vocab_size
            )));
        }
        let options = EngineOptions {
            limits,
            max_queued_samples: usize::MAX,
            token_bytes: None,
            clock: Arc::new(SystemClock::default()),
            worker: "draft".to_owned(),
            speculation: SpeculationConfig::OFF,
            prefix_cache: true,
        };
        Ok(ModelDrafter { engine: Engine::new(model, options), next_group: 0, drafts: HashMap::new() })
    }

    /// Queue what continues a sample; false where the draft model cannot hold it.
    fn ask(&mut self, context: &DraftContext<'_>, max_tokens: usize) -> bool {
        let max_new_tokens = context.max_tokens.min(max_tokens) as u32;
        let GroupRequest { sampling, prompt_token_ids, seeds, .. } = context.request;
        let min_new_tokens = sampling.min_new_tokens.saturating_sub(context.response.len() as u32);
        let request = GroupRequest {
            group_id: GroupId(self.next_group),
            prompt_token_ids: [prompt_token_ids.as_slice(), context.response].concat(),
            seeds: vec![seeds[context.sample_index]],
            sampling: SamplingParams {
                max_new_tokens,
                min_new_tokens: min_new_tokens.min(max_new_tokens),
                stop: Vec::new(),
                ..sampling.clone()
            },
            ..GroupRequest::default()
        };
        self.next_group += 1;
        max_new_tokens > 0 && self.engine.submit(vec![request]).is_ok()
    }
}

impl<M: Model> Drafter for ModelDrafter<M> {
    fn kind(&self) -> DrafterKind {
        DrafterKind::Model
    }

    fn open_group(&mut self, _: &GroupStart<'_>) {}

    fn observe(&mut self, _: &DraftContext<'_>, _: usize) {}

    fn wants_all(&self) -> bool {
        true
    }

    fn prepare(&mut self, contexts: &[DraftContext<'_>], max_tokens: usize) {
        self.drafts.clear();
        let first = self.next_group;
        let asked: Vec<Option<(GroupId, usize)>> = contexts
            .iter()
            .map(|context| self.ask(context, max_tokens).then_some((context.group_id, context.sample_index)))
            .collect();
        while !self.engine.is_idle() {
            if self.engine.step().is_err() {
                // A model that cannot be read drafts nothing, and what it has drafted is of no use without the rest.
                self.engine.open_groups().into_iter().for_each(|group_id| drop(self.engine.abort(group_id)));
                while self.engine.pop_finished().is_some() {}
                return;
            }
        }
        while let Some(result) = self.engine.pop_finished() {
            let sample = asked[(result.group_id.0 - first) as usize];
            let drafted = result.samples.into_iter().next().map(|sample| sample.token_ids);
            self.drafts.extend(sample.zip(drafted));
        }
    }

    fn propose(&mut self, context: &DraftContext<'_>, draft: &mut Draft) {
        let drafted = self.drafts.remove(&(context.group_id, context.sample_index)).unwrap_or_default();
        for (index, token_id) in drafted.into_iter().enumerate() {
            draft.push(token_id, Cell::new(index, 1, 1));
        }
    }

    fn close_group(&mut self, _: GroupId) {}

    fn sleep(&mut self) -> Result<usize, Error> {
        self.engine.sleep()
    }
}
