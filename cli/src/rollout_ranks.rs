//! Engines that take their weights from trainer ranks, each whole or divided over tensor-parallel ranks.

use crate::draft_model;
use crate::local_text::LocalText;
use crate::recipe::{Placement, PlacementMode, Recipe, RecipeError, Source};
use crate::runtime::history_dir;
use crate::trainer_ranks;
use anyhow::Result;
use std::path::Path;
use std::sync::{Arc, RwLock};
use std::time::Duration;
use temper_actor::{CheckpointReader, ModelConfig, PackedPolicy, ParamStore, PolicyFormat, TensorPart};
use temper_proto::WeightService;
use temper_rollout::{LocalRolloutService, RankGroup, Sources, SyncedRolloutService, WeightReceiver, WeightTransport};
use temper_tensor::Device;
use temper_types::{DType, PolicyVersion, WeightFormat};

const KEY: &str = "placement.rollout_tensor_parallel";
/// Numbers of ranks that a recipe can say; [`check`] tells which of them fit its model.
pub const NUM_RANKS: [usize; 4] = [1, 2, 4, 8];

/// What an engine is made with.
pub struct EngineSetting<'a> {
    /// The recipe.
    pub recipe: &'a Recipe,
    /// What computes.
    pub device: &'a Arc<dyn Device>,
    /// Number format.
    pub dtype: DType,
    /// The model's directory.
    pub model_dir: &'a Path,
    /// The run's directory.
    pub run_dir: &'a Path,
    /// Name of the engine.
    pub name: &'a str,
}

impl EngineSetting<'_> {
    /// Start the engine, under the weights of the model's directory as publication `number`; `holders` are the trainer
    /// ranks that new ones come from, `group` the ranks that it is divided over.
    ///
    /// # Errors
    /// A model file that is missing or damaged, limits that do not fit, or a rank that is lost.
    pub fn start(
        &self,
        number: u64,
        (holders, transport): (Vec<Arc<dyn WeightService>>, WeightTransport),
        group: Option<Arc<RankGroup>>,
    ) -> Result<SyncedRolloutService<LocalRolloutService>> {
        let (device, engine) = (self.device, &self.recipe.engine);
        let config = ModelConfig::load(self.model_dir)?;
        let reader = CheckpointReader::open(self.model_dir)?;
        reader.validate(&config)?;
        let params = ParamStore::load(&**device, &config, &reader)?;
        let version = PolicyVersion { number, hash: params.content_hash(&**device) };
        let mut policy = match &group {
            None => {
                let format = PolicyFormat { dtype: self.dtype, weights: engine.weights };
                PackedPolicy::new(device, &params, &config, format)
            }
            Some(group) => {
                group.hand_out(&**device, &params, version.hash)?;
                PackedPolicy::new_part(device, &params, group.part(), self.dtype)
            }
        };
        let text = LocalText::load(self.model_dir)?;
        policy.set_masked_ids(text.tokenizer().missing_ids(config.vocab_size));
        policy.version = version;
        let policy = Arc::new(RwLock::new(policy));
        let bytes = Arc::new(text.token_byte_table(config.vocab_size));
        let mut service =
            LocalRolloutService::new(Arc::clone(device), Arc::clone(&policy), engine.clone(), bytes)?.named(self.name);
        let sources = Sources { ranks: holders, layout: trainer_ranks::layout(&self.recipe.placement), transport };
        let mut receiver = WeightReceiver::new(Arc::clone(device), policy, params, sources, self.name.to_owned());
        if let Some(group) = group {
            service = service.with_ranks(Arc::clone(&group));
            receiver = receiver.divided_over(group);
        }
        let service = draft_model::attach(service, (device, self.dtype), Some(&text), engine)?;
        let service = service.with_history(&history_dir(self.recipe, self.run_dir));
        Ok(SyncedRolloutService::new(service, receiver))
    }

    /// The engine of a process that trains too, with weights of its own, which it takes from `holders`; over threads
    /// where it is divided.
    ///
    /// # Errors
    /// As [`EngineSetting::start`].
    pub fn start_beside_trainer(
        &self,
        (version, holders): (PolicyVersion, Vec<Arc<dyn WeightService>>),
    ) -> Result<SyncedRolloutService<LocalRolloutService>> {
        let placement = &self.recipe.placement;
        let group = match placement.rollout_tensor_parallel {
            1 => None,
            num_ranks => {
                let config = ModelConfig::load(self.model_dir)?;
                let model = (&config, self.dtype);
                Some(Arc::new(RankGroup::of_threads(self.device, model, num_ranks, timeout(placement))?))
            }
        };
        self.start(version.number, (holders, WeightTransport::Grpc), group)
    }
}

/// True where an engine in the trainer's process cannot read the trainer's packed weights.
pub fn has_own_weights(recipe: &Recipe) -> bool {
    recipe.placement.rollout_tensor_parallel > 1 || recipe.engine.weights != WeightFormat::Exact
}

/// Longest wait of tensor-parallel ranks for each other.
pub fn timeout(placement: &Placement) -> Duration {
    Duration::from_secs(placement.collective_timeout_seconds)
}

/// Check that the model can be divided as the recipe says.
///
/// # Errors
/// A number of ranks that none can be, or one that does not fit the model, by key.
pub fn check(recipe: &Recipe, source: &Source) -> Result<(), RecipeError> {
    let num_ranks = recipe.placement.rollout_tensor_parallel;
    if !NUM_RANKS.contains(&num_ranks) {
        return Err(source.error(KEY, format!("{num_ranks} is out of range: expected 1, 2, 4 or 8")));
    }
    if num_ranks == 1 {
        return Ok(());
    }
    let fits = TensorPart::check(&recipe.model_config(source)?, num_ranks);
    fits.map(drop).map_err(|problem| source.error(KEY, format!("{num_ranks} does not fit the model: {problem}")))
}

/// What `temper check` says of divided engines; nothing of whole ones.
pub fn summary(placement: &Placement) -> Option<String> {
    let num_ranks = placement.rollout_tensor_parallel;
    let what = if placement.mode == PlacementMode::Processes { "processes" } else { "threads" };
    (num_ranks > 1).then(|| format!("engines: each divided over {num_ranks} tensor-parallel ranks, which are {what}"))
}
