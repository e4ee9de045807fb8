//! The scheduler's laws under random submits, steps, ends and aborts.

use super::{GroupShape, Scheduler, SeqKey};
use crate::{BlockHash, SchedulerLimits};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// What must be true between any two calls.
fn check_invariants(scheduler: &Scheduler) {
    scheduler.blocks.check_invariants(scheduler.sequences.iter().map(|s| &s.table));
    let rank = |key: &SeqKey| scheduler.sequences[key.index()].rank;
    assert!(scheduler.running.iter().map(rank).is_sorted_by(|a, b| a < b), "running is sorted");
    assert!(scheduler.waiting.iter().map(rank).is_sorted_by(|a, b| a < b), "waiting is sorted");
    assert!(scheduler.running.len() <= scheduler.limits.max_num_seqs);
    let open = || scheduler.running.iter().chain(&scheduler.waiting).map(rank);
    let oldest = scheduler.groups.keys().next().copied();
    assert_eq!(oldest, open().map(|rank| rank.arrival).min());
    for (arrival, group) in &scheduler.groups {
        assert_eq!(group.num_open, open().filter(|rank| rank.arrival == *arrival).count());
    }
    let first = [scheduler.running.first(), scheduler.waiting.front()].into_iter().flatten().map(rank).min();
    assert_eq!(first.map(|rank| rank.arrival), oldest, "the oldest group comes first");
    for rank in open() {
        assert_eq!(rank.is_younger, Some(rank.arrival) != oldest);
    }
    for key in &scheduler.waiting {
        let sequence = &scheduler.sequences[key.index()];
        assert_eq!((sequence.table.blocks().len(), sequence.num_computed), (0, 0), "a waiting sequence has no block");
        assert!(!scheduler.running.contains(key), "a sequence waits or runs");
    }
    for key in &scheduler.running {
        let sequence = &scheduler.sequences[key.index()];
        assert!(sequence.num_computed < sequence.len, "a running sequence has a row to compute");
        assert!(sequence.table.blocks().len() * scheduler.limits.block_size >= sequence.num_computed);
        let num_verified = sequence.num_computed.min(sequence.len) / scheduler.limits.block_size;
        let mut unverified = sequence.table.blocks().iter().skip(num_verified);
        assert!(unverified.all(|block| !scheduler.blocks.is_cached(*block)), "cached blocks are full and verified");
    }
}

/// What must be true of a plan.
fn check_plan(scheduler: &Scheduler) {
    let plan = scheduler.plan();
    assert!(plan.num_rows() <= scheduler.limits.max_batch_tokens, "the budget holds");
    assert!(plan.num_rows() > 0, "a step with work to do computes a row");
    let oldest = scheduler.running[0];
    assert!(plan.work.iter().any(|work| work.key == oldest), "the oldest running sequence progresses");
    let mut written = BTreeSet::new();
    for work in &plan.work {
        let sequence = &scheduler.sequences[work.key.index()];
        assert_eq!(work.first_slot, sequence.num_computed);
        assert!(scheduler.running.contains(&work.key), "nothing planned is preempted");
        for slot in work.first_slot..work.first_slot + work.num_rows {
            assert!(scheduler.blocks.is_writable(&sequence.table, slot), "written blocks have one owner");
            let block = sequence.table.blocks()[slot / scheduler.limits.block_size];
            assert!(written.insert((block, slot % scheduler.limits.block_size)), "a slot is written once");
        }
    }
    let drawing: BTreeSet<SeqKey> = plan.draws.iter().map(|draw| draw.key).collect();
    assert_eq!(drawing.len(), plan.draws_by_sequence().count(), "the draws of a sequence follow each other");
    for draws in plan.draws_by_sequence() {
        let sequence = &scheduler.sequences[draws[0].key.index()];
        assert!(draws.len() <= 1 + sequence.num_drafted, "no more is verified than was proposed");
        for (draw, slot) in draws.iter().zip(sequence.len..) {
            assert_eq!((draw.slot, draw.row), (slot, draws[0].row + (slot - sequence.len) as u32));
            assert!(slot <= sequence.max_slots, "no row behind the last that can count");
        }
    }
}

