//! Which rows the next step computes: a pure state machine over lengths and blocks.
//!
//! Owns: the order of sequences, their block tables and the pool's bookkeeping. Knows no token, no weight and no
//! clock. The engine says how many tokens are drafted ([`Scheduler::propose`]), calls [`Scheduler::schedule`], runs
//! the [`Plan`], calls [`Scheduler::commit`], and then says how many drawn tokens of each sequence count
//! ([`Scheduler::append`]) and which sequences end ([`Scheduler::remove`]).
//!
//! # Policy
//! - One budget of rows a step: decode rows first, oldest first, then prefill chunks, oldest first.
//! - Order of service: the oldest open group, then by falling priority, then by arrival. "Oldest" and "youngest" below
//!   mean first and last in this order.
//! - Sequences start in this order, and only where the pool covers the expected length of everything that runs (the
//!   group's reserve ahead, or `reserve_tokens`; a few tokens more of what outgrew it) and a watermark stays free.
//!   Alone, a sequence always starts.
//! - The first sequence of a group computes the prompt, but for the full blocks that the prefix cache has; its siblings
//!   wait, draw their first token from the same row, and then share its blocks. A sibling that comes later shares the
//!   prompt's full blocks.
//! - A sequence whose prompt goes on with a block that a running one is about to store waits for it, with all its
//!   siblings, and then takes it from the prefix cache: groups that start together compute what they share once.
//! - A decoding sequence may take a row for each token drafted for it, from what budget and free blocks are left after
//!   everything else. The rows behind the last token that counts are forgotten, and their blocks freed, in `append`.
//! - A decode row that finds no block takes those of the youngest sequence, which is recomputed later. The oldest
//!   sequence is therefore never stopped by a younger one, and since everything submitted fits alone, it always ends.
//!
//! # Invariants
//! `waiting` and `running` are sorted by rank (the order of service, then sample index) and disjoint · a waiting
//! sequence has no block · blocks are written only while they have one owner · nothing planned is preempted in the same
//! step · a block enters the prefix cache when all its slots are stored, hold verified tokens, and were computed as its
//! name says: under the weights of the day, with everything before them or behind blocks that were kept.

mod plan;
mod start;

pub use plan::{Draw, Plan, Work};

use crate::block_manager::{BlockHash, BlockManager, BlockTable, OutOfBlocks};
use crate::config::SchedulerLimits;
use std::cmp::Reverse;
use std::collections::{BTreeMap, VecDeque};

/// Handle of a sequence, from [`Scheduler::submit`] to [`Scheduler::remove`]; dense, so it can index a slab.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeqKey(u32);

impl SeqKey {
    /// Position in a slab.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// What the scheduler must know of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GroupShape {
    /// Tokens of the prompt; at least one.
    pub prompt_len: usize,
    /// Longest response; at least one.
    pub max_new_tokens: usize,
    /// Number of samples; at least one.
    pub num_samples: usize,
    /// Served before groups of a lower one, except for the oldest group, which comes first whatever it has.
    pub priority: i32,
    /// Response tokens for which each sample must find room when it starts; `None` takes the limits' `reserve_tokens`.
    pub reserve_tokens: Option<usize>,
}

impl GroupShape {
    /// Slots that the longest possible sample stores. The last token of a response is never stored.
    pub const fn max_slots(&self) -> usize {
        self.prompt_len + self.max_new_tokens - 1
    }
}

/// Counters since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SchedulerStats {
    /// Prompt rows computed.
    pub num_prefill_tokens: u64,
    /// Sequences that lost their blocks.
    pub num_preemptions: u64,
    /// Tokens looked up in the prefix cache, by sequences that start without a sibling's blocks.
    pub prefix_cache_queries: u64,
    /// Those whose K/V it had.
    pub prefix_cache_hits: u64,
}

/// Order of service: the lower, the earlier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
struct Rank {
    /// False for the oldest group that is open, which so always progresses.
    is_younger: bool,
    priority: Reverse<i32>,
    arrival: u64,
    sample_index: u32,
}

