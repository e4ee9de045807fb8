//! A policy that drafts for another: the same bits with and without, and everything kept where it is the same policy.

use crate::support::{Model, engine_of, run_all};
use temper_proto::{GroupRequest, GroupResult};
use temper_rollout::speculation::{Budget, ModelDrafter};
use temper_rollout::{EngineConfig, Model as _, PolicyModel, Speculation, SpeculationConfig, Speculative};
use temper_types::{GroupId, SamplingParams};

fn requests() -> Vec<GroupRequest> {
    let one = |id: u64| GroupRequest {
        group_id: GroupId(id),
        prompt_token_ids: (0..21 + 5 * id).map(|i| ((i * 13 + id) % 60) as u32).collect(),
        seeds: (10 * id..10 * id + 3).collect(),
        sampling: SamplingParams { max_new_tokens: 24, temperature: 0.7, ..SamplingParams::default() },
        ..GroupRequest::default()
    };
    (0..2).map(one).collect()
}

fn content(results: &[GroupResult]) -> Vec<(Vec<u32>, Vec<u32>)> {
    let samples = results.iter().flat_map(|result| &result.samples);
    samples.map(|s| (s.token_ids.clone(), s.log_probs.iter().map(|p| p.to_bits()).collect())).collect()
}

#[test]
fn a_draft_model_changes_no_bit_and_is_right_where_it_is_the_model() {
    let target = Model::llama(5);
    let expected = run_all(&mut engine_of(target), requests());
    let mut rates = Vec::new();
    for seed in [5, 6] {
        let mut engine = engine_of(target);
        let (device, policy) = Model::llama(seed).policy();
        let config = EngineConfig { block_size: 16, max_num_seqs: 8, ..EngineConfig::default() };
        let (model, limits) = PolicyModel::new(device, policy, &config).expect("limits within range");
        let drafter = ModelDrafter::new(model, limits, engine.model().limits()).expect("one vocabulary");
        let config = SpeculationConfig {
            speculative: Speculative::Model,
            max_draft_tokens: 6,
            history_epochs: 0,
            history_tokens: 0,
        };
        engine.set_speculation(Some(Speculation::with_drafters(config, vec![Box::new(drafter)], Budget::all())));
        assert_eq!(content(&run_all(&mut engine, requests())), content(&expected), "draft model {seed}");
        let total = engine.stats().speculation.total();
        rates.push(total.num_accepted_tokens as f64 / total.num_draft_tokens as f64);
    }
    assert!(rates[0] == 1.0 && rates[1] < 0.6, "{rates:?}");
}
