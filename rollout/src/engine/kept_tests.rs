//! A sample that keeps its K/V attends to what older weights stored, to nothing else of theirs, and nobody else does.

use super::Engine;
use super::fake_model::{FakeModel, respond_behind, respond_under};
use super::rounds_tests::{Partial, drafting, round};
use super::tests::{engine, request, roomy, run};
use crate::SchedulerLimits;
use proptest::prelude::*;
use temper_proto::GroupRequest;
use temper_types::{ContentHash, FinishReason, PolicyVersion};

fn version(number: u64) -> PolicyVersion {
    PolicyVersion { number, hash: ContentHash([number as u8; 16]) }
}

fn keeping(id: u64, prompt_len: usize, num_samples: u64, max_new_tokens: u32) -> GroupRequest {
    GroupRequest { keep_kv: true, ..request(id, prompt_len, num_samples, max_new_tokens) }
}

/// What stored the slots of one sample: the version of every full block that it kept, from the first on.
type Blocks = Vec<PolicyVersion>;

/// Check a round of `group` under `today` against what the pool read back: of each sample, which has `begun` tokens
/// before it, the blocks of `blocks` are kept. Gives the blocks that stand in the pool behind it.
fn check_round(
    group: &Partial,
    (begun, blocks): (&[Vec<u32>], &[Blocks]),
    (block_size, today): (usize, PolicyVersion),
) -> Result<Vec<Blocks>, TestCaseError> {
    let mut after = Vec::new();
    for ((sample, begun), blocks) in group.samples.iter().zip(begun).zip(blocks) {
        let index = sample.sample_index.0 as usize;
        let num_before = group.request.prompt_token_ids.len() + begun.len();
        let kept = &blocks[..blocks.len().min((num_before - 1) / block_size)];
        let version_at = |slot: usize| kept.get(slot / block_size).copied().unwrap_or(today);
        let new = &sample.token_ids[begun.len()..];
        if !new.is_empty() {
            let (tokens, log_probs) = respond_behind(&group.request, index, begun, version_at);
            prop_assert_eq!(new, &tokens[..new.len()]);
            prop_assert_eq!(&sample.log_probs[begun.len()..], &log_probs[..new.len()]);
            let num_old = kept.iter().filter(|version| **version != today).count();
            prop_assert_eq!(sample.num_kept as usize, num_old * block_size);
        }
        let num_full = (num_before + new.len() - 1) / block_size;
        after.push((0..num_full).map(|block| version_at(block * block_size)).collect());
    }
    Ok(after)
}