/// Lengths and blocks of one sequence.
#[derive(Debug, Default)]
struct Sequence {
    rank: Rank,
    prompt_len: usize,
    max_slots: usize,
    reserve_tokens: usize,
    /// Tokens known: the prompt and what was drawn.
    len: usize,
    /// Slots whose K/V are stored.
    num_computed: usize,
    /// True once a token was drawn since the sequence last started: from then on it takes decode rows.
    is_decoding: bool,
    /// Tokens proposed to follow the known ones in the next step.
    num_drafted: usize,
    table: BlockTable,
    /// Names of the full blocks of known tokens; fewer where the caller names none.
    hashes: Vec<BlockHash>,
    /// Leading blocks known to be cached.
    num_cached: usize,
    /// True where some block was computed under other weights than the names say.
    is_stale: bool,
    /// Leading names that are true of nothing but what the prefix cache has.
    num_kept: usize,
    /// Blocks with such names that it found there when it last started, and the most over all its starts.
    num_kept_now: usize,
    num_kept_found: usize,
}

/// The scheduler. See the module for its policy.
#[derive(Debug)]
pub struct Scheduler {
    limits: SchedulerLimits,
    blocks: BlockManager,
    sequences: Vec<Sequence>,
    free_keys: Vec<SeqKey>,
    running: Vec<SeqKey>,
    waiting: VecDeque<SeqKey>,
    /// Waiting sequences that found room this step and join when a sibling has computed their prompt.
    followers: Vec<SeqKey>,
    plan: Plan,
    next_arrival: u64,
    /// Open groups by arrival.
    groups: BTreeMap<u64, OpenGroup>,
    stats: SchedulerStats,
}

/// A group of which some sequence runs or waits.
#[derive(Debug)]
struct OpenGroup {
    priority: Reverse<i32>,
    num_open: usize,
}

impl Scheduler {
    /// An idle scheduler with an empty pool.
    pub fn new(limits: SchedulerLimits) -> Self {
        Scheduler {
            limits,
            blocks: BlockManager::new(limits.num_blocks, limits.block_size),
            sequences: Vec::new(),
            free_keys: Vec::new(),
            running: Vec::with_capacity(limits.max_num_seqs),
            waiting: VecDeque::new(),
            followers: Vec::with_capacity(limits.max_num_seqs),
            plan: Plan::default(),
            next_arrival: 0,
            groups: BTreeMap::new(),
            stats: SchedulerStats::default(),
        }
    }

    /// Blocks that a sample of this shape may need at its longest, where that is more than the pool has.
    pub fn excess_blocks(&self, shape: GroupShape) -> Option<usize> {
        let needed = self.blocks.blocks_for(shape.max_slots());
        (needed > self.blocks.num_blocks()).then_some(needed)
    }

    /// Queue a group behind all others; returns a key per sample, in order.
    ///
    /// # Panics
    /// If the shape has a 0 or can never fit ([`Scheduler::excess_blocks`]).
    pub fn submit(&mut self, shape: GroupShape) -> Vec<SeqKey> {
        assert!(shape.prompt_len > 0 && shape.max_new_tokens > 0 && shape.num_samples > 0, "empty shape {shape:?}");
        assert_eq!(self.excess_blocks(shape), None, "{shape:?} can never fit");
        let arrival = self.next_arrival;
        self.next_arrival += 1;
        let (is_younger, priority) = (!self.groups.is_empty(), Reverse(shape.priority));
        self.groups.insert(arrival, OpenGroup { priority, num_open: shape.num_samples });
        let rank = |sample_index| Rank { is_younger, priority, arrival, sample_index };
        (0..shape.num_samples as u32).map(|sample_index| self.enqueue(rank(sample_index), shape)).collect()
    }

    fn enqueue(&mut self, rank: Rank, shape: GroupShape) -> SeqKey {
        let key = self.free_keys.pop().unwrap_or_else(|| {
            self.sequences.push(Sequence::default());
            SeqKey((self.sequences.len() - 1) as u32)
        });
        let sequence = &mut self.sequences[key.index()];
        sequence.rank = rank;
        sequence.prompt_len = shape.prompt_len;
        sequence.hashes.clear();
        (sequence.num_kept, sequence.num_kept_found) = (0, 0);
        sequence.max_slots = shape.max_slots();
        sequence.reserve_tokens = shape.reserve_tokens.unwrap_or(self.limits.reserve_tokens);
        sequence.len = shape.prompt_len;
        let at = self.find_waiting(rank);
        self.waiting.insert(at, key);
        key
    }

    /// Let `key`, which was submitted and has not started, go on behind `num_tokens` tokens of its own and take at most
    /// `max_new_tokens` more. It starts like one that was preempted.
    pub fn go_on(&mut self, key: SeqKey, num_tokens: usize, max_new_tokens: usize) {
        let sequence = &mut self.sequences[key.index()];
        sequence.len += num_tokens;
        sequence.max_slots = sequence.max_slots.min(sequence.len + max_new_tokens.max(1) - 1);
    }

