//! The block manager against a naive model that stores the contents of every block.

use super::{BlockHash, BlockManager, BlockTable};
use proptest::prelude::*;

const BLOCK_SIZE: usize = 4;
const NUM_BLOCKS: usize = 12;

#[derive(Debug, Clone)]
enum Op {
    /// Append so many tokens to sequence `which`.
    Append { which: usize, count: usize },
    /// Fork a new sequence off the first tokens of sequence `which`.
    Fork { which: usize, keep: usize },
    /// Drop the last tokens of sequence `which` that are not cached.
    Truncate { which: usize, count: usize },
    /// End sequence `which`.
    Release { which: usize },
    /// Start with the tokens of an ended sequence: cached blocks first, the rest written anew.
    Restart { which: usize },
    /// Write the tokens of an ended sequence anew without looking at the cache.
    Recompute { which: usize },
    /// Forget all prefixes.
    Clear,
    /// Forget all prefixes but those of ended sequence `which`.
    Keep { which: usize },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0usize..8, 1usize..9).prop_map(|(which, count)| Op::Append { which, count }),
        2 => (0usize..8, 0usize..40).prop_map(|(which, keep)| Op::Fork { which, keep }),
        1 => (0usize..8, 1usize..6).prop_map(|(which, count)| Op::Truncate { which, count }),
        2 => (0usize..8).prop_map(|which| Op::Release { which }),
        2 => (0usize..8).prop_map(|which| Op::Restart { which }),
        1 => (0usize..8).prop_map(|which| Op::Recompute { which }),
        1 => Just(Op::Clear),
        1 => any::<usize>().prop_map(|which| Op::Keep { which }),
    ]
}

/// A sequence under test: its table, and the tokens that a reader of the table must find.
#[derive(Default)]
struct Sequence {
    table: BlockTable,
    tokens: Vec<u64>,
    /// True where blocks were stored before prefixes were forgotten: they are not cached.
    is_stale: bool,
}

/// A name that only these tokens have.
fn hash(tokens: &[u64]) -> BlockHash {
    BlockHash(tokens.iter().fold(1u128, |hash, token| hash.wrapping_mul(1_000_003) + u128::from(*token)))
}

fn hashes(tokens: &[u64]) -> Vec<BlockHash> {
    (1..=tokens.len() / BLOCK_SIZE).map(|i| hash(&tokens[..i * BLOCK_SIZE])).collect()
}

/// The pool with the contents of its slots, as a device would hold them.
struct World {
    manager: BlockManager,
    memory: Vec<u64>,
    sequences: Vec<Sequence>,
    ended: Vec<Vec<u64>>,
    next_token: u64,
}

impl World {
    fn new() -> Self {
        World {
            manager: BlockManager::new(NUM_BLOCKS, BLOCK_SIZE),
            memory: vec![0; NUM_BLOCKS * BLOCK_SIZE],
            sequences: vec![Sequence::default()],
            ended: Vec::new(),
            next_token: 1,
        }
    }

    fn append_new(&mut self, which: usize) -> bool {
        self.next_token += 1;
        self.append_one(which, self.next_token)
    }

    fn append_one(&mut self, which: usize, token: u64) -> bool {
        let Sequence { table, tokens, is_stale } = &mut self.sequences[which];
        let slot = tokens.len();
        let before = self.manager.num_free();
        if self.manager.grow(table, slot + 1).is_err() {
            assert_eq!((before, slot % BLOCK_SIZE), (0, 0), "growing fails only where nothing is free");
            return false;
        }
        match self.manager.make_writable(table, slot) {
            Err(_) => {
                assert_eq!(self.manager.num_free(), 0, "copy-on-write fails only where nothing is free");
                return false;
            }
            Ok(None) => {}
            Ok(Some(copy)) => {
                let (from, to) = (copy.from as usize * BLOCK_SIZE, copy.to as usize * BLOCK_SIZE);
                self.memory.copy_within(from..from + BLOCK_SIZE, to);
            }
        }
        assert!(self.manager.is_writable(table, slot));
        self.memory[table.blocks()[slot / BLOCK_SIZE] as usize * BLOCK_SIZE + slot % BLOCK_SIZE] = token;
        tokens.push(token);
        if tokens.len().is_multiple_of(BLOCK_SIZE) && !*is_stale {
            self.manager.cache_block(table, slot / BLOCK_SIZE, hash(tokens));
        }
        true
    }

