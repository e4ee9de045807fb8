//! The hash that names weights.

use super::layout::TensorSlot;
use super::params::{ParamStore, Unit};
use std::collections::BTreeMap;
use std::ops::Range;
use temper_tensor::{Device, Incoming, ValueHasher, View, ViewMut};
use temper_types::ContentHash;
use xxhash_rust::xxh3::Xxh3;

/// Bytes of a tensor that one leaf covers.
const LEAF_BYTES: usize = 1 << 20;
const LEAF_ELEMENTS: usize = LEAF_BYTES / size_of::<f32>();
/// Elements that are read at once: they stay in the nearest cache.
const BLOCK: usize = 2048;
/// Leaves from which on a unit is hashed by several threads.
const MIN_PARALLEL_LEAVES: usize = 8;

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
}

impl WeightHasher {
    /// Take in a unit; the order of units does not matter. Large ones are hashed by as many threads as `dev` has.
    pub fn add(&mut self, dev: &dyn Device, unit: &Unit) {
        let leaves: Vec<Range<usize>> = unit.slots().iter().flat_map(leaves).collect();
        let mut digests = digests(dev, unit, &leaves).into_iter();
        for slot in unit.slots() {
            self.add_slot(slot, digests.by_ref().take(num_leaves(slot)));
        }
    }

    /// Take in a tensor by its leaves.
    pub(super) fn add_slot(&mut self, slot: &TensorSlot, leaves: impl Iterator<Item = u128>) {
        let mut node = Xxh3::new();
        update_sized(&mut node, slot.name.as_bytes());
        update_sized(&mut node, &slot.shape.iter().flat_map(|n| (*n as u64).to_le_bytes()).collect::<Vec<_>>());
        leaves.for_each(|leaf| node.update(&leaf.to_le_bytes()));
        self.nodes.insert(slot.name.clone(), node.digest128());
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

fn num_leaves(slot: &TensorSlot) -> usize {
    slot.range.len().div_ceil(LEAF_ELEMENTS)
}

/// Ranges of a tensor's leaves in its unit, ascending.
pub(super) fn leaves(slot: &TensorSlot) -> impl Iterator<Item = Range<usize>> {
    let whole = slot.range.clone();
    whole.clone().step_by(LEAF_ELEMENTS).map(move |start| start..whole.end.min(start + LEAF_ELEMENTS))
}

/// Hashes of ranges of a unit.
fn digests(dev: &dyn Device, unit: &Unit, leaves: &[Range<usize>]) -> Vec<u128> {
    let one_by_one = |part: &[Range<usize>]| -> Vec<u128> { part.iter().map(|r| digest(dev, unit.view(r))).collect() };
    let num_threads = dev.info().num_threads.clamp(1, leaves.len().max(1));
    if leaves.len() < MIN_PARALLEL_LEAVES || num_threads == 1 {
        return one_by_one(leaves);
    }
    let parts = leaves.chunks(leaves.len().div_ceil(num_threads));
    std::thread::scope(|scope| {
        let threads: Vec<_> = parts.map(|part| scope.spawn(move || one_by_one(part))).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("hashing does not panic")).collect()
    })
}

/// Hash of one leaf.
pub(super) fn digest(dev: &dyn Device, leaf: View<'_>) -> u128 {
    let (mut hasher, mut values) = (LeafHasher::new(leaf.len()), [0.0; BLOCK]);
    for start in (0..leaf.len()).step_by(BLOCK) {
        let end = leaf.len().min(start + BLOCK);
        let values = &mut values[..end - start];
        dev.read(leaf.slice(start..end), values);
        hasher.update(values);
    }
    hasher.finish()
}

/// Hashes the values of one leaf as they come: xxh3-128 of their little-endian bytes.
pub(super) enum LeafHasher {
    /// So few bytes that they are hashed otherwise.
    Short(Box<Xxh3>),
    Long(Box<ValueHasher>),
}

impl LeafHasher {
    /// Of a leaf of `len` values.
    pub(super) fn new(len: usize) -> Self {
        match len {
            0..ValueHasher::MIN_VALUES => LeafHasher::Short(Box::new(Xxh3::new())),
            len => LeafHasher::Long(Box::new(ValueHasher::new(len))),
        }
    }

    pub(super) fn update(&mut self, values: &[f32]) {
        match self {
            LeafHasher::Short(hasher) => values.iter().for_each(|value| hasher.update(&value.to_le_bytes())),
            LeafHasher::Long(hasher) => hasher.update(values),
        }
    }

    /// The next values, copied to `to`: what is hashed is what is kept.
    pub(super) fn receive(&mut self, dev: &dyn Device, from: Incoming<'_>, mut to: ViewMut<'_>) {
        match self {
            LeafHasher::Short(_) => {
                let mut values = vec![0.0; to.len()];
                dev.receive(from, to.reborrow(), None);
                dev.read(to.as_view(), &mut values);
                self.update(&values);
            }
            LeafHasher::Long(hasher) => dev.receive(from, to, Some(hasher)),
        }
    }

    pub(super) fn finish(&self) -> u128 {
        match self {
            LeafHasher::Short(hasher) => hasher.digest128(),
            LeafHasher::Long(hasher) => hasher.finish(),
        }
    }
}
