//! Which full blocks hold which prefix, and in which order idle ones are given up.
//!
//! Owns: a hash for each cached block, and the idle ones among them (named by no table) from the longest idle to the
//! latest. A block's hash covers every token up to its end, the weights, the vocabulary and the number format, so two
//! blocks with one hash hold the same bits.

use std::collections::HashMap;

/// Name of a full block: a hash over its tokens and everything before them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockHash(pub u128);

const NONE: u32 = u32::MAX;

#[derive(Debug)]
pub(super) struct PrefixCache {
    by_hash: HashMap<BlockHash, u32>,
    hashes: Vec<Option<BlockHash>>,
    /// Neighbours of an idle block; the entry behind the last block is the ring's head.
    links: Vec<(u32, u32)>,
    num_idle: usize,
}

impl PrefixCache {
    pub fn new(num_blocks: usize) -> Self {
        let mut links = vec![(NONE, NONE); num_blocks + 1];
        links[num_blocks] = (num_blocks as u32, num_blocks as u32);
        PrefixCache { by_hash: HashMap::with_capacity(num_blocks), hashes: vec![None; num_blocks], links, num_idle: 0 }
    }

    pub fn num_idle(&self) -> usize {
        self.num_idle
    }

    pub fn is_cached(&self, block: u32) -> bool {
        self.hashes[block as usize].is_some()
    }

    pub fn find(&self, hash: BlockHash) -> Option<u32> {
        self.by_hash.get(&hash).copied()
    }

    /// Name `block`, which no other name has.
    pub fn insert(&mut self, block: u32, hash: BlockHash) {
        assert!(self.by_hash.insert(hash, block).is_none(), "a prefix is cached once");
        assert!(self.hashes[block as usize].replace(hash).is_none(), "a cached block keeps its name");
    }

    /// The cached `block` is named by no table any more.
    pub fn set_idle(&mut self, block: u32) {
        let head = self.head();
        let last = self.links[head as usize].0;
        self.links[block as usize] = (last, head);
        self.links[last as usize].1 = block;
        self.links[head as usize].0 = block;
        self.num_idle += 1;
    }

    /// The idle `block` is named by a table again.
    pub fn set_busy(&mut self, block: u32) {
        let (before, after) = std::mem::replace(&mut self.links[block as usize], (NONE, NONE));
        self.links[before as usize].1 = after;
        self.links[after as usize].0 = before;
        self.num_idle -= 1;
    }

    /// Forget the block that was idle longest; it is free then.
    pub fn evict(&mut self) -> Option<u32> {
        let head = self.head();
        let oldest = self.links[head as usize].1;
        if oldest == head {
            return None;
        }
        self.set_busy(oldest);
        self.forget(oldest);
        Some(oldest)
    }

    /// Forget every prefix but those that `is_kept`; `free` gets the blocks that were idle, the longest idle one first.
    pub fn retain(&mut self, is_kept: impl Fn(BlockHash) -> bool, free: &mut Vec<u32>) {
        let mut at = self.links[self.head() as usize].1;
        while at != self.head() {
            let next = self.links[at as usize].1;
            if !self.hashes[at as usize].is_some_and(&is_kept) {
                self.set_busy(at);
                free.push(at);
            }
            at = next;
        }
        for block in 0..self.head() {
            if self.hashes[block as usize].is_some_and(|hash| !is_kept(hash)) {
                self.forget(block);
            }
        }
    }

    fn forget(&mut self, block: u32) {
        let hash = self.hashes[block as usize].take();
        hash.and_then(|hash| self.by_hash.remove(&hash)).expect("a block is forgotten once");
    }

    fn head(&self) -> u32 {
        self.hashes.len() as u32
    }

    /// Check the invariants against the reference counts; returns the idle blocks.
    #[cfg(test)]
    pub fn check_invariants(&self, ref_counts: &[u32]) -> Vec<u32> {
        let mut idle = Vec::new();
        let mut at = self.links[self.head() as usize].1;
        while at != self.head() {
            assert!(self.is_cached(at) && ref_counts[at as usize] == 0, "idle block {at} is cached and unnamed");
            idle.push(at);
            at = self.links[at as usize].1;
        }
        assert_eq!(idle.len(), self.num_idle);
        let named: Vec<(u32, BlockHash)> =
            (0u32..).zip(&self.hashes).filter_map(|(block, hash)| Some((block, (*hash)?))).collect();
        assert_eq!(named.len(), self.by_hash.len(), "one name a block, one block a name");
        assert!(named.iter().all(|(block, hash)| self.by_hash[hash] == *block));
        idle
    }
}
