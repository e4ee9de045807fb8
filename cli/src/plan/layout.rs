//! Placements that a recipe can say, and where their parts come to lie.

use super::cluster::Place;
use super::{Cluster, Workload};
use crate::recipe::{PlacementMode, ShardingKind};
use crate::trainer_ranks::MAX_RANKS;
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
    /// Tensor-parallel ranks of each of them.
    pub tensor_parallel: usize,
    /// Trainer ranks.
    pub ranks: usize,
    /// Consecutive trainer ranks that share the rows of a micro-batch: a divisor of their number.
    pub sequence_parallel: usize,
    /// What the ranks divide.
    pub sharding: Sharding,
    /// Most tokens of a micro-batch.
    pub max_micro_batch_tokens: usize,
    /// Whether activations are recomputed.
    pub recompute: bool,
    /// Steps that generation is ahead of training.
    pub staleness: usize,
}

/// What of the engines lies on one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EngineShare {
    /// Engines that have a rank here.
    pub engines: usize,
    /// Those of them whose rank 0 is here: it schedules, draws and takes new weights.
    pub leaders: usize,
    /// Their ranks, the leaders among them.
    pub ranks: usize,
}

impl Layout {
    /// What it is but for how models and rows are divided, micro-batches and how stale it may become: rows of one kind
    /// are alternatives of each other.
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

    /// What of the engines lies on every place: they go one after the other over the places that have room for all
    /// ranks of one, which share a host.
    pub fn engines_at(&self, cluster: &Cluster) -> Vec<EngineShare> {
        let mut at = vec![EngineShare::default(); cluster.places.len()];
        let seats = seats(cluster, self.mode, self.tensor_parallel);
        for seat in seats.iter().cycle().take(if seats.is_empty() { 0 } else { self.engines }) {
            at[seat.first].leaders += 1;
            for place in &mut at[seat.first..seat.first + seat.places] {
                place.engines += 1;
                place.ranks += self.tensor_parallel / seat.places;
            }
        }
        at
    }

