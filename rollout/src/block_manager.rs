//! Paged K/V blocks with reference counts, and the prefixes that full ones hold.
//!
//! Owns: which blocks of the pool are free, how many tables name each used one, and which prefix a full block holds.
//! Knows nothing of sequences, tokens or devices: a copy that a write needs is returned to the caller, who runs it.
//!
//! # Invariants
//! - The reference count of a block equals the number of times it occurs in live tables.
//! - Free and used blocks partition the pool: a block is free exactly when its count is 0. A free block may still hold
//!   a cached prefix; it is taken last, the longest idle one first.
//! - A block is written only while it has one owner and no cached prefix; [`BlockManager::make_writable`] brings the
//!   first about, and only full blocks are ever cached.
//! - A table that names a cached block names the blocks of all prefixes before it, and gives up later blocks first: so
//!   a prefix is never forgotten before the longer ones that need it.
//! - Every operation either succeeds whole or changes nothing.

mod prefix;

pub use prefix::BlockHash;

use prefix::PrefixCache;

/// The blocks of one sequence in slot order: block `i` holds slots `i * block_size..(i + 1) * block_size`.
///
/// Not `Clone`: a second table over the same blocks is made by [`BlockManager::fork`], which counts it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct BlockTable {
    blocks: Vec<u32>,
}

impl BlockTable {
    /// Make room for `num_blocks` in all, so that growing the table up to there does not allocate.
    pub fn reserve(&mut self, num_blocks: usize) {
        self.blocks.reserve(num_blocks.saturating_sub(self.blocks.len()));
    }

    /// The blocks, in slot order.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }
}

/// A block to copy before the next forward, all layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockCopy {
    /// Source block.
    pub from: u32,
    /// Destination block, fresh.
    pub to: u32,
}

/// The pool has fewer free blocks than an operation needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutOfBlocks;

/// The one owner of the pool's bookkeeping.
#[derive(Debug)]
pub struct BlockManager {
    block_size: usize,
    /// Number of table entries that name each block.
    ref_counts: Vec<u32>,
    /// Free blocks; the next one handed out is the last.
    free: Vec<u32>,
    /// Prefixes of full blocks; the idle ones among them are free too.
    cache: PrefixCache,
    peak_used: usize,
}

impl BlockManager {
    /// A pool of `num_blocks` free blocks of `block_size` slots each.
    ///
    /// # Panics
    /// If `block_size` is 0 or `num_blocks` does not fit 32 bits.
    pub fn new(num_blocks: usize, block_size: usize) -> Self {
        assert!(block_size > 0, "a block holds at least one slot");
        let num_ids = u32::try_from(num_blocks).expect("block ids fit 32 bits");
        // Low ids go out first, so that memory that is never needed is never touched.
        BlockManager {
            block_size,
            ref_counts: vec![0; num_blocks],
            free: (0..num_ids).rev().collect(),
            cache: PrefixCache::new(num_blocks),
            peak_used: 0,
        }
    }

    /// Slots in a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Blocks in the pool.
    pub fn num_blocks(&self) -> usize {
        self.ref_counts.len()
    }

    /// Blocks that no table names.
    pub fn num_free(&self) -> usize {
        self.free.len() + self.cache.num_idle()
    }

    /// Blocks that at least one table names.
    pub fn num_used(&self) -> usize {
        self.num_blocks() - self.num_free()
    }

    /// Most blocks in use at once so far.
    pub fn peak_used(&self) -> usize {
        self.peak_used
    }

    /// Blocks that hold `num_slots` slots.
    pub fn blocks_for(&self, num_slots: usize) -> usize {
        num_slots.div_ceil(self.block_size)
    }

    /// Append fresh blocks until `table` covers `num_slots` slots.
    ///
    /// # Errors
    /// Where too few blocks are free; nothing is changed then.
    pub fn grow(&mut self, table: &mut BlockTable, num_slots: usize) -> Result<(), OutOfBlocks> {
        let missing = self.blocks_for(num_slots).saturating_sub(table.blocks.len());
        if missing > self.num_free() {
            return Err(OutOfBlocks);
        }
        for _ in 0..missing {
            let block = self.take()?;
            table.blocks.push(block);
        }
        Ok(())
    }

    /// Append fresh blocks towards `num_slots` slots as far as free ones last; returns the slots covered, `num_slots`
    /// at most.
    pub fn grow_up_to(&mut self, table: &mut BlockTable, num_slots: usize) -> usize {
        let reachable = num_slots.min((table.blocks.len() + self.num_free()) * self.block_size);
        self.grow(table, reachable).expect("as many blocks are free as were counted");
        reachable
    }

    /// Give back the blocks beyond those that hold the first `num_slots` slots.
    pub fn truncate(&mut self, table: &mut BlockTable, num_slots: usize) {
        let num_kept = self.blocks_for(num_slots).min(table.blocks.len());
        for block in table.blocks.drain(num_kept..).rev() {
            self.give_back(block);
        }
    }

    /// Let the empty table `child` share the first `num_blocks` blocks of `parent`.
    ///
    /// # Panics
    /// If `child` is not empty or `parent` is shorter.
    pub fn fork(&mut self, parent: &BlockTable, num_blocks: usize, child: &mut BlockTable) {
        assert!(child.blocks.is_empty(), "a fork starts from an empty table, not one of {:?}", child.blocks);
        for &block in &parent.blocks[..num_blocks] {
            self.ref_counts[block as usize] += 1;
            child.blocks.push(block);
        }
    }

