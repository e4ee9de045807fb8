//! The decode loop takes no memory: steps in which nothing starts, nothing ends and nothing is drafted allocate
//! nothing, on any thread. Drafters' indexes grow with what they are shown.

// The counter of this program's allocations.
#![allow(unsafe_code)]

#[path = "engine/support.rs"]
mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};
use support::{FORMATS, Model, engine_of, run_all};
use temper_proto::GroupRequest;
use temper_rollout::{Engine, PolicyModel};
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

fn requests((num_groups, num_samples): (u64, u64), law: &SamplingParams) -> Vec<GroupRequest> {
    let request = |id: u64| GroupRequest {
        group_id: GroupId(id),
        prompt_token_ids: (0..33).map(|i| (i * 5 + id as u32) % 61).collect(),
        seeds: (0..num_samples).collect(),
        sampling: law.clone(),
        ..GroupRequest::default()
    };
    (0..num_groups).map(request).collect()
}

/// Allocations of 40 steps in which every sample draws and none ends.
fn count_allocations(engine: &mut Engine<PolicyModel>, shape: (u64, u64), law: &SamplingParams) -> u64 {
    // Every thread meets every kernel.
    run_all(engine, requests(shape, law));
    engine.submit(requests(shape, law)).expect("they fit");
    (0..4).for_each(|_| engine.step().expect("it generates"));
    let before = COUNT.load(Ordering::Relaxed);
    (0..40).for_each(|_| engine.step().expect("it generates"));
    assert_eq!(engine.num_open_groups() as u64, shape.0, "nothing ended");
    COUNT.load(Ordering::Relaxed) - before
}

#[test]
fn steps_of_the_decode_loop_allocate_nothing() {
    for format in FORMATS {
        for law in laws() {
            for shape in [(1, 1), (1, 8), (5, 7)] {
                let mut engine = engine_of(Model { format, ..Model::llama(1) });
                let count = count_allocations(&mut engine, shape, &law);
                assert_eq!(count, 0, "{format:?}, {shape:?} samples, {law:?}");
            }
        }
    }
}
