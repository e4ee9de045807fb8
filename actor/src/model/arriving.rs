//! The hash of weights that arrive in pieces, computed as each number is copied to its place.
//!
//! Owns: which part of every leaf has arrived, and its hash so far. What comes in the order of its leaf is hashed once,
//! as it comes; a leaf that comes otherwise, as where two senders' parts of it meet, is hashed from the store at the
//! end. Either way the result is [`ParamStore::content_hash`] of what was written.

use super::hash::{LeafHasher, WeightHasher, digest, leaves};
use super::params::ParamStore;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use temper_tensor::{Device, Incoming, ViewMut};
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

    /// Write what comes in to `to`, unit `unit` from element `start` on, and hash it. Padding between tensors is part
    /// of no hash.
    ///
    /// # Panics
    /// If there is no such unit, or `to` has another length.
    pub fn receive(&self, dev: &dyn Device, (unit, start): (usize, usize), from: Incoming<'_>, to: ViewMut<'_>) {
        let (leaves, end) = (&self.units[unit], start + from.len());
        let first = leaves.partition_point(|leaf| leaf.range.end <= start);
        let (mut at, mut from, mut to) = (start, from, to);
        for leaf in leaves[first..].iter().take_while(|leaf| leaf.range.start < end) {
            let (begin, stop) = (leaf.range.start.max(start), leaf.range.end.min(end));
            let ((padding, values), (room, rest)) = (from.split_at(begin - at), to.split_at(begin - at));
            dev.receive(padding, room, None);
            let ((values, later), (room, rest)) = (values.split_at(stop - begin), rest.split_at(stop - begin));
            leaf.receive(dev, begin - leaf.range.start, values, room);
            (at, from, to) = (stop, later, rest);
        }
        dev.receive(from, to, None);
    }

    /// The hash of `store`, into which everything was written.
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
    fn receive(&self, dev: &dyn Device, at: usize, from: Incoming<'_>, to: ViewMut<'_>) {
        let mut arrived = self.arrived.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut hasher, taken) = match std::mem::replace(&mut *arrived, Arrived::Mixed) {
            Arrived::Nothing if at == 0 => (LeafHasher::new(self.range.len()), 0),
            Arrived::Part(hasher, taken) if at == taken => (hasher, taken),
            _ => return dev.receive(from, to, None),
        };
        let taken = taken + from.len();
        hasher.receive(dev, from, to);
        *arrived =
            if taken == self.range.len() { Arrived::Whole(hasher.finish()) } else { Arrived::Part(hasher, taken) };
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
