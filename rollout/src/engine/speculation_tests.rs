//! Drafts change no response, whoever makes them.

use super::Engine;
use super::fake_model::{FakeModel, VOCAB};
use super::tests::{engine, request, roomy, run};
use crate::SchedulerLimits;
use crate::clock::SystemClock;
use crate::speculation::{
    Budget, Cell, Draft, DraftContext, Drafter, DrafterKind, GroupStart, ReplayDrafter, Speculation, SpeculationConfig,
    Speculative, SuffixDrafter,
};
use proptest::prelude::*;
use std::collections::HashMap;
use std::sync::Arc;
use temper_proto::{GroupRequest, GroupResult};
use temper_types::{GroupId, Philox, SamplingParams};

/// What a drafter without scruples says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    Wrong,
    Oracle,
    Random,
    OutOfVocabulary,
    PastTheEnd,
    Empty,
    /// Right up to a random point.
    Mixed,
}

const MANNERS: [Manner; 7] = [
    Manner::Wrong,
    Manner::Oracle,
    Manner::Random,
    Manner::OutOfVocabulary,
    Manner::PastTheEnd,
    Manner::Empty,
    Manner::Mixed,
];

/// A drafter that knows the truth and does with it what it likes.
struct Adversary {
    manner: Manner,
    truth: HashMap<(GroupId, usize), Vec<u32>>,
    num_calls: u64,
}

impl Adversary {
    fn token(&self, truth: Option<u32>, at: u64) -> u32 {
        let noise = Philox::new(self.num_calls).below(u64::from(VOCAB), at, 1) as u32;
        match self.manner {
            Manner::Wrong => truth.map_or(0, |id| (id + 1) % VOCAB),
            Manner::Oracle | Manner::Empty => truth.unwrap_or(0),
            Manner::Random => noise,
            Manner::OutOfVocabulary => [truth.unwrap_or(3), VOCAB, u32::MAX][noise as usize % 3],
            Manner::PastTheEnd => truth.unwrap_or(noise),
            Manner::Mixed => truth.filter(|_| noise > 4).unwrap_or(noise),
        }
    }
}

impl Drafter for Adversary {
    fn kind(&self) -> DrafterKind {
        DrafterKind::Suffix
    }

