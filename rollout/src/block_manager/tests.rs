//! The block manager against a naive model that stores the contents of every block.

use super::{BlockManager, BlockTable};
use proptest::prelude::*;

const BLOCK_SIZE: usize = 4;
const NUM_BLOCKS: usize = 12;

#[derive(Debug, Clone)]
enum Op {
    /// Append so many tokens to sequence `which`.
    Append { which: usize, count: usize },
    /// Fork a new sequence off the first tokens of sequence `which`.
    Fork { which: usize, keep: usize },
    /// End sequence `which`.
    Release { which: usize },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0usize..8, 1usize..9).prop_map(|(which, count)| Op::Append { which, count }),
        2 => (0usize..8, 0usize..40).prop_map(|(which, keep)| Op::Fork { which, keep }),
        1 => (0usize..8).prop_map(|which| Op::Release { which }),
    ]
}

/// A sequence under test: its table, and the tokens that a reader of the table must find.
#[derive(Default)]
struct Sequence {
    table: BlockTable,
    tokens: Vec<u64>,
}

/// The pool with the contents of its slots, as a device would hold them.
struct World {
    manager: BlockManager,
    memory: Vec<u64>,
    sequences: Vec<Sequence>,
    next_token: u64,
}

impl World {
    fn new() -> Self {
        World {
            manager: BlockManager::new(NUM_BLOCKS, BLOCK_SIZE),
            memory: vec![0; NUM_BLOCKS * BLOCK_SIZE],
            sequences: vec![Sequence::default()],
            next_token: 1,
        }
    }

    fn append_one(&mut self, which: usize) -> bool {
        let Sequence { table, tokens } = &mut self.sequences[which];
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
        self.memory[table.blocks()[slot / BLOCK_SIZE] as usize * BLOCK_SIZE + slot % BLOCK_SIZE] = self.next_token;
        tokens.push(self.next_token);
        self.next_token += 1;
        true
    }

    fn fork(&mut self, which: usize, keep: usize) {
        let parent = &self.sequences[which];
        let keep = keep.min(parent.tokens.len());
        let mut child = Sequence { table: BlockTable::default(), tokens: parent.tokens[..keep].to_vec() };
        let used = self.manager.num_used();
        self.manager.fork(&parent.table, keep.div_ceil(BLOCK_SIZE), &mut child.table);
        assert_eq!(self.manager.num_used(), used, "a fork takes no block");
        self.sequences.push(child);
    }

    fn apply(&mut self, op: &Op) {
        let pick = |which: usize| which % self.sequences.len();
        match *op {
            Op::Append { which, count } => {
                let which = pick(which);
                let _ = (0..count).all(|_| self.append_one(which));
            }
            Op::Fork { which, keep } => self.fork(pick(which), keep),
            Op::Release { which } => {
                let which = pick(which);
                self.manager.release(&mut self.sequences[which].table);
                self.sequences[which].tokens.clear();
            }
        }
    }

    fn check(&self) {
        self.manager.check_invariants(self.sequences.iter().map(|s| &s.table));
        for sequence in &self.sequences {
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
