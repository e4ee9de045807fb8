//! Rounds change no bit: a response that is cut anywhere and goes on is the one that was never cut.

use super::Engine;
use super::fake_model::{FakeModel, VOCAB};
use super::tests::{engine, request, roomy, run};
use crate::SchedulerLimits;
use crate::speculation::{Budget, Drafter, ReplayDrafter, Speculation, SpeculationConfig, Speculative, SuffixDrafter};
use proptest::prelude::*;
use temper_proto::{BegunResponse, GeneratedSample, GroupRequest, Reuse};
use temper_types::{ContentHash, FinishReason, GroupId, PolicyVersion, SamplingParams};

const NEW: PolicyVersion = PolicyVersion { number: 1, hash: ContentHash([1; 16]) };

/// One group as far as it is drawn.
pub(super) struct Partial {
    pub request: GroupRequest,
    pub samples: Vec<GeneratedSample>,
}

fn append(to: &mut GeneratedSample, new: GeneratedSample) {
    to.token_ids.extend(new.token_ids);
    to.log_probs.extend(new.log_probs);
    to.sampled_log_probs.extend(new.sampled_log_probs);
    to.surviving_mass.extend(new.surviving_mass);
    for (version, num_tokens) in new.policy_versions {
        match to.policy_versions.last_mut() {
            Some((last, known)) if *last == version => *known += num_tokens,
            _ => to.policy_versions.push((version, num_tokens)),
        }
    }
    to.finish_reason = new.finish_reason;
    to.num_kept = new.num_kept;
}

impl Partial {
    pub fn new(request: &GroupRequest) -> Self {
        Partial { request: request.clone(), samples: Vec::new() }
    }

    pub fn is_complete(&self) -> bool {
        !self.samples.is_empty() && self.samples.iter().all(|s| s.finish_reason != FinishReason::Paused)
    }

    pub fn next_round(&self, round_tokens: u32) -> GroupRequest {
        let begun = |s: &GeneratedSample| BegunResponse {
            token_ids: s.token_ids.clone(),
            is_complete: s.finish_reason != FinishReason::Paused,
        };
        GroupRequest { round_tokens, begun: self.samples.iter().map(begun).collect(), ..self.request.clone() }
    }

    pub fn take(&mut self, new: Vec<GeneratedSample>, round_tokens: usize) {
        if self.samples.is_empty() {
            self.samples = new;
            return;
        }
        for (known, new) in self.samples.iter_mut().zip(new) {
            if known.finish_reason == FinishReason::Paused {
                let is_whole_round = new.token_ids.len() == round_tokens;
                assert!(is_whole_round || new.finish_reason != FinishReason::Paused, "a paused sample drew its round");
                append(known, new);
            } else {
                assert!(new.token_ids.is_empty() && new.policy_versions.is_empty(), "nothing is drawn behind the end");
            }
        }
    }
}

/// Draw one round of every group that is not complete.
pub(super) fn round(engine: &mut Engine<FakeModel>, groups: &mut [Partial], round_tokens: u32) {
    let open: Vec<&mut Partial> = groups.iter_mut().filter(|group| !group.is_complete()).collect();
    engine.submit(open.iter().map(|group| group.next_round(round_tokens)).collect()).unwrap();
    let results = run(engine);
    assert_eq!((results.len(), engine.stats().kv_blocks_in_use), (open.len(), 0));
    for group in open {
        let result = results.iter().find(|r| r.group_id == group.request.group_id).expect("one result a group");
        group.take(result.samples.clone(), round_tokens as usize);
    }
}

fn in_rounds(engine: &mut Engine<FakeModel>, requests: &[GroupRequest], round_tokens: u32) -> Vec<Partial> {
    let mut groups: Vec<Partial> = requests.iter().map(Partial::new).collect();
    while !groups.iter().all(Partial::is_complete) {
        round(engine, &mut groups, round_tokens);
    }
    groups
}