    fn fork(&mut self, which: usize, keep: usize) {
        let parent = &self.sequences[which];
        // As in the engine, a part of a block is shared only while it is not full.
        let full = parent.tokens.len() / BLOCK_SIZE * BLOCK_SIZE;
        let keep = if keep < full { keep / BLOCK_SIZE * BLOCK_SIZE } else { parent.tokens.len() };
        let (tokens, is_stale) = (parent.tokens[..keep].to_vec(), parent.is_stale);
        let mut child = Sequence { table: BlockTable::default(), tokens, is_stale };
        let used = self.manager.num_used();
        self.manager.fork(&parent.table, keep.div_ceil(BLOCK_SIZE), &mut child.table);
        assert_eq!(self.manager.num_used(), used, "a fork takes no block");
        self.sequences.push(child);
    }

    fn restart(&mut self, which: usize, uses_cache: bool) {
        let Some(tokens) = self.ended.get(which % self.ended.len().max(1)).cloned() else { return };
        let mut sequence = Sequence::default();
        if uses_cache {
            let hashes = hashes(&tokens);
            let num_found = self.manager.num_cached(&hashes);
            self.manager.share_cached(&hashes[..num_found], &mut sequence.table);
            sequence.tokens.extend_from_slice(&tokens[..num_found * BLOCK_SIZE]);
        }
        self.sequences.push(sequence);
        let new = self.sequences.len() - 1;
        let num_found = self.sequences[new].tokens.len();
        let _ = tokens[num_found..].iter().all(|token| self.append_one(new, *token));
    }

    fn truncate(&mut self, which: usize, count: usize) {
        let Sequence { table, tokens, .. } = &mut self.sequences[which];
        let is_cached = |index: &usize| self.manager.is_cached(table.blocks()[*index]);
        let num_cached = (0..table.blocks().len()).take_while(is_cached).count();
        let has_shared_end = !tokens.is_empty() && !self.manager.is_writable(table, tokens.len() - 1);
        if has_shared_end {
            return;
        }
        tokens.truncate(tokens.len().saturating_sub(count).max(num_cached * BLOCK_SIZE));
        self.manager.truncate(table, tokens.len());
    }

    fn apply(&mut self, op: &Op) {
        let pick = |which: usize| which % self.sequences.len();
        match *op {
            Op::Append { which, count } => {
                let which = pick(which);
                let _ = (0..count).all(|_| self.append_new(which));
            }
            Op::Fork { which, keep } => self.fork(pick(which), keep),
            Op::Release { which } => {
                let which = pick(which);
                let sequence = &mut self.sequences[which];
                self.manager.release(&mut sequence.table);
                self.ended.push(std::mem::take(&mut sequence.tokens));
                sequence.is_stale = false;
            }
            Op::Truncate { which, count } => self.truncate(pick(which), count),
            Op::Restart { which } => self.restart(which, true),
            Op::Recompute { which } => self.restart(which, false),
            Op::Clear => {
                self.manager.clear_cache(|_| false);
                self.sequences.iter_mut().for_each(|s| s.is_stale = !s.tokens.is_empty());
            }
            Op::Keep { which } => {
                let kept = self.ended.get(which % self.ended.len().max(1)).map_or(Vec::new(), |tokens| hashes(tokens));
                let num_cached = self.manager.num_cached(&kept);
                self.manager.clear_cache(|name| kept.contains(&name));
                assert_eq!(self.manager.num_cached(&kept), num_cached, "what is kept stays");
                self.sequences.iter_mut().for_each(|s| s.is_stale = !s.tokens.is_empty());
            }
        }
    }