    /// Forget the names of the blocks of `key`. A sequence without names uses no cache.
    pub fn clear_hashes(&mut self, key: SeqKey) {
        self.sequences[key.index()].hashes.clear();
    }

    /// Name the next full block of tokens known of `key`. A name says all that the K/V of a block depend on.
    pub fn push_hash(&mut self, key: SeqKey, hash: BlockHash) {
        self.sequences[key.index()].hashes.push(hash);
    }

    /// The first `num_kept` names of `key` are of blocks that nobody can compute any more. Where the cache has lost one
    /// by the time that `key` starts, what it computes in its place is never cached.
    pub fn set_kept(&mut self, key: SeqKey, num_kept: usize) {
        self.sequences[key.index()].num_kept = num_kept;
    }

    /// Most blocks that `key` found of those that it kept ([`Scheduler::set_kept`]), over all its starts.
    pub fn num_kept_found(&self, key: SeqKey) -> usize {
        self.sequences[key.index()].num_kept_found
    }

    /// Names of the leading blocks of `key`, which runs, that the prefix cache has.
    pub fn cached_names(&self, key: SeqKey) -> &[BlockHash] {
        let Sequence { hashes, num_cached, .. } = &self.sequences[key.index()];
        &hashes[..*num_cached]
    }

    /// The weights changed, or the pool lost its contents: no cached prefix is valid any more but those that `is_kept`,
    /// and what running sequences have stored is never cached.
    pub fn invalidate_cache(&mut self, is_kept: impl Fn(BlockHash) -> bool) {
        self.blocks.clear_cache(is_kept);
        for key in &self.running {
            let sequence = &mut self.sequences[key.index()];
            (sequence.is_stale, sequence.num_cached) = (true, 0);
        }
    }

    /// Ask for rows that verify `num_drafted` proposed tokens of `key` in the next step. The plan may grant fewer, and
    /// grants none to a sequence that is not decoding.
    pub fn propose(&mut self, key: SeqKey, num_drafted: usize) {
        self.sequences[key.index()].num_drafted = num_drafted;
    }

    /// Forget what was proposed.
    pub fn clear_drafts(&mut self) {
        for key in &self.running {
            self.sequences[key.index()].num_drafted = 0;
        }
    }

    /// Most tokens whose rows could count if they were drafted for `key` now; 0 where it is not decoding.
    pub fn draft_room(&self, key: SeqKey) -> usize {
        let sequence = &self.sequences[key.index()];
        // The row of a response's last token is never computed.
        if sequence.is_decoding { sequence.max_slots - sequence.len } else { 0 }
    }

    /// Sequences that hold blocks, oldest first.
    pub fn running(&self) -> &[SeqKey] {
        &self.running
    }

    /// Plan the next step. The same plan comes again if it is not committed, except for its copies, which must be run.
    pub fn schedule(&mut self) -> &Plan {
        self.plan.clear();
        self.followers.clear();
        self.plan_decode_rows();
        if self.plan.num_preempted == 0 {
            self.start_waiting();
        }
        self.plan_prefill_chunks();
        self.grant_drafts();
        self.plan_draws();
        &self.plan
    }

    /// The plan of the last [`Scheduler::schedule`].
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Record that the plan's rows are stored, and let the siblings that drew from a prompt's last row share it.
    pub fn commit(&mut self) {
        for index in 0..self.plan.work.len() {
            let Work { key, first_slot, num_rows } = self.plan.work[index];
            let sequence = &mut self.sequences[key.index()];
            sequence.num_computed += num_rows;
            sequence.num_drafted = 0;
            let prompt_end = sequence.num_computed.min(sequence.prompt_len);
            self.stats.num_prefill_tokens += prompt_end.saturating_sub(first_slot) as u64;
            self.cache_full_blocks(key);
        }
        for index in 0..self.followers.len() {
            let follower = self.followers[index];
            if let Some(leader) = self.leader_at_prompt_end(follower) {
                self.join(leader, follower);
            }
        }
        self.followers.clear();
    }

    /// `num_tokens` more tokens are known of `key`, at least one. Rows computed from drafted tokens that turned out
    /// otherwise are forgotten.
    pub fn append(&mut self, key: SeqKey, num_tokens: usize) {
        let sequence = &mut self.sequences[key.index()];
        sequence.len += num_tokens;
        sequence.is_decoding = true;
        sequence.num_computed = sequence.num_computed.min(sequence.len - 1);
        self.blocks.truncate(&mut sequence.table, sequence.num_computed);
        self.cache_full_blocks(key);
    }

