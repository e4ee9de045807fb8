//! Groups of any priority that come, are aborted at any step, and share a pool of any size, over a model that fails now
//! and then and whose weights change between them: those that end say what they would have said alone, those that are
//! aborted say the beginning of it, and nothing is left behind.

use super::fake_model::respond_under;
use super::tests::{engine, request, roomy, run};
use crate::SchedulerLimits;
use crate::speculation::{Budget, Drafter, ReplayDrafter, Speculation, SpeculationConfig, Speculative, SuffixDrafter};
use proptest::prelude::*;
use std::collections::BTreeMap;
use temper_proto::{GroupRequest, GroupResult};
use temper_types::{ContentHash, FinishReason, GroupId, PolicyVersion};

const CONFIG: SpeculationConfig =
    SpeculationConfig { speculative: Speculative::Auto, max_draft_tokens: 7, history_epochs: 2, history_tokens: 5000 };

/// What happens to a group: when it comes and, where it is aborted, how many steps later.
#[derive(Debug, Clone)]
struct Life {
    request: GroupRequest,
    submitted_at: usize,
    aborted_after: Option<usize>,
    /// The weights under which it came.
    version: PolicyVersion,
}

fn lives() -> impl Strategy<Value = Vec<Life>> {
    let shape = (1usize..40, 1u64..5, 1u32..30, -2i32..3);
    let life = (shape, 0usize..40, prop::option::weighted(0.4, 0usize..40));
    prop::collection::vec(life, 1..9).prop_map(|lives| {
        let one = |(((prompt_len, num_samples, new, priority), submitted_at, aborted_after), id)| {
            // Every other group repeats a prompt, so that lengths and prefixes are known.
            let request =
                GroupRequest { group_id: GroupId(id), priority, ..request(id / 2, prompt_len, num_samples, new) };
            Life { request, submitted_at, aborted_after, version: PolicyVersion::default() }
        };
        lives.into_iter().zip(0..).map(one).collect()
    })
}

fn check(life: &Life, result: &GroupResult) {
    let len = life.request.sampling.max_new_tokens as usize;
    for (index, sample) in result.samples.iter().enumerate() {
        let (token_ids, log_probs) = respond_under(&life.request, index, life.version);
        let kept = sample.token_ids.len();
        assert_eq!((&sample.token_ids[..], &sample.log_probs[..]), (&token_ids[..kept], &log_probs[..kept]));
        let is_whole = sample.finish_reason == FinishReason::Length;
        assert_eq!(is_whole, kept == len, "a sample is whole or aborted");
        assert!(is_whole || life.aborted_after.is_some(), "nothing is aborted unasked");
    }
    assert_eq!(result.samples.len(), life.request.seeds.len());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whoever_comes_and_goes_the_others_say_the_same(
        mut lives in lives(),
        (is_drafting, fails_every) in (any::<bool>(), 2usize..9),
        (max_num_seqs, spare, prefill_chunk, spare_blocks) in (1usize..9, 1usize..40, 1usize..40, 0usize..9),
    ) {
        let limits = SchedulerLimits {
            max_num_seqs, max_batch_tokens: max_num_seqs + spare, prefill_chunk, num_blocks: 5 + spare_blocks,
            watermark_blocks: 1, reserve_tokens: 8, ..roomy()
        };
        let mut engine = engine(limits);
        if is_drafting {
            let (replay, suffix) = (ReplayDrafter::new(7), SuffixDrafter::new(7));
            let drafters: Vec<Box<dyn Drafter>> = vec![Box::new(replay), Box::new(suffix)];
            engine.set_speculation(Some(Speculation::with_drafters(CONFIG, drafters, Budget::all())));
        }
        let mut results: BTreeMap<GroupId, GroupResult> = BTreeMap::new();
        let mut take = |result: GroupResult| {
            assert!(results.insert(result.group_id, result).is_none(), "a group ends once");
        };
        for step in 0..90 {
            // New weights whenever nothing runs: what a later prompt finds in the cache must not be of the old ones.
            if engine.is_idle() {
                let version = &mut engine.model_mut().version;
                let number = version.number + 1;
                *version = PolicyVersion { number, hash: ContentHash([number as u8; 16]) };
            }
            let today = engine.model().version;
            for life in &mut lives {
                if life.submitted_at == step {
                    life.version = today;
                    engine.submit(vec![life.request.clone()]).unwrap();
                }
                if life.aborted_after.is_some_and(|after| life.submitted_at + after == step) {
                    let in_use = engine.stats().kv_blocks_in_use;
                    engine.abort(life.request.group_id).into_iter().for_each(&mut take);
                    prop_assert!(engine.stats().kv_blocks_in_use <= in_use);
                }
            }
            engine.model_mut().fails = step % fails_every == 0;
            prop_assert_eq!(engine.step().is_err(), engine.model().fails && !engine.is_idle());
            engine.model_mut().fails = false;
            std::iter::from_fn(|| engine.pop_finished()).for_each(&mut take);
        }
        run(&mut engine).into_iter().for_each(&mut take);
        for life in &lives {
            check(life, &results[&life.request.group_id]);
        }
        let stats = engine.stats();
        prop_assert_eq!(results.len(), lives.len());
        prop_assert_eq!((stats.kv_blocks_in_use, stats.num_requests_running, stats.num_requests_waiting), (0, 0, 0));
        prop_assert!(engine.samples.iter().all(Option::is_none) && engine.groups.is_empty());
    }
}
