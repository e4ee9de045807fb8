//! How waiting sequences come to run: admission, sharing with siblings, and joining at the end of a prompt.

use super::{Rank, Scheduler, SeqKey, Sequence, has_same_blocks, shares_first_draw};
use crate::block_manager::BlockHash;

/// Tokens that a sequence longer than its reserve is expected to go on for. Of 0, what starts beside it is preempted
/// soon and computed again; many leave blocks idle.
const OUTGROWN_TOKENS: usize = 32;

/// Where the prompt of a starting sequence comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PromptSource {
    /// It is computed from its first slot.
    Own,
    /// A running sibling has it; its full blocks are shared.
    Sibling(SeqKey),
    /// A running sibling is computing it.
    InProgress,
}

impl Scheduler {
    /// Start waiting sequences in order while there is room for what they and all running ones are expected to need.
    pub(super) fn start_waiting(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        let capacity = self.blocks.num_blocks().saturating_sub(self.limits.watermark_blocks);
        let mut demand = self.running_demand();
        let (mut at, mut num_delayed, mut delayed_arrival) = (0, 0, None);
        while at < self.waiting.len()
            && self.running.len() + self.followers.len() + num_delayed < self.limits.max_num_seqs
        {
            let key = self.waiting[at];
            let arrival = self.sequences[key.index()].rank.arrival;
            if delayed_arrival == Some(arrival) {
                (at, num_delayed) = (at + 1, num_delayed + 1);
                continue;
            }
            demand += self.demand_of_starting(key);
            if demand > capacity && !self.running.is_empty() {
                return;
            }
            match self.prompt_source(key) {
                PromptSource::InProgress => {
                    self.followers.push(key);
                    at += 1;
                }
                // Room stays set aside for it and its siblings, so that none that came later keeps them waiting.
                PromptSource::Own if self.awaits_prefix(key) => {
                    delayed_arrival = Some(arrival);
                    (at, num_delayed) = (at + 1, num_delayed + 1);
                }
                source if self.start(at, source) => {}
                _ => return,
            }
        }
    }

    /// Let `follower` share all blocks of `leader`, which holds exactly the prompt.
    pub(super) fn join(&mut self, leader: SeqKey, follower: SeqKey) {
        let at = self.find_waiting(self.sequences[follower.index()].rank);
        assert_eq!(self.waiting.remove(at), Some(follower), "a follower waits until it joins");
        let num_blocks = self.sequences[leader.index()].table.blocks().len();
        self.share(leader, num_blocks, follower);
        self.sequences[follower.index()].num_computed = self.sequences[leader.index()].num_computed;
        self.insert_running(follower);
    }

    /// The running sibling that has stored exactly the prompt that `follower` waits for.
    pub(super) fn leader_at_prompt_end(&self, follower: SeqKey) -> Option<SeqKey> {
        let (follower, block_size) = (&self.sequences[follower.index()], self.limits.block_size);
        self.running_siblings(follower.rank).find(|key| {
            let leader = &self.sequences[key.index()];
            shares_first_draw(follower, leader, block_size) && leader.num_computed == leader.prompt_len
        })
    }

    /// Move the waiting sequence at `at` to the running ones. False, and nothing changed, where blocks are missing.
    fn start(&mut self, at: usize, source: PromptSource) -> bool {
        let key = self.waiting[at];
        let num_shared = self.num_shareable_blocks(&self.sequences[key.index()]);
        let mut num_looked_up = 0;
        match source {
            PromptSource::Sibling(sibling) if self.num_cached_blocks(key) <= num_shared => {
                self.share(sibling, num_shared, key);
            }
            _ => num_looked_up = self.share_cached(key),
        }
        let sequence = &mut self.sequences[key.index()];
        sequence.num_computed = sequence.table.blocks().len() * self.limits.block_size;
        sequence.table.reserve(self.blocks.blocks_for(sequence.max_slots));
        if self.blocks.grow(&mut sequence.table, sequence.len).is_err() {
            self.release(key);
            return false;
        }
        sequence.num_kept_found = sequence.num_kept_found.max(sequence.num_kept_now);
        sequence.is_stale |= sequence.num_kept_now < sequence.num_kept;
        let num_found = if num_looked_up > 0 { self.sequences[key.index()].num_computed } else { 0 };
        self.stats.prefix_cache_queries += num_looked_up as u64;
        self.stats.prefix_cache_hits += num_found as u64;
        self.waiting.remove(at);
        self.insert_running(key);
        true
    }

    fn share(&mut self, from: SeqKey, num_blocks: usize, to: SeqKey) {
        let mut table = std::mem::take(&mut self.sequences[to.index()].table);
        table.reserve(self.blocks.blocks_for(self.sequences[to.index()].max_slots));
        let Sequence { table: theirs, is_stale, num_kept_now, .. } = &self.sequences[from.index()];
        self.blocks.fork(theirs, num_blocks, &mut table);
        let (is_stale, num_kept_now) = (*is_stale, (*num_kept_now).min(num_blocks));
        let sequence = &mut self.sequences[to.index()];
        (sequence.table, sequence.is_stale) = (table, is_stale);
        sequence.num_kept_now = num_kept_now.min(sequence.num_kept);
    }

