//! The engine over a model that hashes what it reads.

use super::fake_model::{FakeModel, VOCAB, respond, respond_under};
use super::{Engine, EngineOptions};
use crate::speculation::{Speculation, Speculative};
use crate::{Clock, Error, SchedulerLimits, SpeculationConfig, TokenByteTable};
use proptest::prelude::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use temper_proto::{GroupRequest, GroupResult};
use temper_types::{ContentHash, FinishReason, GroupId, PolicyVersion, PromptId, SamplingParams};

/// A clock that advances one second with every look.
#[derive(Default)]
struct CountingClock(AtomicU64);

impl Clock for CountingClock {
    fn now(&self) -> Duration {
        Duration::from_secs(self.0.fetch_add(1, Ordering::Relaxed))
    }
}

pub(super) fn roomy() -> SchedulerLimits {
    SchedulerLimits {
        max_num_seqs: 16,
        max_batch_tokens: 64,
        prefill_chunk: 32,
        block_size: 16,
        num_blocks: 200,
        watermark_blocks: 2,
        reserve_tokens: 16,
    }
}

pub(super) fn engine(limits: SchedulerLimits) -> Engine<FakeModel> {
    let letters = (0..VOCAB).map(|id| vec![b'a' + (id % 26) as u8]).collect();
    let options = EngineOptions {
        limits,
        max_queued_samples: 1000,
        token_bytes: Some(Arc::new(TokenByteTable(letters))),
        clock: Arc::new(CountingClock::default()),
        worker: "test".to_owned(),
        speculation: SpeculationConfig::OFF,
        prefix_cache: true,
    };
    Engine::new(FakeModel::new(limits.num_blocks, limits.block_size), options)
}

pub(super) fn request(group: u64, prompt_len: usize, num_samples: u64, max_new_tokens: u32) -> GroupRequest {
    GroupRequest {
        group_id: GroupId(group),
        prompt_id: PromptId(group),
        epoch: 0,
        prompt_token_ids: (0..prompt_len as u32).map(|i| (i * 7 + group as u32) % VOCAB).collect(),
        seeds: (0..num_samples).map(|i| group * 1000 + i).collect(),
        sampling: SamplingParams { max_new_tokens, ..SamplingParams::default() },
        ..GroupRequest::default()
    }
}

pub(super) fn run(engine: &mut Engine<FakeModel>) -> Vec<GroupResult> {
    let mut results = Vec::new();
    while !engine.is_idle() {
        engine.step().unwrap();
        results.extend(std::iter::from_fn(|| engine.pop_finished()));
    }
    results.sort_by_key(|result| result.group_id);
    results
}

fn run_one(request: GroupRequest) -> GroupResult {
    let mut engine = engine(roomy());
    engine.submit(vec![request]).unwrap();
    run(&mut engine).remove(0)
}

fn bits(log_probs: &[f32]) -> Vec<u32> {
    log_probs.iter().map(|x| x.to_bits()).collect()
}

