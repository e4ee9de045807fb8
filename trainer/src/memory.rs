//! What a rank holds and moves, foretold.

use crate::Sharding;
use std::ops::Range;
use temper_actor::{ModelConfig, UnitShapes};
use temper_collective::shard_ranges;

/// Bytes of one model's f32 state on one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Memory {
    /// Masters.
    pub masters: u64,
    /// Gradients, between backwards.
    pub gradients: u64,
    /// Both moments.
    pub moments: u64,
}

impl Memory {
    /// What rank `rank` of `world` holds of a model once it has stepped.
    ///
    /// # Panics
    /// If there is no such rank, or the shard size does not divide the world.
    pub fn predict(shapes: &UnitShapes, sharding: Sharding, (rank, world): (usize, usize)) -> Self {
        let (mut whole, mut shard) = (0, 0);
        for unit in 0..shapes.num_units() {
            let len = shapes.unit_len(unit);
            whole += 4 * len as u64;
            shard += 4 * own(len, sharding, (rank, world)) as u64;
        }
        let pick = |is_sharded| if is_sharded { shard } else { whole };
        Memory {
            masters: pick(sharding.shards_masters()),
            gradients: pick(sharding.shards_gradients()),
            moments: 2 * shard,
        }
    }
}

fn own(len: usize, sharding: Sharding, (rank, world): (usize, usize)) -> usize {
    let num_shards = sharding.num_shards(world);
    shard_ranges(len, num_shards)[rank % num_shards].len()
}

/// Bytes that rank `rank` of `world` sends in one update of the policy by `num_rounds` backwards (those of the rank
/// with the most micro-batches), for what has the size of the model; a tied head reads no masters
/// of the last unit, which then are not gathered.
///
/// Each backward: gradients of every unit, and, where masters are sharded, its masters. Then the new masters, to the
/// ranks that hold them or to the packed weights.
///
/// # Panics
/// As [`Memory::predict`].
pub fn update_bytes_sent(
    shapes: &UnitShapes,
    sharding: Sharding,
    (rank, world): (usize, usize),
    num_rounds: u64,
) -> u64 {
    let num_shards = sharding.num_shards(world);
    let num_copies = world / num_shards;
    let is_last_read = shapes.slots(shapes.num_units() - 1).len() > 1;
    let is_table_read = !is_last_read;
    let (mut per_round, mut after) = (0, 0);
    for unit in 0..shapes.num_units() {
        let len = shapes.unit_len(unit);
        let own = own(len, sharding, (rank, world));
        let gather = (num_shards - 1) * own;
        let scatter = len - own;
        per_round += scatter;
        per_round += match sharding {
            Sharding::Zero1 => gather,
            Sharding::Zero2 | Sharding::Zero3 => 0,
            // Along the chain of copies: to the next one, and from the last one back to all.
            Sharding::Hybrid { .. } if rank / num_shards == num_copies - 1 => (num_copies - 1) * own,
            Sharding::Hybrid { .. } => own,
        };
        let is_read = match unit {
            0 => is_table_read,
            last if last == shapes.num_units() - 1 => is_last_read,
            _ => true,
        };
        if sharding.shards_masters() && is_read {
            per_round += gather;
        }
        after += gather;
    }
    4 * (per_round as u64 * num_rounds + after as u64)
}

/// Passes of the model over one micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passes {
    /// Forwards through all layers, those that recompute activations included.
    pub forwards: u64,
    /// Backwards through all layers.
    pub backwards: u64,
}

/// Bytes that rank `rank` of the `size` that share rows sends to the others of its group while rows turn into heads and
/// heads into rows, over `passes` of one micro-batch of `num_rows` rows.
///
/// A forward turns projections into heads and attention's outputs into rows; a backward the gradients of both. A rank
/// sends `(size - 1) / size` of what it holds of each. Beside that it sends 24 bytes for each of its targets to each
/// other rank (log-prob, entropy, sum of squares), or 8 (a value).
pub fn exchange_bytes_sent(config: &ModelConfig, (rank, size): (usize, usize), num_rows: usize, passes: Passes) -> u64 {
    let own = part(num_rows, rank, size).len();
    let kv = (config.num_key_value_heads / size).max(1) * config.head_dim;
    let heads = config.num_attention_heads / size * config.head_dim;
    let to_heads = |width: usize| own * (size - 1) * width;
    let to_rows = |width: usize| (num_rows - own) * width;
    let forward = to_heads(heads + 2 * kv) + to_rows(heads);
    let backward = to_heads(heads) + to_rows(heads + 2 * kv);
    let per_layer = passes.forwards * forward as u64 + passes.backwards * backward as u64;
    4 * config.num_hidden_layers as u64 * per_layer
}

fn part(num_rows: usize, rank: usize, size: usize) -> Range<usize> {
    num_rows * rank / size..num_rows * (rank + 1) / size
}