#[derive(Debug, Clone)]
enum Op {
    Submit(GroupShape),
    /// Run one step with `num_drafted` tokens proposed for each sequence, of which up to `num_accepted` come true;
    /// sequences whose key divides by `stop_every` stop early.
    Step {
        stop_every: usize,
        num_drafted: usize,
        num_accepted: usize,
    },
    /// Queue a group whose samples have this many tokens of an earlier round and may draw so many in this one.
    GoOn(GroupShape, usize, usize),
    /// Drop the open sequence at this position.
    Abort(usize),
    /// New weights: every block gets another name.
    Refit,
}

fn op() -> impl Strategy<Value = Op> {
    let (lengths, service) = ((1usize..40, 1usize..30, 1usize..6), (-2i32..3, prop::option::of(0usize..40)));
    let shape =
        (lengths, service).prop_map(|((prompt_len, max_new_tokens, num_samples), (priority, reserve_tokens))| {
            GroupShape { prompt_len, max_new_tokens, num_samples, priority, reserve_tokens }
        });
    let round = (shape.clone(), 1usize..20, 1usize..9);
    prop_oneof![
        1 => shape.prop_map(Op::Submit),
        1 => round.prop_map(|(shape, num_begun, round)| Op::GoOn(shape, num_begun, round)),
        5 => (7usize..40, 0usize..9, 0usize..9).prop_map(|(stop_every, num_drafted, num_accepted)| {
            Op::Step { stop_every, num_drafted, num_accepted }
        }),
        1 => (0usize..64).prop_map(Op::Abort),
        1 => Just(Op::Refit),
    ]
}

fn limits() -> impl Strategy<Value = SchedulerLimits> {
    (1usize..7, 1usize..20, 1usize..12, 4usize..30, 0usize..3, 0usize..20).prop_map(
        |(max_num_seqs, spare, prefill_chunk, num_blocks, watermark_blocks, reserve_tokens)| SchedulerLimits {
            max_num_seqs,
            max_batch_tokens: max_num_seqs + spare,
            prefill_chunk,
            block_size: 4,
            num_blocks,
            watermark_blocks,
            reserve_tokens,
        },
    )
}

/// A scheduler with a record of how many tokens each open sequence may still draw.
struct World {
    scheduler: Scheduler,
    left: BTreeMap<SeqKey, usize>,
    /// What the names of a sequence's own blocks begin with.
    names: BTreeMap<SeqKey, u128>,
    next_name: u128,
    version: u128,
}

impl World {
    fn step(&mut self, stop_every: usize, num_drafted: usize, num_accepted: usize) {
        self.scheduler.clear_drafts();
        self.left.keys().for_each(|key| self.scheduler.propose(*key, num_drafted));
        self.scheduler.schedule();
        check_plan(&self.scheduler);
        self.scheduler.commit();
        let drawn: Vec<(SeqKey, usize)> =
            self.scheduler.plan().draws_by_sequence().map(|draws| (draws[0].key, draws.len())).collect();
        for (key, num_draws) in drawn {
            let left = self.left.get_mut(&key).expect("an open sequence draws");
            let num_kept = num_draws.min(1 + num_accepted);
            *left -= num_kept;
            let left = *left;
            // Their names come first, as the engine gives them.
            self.name_blocks(key, num_kept);
            self.scheduler.append(key, num_kept);
            if left == 0 || (key.index() + left).is_multiple_of(stop_every) {
                self.left.remove(&key);
                self.scheduler.remove(key);
            }
        }
    }

    /// Name the full blocks of what is known and of `num_new` tokens behind it: all prompts begin the same, and no
    /// response does.
    fn name_blocks(&mut self, key: SeqKey, num_new: usize) {
        let (sequence, block_size) = (&self.scheduler.sequences[key.index()], self.scheduler.limits.block_size);
        let (num_full, num_prompt) = ((sequence.len + num_new) / block_size, sequence.prompt_len / block_size);
        self.scheduler.clear_hashes(key);
        for at in 0..num_full {
            let owner = if at < num_prompt { 0 } else { self.names[&key] };
            self.scheduler.push_hash(key, BlockHash(self.version << 96 | owner << 64 | at as u128));
        }
    }

