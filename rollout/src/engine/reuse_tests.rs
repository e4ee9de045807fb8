//! Lenient replay in the engine: what is taken again, how it is flagged, and that drafts and limits change none of it.

use super::tests::{engine, request, roomy, run};
use crate::SchedulerLimits;
use crate::speculation::{Budget, Drafter, ReplayDrafter, Speculation, SpeculationConfig, Speculative, SuffixDrafter};
use proptest::prelude::*;
use temper_proto::{EarlierResponse, GeneratedSample, GroupRequest, GroupResult, Reuse};
use temper_types::{ContentHash, FinishReason, GroupId, PolicyVersion};

const OLD: PolicyVersion = PolicyVersion { number: 4, hash: ContentHash([4; 16]) };

fn respond(limits: SchedulerLimits, request: &GroupRequest) -> Vec<GeneratedSample> {
    let mut engine = engine(limits);
    engine.submit(vec![request.clone()]).unwrap();
    run(&mut engine).remove(0).samples
}

/// The second pass over the prompt of `first`, offered what `first` said with log-probs `shift` higher.
fn again(first: &[GeneratedSample], lenience: f32, shift: f32) -> Reuse {
    let earlier = |sample: &GeneratedSample| EarlierResponse {
        token_ids: sample.token_ids.clone(),
        log_probs: sample.log_probs.iter().map(|p| p + shift).collect(),
        policy_versions: vec![(OLD, sample.token_ids.len() as u32)],
    };
    Reuse { lenience, responses: first.iter().map(earlier).collect() }
}

fn with_other_seeds(mut request: GroupRequest, reuse: Reuse) -> GroupRequest {
    request.seeds.iter_mut().for_each(|seed| *seed += 77);
    GroupRequest { group_id: GroupId(9), reuse: Some(reuse), ..request }
}

/// Tokens, flags, bits of log-probs, versions and how it ended.
type Content = (Vec<u32>, Vec<u8>, Vec<u32>, Vec<(PolicyVersion, u32)>, FinishReason);

fn content(samples: &[GeneratedSample]) -> Vec<Content> {
    let bits = |s: &GeneratedSample| s.log_probs.iter().map(|p| p.to_bits()).collect();
    let of = |s: &GeneratedSample| {
        (s.token_ids.clone(), s.reused.clone(), bits(s), s.policy_versions.clone(), s.finish_reason)
    };
    samples.iter().map(of).collect()
}

#[test]
fn under_the_same_weights_all_is_reused_under_their_old_name() {
    let mut first = request(0, 10, 4, 37);
    first.sampling.stop_token_ids = vec![3];
    let said = respond(roomy(), &first);
    let replayed = respond(roomy(), &with_other_seeds(first, again(&said, 1.0, 0.0)));
    for (old, new) in said.iter().zip(&replayed) {
        assert_eq!((&new.token_ids, &new.log_probs), (&old.token_ids, &old.log_probs));
        assert_eq!(new.reused, vec![1; old.token_ids.len()]);
        assert_eq!(new.policy_versions, [(OLD, old.token_ids.len() as u32)]);
        assert_eq!(new.finish_reason, old.finish_reason);
    }
}

