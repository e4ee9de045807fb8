//! Bytes that the processes of a placement hold. Masters, gradients and moments are those of
//! [`temper_trainer::Memory`]; the rest follows the buffers that trainer and engine allocate.

use super::layout::{EngineShare, Layout, Mode};
use super::{Calibration, Cluster, Workload};
use temper_rollout::WeightTransport;
use temper_trainer::Memory;

const F32: u64 = 4;

/// Bytes of one placement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryNeed {
    /// Masters, gradients and moments of the policy on rank 0, which has the most.
    pub rank: Memory,
    /// All that a trainer process of one rank has, models besides the policy, packed weights and activations included.
    pub trainer: u64,
    /// All that an engine's rank 0 has that is a process of its own; what it adds where it is in the trainer's process.
    pub engine: u64,
    /// The same of each of its other ranks; 0 where there are none.
    pub follower: u64,
    /// Bytes on every place, in the cluster's order. Places of one host's cores share its memory.
    pub places: Vec<u64>,
}

impl MemoryNeed {
    /// Those of a layout.
    pub fn new(work: &Workload, cal: &Calibration, cluster: &Cluster, layout: &Layout) -> Self {
        let shared = packed_bytes(work);
        let rank = Memory::predict(&work.shapes, layout.sharding, (0, layout.ranks));
        let trainer = trainer_bytes(work, layout, rank);
        let (ranks, engines) = (layout.ranks_at(cluster), layout.engines_at(cluster));
        let is_embedded = layout.mode == Mode::Embedded;
        let process = if is_embedded { 0 } else { cal.process_bytes };
        let (engine, follower) = engine_bytes(work, layout);
        let (engine, follower) = (engine + process, if layout.tensor_parallel > 1 { follower + process } else { 0 });
        let models = packed_sets(work) * shared;
        let at = |(ranks, share): (&usize, &EngineShare)| {
            let (ranks, leaders, followers) = (*ranks as u64, share.leaders as u64, share.ranks - share.leaders);
            let engines = leaders * engine + followers as u64 * follower;
            match (is_embedded, ranks + engines) {
                (_, 0) => 0,
                (true, _) => ranks * trainer + models + engines + cal.process_bytes,
                (false, _) => ranks * (trainer + models + process) + engines,
            }
        };
        let places = ranks.iter().zip(&engines).map(at).collect();
        MemoryNeed { rank, trainer: trainer + models + cal.process_bytes, engine, follower, places }
    }

    /// The first host or device that it does not fit: its name, what it would need and what it has.
    pub fn misfit(&self, cluster: &Cluster) -> Option<(String, u64, u64)> {
        let mut hosts = vec![0; cluster.hosts.len()];
        for (place, need) in cluster.places.iter().zip(&self.places) {
            match &place.device {
                None => hosts[place.host] += need,
                Some(device) if *need > device.memory_bytes => {
                    let name = format!("{} of {}", device.name, cluster.hosts[place.host].name);
                    return Some((name, *need, device.memory_bytes));
                }
                Some(_) => {}
            }
        }
        let full = cluster.hosts.iter().zip(hosts).find(|(host, need)| *need > host.memory_bytes);
        full.map(|(host, need)| (host.name.clone(), need, host.memory_bytes))
    }

    /// Bytes of the place that has the most.
    pub fn largest(&self) -> u64 {
        self.places.iter().copied().max().unwrap_or(0)
    }
}

/// State of every model on one rank, its activations, and what a backward gathers.
fn trainer_bytes(work: &Workload, layout: &Layout, rank: Memory) -> u64 {
    let own = rank.masters + rank.gradients + rank.moments;
    let reference = if work.has_reference { rank.masters } else { 0 };
    let critic = if work.has_critic { own } else { 0 };
    let units = 0..work.shapes.num_units();
    let largest = units.map(|unit| F32 * work.shapes.unit_len(unit) as u64).max().unwrap_or(0);
    // The gradient of the unit at work beside that of the table, and masters of both under zero3 and hybrid.
    let gathered = if layout.ranks > 1 { 4 * largest } else { 0 };
    let kept = mirror_bytes(work, layout, rank) + published_bytes(work, layout, rank);
    own + reference + critic + gathered + kept + activation_bytes(work, layout)
}

/// The last two versions of a rank's masters, where engines in other processes are sent changes alone.
fn published_bytes(work: &Workload, layout: &Layout, rank: Memory) -> u64 {
    let sends_changes = work.placement.weight_transport == WeightTransport::Delta && layout.mode != Mode::Embedded;
    if sends_changes { 2 * rank.masters } else { 0 }
}

/// Copies of a rank's state, its own and another rank's, of two steps while they are sent. A reference is there once in
/// both; replicas keep their own copies alone.
fn mirror_bytes(work: &Workload, layout: &Layout, rank: Memory) -> u64 {
    if !layout.mirrors(work) {
        return 0;
    }
    let masters = rank.moments / 2;
    let models = 1 + u64::from(work.has_critic);
    let reference = if work.has_reference { masters } else { 0 };
    let of_one = 2 * models * (masters + rank.moments) + reference;
    if layout.ranks > layout.sharding.num_shards(layout.ranks) { of_one } else { 2 * of_one }
}

/// Packed weights of a trainer's process: policy, reference, critic.
fn packed_sets(work: &Workload) -> u64 {
    1 + u64::from(work.has_reference) + u64::from(work.has_critic)
}

