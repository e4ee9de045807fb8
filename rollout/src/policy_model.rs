//! The real model behind [`Model`]: a packed policy that others may hold too, and a K/V pool of the engine's own.

use crate::model::{Model, ModelLimits, StepBatch, StepOutput};
use crate::tensor_parallel::{RankGroup, StepCommand};
use crate::{BlockCopy, EngineConfig, Error, SchedulerLimits};
use std::sync::{Arc, RwLock, RwLockReadGuard};
use temper_actor::{Batch, Head, PackedPolicy, Workspace};
use temper_tensor::{Device, KvCache, KvCacheSpec, SampleRow, Sampled};
use temper_types::PolicyVersion;

/// A policy over a paged pool. The pool takes memory at the first step and can be given back between runs.
#[derive(Debug)]
pub struct PolicyModel {
    device: Arc<dyn Device>,
    policy: Arc<RwLock<PackedPolicy>>,
    limits: ModelLimits,
    /// Ids that are never drawn, ascending.
    masked_ids: Vec<u32>,
    spec: KvCacheSpec,
    cache: Option<KvCache>,
    workspace: Workspace,
    /// The other ranks, where `policy` is a tensor-parallel rank's part.
    ranks: Option<Arc<RankGroup>>,
    /// Copies that the other ranks were not told yet.
    untold: Vec<BlockCopy>,
}

impl PolicyModel {
    /// A model over `policy`, which is locked for reading during a step and free between steps. Returns the limits of
    /// the scheduler that match its pool.
    ///
    /// # Errors
    /// Where the configuration does not fit the model, or the model has no LM head.
    pub fn new(
        device: Arc<dyn Device>,
        policy: Arc<RwLock<PackedPolicy>>,
        config: &EngineConfig,
    ) -> Result<(Self, SchedulerLimits), Error> {
        config.validate()?;
        let (limits, masked_ids, spec, scheduler) = {
            let policy = lock(&policy)?;
            if policy.config().head != Head::CausalLm {
                return Err(Error::Model("a policy with a value or score head draws no tokens".to_owned()));
            }
            if policy.weights() != config.weights {
                let expected = format!("\"{}\", the form of the policy's weights", policy.weights());
                let value = config.weights.to_string();
                return Err(Error::InvalidConfig { key: "weights", value, expected });
            }
            let vocab_size = policy.config().vocab_size;
            let limits = ModelLimits {
                vocab_size,
                num_drawable_ids: vocab_size - policy.masked_ids().len(),
                max_positions: policy.config().max_position_embeddings,
                kv_dtype: policy.kv_spec(1, config.block_size).dtype,
            };
            let scheduler = config.resolve(limits, policy.kv_spec(1, config.block_size).block_bytes())?;
            let spec = policy.kv_spec(scheduler.num_blocks, scheduler.block_size);
            (limits, policy.masked_ids().to_vec(), spec, scheduler)
        };
        let (cache, workspace, ranks, untold) = (None, Workspace::new(), None, Vec::new());
        let model = PolicyModel { device, policy, limits, masked_ids, spec, cache, workspace, ranks, untold };
        Ok((model, scheduler))
    }

    /// Compute with the other ranks of the model, of which the policy is rank 0's part.
    pub(crate) fn set_ranks(&mut self, ranks: Arc<RankGroup>) {
        self.ranks = Some(ranks);
    }

    /// Bytes of the pool when it is allocated, on all ranks.
    pub fn kv_cache_bytes(&self) -> usize {
        let num_ranks = self.ranks.as_ref().map_or(1, |ranks| ranks.part().num_ranks());
        self.spec.num_blocks * self.spec.block_bytes() * num_ranks
    }
}

impl Model for PolicyModel {
    fn limits(&self) -> ModelLimits {
        self.limits
    }

    fn is_masked(&self, id: u32) -> bool {
        self.masked_ids.binary_search(&id).is_ok()
    }

    fn version(&self) -> Result<PolicyVersion, Error> {
        Ok(lock(&self.policy)?.version)
    }

    fn copy_blocks(&mut self, copies: &[BlockCopy]) {
        if self.ranks.is_some() {
            self.untold.extend_from_slice(copies);
        }
        if let Some(cache) = &mut self.cache {
            copies.iter().for_each(|copy| self.device.kv_copy_block(cache, copy.from, copy.to));
        }
    }

    fn step(&mut self, batch: StepBatch<'_>, output: &mut StepOutput) -> Result<(), Error> {
        let policy = lock(&self.policy)?;
        let cache = self.cache.get_or_insert_with(|| self.device.kv_cache(self.spec));
        let rows = Batch { token_ids: batch.token_ids, positions: batch.positions, spans: batch.spans };
        match &self.ranks {
            None => {
                policy.forward(&rows, cache, &mut self.workspace);
            }
            Some(ranks) => {
                let (weights, copies) = (policy.version.hash, self.untold.as_slice());
                let step = StepCommand { weights, pool: &self.spec, copies, batch };
                let workspace = &mut self.workspace;
                ranks.step(&step, |others| policy.forward_part(&rows, cache, workspace, others).map(|_| ()))?;
                self.untold.clear();
            }
        }
        output.version = policy.version;
        output.sampled.clear();
        if !batch.draws.is_empty() {
            policy.sample(&mut self.workspace, batch.draw_rows, batch.draws, &mut output.sampled);
        }
        Ok(())
    }

    fn release_kv(&mut self) -> usize {
        self.untold.clear();
        if let Some(ranks) = self.ranks.as_ref().filter(|_| self.cache.is_some()) {
            ranks.release_kv();
        }
        self.cache.take().map_or(0, |_pool| self.kv_cache_bytes())
    }

    fn draw_again(&mut self, draw_rows: &[u32], draws: &[SampleRow<'_>]) -> Result<Vec<Sampled>, Error> {
        let mut drawn = Vec::new();
        lock(&self.policy)?.sample(&mut self.workspace, draw_rows, draws, &mut drawn);
        Ok(drawn)
    }
}

/// A poisoned lock means that a writer died half-way: the weights are unknown, so nothing is computed with them.
fn lock(policy: &RwLock<PackedPolicy>) -> Result<RwLockReadGuard<'_, PackedPolicy>, Error> {
    policy.read().map_err(|_| Error::Model("the policy's writer panicked, its weights are unknown".to_owned()))
}
