//! The rollout service over an engine in the same process.
//!
//! Owns: the engine, behind a mutex that is held for one step at a time. It has no thread: whoever waits in
//! [`RolloutService::next_group`] computes. Steps of concurrent callers take turns, and the weights may change between
//! any two steps (see [`crate::Engine`] for what that means to running sequences).

use crate::clock::{Clock, SystemClock};
use crate::engine::{Engine, EngineOptions};
use crate::model::Model;
use crate::policy_model::PolicyModel;
use crate::stop::TokenBytes;
use crate::synced::Drain;
use crate::{BeamHypothesis, BeamSpec, EngineConfig, Error, ModelDrafter, RankGroup, Speculative};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;
use temper_actor::PackedPolicy;
use temper_proto::{GroupRequest, GroupResult, RolloutService, RolloutStats, ServiceError, ServiceResult};
use temper_tensor::Device;
use temper_types::{ErrorCode, PolicyVersion, WeightFormat};

/// Name of the engine in embedded mode.
const WORKER: &str = "rollout-0";

/// [`RolloutService`] in the caller's process.
pub struct LocalRolloutService<M = PolicyModel> {
    engine: Mutex<Engine<M>>,
    clock: Arc<dyn Clock>,
    worker: String,
}

impl LocalRolloutService {
    /// A service that generates with `policy`. The pool takes memory when the first group runs.
    ///
    /// # Errors
    /// Where a value of `config` is out of range or does not fit the model.
    pub fn new(
        device: Arc<dyn Device>,
        policy: Arc<RwLock<PackedPolicy>>,
        config: EngineConfig,
        token_bytes: Arc<dyn TokenBytes>,
    ) -> Result<Self, Error> {
        let (model, limits) = PolicyModel::new(device, policy, &config)?;
        let options = EngineOptions {
            limits,
            max_queued_samples: config.max_queued_samples,
            token_bytes: Some(token_bytes),
            clock: Arc::new(SystemClock::default()),
            worker: WORKER.to_owned(),
            speculation: config.speculation(),
            prefix_cache: config.prefix_cache,
        };
        Ok(Self::with_engine(model, options))
    }

    /// Compute with the other tensor-parallel ranks of the model, of which the policy is rank 0's part.
    #[must_use]
    pub fn with_ranks(mut self, ranks: Arc<RankGroup>) -> Self {
        let engine = self.engine.get_mut().unwrap_or_else(PoisonError::into_inner);
        engine.model_mut().set_ranks(ranks);
        self
    }

    /// Let `policy`, a smaller model of the same vocabulary, draft too. `config` is the engine's; the pool of the
    /// draft model takes at most a quarter of its bytes.
    ///
    /// # Errors
    /// Where the models have other vocabularies, or the configuration asks for no drafts.
    pub fn with_draft_model(
        mut self,
        device: Arc<dyn Device>,
        policy: Arc<RwLock<PackedPolicy>>,
        config: &EngineConfig,
    ) -> Result<Self, Error> {
        let own = EngineConfig {
            block_size: 16,
            num_blocks: 0,
            kv_cache_bytes: config.kv_cache_bytes / 4,
            weights: WeightFormat::Exact,
            speculative: Speculative::Off,
            draft_model: String::new(),
            ..config.clone()
        };
        let (model, limits) = PolicyModel::new(device, policy, &own)?;
        let engine = self.engine.get_mut().unwrap_or_else(PoisonError::into_inner);
        let drafter = ModelDrafter::new(model, limits, engine.model().limits())?;
        let no_drafts = || Error::InvalidConfig {
            key: "draft_model",
            value: config.draft_model.clone(),
            expected: "none where speculative is off".to_owned(),
        };
        engine.speculation_mut().ok_or_else(no_drafts)?.add_drafter(Box::new(drafter));
        Ok(self)
    }

    /// Search for the best responses to `prompt`, best first.
    ///
    /// # Errors
    /// `InvalidArgument` for a search that does not fit the engine, `Internal` where groups are open or the model
    /// fails.
    pub fn beam_search(&self, prompt: &[u32], spec: &BeamSpec) -> ServiceResult<(Vec<BeamHypothesis>, PolicyVersion)> {
        const OPERATION: &str = "beam_search";
        self.lock(OPERATION)?.beam_search(prompt, spec).map_err(self.convert(OPERATION))
    }
}

impl<M: Model> LocalRolloutService<M> {
    /// The same service under a name of its own, as one of several has.
    #[must_use]
    pub fn named(mut self, worker: &str) -> Self {
        worker.clone_into(&mut self.worker);
        let engine = self.engine.get_mut().unwrap_or_else(PoisonError::into_inner);
        engine.set_worker(worker);
        self
    }