/// Everything of a sample but timings and counts, as bits.
fn fingerprint(samples: &[GeneratedSample]) -> Vec<String> {
    let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
    let sample = |s: &GeneratedSample| {
        let floats = [bits(&s.log_probs), bits(&s.sampled_log_probs), bits(&s.surviving_mass)];
        format!(
            "{} {} {:?} {floats:?} {:?}",
            s.sample_index,
            s.seed,
            s.token_ids,
            (s.finish_reason, &s.policy_versions)
        )
    };
    samples.iter().map(sample).collect()
}

/// The groups in one piece.
fn uncut(requests: &[GroupRequest]) -> Vec<Vec<String>> {
    let mut engine = engine(roomy());
    engine.submit(requests.to_vec()).unwrap();
    run(&mut engine).iter().map(|result| fingerprint(&result.samples)).collect()
}

pub(super) fn drafting(engine: &mut Engine<FakeModel>) {
    let drafters: Vec<Box<dyn Drafter>> = vec![Box::new(ReplayDrafter::new(9)), Box::new(SuffixDrafter::new(9))];
    let config = SpeculationConfig {
        speculative: Speculative::Auto,
        max_draft_tokens: 11,
        history_epochs: 2,
        history_tokens: 5000,
    };
    engine.set_speculation(Some(Speculation::with_drafters(config, drafters, Budget::all())));
}