    /// Leading blocks of the known tokens of `key` that the prefix cache has: more than the prompt's where the sequence
    /// goes on behind tokens of its own.
    fn num_cached_blocks(&self, key: SeqKey) -> usize {
        let Sequence { hashes, len, .. } = &self.sequences[key.index()];
        self.blocks.num_cached(shareable_names(hashes, *len, self.limits.block_size))
    }

    /// Take the cached blocks that the known tokens of `key` begin with, so that a row is left to compute. Returns the
    /// number of tokens looked up, 0 where the caller names no blocks.
    fn share_cached(&mut self, key: SeqKey) -> usize {
        let Sequence { table, hashes, num_cached, num_kept, num_kept_now, len, .. } = &mut self.sequences[key.index()];
        let named = shareable_names(hashes, *len, self.limits.block_size);
        *num_cached = self.blocks.num_cached(named);
        *num_kept_now = (*num_cached).min(*num_kept);
        self.blocks.share_cached(&named[..*num_cached], table);
        if hashes.is_empty() { 0 } else { *len }
    }

    /// True where a running sequence is about to store the first block that the prefix cache lacks of the known tokens
    /// of `key`, which can take that block when it is there.
    fn awaits_prefix(&self, key: SeqKey) -> bool {
        let block_size = self.limits.block_size;
        let Sequence { hashes, len, .. } = &self.sequences[key.index()];
        let named = shareable_names(hashes, *len, block_size);
        let at = self.blocks.num_cached(named);
        let Some(missing) = named.get(at) else { return false };
        let stores_it = |other: &Sequence| {
            !other.is_stale && other.num_computed < (at + 1) * block_size && other.hashes.get(at) == Some(missing)
        };
        self.running.iter().any(|key| stores_it(&self.sequences[key.index()]))
    }

    fn prompt_source(&self, key: SeqKey) -> PromptSource {
        let sequence = &self.sequences[key.index()];
        let num_shared_blocks = self.num_shareable_blocks(sequence);
        let num_shared_slots = num_shared_blocks * self.limits.block_size;
        let mut source = PromptSource::Own;
        for sibling_key in self.running_siblings(sequence.rank) {
            let sibling = &self.sequences[sibling_key.index()];
            if !has_same_blocks(sequence, sibling, num_shared_blocks) {
                continue;
            }
            if !shares_first_draw(sequence, sibling, self.limits.block_size) && sibling.num_computed >= num_shared_slots
            {
                return PromptSource::Sibling(sibling_key);
            }
            source = PromptSource::InProgress;
        }
        source
    }

    /// Full blocks of the prompt that a sequence can take from a sibling and still have a row left to compute.
    fn num_shareable_blocks(&self, sequence: &Sequence) -> usize {
        sequence.prompt_len.min(sequence.len - 1) / self.limits.block_size
    }

    /// Blocks that all running sequences are expected to need, shared prompts counted once.
    fn running_demand(&self) -> usize {
        let mut demand = 0;
        let mut last_arrival = None;
        for key in &self.running {
            let sequence = &self.sequences[key.index()];
            demand += self.own_demand(sequence);
            if last_arrival.replace(sequence.rank.arrival) != Some(sequence.rank.arrival) {
                demand += sequence.prompt_len / self.limits.block_size;
            }
        }
        demand
    }

    fn demand_of_starting(&self, key: SeqKey) -> usize {
        let sequence = &self.sequences[key.index()];
        let is_first = self.running_siblings(sequence.rank).next().is_none();
        let prompt_blocks = if is_first { sequence.prompt_len / self.limits.block_size } else { 0 };
        self.own_demand(sequence) + prompt_blocks
    }

    /// Blocks beyond the prompt's full ones that a sequence is expected to need. One that outgrew its reserve goes on.
    fn own_demand(&self, sequence: &Sequence) -> usize {
        let guess = sequence.prompt_len + sequence.reserve_tokens;
        let guess = if sequence.len <= guess { guess } else { sequence.len + OUTGROWN_TOKENS };
        let expected = sequence.max_slots.min(guess);
        self.blocks.blocks_for(expected.max(sequence.len)) - sequence.prompt_len / self.limits.block_size
    }

    fn running_siblings(&self, rank: Rank) -> impl Iterator<Item = SeqKey> + '_ {
        let first = Rank { sample_index: 0, ..rank };
        let start = self.running.partition_point(|key| self.sequences[key.index()].rank < first);
        let is_sibling = move |key: &SeqKey| self.sequences[key.index()].rank.arrival == rank.arrival;
        self.running[start..].iter().copied().take_while(is_sibling)
    }

    fn insert_running(&mut self, key: SeqKey) {
        let Sequence { hashes, rank, max_slots, .. } = &mut self.sequences[key.index()];
        if !hashes.is_empty() {
            // So that later names do not allocate.
            hashes.reserve((*max_slots / self.limits.block_size).saturating_sub(hashes.len()));
        }
        let rank = *rank;
        let at = self.find_running(rank).expect_err("a sequence starts once");
        self.running.insert(at, key);
    }
}

/// Names of the blocks that a sequence of `len` known tokens may take from the cache, so that a row is left to compute.
fn shareable_names(hashes: &[BlockHash], len: usize, block_size: usize) -> &[BlockHash] {
    &hashes[..hashes.len().min((len - 1) / block_size)]
}