/// All parameters in f32.
fn whole_bytes(work: &Workload) -> u64 {
    (0..work.shapes.num_units()).map(|unit| F32 * work.shapes.unit_len(unit) as u64).sum()
}

/// What rank 0 of an engine has, and each of its other ranks: a cache and buffers, and, unless it is whole and in the
/// trainer's process, weights of its own. Rank 0 has the LM head beside its part of the layers, and everything as f32
/// units, into which new weights arrive.
fn engine_bytes(work: &Workload, layout: &Layout) -> (u64, u64) {
    let num_ranks = layout.tensor_parallel as u64;
    let (kv, rows) = (kv_bytes(work, layout.tensor_parallel), work.engine.max_batch_tokens as u64);
    let buffers = kv + workspace_bytes(work, rows, num_ranks);
    if layout.mode == Mode::Embedded && num_ranks == 1 {
        return (buffers, 0);
    }
    // Of rows' sums: everybody's, and a copy for the exchange.
    let sums = if num_ranks > 1 { (num_ranks + 1) * F32 * rows * work.model.hidden_size as u64 } else { 0 };
    let size = work.dtype.size_bytes() as u64;
    let (head, layers) = (work.model.head_weights() as u64, work.model.layer_weights() as u64);
    let own = buffers + sums + layers * size / num_ranks + F32 * head;
    (own + head * size + whole_bytes(work), own)
}

/// Matrices in the compute format, and the embedding table once more in f32.
fn packed_bytes(work: &Workload) -> u64 {
    let matrices = (work.model.layer_weights() + work.model.head_weights()) as u64;
    matrices * work.dtype.size_bytes() as u64 + F32 * work.model.head_weights() as u64
}

/// Bytes of a block of keys and values on one of `num_ranks` tensor-parallel ranks, which divide the heads.
fn block_bytes(work: &Workload, num_ranks: usize) -> u64 {
    let model = &work.model;
    let row = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * work.dtype.size_bytes();
    (row * work.engine.block_size / num_ranks) as u64
}

/// The pool of keys and values of a rank, as the engine's limits resolve it.
pub fn kv_bytes(work: &Workload, num_ranks: usize) -> u64 {
    let (engine, block) = (&work.engine, block_bytes(work, num_ranks));
    let useful = (engine.max_num_seqs * work.max_positions().div_ceil(engine.block_size)) as u64;
    let blocks = match engine.num_blocks {
        0 => (engine.kv_cache_bytes / block.max(1)).min(useful),
        fixed => fixed as u64,
    };
    blocks * block
}

/// Sequences of the expected length that run at once in one engine over `num_ranks` ranks.
pub fn concurrency(work: &Workload, num_ranks: usize, samples: usize) -> usize {
    let tokens = work.expected.prompt_tokens / work.samples as f64 + work.expected.response_tokens;
    let blocks = (tokens / work.engine.block_size as f64).ceil().max(1.0) as u64;
    let fit = kv_bytes(work, num_ranks) / (block_bytes(work, num_ranks) * blocks).max(1);
    samples.min(work.engine.max_num_seqs).min(usize::try_from(fit).unwrap_or(usize::MAX)).max(1)
}

/// Buffers of the layer that runs, of which each of `num_ranks` ranks has a part.
fn workspace_bytes(work: &Workload, rows: u64, num_ranks: u64) -> u64 {
    let m = &work.model;
    let qkv = (m.num_attention_heads + 2 * m.num_key_value_heads) * m.head_dim;
    let attn = m.num_attention_heads * m.head_dim;
    F32 * rows * (4 * m.hidden_size as u64 + (2 * qkv + attn + 3 * m.intermediate_size) as u64 / num_ranks)
}

/// What a rank's rows of a micro-batch keep for their backward, its keys and values, and the gradients on their way
/// back. Where ranks share rows, what attention reads and gives is there by rows and by heads, but for projections that
/// no head norm reads again.
pub fn activation_bytes(work: &Workload, layout: &Layout) -> u64 {
    let (m, size) = (&work.model, layout.sequence_parallel);
    let limit = layout.max_micro_batch_tokens.saturating_mul(size).max(work.longest());
    let rows = limit.min(work.most_tokens(layout.row_groups())).div_ceil(size) as u64;
    let (d, layers) = (m.hidden_size, m.num_hidden_layers);
    let attn = m.num_attention_heads * m.head_dim;
    let qkv = attn + 2 * m.num_key_value_heads * m.head_dim;
    // Neighbours that share a key/value head have it each.
    let kv_heads = m.num_key_value_heads.max(size);
    let turned = if size > 1 { 2 * attn + 2 * kv_heads * m.head_dim } else { 0 };
    let by_rows = if size == 1 || work.config.qk_norm { qkv } else { 0 };
    let saved = 2 + by_rows + attn + turned + m.num_attention_heads + d + 2 * m.intermediate_size;
    let num_saved = if layout.recompute { 1 } else { layers };
    let grads = 2 * d + attn + qkv + turned + 3 * m.intermediate_size;
    let targets = 4 * d;
    let kv = 2 * layers * kv_heads * m.head_dim * work.dtype.size_bytes();
    let floats = layers * d + num_saved * saved + grads + turned + targets;
    workspace_bytes(work, rows, 1) + rows * (F32 * floats as u64 + kv as u64)
}
