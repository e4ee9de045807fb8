//! Rounds over random policies: a response that is cut and goes on has the bits of the uncut one.

use crate::support::{Model, engine_of, engine_with, run_all};
use temper_proto::{BegunResponse, GeneratedSample, GroupRequest};
use temper_rollout::EngineConfig;
use temper_types::{FinishReason, GroupId, SamplingParams};

/// Seeds of the weights.
const OLD: u64 = 3;
const NEW: u64 = 4;
const LEN: u32 = 24;

fn request(sampling: SamplingParams) -> GroupRequest {
    GroupRequest {
        group_id: GroupId(1),
        prompt_token_ids: (0..37).map(|i| 2 + i % 50).collect(),
        seeds: vec![7, 8, 9],
        sampling: SamplingParams { max_new_tokens: LEN, ..sampling },
        ..GroupRequest::default()
    }
}

fn generate(seed: u64, request: GroupRequest) -> Vec<GeneratedSample> {
    run_all(&mut engine_of(Model::llama(seed)), vec![request]).remove(0).samples
}

fn going_on(request: &GroupRequest, first: &[GeneratedSample]) -> GroupRequest {
    let begun = |s: &GeneratedSample| BegunResponse {
        token_ids: s.token_ids.clone(),
        is_complete: s.finish_reason != FinishReason::Paused,
    };
    GroupRequest { begun: first.iter().map(begun).collect(), ..request.clone() }
}

/// Ids, and bits of log-probs under both laws and of the surviving mass.
fn bits(parts: &[&GeneratedSample]) -> (Vec<u32>, [Vec<u32>; 3]) {
    let of =
        |values: fn(&GeneratedSample) -> &[f32]| parts.iter().flat_map(|s| values(s)).map(|x| x.to_bits()).collect();
    let floats = [of(|s| &s.log_probs), of(|s| &s.sampled_log_probs), of(|s| &s.surviving_mass)];
    (parts.iter().flat_map(|s| s.token_ids.iter().copied()).collect(), floats)
}

#[test]
fn a_cut_at_any_position_changes_no_bit() {
    let laws = [
        SamplingParams::default(),
        SamplingParams {
            top_p: 0.8,
            repetition_penalty: 1.2,
            stop_token_ids: vec![5, 9, 30],
            ..SamplingParams::default()
        },
    ];
    let caching = EngineConfig { block_size: 16, ..EngineConfig::default() };
    let plain = EngineConfig { prefix_cache: false, prefill_chunk: 5, block_size: 16, ..EngineConfig::default() };
    for law in laws {
        let request = request(law);
        let whole = generate(OLD, request.clone());
        for cut in 1..LEN {
            for config in [&caching, &plain] {
                let mut engine = engine_with(Model::llama(OLD), config);
                let mut round = |request| run_all(&mut engine, vec![request]).remove(0).samples;
                let first = round(GroupRequest { round_tokens: cut, ..request.clone() });
                if first.iter().all(|s| s.finish_reason != FinishReason::Paused) {
                    continue;
                }
                let second = round(going_on(&request, &first));
                for ((first, second), whole) in first.iter().zip(&second).zip(&whole) {
                    assert_eq!(bits(&[first, second]), bits(&[whole]), "cut at {cut}");
                }
            }
        }
    }
}

/// Under other weights, what goes on is what those would draw behind the same tokens, with the noise of their slots.
#[test]
fn other_weights_go_on_as_if_the_beginning_were_theirs() {
    let request = request(SamplingParams::default());
    let first = generate(OLD, GroupRequest { round_tokens: 10, ..request.clone() });
    let second = generate(NEW, going_on(&request, &first));
    let whole = generate(OLD, request.clone());
    assert_ne!(second[0].token_ids, whole[0].token_ids[10..]);
    for (index, (first, second)) in first.iter().zip(&second).enumerate() {
        let mut prompt = request.prompt_token_ids.clone();
        prompt.extend(&first.token_ids);
        let sampling = SamplingParams { max_new_tokens: LEN - 10, ..request.sampling.clone() };
        let seeds = vec![request.seeds[index]];
        let behind = GroupRequest { prompt_token_ids: prompt, seeds, sampling, ..request.clone() };
        assert_eq!(bits(&[second]), bits(&[&generate(NEW, behind)[0]]), "sample {index}");
    }
}
