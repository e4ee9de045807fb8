//! The hash of weights that arrive in pieces, computed while each piece is in a near cache.
//!
//! Owns: which part of every leaf has arrived, and its hash so far. What comes in the order of its leaf is hashed once,
//! as it comes; a leaf that comes otherwise, as where two senders' parts of it meet, is hashed from the store at the
//! end. Either way the result is [`ParamStore::content_hash`] of what was written.

use super::hash::{LeafHasher, WeightHasher, digest, leaves};
use super::params::ParamStore;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use temper_tensor::Device;
use temper_types::ContentHash;

/// Hashes weights as they arrive, from several threads.
pub struct ArrivingHash {
    /// Leaves of every unit, ascending.
    units: Vec<Vec<Leaf>>,
}

struct Leaf {
    range: Range<usize>,
    arrived: Mutex<Arrived>,
}

enum Arrived {
    Nothing,
    /// The first so many elements, in order.
    Part(LeafHasher, usize),
    Whole(u128),
    /// Not in order, or twice.
    Mixed,
}

impl ArrivingHash {
    /// Nothing of the weights of `store` has arrived.
    pub fn new(store: &ParamStore) -> Self {
        let leaf = |range| Leaf { range, arrived: Mutex::new(Arrived::Nothing) };
        let unit = |unit: &super::params::Unit| unit.slots().iter().flat_map(leaves).map(leaf).collect();
        ArrivingHash { units: store.units().iter().map(unit).collect() }
    }

    /// `values` were written to unit `unit` from element `start` on. Padding between tensors is part of no hash.
    ///
    /// # Panics
    /// If there is no such unit.
    pub fn add(&self, unit: usize, start: usize, values: &[f32]) {
        let (leaves, end) = (&self.units[unit], start + values.len());
        let first = leaves.partition_point(|leaf| leaf.range.end <= start);
        for leaf in leaves[first..].iter().take_while(|leaf| leaf.range.start < end) {
            let from = leaf.range.start.max(start);
            leaf.add(from - leaf.range.start, &values[from - start..leaf.range.end.min(end) - start]);
        }
    }

    /// The hash of `store`, into which everything was written that was added.
    pub fn finish(&self, dev: &dyn Device, store: &ParamStore) -> ContentHash {
        let mut hasher = WeightHasher::default();
        for (unit, leaves) in store.units().iter().zip(&self.units) {
            let mut leaves = leaves.iter();
            for slot in unit.slots() {
                let own = super::hash::leaves(slot).zip(leaves.by_ref());
                hasher.add_slot(
                    slot,
                    own.map(|(range, leaf)| leaf.whole().unwrap_or_else(|| digest(dev, unit.view(&range)))),
                );
            }
        }
        hasher.finish()
    }
}

impl Leaf {
    /// Elements from `at` on.
    fn add(&self, at: usize, values: &[f32]) {
        let mut arrived = self.arrived.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut hasher, len) = match std::mem::replace(&mut *arrived, Arrived::Mixed) {
            Arrived::Nothing => (LeafHasher::new(self.range.len()), 0),
            Arrived::Part(hasher, len) => (hasher, len),
            Arrived::Whole(_) | Arrived::Mixed => return,
        };
        if at != len {
            return;
        }
        hasher.update(values);
        let len = len + values.len();
        *arrived = if len == self.range.len() { Arrived::Whole(hasher.finish()) } else { Arrived::Part(hasher, len) };
    }

    fn whole(&self) -> Option<u128> {
        match *self.arrived.lock().unwrap_or_else(PoisonError::into_inner) {
            Arrived::Whole(digest) => Some(digest),
            _ => None,
        }
    }
}

impl std::fmt::Debug for ArrivingHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ArrivingHash").field("num_units", &self.units.len()).finish_non_exhaustive()
    }
}
