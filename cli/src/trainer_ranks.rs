//! The trainer of a run in this process: alone, or several ranks that share the compute device.

use crate::recipe::{MAX_WAIT_SECONDS, Placement, PlacementMode, Recipe, RecipeError, ShardingKind, Source};
use anyhow::Result;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use temper_actor::sequence_parallel_problem;
use temper_collective::reshard::Layout;
use temper_proto::{TrainerService, WeightService};
use temper_rollout::WeightTransport;
use temper_tensor::Device;
use temper_trainer::{LocalTrainerService, Ranks, Sharding, SharedPolicy, Trainer, TrainerGroup, load_local_ranks};
use temper_types::{DType, PolicyVersion};

/// A trainer, and the packed weights that an engine of the same process reads.
pub struct LocalTrainer {
    /// The trainer.
    pub service: Arc<dyn TrainerService>,
    /// Its packed weights.
    pub policy: SharedPolicy,
    /// The version that it was loaded with.
    pub version: PolicyVersion,
    /// The ranks, for engines that hold weights of their own.
    pub holders: Vec<Arc<dyn WeightService>>,
}

/// What of a model the ranks of `placement` divide.
pub fn sharding(placement: &Placement) -> Sharding {
    match placement.sharding {
        ShardingKind::Zero1 => Sharding::Zero1,
        ShardingKind::Zero2 => Sharding::Zero2,
        ShardingKind::Zero3 => Sharding::Zero3,
        ShardingKind::Hybrid => Sharding::Hybrid { shard_size: placement.shard_size },
    }
}

/// Ranks of `placement` that hold one copy of the state together.
pub fn num_shards(placement: &Placement) -> usize {
    sharding(placement).num_shards(placement.trainer_ranks)
}

/// How the masters lie on the ranks of `placement`.
pub fn layout(placement: &Placement) -> Layout {
    let world = placement.trainer_ranks;
    match placement.sharding {
        ShardingKind::Zero1 | ShardingKind::Zero2 => Layout::Replicated { world },
        ShardingKind::Zero3 => Layout::Fsdp { world, shards: world },
        ShardingKind::Hybrid => Layout::Fsdp { world, shards: placement.shard_size },
    }
}

/// Let engines of other processes on this host read the masters where they lie, unless `placement` wants gRPC; where
/// `share` finds that there is no such memory, which is said, they come by gRPC too.
pub fn share_masters(placement: &Placement, share: impl FnOnce() -> Result<(), temper_trainer::Error>) {
    if placement.weight_transport == WeightTransport::Auto
        && let Err(error) = share()
    {
        tracing::warn!(%error, "engines get new weights by gRPC");
    }
}

/// Load the trainer of a recipe; ranks are threads.
///
/// # Errors
/// A model file that is missing or damaged.
pub fn load(
    recipe: &Recipe,
    (device, dtype): (&Arc<dyn Device>, DType),
    (model_dir, run_dir): (&Path, &Path),
    masked_ids: &[u32],
) -> Result<LocalTrainer> {
    let placement = &recipe.placement;
    let start = |ranks| {
        let mut trainer = Trainer::load_rank(Arc::clone(device), (model_dir, dtype), masked_ids.to_vec(), ranks)?;
        trainer.save_non_finite_to(run_dir.join("non_finite"));
        Ok(trainer)
    };
    if placement.trainer_ranks == 1 {
        let trainer = start(None)?;
        let (policy, version) = (trainer.policy(), trainer.version());
        let service = Arc::new(LocalTrainerService::new(trainer));
        return Ok(LocalTrainer { holders: vec![service.clone()], service, policy, version });
    }
    let timeout = Duration::from_secs(placement.collective_timeout_seconds);
    let start = |rank: Ranks| start(Some(rank.with_sequence_parallel(placement.sequence_parallel)?));
    let ranks = load_local_ranks(placement.trainer_ranks, sharding(placement), timeout, start)?;
    let (policy, version) = (ranks[0].policy(), ranks[0].version());
    let services: Vec<_> = ranks.into_iter().map(|rank| Arc::new(LocalTrainerService::new(rank))).collect();
    let holders = services.iter().map(|rank| Arc::clone(rank) as Arc<dyn WeightService>).collect();
    let ranks = services.into_iter().map(|rank| rank as Arc<dyn TrainerService>).collect();
    let group = TrainerGroup::new(ranks)?.with_sequence_parallel(placement.sequence_parallel)?;
    Ok(LocalTrainer { service: Arc::new(group), policy, version, holders })
}

