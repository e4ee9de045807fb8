//! The paged key/value cache and the rotation table.

use crate::cpu::{CpuKvPool, CpuRopeTable};
use temper_types::DType;

/// Shape of a paged cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvCacheSpec {
    /// Layers of the model.
    pub num_layers: usize,
    /// Blocks in the pool.
    pub num_blocks: usize,
    /// Slots in a block; a multiple of 16.
    pub block_size: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Format of the stored keys and values.
    pub dtype: DType,
}

impl KvCacheSpec {
    /// Bytes of one block over all layers, keys and values.
    pub const fn block_bytes(&self) -> usize {
        2 * self.num_layers * self.block_size * self.num_kv_heads * self.head_dim * self.dtype.size_bytes()
    }
}

/// A pool of K/V blocks for all layers. It does not know which block belongs to whom.
pub struct KvCache {
    pub(crate) spec: KvCacheSpec,
    pub(crate) pool: CpuKvPool,
}

impl KvCache {
    /// Shape of the cache.
    pub fn spec(&self) -> &KvCacheSpec {
        &self.spec
    }
}

impl std::fmt::Debug for KvCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvCache").field("spec", &self.spec).finish()
    }
}

/// Cosines and sines of every (position, frequency) pair, made once per model.
pub struct RopeTable {
    pub(crate) table: CpuRopeTable,
}

impl RopeTable {
    /// Number of positions covered.
    pub fn num_positions(&self) -> usize {
        self.table.num_positions()
    }
}

impl std::fmt::Debug for RopeTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RopeTable({} positions)", self.num_positions())
    }
}