    fn open_group(&mut self, _: &GroupStart<'_>) {}

    fn observe(&mut self, context: &DraftContext<'_>, num_new: usize) {
        let truth = &self.truth[&(context.group_id, context.sample_index)];
        assert_eq!(context.response, &truth[..context.response.len()], "only verified tokens are shown");
        assert!((1..=context.response.len()).contains(&num_new));
    }

    fn propose(&mut self, context: &DraftContext<'_>, draft: &mut Draft) {
        self.num_calls += 1;
        let truth = &self.truth[&(context.group_id, context.sample_index)];
        let wanted = match self.manner {
            Manner::Empty => 0,
            Manner::Oracle => truth.len() - context.response.len(),
            _ => context.max_tokens + 20,
        };
        for index in 0..wanted {
            let token_id = self.token(truth.get(context.response.len() + index).copied(), index as u64);
            draft.push(token_id, Cell::new(index, 1, 2));
        }
    }

    fn close_group(&mut self, _: GroupId) {}
}

const CONFIG: SpeculationConfig =
    SpeculationConfig { speculative: Speculative::Auto, max_draft_tokens: 11, history_epochs: 2, history_tokens: 5000 };

/// Everything of a result but timings and counts, as bits.
fn fingerprint(results: &[GroupResult]) -> String {
    let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
    let sample = |s: &temper_proto::GeneratedSample| {
        let floats = [bits(&s.log_probs), bits(&s.sampled_log_probs), bits(&s.surviving_mass)];
        format!("{:?} {:?} {:?} {:?}\n", s.token_ids, floats, s.finish_reason, s.policy_versions)
    };
    results.iter().flat_map(|result| result.samples.iter().map(sample)).collect()
}

fn truth(results: &[GroupResult]) -> HashMap<(GroupId, usize), Vec<u32>> {
    let of = |r: &GroupResult| {
        let id = r.group_id;
        r.samples.iter().enumerate().map(move |(i, s)| ((id, i), s.token_ids.clone())).collect::<Vec<_>>()
    };
    results.iter().flat_map(of).collect()
}

fn generate(engine: &mut Engine<FakeModel>, requests: &[GroupRequest]) -> Vec<GroupResult> {
    engine.submit(requests.to_vec()).unwrap();
    let results = run(engine);
    assert_eq!(engine.stats().kv_blocks_in_use, 0);
    results
}

/// Words of one, two and three tokens over few ids, so that drafts run into them.
fn bad_words() -> Vec<Vec<u32>> {
    vec![vec![4], vec![9, 9], vec![2, 30], vec![30, 2, 9]]
}

/// No response of `request` completes a bad word, in itself or with its prompt, or leaves the allowed ids.
fn check_bans(request: &GroupRequest, result: &GroupResult) {
    let sampling = &request.sampling;
    for sample in &result.samples {
        let tokens = [request.prompt_token_ids.as_slice(), &sample.token_ids].concat();
        for end in request.prompt_token_ids.len() + 1..=tokens.len() {
            assert!(!sampling.bad_words_ids.iter().any(|word| tokens[..end].ends_with(word)), "{tokens:?} at {end}");
        }
        let allowed = &sampling.allowed_token_ids;
        assert!(allowed.is_empty() || sample.token_ids.iter().all(|id| allowed.contains(id)));
    }
}

fn sampling() -> impl Strategy<Value = SamplingParams> {
    let variants = [
        SamplingParams::default(),
        SamplingParams { repetition_penalty: 1.3, frequency_penalty: 0.4, ..SamplingParams::default() },
        SamplingParams { stop_token_ids: vec![3, 30, 17], min_new_tokens: 4, ..SamplingParams::default() },
        SamplingParams { stop: vec!["abc".to_owned(), "q".to_owned()], min_new_tokens: 3, ..SamplingParams::default() },
        SamplingParams { logit_bias: [(3, 2.0), (9, -4.0)].into(), ..SamplingParams::default() },
        SamplingParams {
            allowed_token_ids: vec![9, 4, 30, 4, 2],
            bad_words_ids: bad_words(),
            ..SamplingParams::default()
        },
    ];
    prop::sample::select(variants.to_vec())
}

fn requests() -> impl Strategy<Value = Vec<GroupRequest>> {
    prop::collection::vec((1usize..50, 1u64..6, 4u32..40, sampling()), 1..6).prop_map(|shapes| {
        let one = |((prompt_len, num_samples, new, sampling), id)| {
            let plain = request(id, prompt_len, num_samples, new);
            GroupRequest { sampling: SamplingParams { max_new_tokens: new, ..sampling }, ..plain }
        };
        shapes.into_iter().zip(0..).map(one).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    /// The same bits with every drafter, good or bad, over every limit.
    #[test]
    fn no_draft_changes_a_response(
        requests in requests(),
        manner in prop::sample::select(MANNERS.to_vec()),
        (max_num_seqs, spare, prefill_chunk, spare_blocks) in (1usize..20, 1usize..70, 1usize..40, 0usize..12),
    ) {
        let expected = generate(&mut engine(roomy()), &requests);
        let max_batch_tokens = max_num_seqs + spare;
        let limits = SchedulerLimits {
            max_num_seqs, max_batch_tokens, prefill_chunk, num_blocks: 6 + spare_blocks, watermark_blocks: 0,
            reserve_tokens: 4, ..roomy()
        };
        let mut engine = engine(limits);
        let adversary = Adversary { manner, truth: truth(&expected), num_calls: 0 };
        engine.set_speculation(Some(Speculation::with_drafters(CONFIG, vec![Box::new(adversary)], Budget::all())));
        let results = generate(&mut engine, &requests);
        prop_assert_eq!(fingerprint(&results), fingerprint(&expected));
        prop_assert!(engine.model().rows.iter().all(|&rows| rows <= max_batch_tokens));
        requests.iter().zip(&results).for_each(|(request, result)| check_bans(request, result));
        let samples = results.iter().flat_map(|r| &r.samples);
        let (drafted, accepted) =
            samples.fold((0, 0), |(d, a), s| (d + u64::from(s.num_drafted), a + u64::from(s.num_accepted)));
        let total = engine.stats().speculation.total();
        prop_assert_eq!((drafted, accepted), (total.num_draft_tokens, total.num_accepted_tokens));
        prop_assert!(manner != Manner::Wrong || accepted == 0);
        prop_assert!(manner != Manner::Oracle || accepted == drafted);
        prop_assert!(manner != Manner::Empty || drafted == 0);
    }

    /// The same bits with the real drafters, over two passes with other seeds and a forced or a measured budget.
    #[test]
    fn the_real_drafters_change_nothing(requests in requests(), is_measured in any::<bool>()) {
        let mut plain = engine(roomy());
        plain.namer = None;
        let mut drafting = engine(SchedulerLimits { num_blocks: 12, ..roomy() });
        let drafters: Vec<Box<dyn Drafter>> = vec![Box::new(ReplayDrafter::new(9)), Box::new(SuffixDrafter::new(9))];
        let budget = if is_measured { Budget::measured() } else { Budget::all() };
        drafting.set_speculation(Some(Speculation::with_drafters(CONFIG, drafters, budget)));
        for pass in 0..3 {
            let mut requests = requests.clone();
            requests.iter_mut().flat_map(|r| &mut r.seeds).for_each(|seed| *seed += pass / 2);
            let expected = generate(&mut plain, &requests);
            prop_assert_eq!(fingerprint(&generate(&mut drafting, &requests)), fingerprint(&expected));
        }
    }
}

#[test]
fn an_oracle_saves_steps_and_keeps_the_rows() {
    let requests = [request(0, 10, 4, 37)];
    let mut plain = engine(roomy());
    let expected = generate(&mut plain, &requests);
    let mut drafting = engine(roomy());
    let adversary = Adversary { manner: Manner::Oracle, truth: truth(&expected), num_calls: 0 };
    drafting.set_speculation(Some(Speculation::with_drafters(CONFIG, vec![Box::new(adversary)], Budget::all())));
    assert_eq!(fingerprint(&generate(&mut drafting, &requests)), fingerprint(&expected));
    assert_eq!(drafting.stats().num_rows, plain.stats().num_rows, "every row is computed once");
    // The first token comes with the prompt, then 12 a step.
    assert_eq!((plain.stats().num_steps, drafting.stats().num_steps), (37, 1 + 3));
    assert_eq!(drafting.stats().num_generated_tokens, 4 * 37);
}

/// The same prompts with the same noise: the second pass is replayed whole.
#[test]
fn replay_finds_the_previous_pass() {
    let mut drafting = engine(roomy());
    let drafters: Vec<Box<dyn Drafter>> = vec![Box::new(ReplayDrafter::new(11))];
    drafting.set_speculation(Some(Speculation::with_drafters(CONFIG, drafters, Budget::all())));
    let first = generate(&mut drafting, &[request(0, 10, 4, 37)]);
    assert_eq!(drafting.stats().speculation.total().num_draft_tokens, 0);
    let again = GroupRequest { group_id: GroupId(9), ..request(0, 10, 4, 37) };
    let second = generate(&mut drafting, &[again]);
    assert_eq!(fingerprint(&first), fingerprint(&second));
    let total = drafting.stats().speculation.total();
    assert_eq!((total.num_draft_tokens, total.num_accepted_tokens), (4 * 33, 4 * 33));
    assert_eq!(second[0].samples[2].num_accepted, 33);
}

/// A failing step leaves drafts behind; the next one proposes anew.
#[test]
fn a_failed_step_with_drafts_can_be_tried_again() {
    let requests = [request(0, 20, 3, 30)];
    let expected = generate(&mut engine(roomy()), &requests);
    let mut drafting = engine(roomy());
    let adversary = Adversary { manner: Manner::Mixed, truth: truth(&expected), num_calls: 0 };
    drafting.set_speculation(Some(Speculation::with_drafters(CONFIG, vec![Box::new(adversary)], Budget::all())));
    drafting.submit(requests.to_vec()).unwrap();
    for _ in 0..4 {
        drafting.model_mut().fails = true;
        assert!(drafting.step().is_err());
        drafting.model_mut().fails = false;
        drafting.step().unwrap();
    }
    assert_eq!(fingerprint(&run(&mut drafting)), fingerprint(&expected));
}

/// Steps are timed once, before the first one, where drafts are chosen by it: with as many sequences as could draw.
/// What that stored is read by nobody, and a step that fails meanwhile can be tried again.
#[test]
fn steps_are_timed_before_the_first_one() {
    let requests = [request(0, 20, 3, 30), request(1, 7, 2, 12)];
    let expected = generate(&mut engine(roomy()), &requests);
    for (num_blocks, largest) in [(200, 32), (9, 8)] {
        let mut timed = engine(SchedulerLimits { num_blocks, watermark_blocks: 0, ..roomy() });
        timed.set_speculation(Speculation::new(SpeculationConfig { speculative: Speculative::Auto, ..CONFIG }));
        timed.options.clock = Arc::new(SystemClock::default());
        timed.submit(requests.to_vec()).unwrap();
        timed.model_mut().failing_step = Some(4);
        assert!(timed.step().is_err());
        timed.model_mut().rows.clear();
        assert_eq!(fingerprint(&run(&mut timed)), fingerprint(&expected));
        let sizes = std::iter::successors(Some(1), |rows| Some(2 * rows)).take_while(|rows| *rows <= largest);
        let measured: Vec<usize> = std::iter::once(1).chain(sizes.flat_map(|rows| [rows, rows])).collect();
        let rows = &timed.model().rows;
        assert_eq!(rows[..measured.len()], measured);
        assert_eq!(rows[measured.len()..].len() as u64, timed.stats().num_steps, "once, and counted as no step");
    }
    let mut untimed = engine(roomy());
    assert_eq!(fingerprint(&generate(&mut untimed, &requests)), fingerprint(&expected));
    assert_eq!(untimed.model().rows.len() as u64, untimed.stats().num_steps);
}
