//! Placements that a recipe can say, and where their parts come to lie.

use super::{Cluster, Workload};
use crate::recipe::{PlacementMode, ShardingKind};
use temper_trainer::Sharding;

/// How the parts are joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// Everything in one process.
    Embedded,
    /// A process for each worker, engines and trainers on the same places.
    Colocated,
    /// A process for each worker, trainers on the first places and engines on the others.
    Disaggregated {
        /// Places of the trainers.
        trainer_places: usize,
    },
}

impl Mode {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Embedded => "embedded",
            Mode::Colocated => "colocated",
            Mode::Disaggregated { .. } => "disaggregated",
        }
    }
}

/// One placement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// How the parts are joined.
    pub mode: Mode,
    /// Rollout workers.
    pub engines: usize,
    /// Trainer ranks.
    pub ranks: usize,
    /// What the ranks divide.
    pub sharding: Sharding,
    /// Most tokens of a micro-batch.
    pub max_micro_batch_tokens: usize,
    /// Whether activations are recomputed.
    pub recompute: bool,
    /// Steps that generation is ahead of training.
    pub staleness: usize,
}

impl Layout {
    /// What it is but for sharding, micro-batches and how stale it may become: rows of one kind are alternatives of
    /// each other.
    pub fn kind(&self) -> (Mode, usize, usize, bool) {
        (self.mode, self.engines, self.ranks, self.staleness > 0)
    }

    /// Trainer ranks on every place.
    pub fn ranks_at(&self, cluster: &Cluster) -> Vec<usize> {
        let all = cluster.places.len();
        let (first, len) = match self.mode {
            Mode::Embedded => (0, 1),
            Mode::Colocated => (0, all),
            Mode::Disaggregated { trainer_places } => (0, trainer_places),
        };
        deal(self.ranks, all, (first, len))
    }

    /// Engines on every place.
    pub fn engines_at(&self, cluster: &Cluster) -> Vec<usize> {
        let all = cluster.places.len();
        let (first, len) = match self.mode {
            Mode::Embedded => (0, 1),
            Mode::Colocated => (0, all),
            Mode::Disaggregated { trainer_places } => (trainer_places, all - trainer_places),
        };
        deal(self.engines, all, (first, len))
    }

    /// `--set` assignments that select it, where the recipe says something else.
    pub fn assignments(&self, work: &Workload, cluster: &Cluster) -> Vec<String> {
        let now = &work.placement;
        let is_embedded = self.mode == Mode::Embedded;
        let mut set = Vec::new();
        let mut say = |differs: bool, assignment: String| {
            if differs {
                set.push(assignment);
            }
        };
        let mode = if is_embedded { "embedded" } else { "processes" };
        say((now.mode == PlacementMode::Embedded) != is_embedded, format!("placement.mode={mode}"));
        say(now.rollout_workers != self.engines, format!("placement.rollout_workers={}", self.engines));
        say(is_embedded && now.reward_workers > 1, "placement.reward_workers=1".to_owned());
        say(!is_embedded && cluster.has_network() && now.spawn_workers, "placement.spawn_workers=false".to_owned());
        say(now.trainer_ranks != self.ranks, format!("placement.trainer_ranks={}", self.ranks));
        let was_hybrid = now.sharding == ShardingKind::Hybrid;
        let (kind, shard_size) = (sharding_name(self.sharding), self.shard_size());
        let differs = kind_of(self.sharding) != now.sharding && (self.ranks > 1 || was_hybrid);
        say(differs, format!("placement.sharding={kind}"));
        say(now.shard_size != shard_size, format!("placement.shard_size={shard_size}"));
        say(now.sequence_parallel != 1, "placement.sequence_parallel=1".to_owned());
        say(now.mirror_shards && !self.mirrors(work), "placement.mirror_shards=false".to_owned());
        say(self.staleness != work.staleness, format!("placement.staleness={}", self.staleness));
        let (limit, stage) = (self.max_micro_batch_tokens, &work.stage);
        let key = format!("stage.{stage}.memory");
        say(limit != work.max_micro_batch_tokens, format!("{key}.max_micro_batch_tokens={limit}"));
        say(self.recompute != work.recompute, format!("{key}.recompute_activations={}", self.recompute));
        set
    }

    /// Whether its ranks keep each other's state, as the recipe asks: where they can be lost one by one.
    pub fn mirrors(&self, work: &Workload) -> bool {
        work.placement.mirror_shards && self.mode != Mode::Embedded && self.ranks > 1
    }

    fn shard_size(&self) -> usize {
        if let Sharding::Hybrid { shard_size } = self.sharding { shard_size } else { 0 }
    }
}