    fn check(&self) {
        self.manager.check_invariants(self.sequences.iter().map(|s| &s.table));
        for sequence in &self.sequences {
            for (index, &block) in sequence.table.blocks().iter().enumerate().filter(|b| self.manager.is_cached(*b.1)) {
                let prefix = sequence.tokens.get(..(index + 1) * BLOCK_SIZE).expect("a cached block is full");
                assert_eq!(self.manager.cache.find(hash(prefix)), Some(block), "a block has the name of its prefix");
            }
            for (slot, &token) in sequence.tokens.iter().enumerate() {
                let block = sequence.table.blocks()[slot / BLOCK_SIZE] as usize;
                assert_eq!(self.memory[block * BLOCK_SIZE + slot % BLOCK_SIZE], token, "slot {slot} was overwritten");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Every reader finds its own tokens whatever the others append, fork and release, and nothing leaks.
    #[test]
    fn every_sequence_reads_back_what_it_wrote(ops in prop::collection::vec(op(), 1..60)) {
        let mut world = World::new();
        for op in &ops {
            world.apply(op);
            world.check();
        }
        for sequence in &mut world.sequences {
            world.manager.release(&mut sequence.table);
        }
        prop_assert_eq!(world.manager.num_free(), NUM_BLOCKS);
        prop_assert!(world.manager.peak_used() <= NUM_BLOCKS);
    }
}

/// Fill a table with the given tokens, caching full blocks.
fn write(world: &mut World, tokens: std::ops::Range<u64>) -> usize {
    world.sequences.push(Sequence::default());
    let which = world.sequences.len() - 1;
    assert!(tokens.into_iter().all(|token| world.append_one(which, token)));
    which
}

#[test]
fn equal_prefixes_share_one_block_and_the_longest_idle_goes_first() {
    let mut world = World::new();
    let (a, b) = (write(&mut world, 0..10), write(&mut world, 0..9));
    assert_eq!(world.sequences[a].table.blocks()[..2], world.sequences[b].table.blocks()[..2]);
    assert_eq!(world.manager.num_used(), 4, "two shared blocks and two of their own");
    let other = write(&mut world, 100..108);
    [a, b, other].into_iter().for_each(|which| world.apply(&Op::Release { which }));
    world.check();
    let tokens: Vec<u64> = (0..12).collect();
    assert_eq!((world.manager.num_free(), world.manager.num_cached(&hashes(&tokens))), (NUM_BLOCKS, 2));
    // Eight blocks hold nothing; the ninth is the end of the first chain, not its beginning.
    write(&mut world, 200..236);
    assert_eq!(world.manager.num_cached(&hashes(&tokens)), 1);
    world.check();
    world.manager.clear_cache(|_| false);
    assert_eq!(world.manager.num_cached(&hashes(&tokens)), 0);
}

#[test]
fn the_last_owner_of_a_shared_block_writes_in_place() {
    let mut manager = BlockManager::new(2, BLOCK_SIZE);
    let (mut parent, mut child) = (BlockTable::default(), BlockTable::default());
    manager.grow(&mut parent, 2).unwrap();
    manager.fork(&parent, 1, &mut child);
    let copy = manager.make_writable(&mut child, 2).unwrap().unwrap();
    assert_eq!((copy.from, copy.to), (0, 1));
    assert_eq!(manager.make_writable(&mut parent, 2), Ok(None));
    manager.check_invariants([&parent, &child]);
}

#[test]
#[should_panic(expected = "a fork starts from an empty table")]
fn forking_onto_live_blocks_is_refused() {
    let mut manager = BlockManager::new(2, BLOCK_SIZE);
    let (mut parent, mut child) = (BlockTable::default(), BlockTable::default());
    manager.grow(&mut parent, 1).unwrap();
    manager.grow(&mut child, 1).unwrap();
    manager.fork(&parent, 1, &mut child);
}