    /// Forget `key`, running or waiting, and free exactly its blocks. Not between `schedule` and `commit`.
    pub fn remove(&mut self, key: SeqKey) {
        let rank = self.sequences[key.index()].rank;
        match self.find_running(rank) {
            Ok(at) => drop(self.running.remove(at)),
            Err(_) => {
                let at = self.find_waiting(rank);
                assert_eq!(self.waiting.remove(at), Some(key), "a sequence runs or waits until it is removed");
            }
        }
        self.release(key);
        self.free_keys.push(key);
        self.leave_group(rank.arrival);
    }

    /// One sequence fewer is open of the group that came at `arrival`; where it was the oldest group's last, the next
    /// group comes before all others from now on, whatever its priority.
    fn leave_group(&mut self, arrival: u64) {
        let group = self.groups.get_mut(&arrival).expect("the group of an open sequence is open");
        group.num_open -= 1;
        if group.num_open > 0 {
            return;
        }
        self.groups.remove(&arrival);
        if let Some((&oldest, &OpenGroup { priority, .. })) = self.groups.first_key_value()
            && oldest > arrival
        {
            self.bring_forward(Rank { is_younger: true, priority, arrival: oldest, sample_index: 0 });
        }
    }

    /// Make the group whose first sequence ranks at `first` the oldest.
    fn bring_forward(&mut self, first: Rank) {
        let Scheduler { running, waiting, sequences, .. } = self;
        let last = Rank { sample_index: u32::MAX, ..first };
        let rank = |key: &SeqKey| sequences[key.index()].rank;
        let ran = running.partition_point(|key| rank(key) < first)..running.partition_point(|key| rank(key) <= last);
        let waits = waiting.partition_point(|key| rank(key) < first)..waiting.partition_point(|key| rank(key) <= last);
        for key in running[ran.clone()].iter().chain(waiting.range(waits.clone())) {
            sequences[key.index()].rank.is_younger = false;
        }
        running[..ran.end].rotate_right(ran.len());
        if waits.start > 0 {
            waiting.make_contiguous()[..waits.end].rotate_right(waits.len());
        }
    }

    /// Block table of `key`; empty while it waits.
    pub fn block_table(&self, key: SeqKey) -> &[u32] {
        self.sequences[key.index()].table.blocks()
    }

    /// True where nothing runs and nothing waits.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Sequences that hold blocks.
    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that wait for their first step, or for their next after a preemption.
    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The pool's bookkeeping, to read.
    pub fn blocks(&self) -> &BlockManager {
        &self.blocks
    }

    /// Counters.
    pub fn stats(&self) -> SchedulerStats {
        self.stats
    }

    /// Enter the full blocks of `key` that hold known tokens into the prefix cache.
    fn cache_full_blocks(&mut self, key: SeqKey) {
        let Sequence { table, hashes, num_cached, num_computed, len, is_stale, .. } = &mut self.sequences[key.index()];
        if *is_stale {
            return;
        }
        let num_full = (*num_computed).min(*len) / self.limits.block_size;
        for hash in hashes.iter().take(num_full).skip(*num_cached) {
            self.blocks.cache_block(table, *num_cached, *hash);
            *num_cached += 1;
        }
    }

    fn plan_decode_rows(&mut self) {
        let mut at = 0;
        while at < self.running.len() {
            let key = self.running[at];
            if self.sequences[key.index()].is_decoding && self.make_room(key) {
                let first_slot = self.sequences[key.index()].num_computed;
                self.plan.work.push(Work { key, first_slot, num_rows: 1 });
            }
            at += 1;
        }
    }

    fn plan_prefill_chunks(&mut self) {
        // Decode rows number at most `max_num_seqs`, so at least one row of budget is left.
        let mut budget = self.limits.max_batch_tokens - self.plan.num_rows();
        for &key in &self.running {
            let sequence = &self.sequences[key.index()];
            let first_slot = sequence.num_computed;
            let num_rows = (sequence.len - first_slot).min(self.limits.prefill_chunk).min(budget);
            if sequence.is_decoding || num_rows == 0 {
                continue;
            }
            assert!(self.blocks.is_writable(&sequence.table, first_slot), "prefill writes only its own blocks");
            self.plan.work.push(Work { key, first_slot, num_rows });
            budget -= num_rows;
        }
    }