/// What the identity of a run says of its ranks: sums over another number of them round differently. (How state is
/// divided over them changes nothing.)
pub fn identity(placement: &Placement) -> String {
    match (placement.trainer_ranks, placement.sequence_parallel) {
        (1, _) => String::new(),
        (ranks, 1) => format!("-ranks{ranks}"),
        (ranks, sequence) => format!("-ranks{ranks}/sequence{sequence}"),
    }
}

/// Check the keys of `placement` that say how the trainer is divided.
///
/// # Errors
/// A number out of range, or a shard size that does not fit, by key.
pub fn check(placement: &Placement, source: &Source) -> Result<(), RecipeError> {
    let ranks = placement.trainer_ranks;
    if !(1..=MAX_RANKS).contains(&ranks) {
        let problem = format!("{ranks} is out of range: expected 1 to {MAX_RANKS}");
        return Err(source.error("placement.trainer_ranks", problem));
    }
    let timeout = placement.collective_timeout_seconds;
    if !(1..=MAX_WAIT_SECONDS).contains(&timeout) {
        let problem = format!("{timeout} is out of range: expected 1 to {MAX_WAIT_SECONDS}");
        return Err(source.error("placement.collective_timeout_seconds", problem));
    }
    let sequence = placement.sequence_parallel;
    if sequence == 0 || !ranks.is_multiple_of(sequence) {
        let problem = format!("{sequence} does not fit: expected a divisor of trainer_ranks = {ranks}");
        return Err(source.error("placement.sequence_parallel", problem));
    }
    check_mirrors(placement, source)?;
    let size = placement.shard_size;
    match placement.sharding {
        ShardingKind::Hybrid if size == 0 || !ranks.is_multiple_of(size) => {
            let problem = format!("{size} does not fit: expected a divisor of trainer_ranks = {ranks}");
            Err(source.error("placement.shard_size", problem))
        }
        ShardingKind::Hybrid => Ok(()),
        _ if size != 0 => {
            Err(source.error("placement.shard_size", "goes with sharding = \"hybrid\" only: expected no such key"))
        }
        _ => Ok(()),
    }
}

/// Check that there is somebody to hold a mirror, and somebody who can be lost alone.
fn check_mirrors(placement: &Placement, source: &Source) -> Result<(), RecipeError> {
    let (ranks, mode) = (placement.trainer_ranks, placement.mode);
    let problem = match (placement.mirror_shards, mode) {
        (true, _) if ranks < 2 => {
            format!("{ranks} trainer rank has nobody to mirror it: expected trainer_ranks = 2 or more")
        }
        (true, PlacementMode::Embedded) => {
            "ranks that are threads are lost together with what they hold: expected mode = \"processes\"".to_owned()
        }
        _ => return Ok(()),
    };
    Err(source.error("placement.mirror_shards", problem))
}

/// Check that the heads of the model can be divided over the ranks that share rows.
///
/// # Errors
/// That they cannot, by key; a model that cannot be read.
pub fn check_heads(recipe: &Recipe, source: &Source) -> Result<(), RecipeError> {
    let size = recipe.placement.sequence_parallel;
    if size == 1 {
        return Ok(());
    }
    let config = recipe.model_config(source)?;
    match sequence_parallel_problem(&config, size) {
        Some(problem) => Err(source.error("placement.sequence_parallel", problem)),
        None => Ok(()),
    }
}

/// Most ranks of a run.
pub const MAX_RANKS: usize = 64;

/// What `temper check` says of the ranks; nothing of a trainer that is alone.
pub fn summary(placement: &Placement) -> Option<String> {
    let what = match placement.sharding {
        ShardingKind::Zero1 => "moments divided over them, masters and gradients whole on each".to_owned(),
        ShardingKind::Zero2 => "gradients and moments divided over them, masters whole on each".to_owned(),
        ShardingKind::Zero3 => "masters, gradients and moments divided over them".to_owned(),
        ShardingKind::Hybrid => {
            format!("masters, gradients and moments divided over groups of {} ranks", placement.shard_size)
        }
    };
    let rows = match placement.sequence_parallel {
        1 => "each with its share of every batch's rows".to_owned(),
        size => format!("groups of {size} sharing the tokens of every micro-batch"),
    };
    let mirrors = if placement.mirror_shards { "; each rank's state mirrored by another one" } else { "" };
    let ranks = placement.trainer_ranks;
    (ranks > 1).then(|| format!("trainer: {ranks} ranks, {rows}; {what}{mirrors}; packed weights once per process"))
}