    /// Remember earlier responses in a file of `dir` under the engine's name, and know what stands there already. Does
    /// nothing where there are no drafters.
    #[must_use]
    pub fn with_history(mut self, dir: &Path) -> Self {
        let path = dir.join(format!("{}.tokens", self.worker));
        let engine = self.engine.get_mut().unwrap_or_else(PoisonError::into_inner);
        engine.keep_history(&path);
        self
    }

    /// Whether a group can be answered at all; nothing is queued.
    ///
    /// # Errors
    /// What `submit` would refuse it for, whatever is queued.
    pub fn check(&self, group: &GroupRequest) -> ServiceResult<()> {
        const OPERATION: &str = "check";
        self.lock(OPERATION)?.check_fit(group).map_err(self.convert(OPERATION))
    }

    /// A service over any model.
    pub fn with_engine(model: M, options: EngineOptions) -> Self {
        let (clock, worker) = (Arc::clone(&options.clock), options.worker.clone());
        LocalRolloutService { engine: Mutex::new(Engine::new(model, options)), clock, worker }
    }

    fn lock(&self, operation: &'static str) -> ServiceResult<MutexGuard<'_, Engine<M>>> {
        let panicked = |_| self.error(ErrorCode::Internal, operation, "an earlier step panicked");
        self.engine.lock().map_err(panicked)
    }

    fn error(&self, code: ErrorCode, operation: &'static str, message: impl std::fmt::Display) -> ServiceError {
        ServiceError::new(code, self.worker.as_str(), operation, message)
    }

    fn convert(&self, operation: &'static str) -> impl Fn(Error) -> ServiceError + '_ {
        move |error| self.error(error.code(), operation, error)
    }
}

impl<M: Model> Drain for LocalRolloutService<M> {
    fn drain(&self) -> ServiceResult<()> {
        const OPERATION: &str = "drain";
        loop {
            let mut engine = self.lock(OPERATION)?;
            if engine.is_idle() {
                return Ok(());
            }
            engine.step().map_err(self.convert(OPERATION))?;
        }
    }
}

impl<M: Model> RolloutService for LocalRolloutService<M> {
    fn submit(&self, groups: Vec<GroupRequest>) -> ServiceResult<()> {
        self.lock("submit")?.submit(groups).map_err(self.convert("submit"))
    }

    /// Computes until a group finishes. At least one step is taken before the deadline is looked at, so that a caller
    /// who polls without waiting gets ahead too.
    fn next_group(&self, timeout: Duration) -> ServiceResult<Option<GroupResult>> {
        const OPERATION: &str = "next_group";
        let deadline = self.clock.now().saturating_add(timeout);
        loop {
            let mut engine = self.lock(OPERATION)?;
            if let Some(result) = engine.pop_finished() {
                return Ok(Some(result));
            }
            if engine.is_idle() {
                return Ok(None);
            }
            engine.step().map_err(self.convert(OPERATION))?;
            if let Some(result) = engine.pop_finished() {
                return Ok(Some(result));
            }
            let num_open = engine.num_open_groups();
            drop(engine);
            if self.clock.now() >= deadline {
                let message = format!("none of {num_open} groups finished within {timeout:?}");
                return Err(self.error(ErrorCode::DeadlineExceeded, OPERATION, message));
            }
        }
    }

    /// Finished groups that nobody has taken yet stay to be taken.
    fn abort_all(&self) -> ServiceResult<usize> {
        let mut engine = self.lock("abort_all")?;
        let open = engine.open_groups();
        Ok(open.into_iter().filter_map(|group_id| engine.abort(group_id)).count())
    }

    fn set_version(&self, version: PolicyVersion) -> ServiceResult<()> {
        const OPERATION: &str = "set_version";
        let held = self.lock(OPERATION)?.model().version().map_err(self.convert(OPERATION))?;
        if held == version {
            return Ok(());
        }
        let message = format!("expected weights of version {version}, the engine holds {held}");
        Err(self.error(ErrorCode::VersionMismatch, OPERATION, message))
    }

    fn sleep(&self) -> ServiceResult<u64> {
        const OPERATION: &str = "sleep";
        let freed = self.lock(OPERATION)?.sleep().map_err(self.convert(OPERATION))?;
        Ok(freed as u64)
    }

    fn stats(&self) -> RolloutStats {
        // Counters are plain numbers; after a panic they are as good as before.
        self.engine.lock().unwrap_or_else(PoisonError::into_inner).stats()
    }
}

#[cfg(test)]
mod tests;