    /// Lengthen decode items by rows of drafted tokens, oldest sequence first. Costs nobody else a row or a block.
    fn grant_drafts(&mut self) {
        let mut budget = self.limits.max_batch_tokens - self.plan.num_rows();
        for item in &mut self.plan.work {
            let sequence = &mut self.sequences[item.key.index()];
            let wanted = sequence.num_drafted.min(sequence.max_slots - sequence.len).min(budget);
            if !sequence.is_decoding || wanted == 0 {
                continue;
            }
            let end = self.blocks.grow_up_to(&mut sequence.table, item.first_slot + 1 + wanted);
            item.num_rows = end - item.first_slot;
            budget -= item.num_rows - 1;
        }
    }

    fn plan_draws(&mut self) {
        let Plan { work, draws, .. } = &mut self.plan;
        let mut num_rows = 0;
        for item in work.iter() {
            num_rows += item.num_rows as u32;
            let sequence = &self.sequences[item.key.index()];
            let end = item.first_slot + item.num_rows;
            if end < sequence.len {
                continue;
            }
            let num_drafted = end - sequence.len;
            let (row, slot) = (num_rows - 1 - num_drafted as u32, sequence.len);
            let verifying = (0..=num_drafted).map(|i| Draw { key: item.key, row: row + i as u32, slot: slot + i });
            draws.extend(verifying);
            for &key in &self.followers {
                // Two siblings may reach the end of the prompt in one step; a follower draws from the first.
                let is_new = || draws.iter().all(|draw| draw.key != key);
                if shares_first_draw(&self.sequences[key.index()], sequence, self.limits.block_size) && is_new() {
                    draws.push(Draw { key, row, slot });
                }
            }
        }
    }

    /// Give `key` a writable block for its next slot, at the cost of the youngest. False where it was the youngest
    /// itself and gave up its blocks.
    fn make_room(&mut self, key: SeqKey) -> bool {
        while self.reserve_next_slot(key).is_err() {
            let youngest = self.running.pop().expect("the sequence that needs a block is running");
            self.preempt(youngest);
            if youngest == key {
                return false;
            }
        }
        true
    }

    fn reserve_next_slot(&mut self, key: SeqKey) -> Result<(), OutOfBlocks> {
        let Sequence { table, num_computed, .. } = &mut self.sequences[key.index()];
        self.blocks.grow(table, *num_computed + 1)?;
        let copy = self.blocks.make_writable(table, *num_computed)?;
        self.plan.copies.extend(copy);
        Ok(())
    }

    fn preempt(&mut self, key: SeqKey) {
        self.release(key);
        let at = self.find_waiting(self.sequences[key.index()].rank);
        self.waiting.insert(at, key);
        self.plan.num_preempted += 1;
        self.stats.num_preemptions += 1;
    }

    fn release(&mut self, key: SeqKey) {
        let sequence = &mut self.sequences[key.index()];
        self.blocks.release(&mut sequence.table);
        sequence.num_computed = 0;
        sequence.num_drafted = 0;
        sequence.num_cached = 0;
        sequence.num_kept_now = 0;
        sequence.is_stale = false;
        sequence.is_decoding = false;
    }

    fn find_running(&self, rank: Rank) -> Result<usize, usize> {
        self.running.binary_search_by_key(&rank, |key| self.sequences[key.index()].rank)
    }

    /// Where a sequence of this rank stands among the waiting, or would be inserted.
    fn find_waiting(&self, rank: Rank) -> usize {
        self.waiting.partition_point(|key| self.sequences[key.index()].rank < rank)
    }
}

/// True where `follower`, a sibling without a token of its own yet, draws its first from the row from which `leader`
/// draws its first.
fn shares_first_draw(follower: &Sequence, leader: &Sequence, block_size: usize) -> bool {
    let is_undrawn = |s: &Sequence| s.len == s.prompt_len;
    follower.rank.arrival == leader.rank.arrival
        && is_undrawn(follower)
        && is_undrawn(leader)
        && has_same_blocks(follower, leader, follower.prompt_len / block_size)
}

/// True where the first `num_blocks` blocks of two siblings have the same names, or none: one that kept K/V of older
/// weights has other blocks than one that did not.
fn has_same_blocks(a: &Sequence, b: &Sequence, num_blocks: usize) -> bool {
    num_blocks == 0 || a.hashes.get(num_blocks - 1) == b.hashes.get(num_blocks - 1)
}

#[cfg(test)]
mod tests;