    fn submit(&mut self, shape: GroupShape, num_begun: usize, round: usize) {
        for key in self.scheduler.submit(shape) {
            self.next_name += 1;
            self.names.insert(key, self.next_name);
            if num_begun > 0 {
                self.scheduler.go_on(key, num_begun, round);
            }
            self.name_blocks(key, 0);
            self.left.insert(key, round.min(shape.max_new_tokens - num_begun));
        }
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Submit(shape) | Op::GoOn(shape, ..) if self.scheduler.excess_blocks(shape).is_some() => {}
            Op::Submit(shape) => self.submit(shape, 0, usize::MAX),
            Op::GoOn(shape, num_begun, round) => self.submit(shape, num_begun.min(shape.max_new_tokens - 1), round),
            Op::Step { stop_every, num_drafted, num_accepted } if !self.left.is_empty() => {
                self.step(stop_every, num_drafted, num_accepted);
            }
            Op::Step { .. } => {}
            Op::Abort(which) => {
                let victim = self.left.keys().nth(which % self.left.len().max(1)).copied();
                if let Some(key) = victim {
                    self.left.remove(&key);
                    self.scheduler.remove(key);
                }
            }
            Op::Refit => {
                self.version += 1;
                self.scheduler.invalidate_cache(|_| false);
                let open: Vec<SeqKey> = self.left.keys().copied().collect();
                open.into_iter().for_each(|key| self.name_blocks(key, 0));
            }
        }
        check_invariants(&self.scheduler);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// The invariants hold after every call, also where samples go on and restart from cached blocks of their own;
    /// everything submitted ends, and the pool is whole afterwards.
    #[test]
    fn random_lives_keep_every_invariant(limits in limits(), ops in prop::collection::vec(op(), 1..80)) {
        let mut world = World {
            scheduler: Scheduler::new(limits),
            left: BTreeMap::new(),
            names: BTreeMap::new(),
            next_name: 0,
            version: 0,
        };
        ops.iter().for_each(|op| world.apply(op));
        let mut steps = 0;
        while !world.left.is_empty() {
            world.apply(&Op::Step { stop_every: usize::MAX, num_drafted: 3, num_accepted: 1 });
            steps += 1;
            prop_assert!(steps < 100_000, "the queue drains");
        }
        prop_assert!(world.scheduler.is_idle());
        prop_assert_eq!(world.scheduler.blocks().num_used(), 0);
    }
}

fn roomy() -> SchedulerLimits {
    SchedulerLimits {
        max_num_seqs: 32,
        max_batch_tokens: 64,
        prefill_chunk: 16,
        block_size: 4,
        num_blocks: 400,
        watermark_blocks: 4,
        reserve_tokens: 16,
    }
}

#[test]
fn a_group_computes_its_prompt_once_and_shares_it() {
    let mut scheduler = Scheduler::new(roomy());
    let keys =
        scheduler.submit(GroupShape { prompt_len: 22, max_new_tokens: 8, num_samples: 5, ..GroupShape::default() });
    for (first_slot, num_rows) in [(0, 16), (16, 6)] {
        let plan = scheduler.schedule();
        assert_eq!(plan.work.len(), 1);
        assert_eq!((plan.work[0].first_slot, plan.work[0].num_rows), (first_slot, num_rows));
        scheduler.commit();
    }
    let drawn: Vec<(SeqKey, u32, usize)> = scheduler.plan().draws.iter().map(|d| (d.key, d.row, d.slot)).collect();
    assert_eq!(drawn, keys.iter().map(|&key| (key, 5, 22)).collect::<Vec<_>>(), "all draw from the prompt's last row");
    assert_eq!((scheduler.blocks().num_used(), scheduler.stats().num_prefill_tokens), (6, 22));
    keys.iter().for_each(|&key| scheduler.append(key, 1));
    let plan = scheduler.schedule();
    assert_eq!((plan.work.len(), plan.copies.len()), (5, 4), "the last owner of the half-full block writes in place");
    check_invariants(&scheduler);
}