/// Every sample of every request is what [`respond`] says, and the pool is whole.
fn check_responses(engine: &mut Engine<FakeModel>, requests: &[GroupRequest]) {
    let results = run(engine);
    assert_eq!(results.len(), requests.len(), "one result per group");
    for request in requests {
        let result = results.iter().find(|r| r.group_id == request.group_id).expect("a result for every group");
        assert_eq!(result.samples.len(), request.seeds.len());
        for (index, sample) in result.samples.iter().enumerate() {
            let (token_ids, log_probs) = respond_under(request, index, engine.model().version);
            assert_eq!(sample.token_ids, token_ids, "group {} sample {index}", request.group_id);
            assert_eq!(bits(&sample.log_probs), bits(&log_probs));
            assert_eq!(sample.finish_reason, FinishReason::Length);
            assert_eq!((sample.sampled_log_probs.len(), sample.surviving_mass.len()), (0, 0));
        }
    }
    assert_eq!(engine.stats().kv_blocks_in_use, 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Responses do not depend on limits, arrival order or preemption.
    #[test]
    fn responses_are_a_function_of_the_request(
        shapes in prop::collection::vec((1usize..70, 1u64..8, 1u32..40), 1..7),
        (max_num_seqs, spare, prefill_chunk) in (1usize..20, 1usize..70, 1usize..40),
        (block_size, spare_blocks) in (prop::sample::select(vec![16usize, 32, 64]), 0usize..12),
        (watermark_blocks, reserve_tokens) in (0usize..3, 0usize..40),
        reversed in any::<bool>(),
        late in 0usize..4,
    ) {
        let mut requests: Vec<_> =
            shapes.iter().zip(0..).map(|(&(p, n, m), id)| request(id, p, n, m)).collect();
        let longest = shapes.iter().map(|&(p, _, m)| (p + m as usize - 1).div_ceil(block_size)).max().unwrap_or(1);
        if reversed {
            requests.reverse();
        }
        let max_batch_tokens = max_num_seqs + spare;
        let num_blocks = longest + spare_blocks;
        let mut engine = engine(SchedulerLimits {
            max_num_seqs, max_batch_tokens, prefill_chunk, block_size, num_blocks, watermark_blocks, reserve_tokens,
        });
        let late = late.min(requests.len());
        engine.submit(requests[late..].to_vec()).unwrap();
        for _ in 0..3 * late {
            engine.step().unwrap();
        }
        engine.submit(requests[..late].to_vec()).unwrap();
        check_responses(&mut engine, &requests);
        prop_assert!(engine.model().rows.iter().all(|&rows| rows <= max_batch_tokens));
    }
}

#[test]
fn a_tiny_pool_preempts_and_changes_nothing() {
    let requests: Vec<_> = (0..4).map(|id| request(id, 20, 3, 40)).collect();
    let mut engine = engine(SchedulerLimits { num_blocks: 9, watermark_blocks: 0, reserve_tokens: 0, ..roomy() });
    engine.submit(requests.clone()).unwrap();
    check_responses(&mut engine, &requests);
    assert!(engine.stats().num_preemptions > 0, "the pool is too small for all of them");
}

/// Responses of all lengths in a pool for a few of them, of which admission guesses too little.
#[test]
fn what_outgrows_its_reserve_is_given_room() {
    let limits =
        SchedulerLimits { num_blocks: 60, watermark_blocks: 1, reserve_tokens: 16, max_num_seqs: 64, ..roomy() };
    let mut engine = engine(SchedulerLimits { max_batch_tokens: 128, ..limits });
    let requests: Vec<_> = (0..48).map(|group| request(group, 10, 2, 20 + (group as u32 * 37) % 180)).collect();
    engine.submit(requests.clone()).unwrap();
    check_responses(&mut engine, &requests);
    let stats = engine.stats();
    let recomputed = stats.num_rows as f64 / (stats.num_prefill_tokens + stats.num_generated_tokens) as f64 - 1.0;
    assert!(recomputed < 0.12, "{recomputed} of the rows again, {} preemptions", stats.num_preemptions);
}

#[test]
fn a_group_costs_one_prefill() {
    let mut engine = engine(roomy());
    let requests = [request(0, 100, 16, 5)];
    engine.submit(requests.to_vec()).unwrap();
    check_responses(&mut engine, &requests);
    let stats = engine.stats();
    assert_eq!((stats.num_prefill_tokens, stats.num_generated_tokens), (100, 80));
    assert_eq!(engine.model().rows.iter().sum::<usize>(), 100 + 16 * 4, "the last token is never computed");
    assert_eq!(stats.num_steps, 4 + 4);
}

/// A group of 16 over 512 tokens computes as many rows to its first tokens as a group of one.
#[test]
fn a_group_of_16_computes_its_prompt_as_one_sample_does() {
    let rows = |num_samples: u64| {
        let mut engine = engine(SchedulerLimits { max_batch_tokens: 256, prefill_chunk: 128, ..roomy() });
        engine.submit(vec![request(0, 510, num_samples, 1)]).unwrap();
        assert_eq!(run(&mut engine)[0].samples.len(), num_samples as usize);
        engine.stats().num_rows
    };
    assert_eq!((rows(1), rows(16)), (510, 510));
}

/// The first of three prompts is known to be answered shortly, so that more of its samples start at once.
#[test]
fn admission_learns_how_long_the_responses_to_a_prompt_are() {
    let limits = SchedulerLimits { num_blocks: 16, watermark_blocks: 0, reserve_tokens: 200, ..roomy() };
    let mut engine = engine(limits);
    let mut first = request(0, 10, 6, 150);
    first.sampling.stop_token_ids = (0..VOCAB).step_by(4).collect();
    let mut num_running = Vec::new();
    for pass in 0..2 {
        engine.submit(vec![GroupRequest { group_id: GroupId(pass), ..first.clone() }]).unwrap();
        engine.step().unwrap();
        num_running.push(engine.stats().num_requests_running);
        run(&mut engine);
    }
    assert!(num_running[0] <= 1 && num_running[1] >= 2, "{num_running:?}");
}

/// Priorities say when, and never what.
#[test]
fn priorities_change_the_order_of_results_alone() {
    let mut engine = engine(SchedulerLimits { max_num_seqs: 4, ..roomy() });
    let requests: Vec<GroupRequest> =
        (0..6).map(|id| GroupRequest { priority: id as i32, ..request(id, 10, 2, 8) }).collect();
    engine.submit(requests.clone()).unwrap();
    let mut order = Vec::new();
    while !engine.is_idle() {
        engine.step().unwrap();
        order.extend(std::iter::from_fn(|| engine.pop_finished()).map(|result| result.group_id.0));
    }
    assert_eq!(order, [0, 5, 1, 4, 2, 3], "the oldest, and beside it the highest");
    let mut again = super::tests::engine(roomy());
    again.submit(requests.clone()).unwrap();
    check_responses(&mut again, &requests);
}

/// A prompt that begins as an earlier one pays only for the rest, whatever drew from the blocks before.
#[test]
fn a_cached_prefix_is_not_computed_again() {
    let mut engine = engine(roomy());
    let shared = |group: u64, tail: u32| {
        let mut request = request(group, 0, 2, 20);
        request.prompt_token_ids = (0..40).map(|i| i % VOCAB).chain([tail, tail + 1]).collect();
        request
    };
    let first = [shared(0, 1)];
    engine.submit(first.to_vec()).unwrap();
    check_responses(&mut engine, &first);
    assert_eq!((engine.stats().prefix_cache_queries, engine.stats().prefix_cache_hits), (42, 0));
    let later = [shared(1, 1), shared(2, 7)];
    engine.submit(later.to_vec()).unwrap();
    check_responses(&mut engine, &later);
    let stats = engine.stats();
    assert_eq!((stats.prefix_cache_queries, stats.prefix_cache_hits), (3 * 42, 2 * 32), "two blocks of 16 are full");
    assert_eq!(stats.num_prefill_tokens, 42 + 2 * 10);

    engine.model_mut().version = PolicyVersion { number: 1, hash: ContentHash([1; 16]) };
    engine.submit(vec![shared(3, 1)]).unwrap();
    check_responses(&mut engine, &[shared(3, 1)]);
    assert_eq!(engine.stats().prefix_cache_hits, 64, "new weights have no prefix of the old ones");
}

/// Groups that are queued together and begin the same compute what they share once, whatever their order of service.
#[test]
fn groups_that_start_together_share_their_prefix() {
    let shared = |group: u64, len: usize, tail: u32| {
        let mut request = request(group, 0, 2, 6);
        request.prompt_token_ids = (0..len as u32).map(|i| (i * 3) % VOCAB).chain([tail, tail + 1, tail + 2]).collect();
        request
    };
    // Equal prompts, one that leaves after 40 tokens, one that has nothing in common, and one that is a prefix.
    let mut requests = vec![shared(0, 97, 1), shared(1, 97, 1), shared(2, 97, 9), shared(3, 40, 20), shared(5, 29, 1)];
    requests.insert(2, request(4, 33, 2, 6));
    let mut together = engine(roomy());
    together.submit(requests.clone()).unwrap();
    check_responses(&mut together, &requests);
    let stats = together.stats();
    assert_eq!(stats.prefix_cache_hits, 96 + 96 + 32 + 16);
    assert_eq!(stats.num_prefill_tokens + stats.prefix_cache_hits, stats.prompt_tokens);

    let mut without = engine(roomy());
    without.namer = None;
    without.submit(requests.clone()).unwrap();
    check_responses(&mut without, &requests);
    assert_eq!(without.stats().num_prefill_tokens, stats.prompt_tokens);
}

/// A second turn continues a response: what the first turn stored is found, the drawn tokens included.
#[test]
fn a_second_turn_finds_the_first() {
    let mut engine = engine(roomy());
    engine.submit(vec![request(0, 20, 1, 30)]).unwrap();
    let mut turn = request(1, 20, 2, 10);
    turn.prompt_token_ids = request(0, 20, 1, 30).prompt_token_ids;
    turn.prompt_token_ids.extend(run(&mut engine).remove(0).samples.remove(0).token_ids);
    engine.submit(vec![turn.clone()]).unwrap();
    check_responses(&mut engine, &[turn]);
    assert_eq!(engine.stats().prefix_cache_hits, 48, "50 tokens fill 3 blocks of 16");
}

/// Weights that change while sequences run leave no prefix behind that mixes both.
#[test]
fn what_is_stored_across_a_change_of_weights_is_never_cached() {
    let mut engine = engine(SchedulerLimits { prefill_chunk: 16, ..roomy() });
    engine.submit(vec![request(0, 50, 3, 20)]).unwrap();
    engine.step().unwrap();
    engine.model_mut().version = PolicyVersion { number: 1, hash: ContentHash([1; 16]) };
    run(&mut engine);
    let again = GroupRequest { group_id: GroupId(5), ..request(0, 50, 3, 20) };
    engine.submit(vec![again.clone()]).unwrap();
    run(&mut engine);
    assert_eq!(engine.stats().prefix_cache_hits, 0);
    engine.submit(vec![again]).unwrap();
    run(&mut engine);
    assert_eq!(engine.stats().prefix_cache_hits, 48);
}

#[test]
fn a_stop_token_ends_the_response_and_stays() {
    let free = run_one(request(0, 5, 1, 30)).samples.remove(0);
    let stop_id = free.token_ids[6];
    let first = free.token_ids.iter().position(|&id| id == stop_id).unwrap();
    let mut stopped = request(0, 5, 1, 30);
    stopped.sampling.stop_token_ids = vec![stop_id];
    let sample = run_one(stopped.clone()).samples.remove(0);
    assert_eq!(sample.token_ids, free.token_ids[..=first]);
    assert_eq!((sample.log_probs.len(), sample.finish_reason), (first + 1, FinishReason::Stop));

    stopped.sampling.min_new_tokens = first as u32 + 2;
    let sample = run_one(stopped).samples.remove(0);
    assert!(!sample.token_ids[..=first + 1].contains(&stop_id), "stop ids are banned before min_new_tokens");
    assert_eq!(sample.sampled_log_probs.len(), sample.token_ids.len(), "a ban is a truncation");
    assert_eq!(sample.surviving_mass.len(), sample.token_ids.len());
}

#[test]
fn a_stop_string_ends_with_the_token_that_completes_it() {
    let free = run_one(request(0, 5, 1, 30)).samples.remove(0);
    let text: Vec<u8> = free.token_ids.iter().map(|&id| b'a' + (id % 26) as u8).collect();
    let stop = &text[4..7];
    let end = (0..text.len()).find(|&end| text[..=end].ends_with(stop)).unwrap();
    let mut stopped = request(0, 5, 1, 30);
    stopped.sampling.stop = vec!["~".to_owned(), String::from_utf8(stop.to_vec()).unwrap()];
    let sample = run_one(stopped.clone()).samples.remove(0);
    assert_eq!((&sample.token_ids[..], sample.finish_reason), (&free.token_ids[..=end], FinishReason::StopString));
    stopped.sampling.min_new_tokens = end as u32 + 2;
    assert!(run_one(stopped).samples[0].token_ids.len() > end + 1, "a stop string counts from min_new_tokens on");
}

#[test]
fn penalties_see_prompt_and_response() {
    let plain = run_one(request(0, 5, 2, 20));
    let mut penalised = request(0, 5, 2, 20);
    penalised.sampling.presence_penalty = 0.5;
    let other = run_one(penalised.clone());
    assert_ne!(plain.samples[0].token_ids, other.samples[0].token_ids);
    assert_eq!(other.samples[0].surviving_mass.len(), 20);

    let mut tiny = engine(SchedulerLimits { num_blocks: 3, watermark_blocks: 0, reserve_tokens: 0, ..roomy() });
    tiny.submit(vec![penalised, request(1, 30, 2, 10)]).unwrap();
    let results = run(&mut tiny);
    assert!(tiny.stats().num_preemptions > 0);
    assert_eq!(results[0].samples[0].token_ids, other.samples[0].token_ids, "counts survive a preemption");
}

/// A bias and allowed ids are part of the law; a bad word that the prompt begins is not completed either.
#[test]
fn processors_steer_what_is_drawn() {
    let free = run_one(request(0, 5, 1, 20)).samples.remove(0);
    let mut steered = request(0, 5, 1, 20);
    let last_of_prompt = *steered.prompt_token_ids.last().unwrap();
    steered.sampling.bad_words_ids = vec![vec![last_of_prompt, free.token_ids[0]]];
    let sample = run_one(steered.clone()).samples.remove(0);
    assert_ne!(sample.token_ids[0], free.token_ids[0]);
    assert_eq!((sample.surviving_mass.len(), sample.sampled_log_probs.len()), (20, 20), "a ban is a truncation");
    steered.sampling = SamplingParams { allowed_token_ids: vec![7, 3, 7], max_new_tokens: 20, ..Default::default() };
    let sample = run_one(steered.clone()).samples.remove(0);
    assert!(sample.token_ids.iter().all(|id| [3, 7].contains(id)));
    steered.sampling = SamplingParams { logit_bias: [(7, 1.0)].into(), max_new_tokens: 20, ..Default::default() };
    assert_ne!(run_one(steered).samples[0].token_ids, free.token_ids);
}

#[test]
fn every_token_carries_the_version_that_drew_it() {
    let mut engine = engine(roomy());
    engine.submit(vec![request(0, 5, 2, 6)]).unwrap();
    let old = engine.model().version;
    let new = PolicyVersion { number: 1, hash: ContentHash([1; 16]) };
    (0..2).for_each(|_| engine.step().unwrap());
    engine.model_mut().version = new;
    let result = run(&mut engine).remove(0);
    assert_eq!(result.samples[1].policy_versions, [(old, 2), (new, 4)]);
}

#[test]
fn an_abort_frees_exactly_its_blocks_and_answers_once() {
    let mut engine = engine(roomy());
    let requests = [request(0, 40, 3, 20), request(1, 20, 2, 20), request(2, 9, 1, 20)];
    engine.submit(requests.to_vec()).unwrap();
    (0..6).for_each(|_| engine.step().unwrap());
    let before = engine.stats().kv_blocks_in_use;
    let aborted = engine.abort(GroupId(0)).unwrap();
    assert_eq!(aborted.samples.len(), 3);
    for (index, sample) in aborted.samples.iter().enumerate() {
        let (token_ids, _) = respond(&requests[0], index);
        assert_eq!(sample.finish_reason, FinishReason::Abort);
        assert!(!sample.token_ids.is_empty() && token_ids.starts_with(&sample.token_ids));
    }
    // Two full prompt blocks are shared by all three; each sibling has one block of its own.
    assert_eq!(before - engine.stats().kv_blocks_in_use, 2 + 3);
    assert_eq!(engine.abort(GroupId(0)), None);
    check_responses(&mut engine, &requests[1..]);
}

#[test]
fn bad_requests_are_refused_and_nothing_is_queued() {
    type Change = fn(&mut GroupRequest);
    let cases: [(Change, &str); 16] = [
        (|r| r.prompt_token_ids.clear(), "the prompt has no token"),
        (|r| r.prompt_token_ids[1] = VOCAB, "prompt[1] = 40 is no token id"),
        (|r| r.seeds.clear(), "no seed"),
        (|r| r.sampling.top_p = 0.0, "top_p = 0 is out of range"),
        (|r| r.sampling.stop_token_ids = vec![3, 99], "stop_token_ids[1] = 99"),
        (|r| r.sampling.logit_bias = [(40, 1.0)].into(), "logit_bias[0] = 40 is no token id"),
        (|r| r.sampling.allowed_token_ids = vec![1, 41], "allowed_token_ids[1] = 41 is no token id"),
        (|r| r.sampling.bad_words_ids = vec![vec![1], vec![]], "bad_words_ids = 1 is out of range"),
        (|r| r.sampling.bad_words = vec!["no".to_owned()], "expected them resolved to bad_words_ids"),
        (
            |r| {
                r.sampling.allowed_token_ids = vec![1, 2];
                r.sampling.bad_words_ids = vec![vec![2], vec![1, 1]];
            },
            "may rule out all of 2 ids to draw",
        ),
        (|r| r.sampling.allowed_token_ids = vec![30, 31], "the tokenizer has none of the 2 allowed_token_ids"),
        (
            |r| {
                r.sampling.allowed_token_ids = vec![1, 30];
                r.sampling.bad_words_ids = vec![vec![1]];
            },
            "may rule out all of 1 ids to draw",
        ),
        (|r| r.sampling.stop = vec![String::new()], "an empty stop string"),
        (
            |r| r.sampling.max_new_tokens = 600,
            "can never fit: 5 prompt tokens and up to 600 new ones need 604 positions",
        ),
        (|r| r.sampling.max_new_tokens = 100, "need 7 kv blocks, the engine has 6"),
        (|r| r.group_id = GroupId(0), "already queued"),
    ];
    for (change, expected) in cases {
        let mut engine = engine(SchedulerLimits { num_blocks: 6, ..roomy() });
        engine.model_mut().masked = vec![30, 31];
        let mut bad = request(1, 5, 1, 10);
        change(&mut bad);
        let error = engine.submit(vec![request(0, 5, 1, 10), bad]).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert!(engine.is_idle(), "nothing of the call is queued");
    }
    let mut engine = engine(roomy());
    let error = engine.submit(vec![request(0, 5, 999, 10), request(1, 5, 2, 10)]).unwrap_err();
    assert_eq!(error, Error::QueueFull { queued: 0, submitted: 1001, limit: 1000 });
}

#[test]
fn a_failed_step_can_be_tried_again() {
    let mut engine = engine(roomy());
    let requests = [request(0, 20, 4, 12)];
    engine.submit(requests.to_vec()).unwrap();
    for _ in 0..4 {
        engine.model_mut().fails = true;
        assert!(engine.step().is_err());
        engine.model_mut().fails = false;
        engine.step().unwrap();
    }
    check_responses(&mut engine, &requests);
}

/// Nothing is taken from weights that are no numbers; whoever mends them can go on.
#[test]
fn weights_that_are_no_numbers_draw_nothing() {
    let mut engine = engine(roomy());
    let requests = [request(7, 20, 2, 5)];
    engine.submit(requests.to_vec()).unwrap();
    engine.step().unwrap();
    engine.model_mut().is_broken = true;
    let error = engine.step().unwrap_err().to_string();
    assert!(error.contains("token 21 of group 7 is NaN"), "{error}");
    engine.model_mut().is_broken = false;
    check_responses(&mut engine, &requests);
}

#[test]
fn timings_split_queue_and_rollout() {
    let mut engine = engine(SchedulerLimits { max_num_seqs: 1, ..roomy() });
    engine.submit(vec![request(0, 5, 1, 3), request(1, 5, 1, 3)]).unwrap();
    let results = run(&mut engine);
    // Looks at the clock: submit 0, submit 1; then begin and end of each of 6 steps, and in the first and last step of
    // each group its start and its end.
    let timings = results.iter().map(|r| (r.samples[0].timings.queue_seconds, r.samples[0].timings.rollout_seconds));
    assert_eq!(timings.collect::<Vec<_>>(), [(3.0, 5.0), (10.0, 5.0)]);
}

#[test]
fn a_sibling_that_finds_no_room_waits_in_the_queue() {
    let mut engine = engine(SchedulerLimits { max_num_seqs: 1, ..roomy() });
    engine.submit(vec![request(0, 5, 3, 3)]).unwrap();
    let timings: Vec<_> = run(&mut engine)[0].samples.iter().map(|s| s.timings).collect();
    assert!(timings.is_sorted_by(|a, b| a.queue_seconds + a.rollout_seconds <= b.queue_seconds), "{timings:?}");
}

/// Every look at the clock takes a second.
#[test]
fn the_tail_is_what_few_of_many_still_draw() {
    let mut engine = engine(roomy());
    engine.submit(vec![request(0, 200, 1, 4)]).unwrap();
    run(&mut engine);
    assert_eq!(engine.stats().tail_micros, 0, "a prompt in chunks, and one of one sample");
    let all_at_once: Vec<_> = (1..9).map(|group| request(group, 5, 2, 3)).collect();
    engine.submit(all_at_once).unwrap();
    run(&mut engine);
    engine.submit(vec![request(9, 5, 2, 30)]).unwrap();
    run(&mut engine);
    assert_eq!(engine.stats().tail_micros, 0, "two of two, however many there were before");
    let requests: Vec<_> = (10..18).map(|group| request(group, 5, 1, if group == 10 { 30 } else { 3 })).collect();
    engine.submit(requests).unwrap();
    let before = engine.stats();
    run(&mut engine);
    let tail = engine.stats().tail_micros;
    assert!(tail >= 27_000_000 && tail < engine.stats().step_micros - before.step_micros, "{tail}");
}

/// Bookkeeping alone, the drafters' included: 100,000 short requests, 10,000 queued at once, steady memory, totals that
/// add up. An end that cost as much as the queue is long would take minutes.
#[test]
fn many_short_requests_leave_nothing_behind() {
    let mut engine = engine(roomy());
    engine.options.max_queued_samples = 20_000;
    let speculative = Speculative::Auto;
    let config = SpeculationConfig { speculative, max_draft_tokens: 8, history_epochs: 2, history_tokens: 5000 };
    engine.set_speculation(Speculation::new(config));
    let (mut num_groups, mut num_samples, mut early_peak) = (0, 0, 0);
    // Every tenth prompt fills a block, and begins as many others do.
    let prompt_len = |i: u64| if i.is_multiple_of(10) { 20 } else { 3 };
    for round in 0..10u64 {
        let requests: Vec<_> = (0..10_000).map(|i| request(round * 10_000 + i, prompt_len(i), 2, 2)).collect();
        engine.submit(requests).unwrap();
        let results = run(&mut engine);
        num_groups += results.len();
        num_samples += results.iter().map(|r| r.samples.len()).sum::<usize>();
        let stats = engine.stats();
        assert_eq!((stats.kv_blocks_in_use, stats.num_requests_running, stats.num_requests_waiting), (0, 0, 0));
        early_peak = if round == 1 { stats.peak_kv_blocks } else { early_peak };
        assert!(round < 1 || stats.peak_kv_blocks == early_peak, "round {round} holds more blocks than those before");
        engine.model_mut().rows.clear();
    }
    assert_eq!((num_groups, num_samples), (100_000, 200_000));
    let stats = engine.stats();
    assert_eq!(stats.num_generated_tokens, 2 * 200_000);
    assert_eq!(stats.prompt_tokens, 90_000 * 3 + 10_000 * 20);
    assert_eq!(stats.num_prefill_tokens + stats.prefix_cache_hits, stats.prompt_tokens, "computed or found");
    assert_eq!(stats.num_rows, stats.num_prefill_tokens + 200_000, "the last token is never computed");
    assert_eq!((stats.prefix_cache_queries, stats.num_preemptions), (10_000 * 20, 0));
    assert!(stats.prefix_cache_hits >= 9_900 * 16, "four prompts in all, met {} times", stats.prefix_cache_hits);
    assert!(engine.samples.len() <= 20_000, "keys are reused");
    assert!(engine.finished.is_empty() && engine.groups.is_empty());
}
