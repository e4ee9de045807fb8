//! Bytes that the processes of a placement hold. Masters, gradients and moments are those of
//! [`temper_trainer::Memory`]; the rest follows the buffers that trainer and engine allocate.

use super::layout::{Layout, Mode};
use super::{Calibration, Cluster, Workload};
use temper_trainer::Memory;

const F32: u64 = 4;

/// Bytes of one placement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryNeed {
    /// Masters, gradients and moments of the policy on rank 0, which has the most.
    pub rank: Memory,
    /// All that a trainer process of one rank has, models besides the policy, packed weights and activations included.
    pub trainer: u64,
    /// All that an engine has that is a process of its own; its cache alone where it shares the trainer's.
    pub engine: u64,
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
        let engine = kv_bytes(work) + workspace_bytes(work, work.engine.max_batch_tokens as u64);
        // Packed and as f32 units, into which new weights arrive.
        let own = engine + shared + whole_bytes(work) + cal.process_bytes;
        let at = |(ranks, engines): (&usize, &usize)| {
            let (ranks, engines) = (*ranks as u64, *engines as u64);
            match (is_embedded, ranks + engines) {
                (_, 0) => 0,
                (true, _) => ranks * trainer + packed_sets(work) * shared + engines * engine + cal.process_bytes,
                (false, _) => ranks * (trainer + packed_sets(work) * shared + cal.process_bytes) + engines * own,
            }
        };
        let places = ranks.iter().zip(&engines).map(at).collect();
        let trainer = trainer + packed_sets(work) * shared + cal.process_bytes;
        MemoryNeed { rank, trainer, engine: if is_embedded { engine } else { own }, places }
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
    own + reference + critic + gathered + mirror_bytes(work, layout, rank) + activation_bytes(work, layout)
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

/// Matrices in the compute format, and the embedding table once more in f32.
fn packed_bytes(work: &Workload) -> u64 {
    let matrices = (work.model.layer_weights() + work.model.head_weights()) as u64;
    matrices * work.dtype.size_bytes() as u64 + F32 * work.model.head_weights() as u64
}

/// The pool of keys and values, as the engine's limits resolve it.
pub fn kv_bytes(work: &Workload) -> u64 {
    let (engine, model) = (&work.engine, &work.model);
    let row = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * work.dtype.size_bytes();
    let block = (row * engine.block_size) as u64;
    let useful = (engine.max_num_seqs * work.max_positions.div_ceil(engine.block_size)) as u64;
    let blocks = match engine.num_blocks {
        0 => (engine.kv_cache_bytes / block.max(1)).min(useful),
        fixed => fixed as u64,
    };
    blocks * block
}

/// Sequences of the expected length that run at once in one engine.
pub fn concurrency(work: &Workload, samples: usize) -> usize {
    let model = &work.model;
    let row = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * work.dtype.size_bytes();
    let block = (row * work.engine.block_size) as u64;
    let tokens = work.expected.prompt_tokens / work.samples as f64 + work.expected.response_tokens;
    let blocks = (tokens / work.engine.block_size as f64).ceil().max(1.0) as u64;
    let fit = kv_bytes(work) / (block * blocks).max(1);
    samples.min(work.engine.max_num_seqs).min(usize::try_from(fit).unwrap_or(usize::MAX)).max(1)
}

/// Buffers of the layer that runs.
fn workspace_bytes(work: &Workload, rows: u64) -> u64 {
    let m = &work.model;
    let qkv = (m.num_attention_heads + 2 * m.num_key_value_heads) * m.head_dim;
    let attn = m.num_attention_heads * m.head_dim;
    F32 * rows * (4 * m.hidden_size + 2 * qkv + attn + 3 * m.intermediate_size) as u64
}

/// What a micro-batch keeps for its backward, its keys and values, and the gradients on their way back.
fn activation_bytes(work: &Workload, layout: &Layout) -> u64 {
    let m = &work.model;
    let groups = work.prompts.div_ceil(work.mini_batches).div_ceil(layout.ranks);
    let own = groups * (longest(work) + (work.trained_samples - 1) * work.max_response_tokens);
    let rows = layout.max_micro_batch_tokens.max(longest(work)).min(own) as u64;
    let (d, layers) = (m.hidden_size, m.num_hidden_layers);
    let qkv = (m.num_attention_heads + 2 * m.num_key_value_heads) * m.head_dim;
    let attn = m.num_attention_heads * m.head_dim;
    let saved = 2 + qkv + attn + m.num_attention_heads + d + 2 * m.intermediate_size;
    let num_saved = if layout.recompute { 1 } else { layers };
    let grads = 2 * d + attn + qkv + 3 * m.intermediate_size;
    let targets = 4 * d;
    let kv = 2 * layers * m.num_key_value_heads * m.head_dim * work.dtype.size_bytes();
    let floats = layers * d + num_saved * saved + grads + targets;
    workspace_bytes(work, rows) + rows * (F32 * floats as u64 + kv as u64)
}

/// Tokens of the longest sequence: one that exceeds the limit goes alone.
fn longest(work: &Workload) -> usize {
    (work.expected.prompt_tokens.ceil() as usize + work.max_response_tokens).min(work.max_positions)
}