#[test]
fn decode_rows_come_before_prefill_and_both_fit_the_budget() {
    let limits = SchedulerLimits { max_batch_tokens: 40, ..roomy() };
    let mut scheduler = Scheduler::new(limits);
    let keys =
        scheduler.submit(GroupShape { prompt_len: 4, max_new_tokens: 8, num_samples: 30, ..GroupShape::default() });
    scheduler.schedule();
    scheduler.commit();
    keys.iter().for_each(|&key| scheduler.append(key, 1));
    scheduler.submit(GroupShape { prompt_len: 40, max_new_tokens: 8, num_samples: 1, ..GroupShape::default() });
    let rows: Vec<usize> = scheduler.schedule().work.iter().map(|work| work.num_rows).collect();
    assert_eq!(rows, [vec![1; 30], vec![10]].concat());
}

#[test]
fn the_youngest_gives_way_and_the_oldest_goes_on() {
    let limits = SchedulerLimits { num_blocks: 4, watermark_blocks: 0, reserve_tokens: 0, ..roomy() };
    let mut scheduler = Scheduler::new(limits);
    let shape = GroupShape { prompt_len: 8, max_new_tokens: 8, num_samples: 1, ..GroupShape::default() };
    let (old, young) = (scheduler.submit(shape)[0], scheduler.submit(shape)[0]);
    scheduler.schedule();
    scheduler.commit();
    [old, young].into_iter().for_each(|key| scheduler.append(key, 1));
    let plan = scheduler.schedule();
    assert_eq!(plan.num_preempted, 1);
    assert_eq!(plan.work.iter().map(|work| work.key).collect::<Vec<_>>(), [old]);
    assert!(scheduler.block_table(young).is_empty());
    check_invariants(&scheduler);
}

#[test]
fn what_can_never_fit_is_known_at_submit() {
    let scheduler = Scheduler::new(SchedulerLimits { num_blocks: 4, ..roomy() });
    let shape = |max_new_tokens| GroupShape { prompt_len: 10, max_new_tokens, num_samples: 1, ..GroupShape::default() };
    assert_eq!(scheduler.excess_blocks(shape(7)), None, "the last token is never stored");
    assert_eq!(scheduler.excess_blocks(shape(8)), Some(5));
}

#[test]
fn a_higher_priority_goes_first_and_the_oldest_goes_on() {
    let limits = SchedulerLimits { max_num_seqs: 2, ..roomy() };
    let mut scheduler = Scheduler::new(limits);
    let shape =
        |priority| GroupShape { prompt_len: 4, max_new_tokens: 8, num_samples: 1, priority, reserve_tokens: None };
    let [first, low, high, higher] = [0, -1, 2, 5].map(|priority| scheduler.submit(shape(priority))[0]);
    let step = |scheduler: &mut Scheduler| {
        scheduler.schedule();
        scheduler.commit();
        let drawn: Vec<SeqKey> = scheduler.plan().draws.iter().map(|draw| draw.key).collect();
        drawn.iter().for_each(|key| scheduler.append(*key, 1));
        check_invariants(scheduler);
        drawn
    };
    assert_eq!(step(&mut scheduler), [first, higher], "the oldest, then the highest");
    scheduler.remove(higher);
    assert_eq!(step(&mut scheduler), [first, high]);
    scheduler.remove(first);
    let later = scheduler.submit(shape(9))[0];
    assert_eq!(step(&mut scheduler), [high, low], "the low one is the oldest now, and no later one passes it");
    scheduler.remove(high);
    assert_eq!(step(&mut scheduler), [low, later]);
}

/// A pool of 8 blocks admits as many samples as their reserves fit, not as their caps say.
#[test]
fn a_known_length_is_what_admission_reserves() {
    let limits = SchedulerLimits { num_blocks: 8, watermark_blocks: 0, reserve_tokens: 100, ..roomy() };
    let shape = |reserve_tokens| GroupShape {
        prompt_len: 4,
        max_new_tokens: 28,
        num_samples: 4,
        reserve_tokens,
        ..GroupShape::default()
    };
    for (reserve_tokens, num_started) in [(None, 1), (Some(4), 4), (Some(9), 2), (Some(10_000), 1)] {
        let mut scheduler = Scheduler::new(limits);
        scheduler.submit(shape(reserve_tokens));
        scheduler.schedule();
        scheduler.commit();
        assert_eq!(scheduler.num_running(), num_started, "{reserve_tokens:?}");
    }
}