/// Laws that remember what came before: penalties, bad words, stops that may stand across a cut.
fn sampling() -> impl Strategy<Value = SamplingParams> {
    let variants = [
        SamplingParams::default(),
        SamplingParams { repetition_penalty: 1.3, frequency_penalty: 0.4, ..SamplingParams::default() },
        SamplingParams { stop_token_ids: vec![3, 30, 17], min_new_tokens: 4, ..SamplingParams::default() },
        SamplingParams { bad_words_ids: vec![vec![4], vec![9, 9], vec![2, 30]], ..SamplingParams::default() },
        SamplingParams { stop: vec!["ab".to_owned(), "c".to_owned(), "fg".to_owned()], ..SamplingParams::default() },
    ];
    prop::sample::select(variants.to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    /// Over every limit, with and without prefix cache and drafts.
    #[test]
    fn no_cut_changes_a_bit(
        shapes in prop::collection::vec((1usize..50, 1u64..6, 1u32..40), 1..5),
        sampling in sampling(),
        round_tokens in 1u32..20,
        (max_num_seqs, spare, prefill_chunk, spare_blocks) in (1usize..20, 1usize..70, 1usize..40, 0usize..12),
        (has_cache, has_drafts) in (any::<bool>(), any::<bool>()),
    ) {
        let request = |(&(prompt_len, n, max_new_tokens), id): (&(usize, u64, u32), u64)| {
            let mut request = request(id, prompt_len, n, max_new_tokens);
            request.sampling = SamplingParams { max_new_tokens, ..sampling.clone() };
            request.sampling.min_new_tokens = request.sampling.min_new_tokens.min(max_new_tokens);
            request
        };
        let requests: Vec<GroupRequest> = shapes.iter().zip(0..).map(request).collect();
        let mut cutting = engine(SchedulerLimits {
            max_num_seqs, max_batch_tokens: max_num_seqs + spare, prefill_chunk, num_blocks: 6 + spare_blocks,
            watermark_blocks: 0, reserve_tokens: 4, ..roomy()
        });
        if !has_cache {
            cutting.namer = None;
        }
        if has_drafts {
            drafting(&mut cutting);
        }
        let groups = in_rounds(&mut cutting, &requests, round_tokens);
        let found: Vec<Vec<String>> = groups.iter().map(|group| fingerprint(&group.samples)).collect();
        prop_assert_eq!(found, uncut(&requests));
    }
}

#[test]
fn a_sample_that_is_cut_at_any_position_is_the_uncut_one() {
    let requests = [request(0, 10, 3, 37)];
    let expected = uncut(&requests);
    for cut in 1..37 {
        let mut cutting = engine(roomy());
        let mut groups = [Partial::new(&requests[0])];
        round(&mut cutting, &mut groups, cut);
        assert!(groups[0].samples.iter().all(|s| s.token_ids.len() == cut as usize), "{cut}");
        round(&mut cutting, &mut groups, 0);
        assert_eq!(fingerprint(&groups[0].samples), expected[0], "cut at {cut}");
    }
}

/// A round pays for the tokens that fill no block, and for its own.
#[test]
fn a_round_under_the_same_weights_finds_its_beginning() {
    let mut cutting = engine(roomy());
    let groups = in_rounds(&mut cutting, &[request(0, 40, 4, 64)], 16);
    assert_eq!(fingerprint(&groups[0].samples), uncut(&[request(0, 40, 4, 64)])[0]);
    let num_rows = cutting.stats().num_rows;
    assert!(num_rows <= 40 + 4 * (63 + 3 * 16), "{num_rows} rows for 4 samples of 64 tokens in 4 rounds");
}

/// What goes on under new weights has both names, and no block of the old weights.
#[test]
fn each_round_has_the_version_that_drew_it() {
    let mut cutting = engine(roomy());
    let mut groups = [Partial::new(&request(0, 40, 2, 30))];
    round(&mut cutting, &mut groups, 20);
    cutting.model_mut().version = NEW;
    round(&mut cutting, &mut groups, 20);
    for sample in &groups[0].samples {
        assert_eq!(sample.policy_versions, [(PolicyVersion::default(), 20), (NEW, 10)]);
    }
    assert_eq!(cutting.stats().prefix_cache_hits, 0, "nothing of the old weights is found");
}

/// A sample may begin anew beside siblings that go on.
#[test]
fn beginnings_of_any_length_stand_side_by_side() {
    let request = request(0, 20, 4, 30);
    let mut whole = engine(roomy());
    whole.submit(vec![request.clone()]).unwrap();
    let whole = run(&mut whole).remove(0).samples;
    let begun = |(sample, len): (&GeneratedSample, usize)| BegunResponse {
        token_ids: sample.token_ids[..len].to_vec(),
        is_complete: len == 30,
    };
    let lens = [17, 0, 30, 1];
    let begun: Vec<BegunResponse> = whole.iter().zip(lens).map(begun).collect();
    let mut mixed = engine(SchedulerLimits { prefill_chunk: 7, ..roomy() });
    mixed.submit(vec![GroupRequest { begun, ..request }]).unwrap();
    let samples = run(&mut mixed).remove(0).samples;
    for ((sample, len), whole) in samples.iter().zip(lens).zip(&whole) {
        assert_eq!(sample.token_ids, whole.token_ids[len..], "behind {len}");
        assert_eq!(sample.log_probs, whole.log_probs[len..]);
    }
}

#[test]
fn beginnings_that_cannot_go_on_are_refused() {
    let begun = |len: usize, is_complete: bool| BegunResponse { token_ids: vec![1; len], is_complete };
    let with = |begun: Vec<BegunResponse>| GroupRequest { begun, ..request(0, 5, 2, 6) };
    let reuse = Some(Reuse { lenience: 1.0, responses: vec![Default::default(); 2] });
    let cases = [
        (with(vec![begun(2, false)]), "1 beginnings for 2 seeds"),
        (with(vec![begun(2, true), begun(6, true)]), "every response is complete"),
        (with(vec![begun(2, false), begun(6, false)]), "response 1 has 6 of 6 tokens and is not complete"),
        (with(vec![begun(2, false), BegunResponse { token_ids: vec![VOCAB], is_complete: true }]), "begun[0] = 40"),
        (GroupRequest { reuse, ..with(vec![begun(2, false); 2]) }, "no earlier responses to reuse"),
    ];
    for (bad, expected) in cases {
        let error = engine(roomy()).submit(vec![bad]).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let mut whole = engine(roomy());
    whole.submit(vec![GroupRequest { group_id: GroupId(4), ..with(vec![begun(5, false), begun(6, true)]) }]).unwrap();
    assert_eq!(run(&mut whole)[0].samples.iter().map(|s| s.token_ids.len()).collect::<Vec<_>>(), [1, 0]);
}