fn kind_of(sharding: Sharding) -> ShardingKind {
    match sharding {
        Sharding::Zero1 => ShardingKind::Zero1,
        Sharding::Zero2 => ShardingKind::Zero2,
        Sharding::Zero3 => ShardingKind::Zero3,
        Sharding::Hybrid { .. } => ShardingKind::Hybrid,
    }
}

/// Its value in a recipe.
pub fn sharding_name(sharding: Sharding) -> &'static str {
    match sharding {
        Sharding::Zero1 => "zero1",
        Sharding::Zero2 => "zero2",
        Sharding::Zero3 => "zero3",
        Sharding::Hybrid { .. } => "hybrid",
    }
}

/// `count` things one after the other over the places `first..first + len` of `all`.
fn deal(count: usize, all: usize, (first, len): (usize, usize)) -> Vec<usize> {
    let mut at = vec![0; all];
    for index in 0..count {
        at[first + index % len] += 1;
    }
    at
}

/// Most ranks that a recipe takes.
const MAX_RANKS: usize = 64;
/// Most workers of a kind that share the cores of a host.
const MAX_PER_HOST: usize = 4;
/// Micro-batch limits that are tried besides the recipe's own.
const MICRO_BATCHES: [usize; 5] = [1024, 2048, 4096, 8192, 16384];
/// Largest staleness that is tried.
const MAX_STALENESS: usize = 2;

/// Every placement worth a look, in a fixed order.
pub fn layouts(work: &Workload, cluster: &Cluster) -> Vec<Layout> {
    let mut all = Vec::new();
    for (mode, max_engines, max_ranks) in modes(cluster) {
        let engines = counts(max_engines);
        let ranks = counts(max_ranks.min(MAX_RANKS));
        let staleness = if mode == Mode::Embedded { 0 } else { MAX_STALENESS };
        let numbers = ranks.iter().flat_map(|r| engines.iter().map(move |e| (*e, *r)));
        let kinds = numbers.flat_map(|(e, r)| (0..=staleness).map(move |s| (mode, e, r, s)));
        all.extend(kinds.flat_map(|kind| variants(work, kind)));
    }
    all
}

/// Modes with the most engines and ranks that they have room for.
fn modes(cluster: &Cluster) -> Vec<(Mode, usize, usize)> {
    let room = |places: &[super::cluster::Place]| -> usize {
        let at = |place: &super::cluster::Place| match place.device {
            Some(_) => 1,
            None => cluster.hosts[place.host].cores.min(MAX_PER_HOST),
        };
        places.iter().map(at).sum()
    };
    let places = &cluster.places;
    let mut modes = vec![(Mode::Embedded, 1, room(&places[..1])), (Mode::Colocated, room(places), room(places))];
    for trainer_places in splits(places.len()) {
        let (trainers, engines) = places.split_at(trainer_places);
        modes.push((Mode::Disaggregated { trainer_places }, room(engines), room(trainers)));
    }
    modes
}

/// Numbers of places for the trainers: all where there are few, else about as many as powers of two and their
/// complements.
fn splits(places: usize) -> Vec<usize> {
    let mut splits: Vec<usize> = (1..places)
        .filter(|n| places <= 16 || n.is_power_of_two() || (places - n).is_power_of_two() || 2 * n == places)
        .collect();
    splits.dedup();
    splits
}

/// 1, 2, 3, 4, then powers of two, and the largest.
fn counts(max: usize) -> Vec<usize> {
    (1..=max).filter(|n| *n <= 4 || n.is_power_of_two() || *n == max).collect()
}

/// Shardings and micro-batches of one kind of placement.
fn variants(work: &Workload, (mode, engines, ranks, staleness): (Mode, usize, usize, usize)) -> Vec<Layout> {
    let mut shardings = vec![Sharding::Zero2];
    if ranks > 1 {
        shardings.extend([Sharding::Zero1, Sharding::Zero3]);
        let sizes = (2..ranks).filter(|size| ranks.is_multiple_of(*size));
        shardings.extend(sizes.map(|shard_size| Sharding::Hybrid { shard_size }));
    }
    let mut limits = vec![work.max_micro_batch_tokens];
    limits.extend(MICRO_BATCHES.into_iter().filter(|limit| *limit != work.max_micro_batch_tokens));
    let mut all = Vec::new();
    for sharding in shardings {
        for max_micro_batch_tokens in &limits {
            for recompute in [false, true] {
                let max_micro_batch_tokens = *max_micro_batch_tokens;
                all.push(Layout { mode, engines, ranks, sharding, max_micro_batch_tokens, recompute, staleness });
            }
        }
    }
    all
}