    /// Groups of trainer ranks that divide the rows of a batch.
    pub fn row_groups(&self) -> usize {
        self.ranks / self.sequence_parallel
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
        let (tensor, sequence) = (self.tensor_parallel, self.sequence_parallel);
        say(now.rollout_tensor_parallel != tensor, format!("placement.rollout_tensor_parallel={tensor}"));
        say(is_embedded && now.reward_workers > 1, "placement.reward_workers=1".to_owned());
        say(!is_embedded && cluster.has_network() && now.spawn_workers, "placement.spawn_workers=false".to_owned());
        say(now.trainer_ranks != self.ranks, format!("placement.trainer_ranks={}", self.ranks));
        let was_hybrid = now.sharding == ShardingKind::Hybrid;
        let (kind, shard_size) = (sharding_name(self.sharding), self.shard_size());
        let differs = kind_of(self.sharding) != now.sharding && (self.ranks > 1 || was_hybrid);
        say(differs, format!("placement.sharding={kind}"));
        say(now.shard_size != shard_size, format!("placement.shard_size={shard_size}"));
        say(now.sequence_parallel != sequence, format!("placement.sequence_parallel={sequence}"));
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

/// Most workers of a kind that share the cores of a host.
const MAX_PER_HOST: usize = 4;
/// Micro-batch limits that are tried besides the recipe's own.
const MICRO_BATCHES: [usize; 5] = [1024, 2048, 4096, 8192, 16384];
/// Largest staleness that is tried.
const MAX_STALENESS: usize = 2;

/// Every placement worth a look, in a fixed order.
pub fn layouts(work: &Workload, cluster: &Cluster) -> Vec<Layout> {
    let mut all = Vec::new();
    for (mode, max_ranks) in modes(cluster) {
        let ranks = counts(max_ranks.min(MAX_RANKS));
        let tensor = work.divisions.tensor_parallel.iter();
        let engines: Vec<(usize, usize)> =
            tensor.flat_map(|t| counts(max_engines(cluster, mode, *t)).into_iter().map(move |e| (e, *t))).collect();
        let staleness = if mode == Mode::Embedded { 0 } else { MAX_STALENESS };
        let numbers = ranks.iter().flat_map(|r| engines.iter().map(move |e| (*e, *r)));
        let kinds = numbers.flat_map(|(e, r)| (0..=staleness).map(move |s| (mode, e, r, s)));
        all.extend(kinds.flat_map(|kind| variants(work, kind)));
    }
    all
}

/// Modes with the most ranks that they have room for.
fn modes(cluster: &Cluster) -> Vec<(Mode, usize)> {
    let room = |places: &[Place]| places.iter().map(|place| processes(cluster, place)).sum();
    let places = &cluster.places;
    let mut modes = vec![(Mode::Embedded, room(&places[..1])), (Mode::Colocated, room(places))];
    for trainer_places in splits(places.len()) {
        modes.push((Mode::Disaggregated { trainer_places }, room(&places[..trainer_places])));
    }
    modes
}

/// Most workers of a kind on a place.
fn processes(cluster: &Cluster, place: &Place) -> usize {
    match place.device {
        Some(_) => 1,
        None => cluster.hosts[place.host].cores.min(MAX_PER_HOST),
    }
}

/// Most engines over `tensor_parallel` ranks each.
fn max_engines(cluster: &Cluster, mode: Mode, tensor_parallel: usize) -> usize {
    let seats = seats(cluster, mode, tensor_parallel);
    if mode == Mode::Embedded {
        return seats.len().min(1);
    }
    // One engine has as many ranks as its host has cores; several share them as whole ones do.
    let engines = |seat: &Seat| (processes(cluster, &cluster.places[seat.first]) / tensor_parallel).max(1);
    seats.iter().map(engines).sum()
}

/// Consecutive places of one host, over which the ranks of an engine are divided evenly.
#[derive(Debug, Clone, Copy)]
struct Seat {
    first: usize,
    places: usize,
}

/// Where an engine over so many ranks fits: the cores of a host that has one for each, or as many devices of a host.
fn seats(cluster: &Cluster, mode: Mode, tensor_parallel: usize) -> Vec<Seat> {
    let all = cluster.places.len();
    let (mut first, end) = match mode {
        Mode::Embedded => (0, 1),
        Mode::Colocated => (0, all),
        Mode::Disaggregated { trainer_places } => (trainer_places, all),
    };
    let mut seats = Vec::new();
    while first < end {
        let place = &cluster.places[first];
        let alike = |other: &&Place| other.host == place.host && place.device.is_some();
        let places = cluster.places[first..end].iter().take_while(alike).take(tensor_parallel).count().max(1);
        let fits = match place.device {
            Some(_) => places == tensor_parallel,
            None => cluster.hosts[place.host].cores >= tensor_parallel,
        };
        if fits {
            seats.push(Seat { first, places });
        }
        first += places;
    }
    seats
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

/// Shardings, groups that share rows, and micro-batches of one kind of placement.
fn variants(
    work: &Workload,
    (mode, (engines, tensor_parallel), ranks, staleness): (Mode, (usize, usize), usize, usize),
) -> Vec<Layout> {
    let mut shardings = vec![Sharding::Zero2];
    if ranks > 1 {
        shardings.extend([Sharding::Zero1, Sharding::Zero3]);
        let sizes = (2..ranks).filter(|size| ranks.is_multiple_of(*size));
        shardings.extend(sizes.map(|shard_size| Sharding::Hybrid { shard_size }));
    }
    let groups = work.divisions.sequence_parallel.iter().copied().filter(|size| ranks.is_multiple_of(*size));
    let groups: Vec<(usize, Vec<usize>)> = groups.map(|size| (size, micro_batches(work, (ranks, size)))).collect();
    let mut all = Vec::new();
    for sharding in shardings {
        for (sequence_parallel, limits) in &groups {
            let sequence_parallel = *sequence_parallel;
            for max_micro_batch_tokens in limits.iter().copied() {
                all.extend([false, true].map(|recompute| Layout {
                    mode,
                    engines,
                    tensor_parallel,
                    ranks,
                    sequence_parallel,
                    sharding,
                    max_micro_batch_tokens,
                    recompute,
                    staleness,
                }));
            }
        }
    }
    all
}

/// Limits of a micro-batch, the recipe's first; of those that all of a rank's rows fit in, the first stands for all.
fn micro_batches(work: &Workload, (ranks, sequence_parallel): (usize, usize)) -> Vec<usize> {
    let most = work.most_tokens(ranks / sequence_parallel).div_ceil(sequence_parallel);
    let others = MICRO_BATCHES.into_iter().filter(|limit| *limit != work.max_micro_batch_tokens);
    let mut is_whole = false;
    let is_new = |limit: &usize| *limit < most || !std::mem::replace(&mut is_whole, true);
    std::iter::once(work.max_micro_batch_tokens).chain(others).filter(is_new).collect()
}