fn begun(group: &Partial) -> Vec<Vec<u32>> {
    match group.samples.len() {
        0 => vec![Vec::new(); group.request.seeds.len()],
        _ => group.samples.iter().map(|sample| sample.token_ids.clone()).collect(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    /// Over any number of changes of weights, with chunks and drafts, beside prompts that begin with what the group was
    /// asked and answered, and find nothing of other weights. Where weights come back, all that was kept is forgotten.
    #[test]
    fn what_is_kept_is_what_was_stored(
        shapes in prop::collection::vec((1usize..60, 1u64..5, 2u32..60), 1..4),
        round_tokens in 1u32..25,
        versions in prop::collection::vec(0u64..3, 60),
        (prefill_chunk, block_size, has_drafts) in (1usize..40, 1usize..20, any::<bool>()),
    ) {
        let limits = SchedulerLimits { prefill_chunk, block_size, num_blocks: 2000, ..roomy() };
        let mut engine = engine(limits);
        if has_drafts {
            drafting(&mut engine);
        }
        let new_group = |(&(len, n, max), id): (&(usize, u64, u32), u64)| Partial::new(&keeping(id, len, n, max));
        let mut groups: Vec<Partial> = shapes.iter().zip(0..).map(new_group).collect();
        let mut blocks: Vec<Vec<Blocks>> = groups.iter().map(|g| vec![Vec::new(); g.request.seeds.len()]).collect();
        for (number, id) in versions.into_iter().zip(100..) {
            if groups.iter().all(Partial::is_complete) {
                break;
            }
            let last = std::mem::replace(&mut engine.model_mut().version, version(number));
            if number < last.number {
                blocks.iter_mut().flatten().for_each(Vec::clear);
            }
            let before: Vec<Option<Vec<Vec<u32>>>> =
                groups.iter().map(|group| (!group.is_complete()).then(|| begun(group))).collect();
            round(&mut engine, &mut groups, round_tokens);
            for ((group, before), blocks) in groups.iter().zip(&before).zip(&mut blocks) {
                if let Some(before) = before {
                    *blocks = check_round(group, (before, &blocks[..]), (block_size, version(number)))?;
                }
            }
            check_fresh(&mut engine, &groups[0], (id, version(number)))?;
        }
        prop_assert_eq!(engine.stats().kv_blocks_in_use, 0);
    }

    /// Where the pool gave some of it away, before the round or while it waited, the rest is what was stored, and what
    /// is computed anew is of today: a sample goes on over some number of old blocks.
    #[test]
    fn what_was_evicted_is_computed_anew(
        (prompt_len, num_samples, first, max_new_tokens) in (1usize..40, 1u64..5, 1u32..30, 2u32..30),
        (other_len, other_samples, other_new) in (1usize..60, 1u64..4, 1u32..40),
        (spare_blocks, is_beside) in (0usize..20, any::<bool>()),
    ) {
        let longest = (prompt_len + first as usize + max_new_tokens as usize).max(other_len + other_new as usize);
        let mut engine = engine(SchedulerLimits {
            block_size: 8, num_blocks: longest / 8 + 2 + spare_blocks, watermark_blocks: 0, reserve_tokens: 0, ..roomy()
        });
        let mut group = Partial::new(&keeping(0, prompt_len, num_samples, first + max_new_tokens));
        round(&mut engine, std::slice::from_mut(&mut group), first);
        engine.model_mut().version = version(1);
        let begun = begun(&group);
        let other = request(9, other_len, other_samples, other_new);
        engine.submit(vec![other.clone()]).unwrap();
        let mut results = if is_beside { Vec::new() } else { run(&mut engine) };
        let num_preempted = engine.stats().num_preemptions;
        engine.submit(vec![group.next_round(1 + max_new_tokens / 2)]).unwrap();
        results.extend(run(&mut engine));
        for sample in &results.iter().find(|r| r.group_id == other.group_id).expect("it ended").samples {
            let expected = respond_under(&other, sample.sample_index.0 as usize, version(1));
            prop_assert_eq!((&sample.token_ids, &sample.log_probs), (&expected.0, &expected.1));
        }
        let result = results.iter().find(|r| r.group_id == group.request.group_id).expect("it ended");
        for (sample, begun) in result.samples.iter().zip(&begun) {
            let num_kept = sample.num_kept as usize;
            prop_assert!(num_kept < prompt_len + begun.len());
            let version_at = |slot: usize| version(u64::from(slot >= num_kept));
            let expected = respond_behind(&group.request, sample.sample_index.0 as usize, begun, version_at);
            if engine.stats().num_preemptions == num_preempted {
                prop_assert_eq!(&sample.token_ids, &expected.0[..sample.token_ids.len()]);
            }
        }
        group.take(result.samples.clone(), 1 + max_new_tokens as usize / 2);
        // Nothing that was computed anew bears an old name.
        for number in [0, 1] {
            engine.model_mut().version = version(number);
            check_fresh(&mut engine, &group, (20 + number, version(number)))?;
        }
        prop_assert_eq!(engine.stats().kv_blocks_in_use, 0);
    }
}

/// A prompt that is what every sample of `group` has by now is answered as `today` answers it.
fn check_fresh(
    engine: &mut Engine<FakeModel>,
    group: &Partial,
    (id, today): (u64, PolicyVersion),
) -> Result<(), TestCaseError> {
    for (sample, at) in group.samples.iter().zip(0..) {
        let prompt_token_ids = [group.request.prompt_token_ids.as_slice(), &sample.token_ids].concat();
        let fresh = GroupRequest { prompt_token_ids, ..request(1000 * id + at, 1, 1, 3) };
        engine.submit(vec![fresh.clone()]).unwrap();
        let found = run(engine).remove(0).samples.remove(0);
        let (tokens, log_probs) = respond_under(&fresh, 0, today);
        prop_assert_eq!((found.token_ids, found.log_probs, found.num_kept), (tokens, log_probs, 0));
    }
    Ok(())
}

/// Under one version nothing is lost or gained.
#[test]
fn without_a_change_of_weights_it_is_the_uncut_response() {
    let mut groups = [Partial::new(&keeping(0, 40, 3, 50))];
    let mut keeping_engine = engine(roomy());
    while !groups[0].is_complete() {
        round(&mut keeping_engine, &mut groups, 7);
    }
    for sample in &groups[0].samples {
        let expected = respond_under(&groups[0].request, sample.sample_index.0 as usize, PolicyVersion::default());
        assert_eq!((&sample.token_ids, &sample.log_probs), (&expected.0, &expected.1));
        assert_eq!(sample.num_kept, 0);
    }
}

/// A round that goes on over kept K/V computes what fills no block, and its own rows.
#[test]
fn what_is_kept_is_not_computed() {
    let rows_of_second_round = |is_kept: bool| {
        let mut engine = engine(SchedulerLimits { block_size: 16, ..roomy() });
        let mut groups = [Partial::new(&GroupRequest { keep_kv: is_kept, ..request(0, 40, 2, 60) })];
        round(&mut engine, &mut groups, 31);
        engine.model_mut().version = version(1);
        let before = engine.stats().num_rows;
        round(&mut engine, &mut groups, 10);
        (engine.stats().num_rows - before, groups[0].samples[0].num_kept)
    };
    // 71 tokens are known of each sample, of 4 full blocks.
    assert_eq!(rows_of_second_round(true), (2 * (71 - 64 + 9), 64));
    let (anew, kept) = rows_of_second_round(false);
    assert!(kept == 0 && anew >= 71 + 9 * 2, "{anew} rows");
}

/// Whatever empties the pool, or other tokens under the same name: nothing is kept then, and nothing is mistaken.
#[test]
fn what_is_gone_or_of_other_tokens_is_not_taken() {
    type Change = fn(&mut Engine<FakeModel>, &mut Partial);
    let changes: [Change; 3] = [
        |engine, _| engine.clear_prefix_cache(),
        |engine, _| assert!(engine.sleep().unwrap() > 0),
        |_, group| group.samples.iter_mut().for_each(|sample| sample.token_ids[0] ^= 1),
    ];
    for change in changes {
        let mut engine = engine(roomy());
        let mut groups = [Partial::new(&keeping(0, 30, 1, 60))];
        round(&mut engine, &mut groups, 40);
        engine.model_mut().version = version(1);
        change(&mut engine, &mut groups[0]);
        let begun = begun(&groups[0]).remove(0);
        round(&mut engine, &mut groups, 0);
        let sample = &groups[0].samples[0];
        let expected = respond_behind(&groups[0].request, 0, &begun, |_| version(1));
        assert_eq!((&sample.token_ids[40..], sample.num_kept), (&expected.0[..], 0));
        assert_eq!(sample.finish_reason, FinishReason::Length);
    }
}

/// Nor is the prompt of a sibling that goes on over old K/V shared with one that does not.
#[test]
fn siblings_share_what_is_of_the_same_weights() {
    let mut engine = engine(roomy());
    let mut groups = [Partial::new(&keeping(0, 50, 2, 60))];
    round(&mut engine, &mut groups, 20);
    groups[0].samples[1].token_ids[0] ^= 1;
    let begun = begun(&groups[0]);
    engine.model_mut().version = version(1);
    round(&mut engine, &mut groups, 0);
    for ((sample, begun), num_kept) in groups[0].samples.iter().zip(&begun).zip([64, 0]) {
        assert_eq!(sample.num_kept, num_kept);
        let version_at = |slot: usize| version(u64::from(slot >= num_kept as usize));
        let expected = respond_behind(&groups[0].request, sample.sample_index.0 as usize, begun, version_at);
        assert_eq!(sample.token_ids[20..], expected.0);
    }
}

/// What stands in the pool of two versions under one name is kept by nobody.
#[test]
fn weights_that_change_in_the_middle_of_a_round_leave_nothing_to_keep() {
    let mut engine = engine(roomy());
    let group = keeping(0, 50, 2, 90);
    engine.submit(vec![GroupRequest { round_tokens: 40, ..group.clone() }]).unwrap();
    for number in 0..30 {
        engine.model_mut().version = version(number / 10);
        engine.step().unwrap();
    }
    let mut groups = [Partial { request: group, samples: run(&mut engine).remove(0).samples }];
    let begun = begun(&groups[0]);
    engine.model_mut().version = version(3);
    round(&mut engine, &mut groups, 0);
    for (sample, begun) in groups[0].samples.iter().zip(&begun) {
        let expected = respond_behind(&groups[0].request, sample.sample_index.0 as usize, begun, |_| version(3));
        assert_eq!((&sample.token_ids[40..], sample.num_kept), (&expected.0[..], 0));
    }
}

/// Groups that never come back are forgotten when the pool needs their blocks.
#[test]
fn what_nobody_takes_up_costs_no_memory_for_ever() {
    let mut engine = engine(SchedulerLimits { num_blocks: 12, block_size: 8, ..roomy() });
    for id in 0..200 {
        engine.submit(vec![GroupRequest { round_tokens: 5, ..keeping(id, 20, 2, 40) }]).unwrap();
        assert!(run(&mut engine)[0].samples.iter().all(|s| s.finish_reason == FinishReason::Paused));
        engine.model_mut().version = version(id);
    }
    let stats = engine.stats();
    assert_eq!((stats.kv_blocks_in_use, stats.num_requests_waiting), (0, 0));
    assert!(engine.kept.len() <= 12, "{} samples are remembered", engine.kept.len());
}
