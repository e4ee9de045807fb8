//! The hash that names weights.

use super::params::{ParamStore, Unit};
use std::collections::BTreeMap;
use temper_tensor::Device;
use temper_types::ContentHash;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

/// Bytes of a tensor that one leaf covers.
const LEAF_BYTES: usize = 1 << 20;
const LEAF_ELEMENTS: usize = LEAF_BYTES / size_of::<f32>();

impl ParamStore {
    /// Hash of all tensors: xxh3-128 over every range of 1 MiB of a tensor's little-endian f32 bytes (leaves), over
    /// each tensor's name, shape and leaves, and over all tensors in the order of their names (root). It does not
    /// depend on how tensors lie in units, and whoever holds some ranges can prove them by their leaves.
    pub fn content_hash(&self, dev: &dyn Device) -> ContentHash {
        let mut hasher = WeightHasher::default();
        self.units.iter().for_each(|unit| hasher.add(dev, unit));
        hasher.finish()
    }
}

/// [`ParamStore::content_hash`], unit by unit.
#[derive(Debug, Default)]
pub struct WeightHasher {
    nodes: BTreeMap<String, u128>,
    staging: Staging,
}

impl WeightHasher {
    /// Take in a unit; the order of units does not matter.
    pub fn add(&mut self, dev: &dyn Device, unit: &Unit) {
        for slot in unit.slots() {
            let mut node = Xxh3::new();
            update_sized(&mut node, slot.name.as_bytes());
            update_sized(&mut node, &slot.shape.iter().flat_map(|n| (*n as u64).to_le_bytes()).collect::<Vec<_>>());
            let values = unit.view(&slot.range);
            for start in (0..values.len()).step_by(LEAF_ELEMENTS) {
                let end = values.len().min(start + LEAF_ELEMENTS);
                let leaf = self.staging.hash(dev, values.slice(start..end));
                node.update(&leaf.to_le_bytes());
            }
            self.nodes.insert(slot.name.clone(), node.digest128());
        }
    }

    /// The hash of what was taken in.
    pub fn finish(&self) -> ContentHash {
        let mut root = Xxh3::new();
        self.nodes.values().for_each(|node| root.update(&node.to_le_bytes()));
        ContentHash(root.digest128().to_le_bytes())
    }
}

/// Length and bytes, so that no two lists of fields hash the same.
fn update_sized(hasher: &mut Xxh3, bytes: &[u8]) {
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
}

/// Host memory for one leaf.
#[derive(Debug, Default)]
struct Staging {
    values: Vec<f32>,
    bytes: Vec<u8>,
}

impl Staging {
    fn hash(&mut self, dev: &dyn Device, leaf: temper_tensor::View<'_>) -> u128 {
        self.values.resize(leaf.len(), 0.0);
        dev.read(leaf, &mut self.values);
        self.bytes.clear();
        self.bytes.extend(self.values.iter().flat_map(|x| x.to_le_bytes()));
        xxh3_128(&self.bytes)
    }
}
