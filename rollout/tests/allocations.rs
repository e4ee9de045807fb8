//! The decode loop takes no memory: steps in which nothing starts and nothing ends allocate nothing, on any thread.

// The counter of this program's allocations.
#![allow(unsafe_code)]

#[path = "engine/support.rs"]
#[allow(dead_code)]
mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};
use support::{FORMATS, Model, engine_with};
use temper_actor::Family;
use temper_proto::GroupRequest;
use temper_rollout::{Engine, EngineConfig, PolicyModel};
use temper_types::{GroupId, SamplingParams};

struct Counting;

static COUNT: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call is handed to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's contract is the system allocator's.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract is the system allocator's.
        unsafe { System.dealloc(ptr, layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        COUNT.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's contract is the system allocator's.
        unsafe { System.realloc(ptr, layout, new_size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Laws of every kind: plain, truncated, with penalties, with bans that depend on what came before.
fn laws() -> [SamplingParams; 4] {
    let plain = SamplingParams { max_new_tokens: 90, ..SamplingParams::default() };
    [
        SamplingParams { top_p: 0.9, top_k: 20, min_p: 0.01, ..plain.clone() },
        SamplingParams {
            repetition_penalty: 1.2,
            presence_penalty: 0.1,
            logit_bias: [(3, 0.5)].into(),
            ..plain.clone()
        },
        SamplingParams {
            bad_words_ids: vec![vec![5], vec![7, 9]],
            stop_token_ids: vec![60],
            min_new_tokens: 90,
            ..plain.clone()
        },
        plain,
    ]
}

/// Allocations of 40 steps in which every sample draws and none ends.
fn count_allocations(
    engine: &mut Engine<PolicyModel>,
    (num_groups, num_samples): (u64, u64),
    law: &SamplingParams,
) -> u64 {
    let request = |id: u64| GroupRequest {
        group_id: GroupId(id),
        prompt_token_ids: (0..33).map(|i| (i * 5 + id as u32) % 61).collect(),
        seeds: (0..num_samples).collect(),
        sampling: law.clone(),
        ..GroupRequest::default()
    };
    engine.submit((0..num_groups).map(request).collect()).expect("they fit");
    // Every thread has met every kernel by then.
    (0..12).for_each(|_| engine.step().expect("it generates"));
    let before = COUNT.load(Ordering::Relaxed);
    (0..40).for_each(|_| engine.step().expect("it generates"));
    assert_eq!(engine.num_open_groups() as u64, num_groups, "nothing ended");
    COUNT.load(Ordering::Relaxed) - before
}

#[test]
fn steps_of_the_decode_loop_allocate_nothing() {
    for format in FORMATS {
        for law in laws() {
            for shape in [(1, 1), (1, 8), (5, 7)] {
                let model = Model { seed: 1, family: Family::Llama, format };
                let mut engine = engine_with(model, &EngineConfig { block_size: 16, ..EngineConfig::default() });
                let count = count_allocations(&mut engine, shape, &law);
                assert_eq!(count, 0, "{format:?}, {shape:?} samples, {law:?}");
            }
        }
    }
}