    /// Make the block that holds `slot` the table's own: where it is shared, replace it by a fresh block and return
    /// the copy to run before the write.
    ///
    /// # Errors
    /// Where a fresh block is needed and none is free; nothing is changed then.
    ///
    /// # Panics
    /// If the table does not cover `slot`.
    pub fn make_writable(&mut self, table: &mut BlockTable, slot: usize) -> Result<Option<BlockCopy>, OutOfBlocks> {
        let entry = &mut table.blocks[slot / self.block_size];
        if self.ref_counts[*entry as usize] == 1 {
            assert!(!self.cache.is_cached(*entry), "block {entry} holds a cached prefix and must not be written");
            return Ok(None);
        }
        let to = self.take()?;
        let from = std::mem::replace(entry, to);
        self.ref_counts[from as usize] -= 1;
        Ok(Some(BlockCopy { from, to }))
    }

    /// True where the block that holds `slot` belongs to `table` alone and holds no cached prefix.
    ///
    /// # Panics
    /// If the table does not cover `slot`.
    pub fn is_writable(&self, table: &BlockTable, slot: usize) -> bool {
        let block = table.blocks[slot / self.block_size];
        self.ref_counts[block as usize] == 1 && !self.cache.is_cached(block)
    }

    /// Give back every block of `table` and empty it, keeping its capacity.
    pub fn release(&mut self, table: &mut BlockTable) {
        self.truncate(table, 0);
    }

    /// Drop one reference. Tables are emptied from their end, so that the next taker gets the blocks in the order in
    /// which they stood there.
    fn give_back(&mut self, block: u32) {
        let count = &mut self.ref_counts[block as usize];
        assert!(*count > 0, "block {block} was released more often than it was taken");
        *count -= 1;
        match (*count, self.cache.is_cached(block)) {
            (0, true) => self.cache.set_idle(block),
            (0, false) => self.free.push(block),
            _ => {}
        }
    }

    /// Number of leading blocks that hold the prefixes named by `hashes`.
    pub fn num_cached(&self, hashes: &[BlockHash]) -> usize {
        hashes.iter().take_while(|hash| self.cache.find(**hash).is_some()).count()
    }

    /// Let the empty `table` share the cached blocks named by `hashes`.
    ///
    /// # Panics
    /// If `table` is not empty or a prefix is not cached ([`BlockManager::num_cached`]).
    pub fn share_cached(&mut self, hashes: &[BlockHash], table: &mut BlockTable) {
        assert!(table.blocks.is_empty(), "cached blocks come first, not after {:?}", table.blocks);
        for hash in hashes {
            let block = self.cache.find(*hash).expect("the prefix is cached");
            self.add_owner(block);
            table.blocks.push(block);
        }
    }

    /// Record that block `index` of `table` is full, verified and never written again, and holds the prefix `hash`.
    /// Where another block holds the same, the table names that one from now on.
    ///
    /// # Panics
    /// If the table has no such block, or the block before it holds no cached prefix.
    pub fn cache_block(&mut self, table: &mut BlockTable, index: usize, hash: BlockHash) {
        let block = table.blocks[index];
        if self.cache.is_cached(block) {
            return;
        }
        assert!(index == 0 || self.cache.is_cached(table.blocks[index - 1]), "prefixes are cached in order");
        match self.cache.find(hash) {
            None => self.cache.insert(block, hash),
            Some(same) => {
                self.add_owner(same);
                table.blocks[index] = same;
                self.give_back(block);
            }
        }
    }

    /// Forget every prefix but those that `is_kept`, of which none may stand behind one that is not. Tables keep their
    /// blocks.
    pub fn clear_cache(&mut self, is_kept: impl Fn(BlockHash) -> bool) {
        self.cache.retain(is_kept, &mut self.free);
    }

    /// Count one more table entry of the cached `block`.
    fn add_owner(&mut self, block: u32) {
        let count = &mut self.ref_counts[block as usize];
        *count += 1;
        if *count == 1 {
            self.cache.set_busy(block);
            self.peak_used = self.peak_used.max(self.num_used());
        }
    }

    fn take(&mut self) -> Result<u32, OutOfBlocks> {
        let block = self.free.pop().or_else(|| self.cache.evict()).ok_or(OutOfBlocks)?;
        assert_eq!(self.ref_counts[block as usize], 0, "free block {block} is named by a table");
        self.ref_counts[block as usize] = 1;
        self.peak_used = self.peak_used.max(self.num_used());
        Ok(block)
    }

    /// True where `block` holds a cached prefix.
    #[cfg(test)]
    pub(crate) fn is_cached(&self, block: u32) -> bool {
        self.cache.is_cached(block)
    }

    /// Check the invariants of this module against every live table.
    #[cfg(test)]
    pub(crate) fn check_invariants<'a>(&self, tables: impl IntoIterator<Item = &'a BlockTable>) {
        let mut occurrences = vec![0u32; self.num_blocks()];
        for table in tables {
            table.blocks.iter().for_each(|&block| occurrences[block as usize] += 1);
        }
        assert_eq!(occurrences, self.ref_counts, "reference counts equal table occurrences");
        let mut is_free = vec![false; self.num_blocks()];
        for block in self.free.iter().copied().chain(self.cache.check_invariants(&self.ref_counts)) {
            assert!(!std::mem::replace(&mut is_free[block as usize], true), "block {block} is free twice");
        }
        for (block, &count) in self.ref_counts.iter().enumerate() {
            assert_eq!(is_free[block], count == 0, "block {block} is free exactly when nothing names it");
        }
    }
}

#[cfg(test)]
mod tests;