/// Each token is taken with probability 1/2: a run of ones, then the sample's own draws, as without reuse.
#[test]
fn from_the_first_token_left_on_the_sample_is_its_own() {
    let first = request(0, 10, 16, 30);
    let said = respond(roomy(), &first);
    let replayed = respond(roomy(), &with_other_seeds(first.clone(), again(&said, 0.5, 0.0)));
    let mut num_taken = Vec::new();
    for (index, (old, new)) in said.iter().zip(&replayed).enumerate() {
        let taken = new.reused.iter().take_while(|flag| **flag == 1).count();
        assert!(new.reused[taken..].iter().all(|flag| *flag == 0) && new.reused.len() == 30);
        assert_eq!(new.token_ids[..taken], old.token_ids[..taken]);
        let mut rest = first.clone();
        rest.prompt_token_ids.extend(&new.token_ids[..taken]);
        rest.seeds = vec![first.seeds[index] + 77];
        rest.sampling.max_new_tokens = 30 - taken as u32;
        assert_eq!(respond(roomy(), &rest)[0].token_ids, new.token_ids[taken..], "the noise is that of the slot");
        assert_eq!(new.policy_versions.iter().map(|run| run.1).sum::<u32>(), 30);
        num_taken.push(taken);
    }
    let mean = num_taken.iter().sum::<usize>() as f64 / 16.0;
    assert!((0.2..2.5).contains(&mean), "a geometric law of mean 1, not {num_taken:?}");
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let first = request(0, 5, 2, 6);
    let said = respond(roomy(), &first);
    type Change = fn(&mut GroupRequest);
    let cases: [(Change, &str); 5] = [
        (|r| r.sampling.top_p = 0.5, "expected the untruncated law"),
        (|r| r.reuse.as_mut().unwrap().lenience = 0.0, "lenience = 0 is out of range"),
        (|r| r.reuse.as_mut().unwrap().lenience = f32::NAN, "lenience = NaN is out of range"),
        (
            |r| {
                r.reuse.as_mut().unwrap().responses.pop();
            },
            "1 earlier responses for 2 seeds",
        ),
        (
            |r| {
                r.reuse.as_mut().unwrap().responses[1].log_probs.pop();
            },
            "response 1 has 6 tokens and 5 log-probs",
        ),
    ];
    for (change, expected) in cases {
        let mut bad = with_other_seeds(first.clone(), again(&said, 1.0, 0.0));
        change(&mut bad);
        let error = engine(roomy()).submit(vec![bad]).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() })]

    /// The same tokens, flags, log-probs and versions with drafts and without, over every limit.
    #[test]
    fn no_limit_and_no_draft_changes_what_is_reused(
        (prompt_len, num_samples, new, earlier_new) in (1usize..50, 1u64..6, 4u32..40, 1u32..60),
        (lenience, shift) in (0.3f32..1.5, -0.3f32..0.3),
        (max_num_seqs, spare, prefill_chunk, spare_blocks) in (1usize..20, 1usize..70, 1usize..40, 0usize..12),
    ) {
        let first = request(0, prompt_len, num_samples, earlier_new);
        let mut reuse = again(&respond(roomy(), &first), lenience, shift);
        reuse.responses[0].token_ids.truncate(3);
        reuse.responses[0].log_probs.truncate(3);
        let mut second = with_other_seeds(first, reuse);
        second.sampling.max_new_tokens = new;
        let expected = respond(roomy(), &second);

        let limits = SchedulerLimits {
            max_num_seqs, max_batch_tokens: max_num_seqs + spare, prefill_chunk, num_blocks: 7 + spare_blocks,
            watermark_blocks: 0, reserve_tokens: 4, ..roomy()
        };
        let mut drafting = engine(limits);
        let drafters: Vec<Box<dyn Drafter>> = vec![Box::new(ReplayDrafter::new(9)), Box::new(SuffixDrafter::new(9))];
        let config = SpeculationConfig {
            speculative: Speculative::Auto, max_draft_tokens: 11, history_epochs: 2, history_tokens: 5000,
        };
        drafting.set_speculation(Some(Speculation::with_drafters(config, drafters, Budget::all())));
        drafting.submit(vec![second]).unwrap();
        let results: Vec<GroupResult> = run(&mut drafting);
        prop_assert_eq!(content(&results[0].samples), content(&expected));
        let num_reused: u64 = expected.iter().flat_map(|s| &s.reused).map(|flag| u64::from(*flag)).sum();
        prop_assert_eq!(drafting.stats().num_reused_tokens, num_reused);
    }
}

/// A whole earlier response costs a few steps, not one for each token.
#[test]
fn replay_verifies_many_tokens_a_step() {
    let first = request(0, 10, 4, 37);
    let said = respond(roomy(), &first);
    let mut drafting = engine(roomy());
    let drafters: Vec<Box<dyn Drafter>> = vec![Box::new(ReplayDrafter::new(11))];
    let config = SpeculationConfig {
        speculative: Speculative::Replay,
        max_draft_tokens: 11,
        history_epochs: 0,
        history_tokens: 0,
    };
    drafting.set_speculation(Some(Speculation::with_drafters(config, drafters, Budget::all())));
    drafting.submit(vec![with_other_seeds(first, again(&said, 1.0, 0.0))]).unwrap();
    run(&mut drafting);
    let stats = drafting.stats();
    assert_eq!((stats.num_steps, stats.num_reused_tokens), (1 + 3, 4 * 37), "the first token, then 12 a step");
}
