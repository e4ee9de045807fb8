//! A draft model changes no response, and one that is the model itself is always right.

use super::Engine;
use super::fake_model::FakeModel;
use super::tests::{engine, request, roomy, run};
use crate::SchedulerLimits;
use crate::speculation::{Budget, ModelDrafter, Speculation, SpeculationConfig, Speculative};
use proptest::prelude::*;
use temper_proto::{GroupRequest, GroupResult};
use temper_types::SamplingParams;

const CONFIG: SpeculationConfig =
    SpeculationConfig { speculative: Speculative::Model, max_draft_tokens: 8, history_epochs: 0, history_tokens: 0 };

fn drafting(limits: SchedulerLimits, draft_limits: SchedulerLimits, budget: Budget) -> Engine<FakeModel> {
    let model = FakeModel::new(draft_limits.num_blocks, draft_limits.block_size);
    drafting_by(model, (limits, draft_limits), budget)
}

fn drafting_by(
    model: FakeModel,
    (limits, draft_limits): (SchedulerLimits, SchedulerLimits),
    budget: Budget,
) -> Engine<FakeModel> {
    let mut engine = engine(limits);
    let target = crate::Model::limits(engine.model());
    let drafter = ModelDrafter::new(model, draft_limits, target).unwrap();
    engine.set_speculation(Some(Speculation::with_drafters(CONFIG, vec![Box::new(drafter)], budget)));
    engine
}

fn content(results: &[GroupResult]) -> Vec<(Vec<u32>, Vec<u32>)> {
    let samples = results.iter().flat_map(|result| &result.samples);
    samples.map(|s| (s.token_ids.clone(), s.log_probs.iter().map(|p| p.to_bits()).collect())).collect()
}

fn generate(engine: &mut Engine<FakeModel>, requests: &[GroupRequest]) -> Vec<GroupResult> {
    engine.submit(requests.to_vec()).unwrap();
    run(engine)
}

#[test]
fn the_model_itself_drafts_what_is_drawn() {
    let requests = [request(0, 10, 4, 37), request(1, 40, 2, 20)];
    let expected = generate(&mut engine(roomy()), &requests);
    let mut drafting = drafting(roomy(), roomy(), Budget::all());
    let results = generate(&mut drafting, &requests);
    assert_eq!(content(&results), content(&expected));
    let total = drafting.stats().speculation.total();
    assert!(total.num_draft_tokens > 100, "{total:?}");
    assert_eq!(total.num_accepted_tokens, total.num_draft_tokens, "the same law with the same noise");
    assert_eq!(
        drafting.stats().speculation.model.iter().map(|c| c.num_draft_tokens).sum::<u64>(),
        total.num_draft_tokens
    );
    assert!(drafting.stats().num_steps < 20, "{} steps", drafting.stats().num_steps);
}

/// The samples of which a draft was complete when a later step of the draft model failed are not of the next drafts.
#[test]
fn a_draft_model_that_fails_drafts_nothing_and_goes_on() {
    let requests = [request(0, 10, 2, 3), request(1, 40, 2, 20)];
    let expected = generate(&mut engine(roomy()), &requests);
    for failing_step in 1..12 {
        let mut model = FakeModel::new(roomy().num_blocks, roomy().block_size);
        model.failing_step = Some(failing_step);
        let mut drafting = drafting_by(model, (roomy(), roomy()), Budget::all());
        assert_eq!(content(&generate(&mut drafting, &requests)), content(&expected), "step {failing_step} fails");
        assert!(drafting.stats().speculation.total().num_accepted_tokens > 0);
    }
}

#[test]
fn another_vocabulary_is_refused() {
    let mut target = crate::Model::limits(engine(roomy()).model());
    target.vocab_size = 50;
    let error = ModelDrafter::new(FakeModel::new(8, 16), roomy(), target).err().unwrap().to_string();
    assert!(error.contains("the draft model has 40 token ids, the model it drafts for has 50"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    /// The same bits whatever room either model has; penalties make the draft model guess wrong now and then.
    #[test]
    fn a_draft_model_changes_nothing(
        shapes in prop::collection::vec((1usize..50, 1u64..5, 2u32..30, any::<bool>()), 1..5),
        (num_blocks, draft_blocks, is_measured) in (5usize..40, 2usize..40, any::<bool>()),
    ) {
        let one = |((prompt_len, num_samples, new, is_plain), id): ((usize, u64, u32, bool), u64)| {
            let plain = request(id, prompt_len, num_samples, new);
            let sampling = SamplingParams {
                presence_penalty: if is_plain { 0.0 } else { 0.5 },
                min_new_tokens: 2,
                stop_token_ids: vec![3],
                ..plain.sampling.clone()
            };
            GroupRequest { sampling, ..plain }
        };
        let requests: Vec<GroupRequest> = shapes.into_iter().zip(0..).map(one).collect();
        let expected = generate(&mut engine(roomy()), &requests);
        let limits = SchedulerLimits { num_blocks, watermark_blocks: 0, ..roomy() };
        let draft_limits = SchedulerLimits { num_blocks: draft_blocks, watermark_blocks: 0, ..roomy() };
        let budget = if is_measured { Budget::measured() } else { Budget::all() };
        let mut drafting = drafting(limits, draft_limits, budget);
        prop_assert_eq!(content(&generate(&mut drafting, &requests)), content(&expected));
        prop_assert_eq!(drafting.stats().kv_blocks_in_use, 0);
    }
}
