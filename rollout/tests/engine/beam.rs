//! Beam search over a random policy against references that compute every prefix on its own.

use crate::support::{Model, engine_of, engine_with, run_all};
use std::collections::BTreeMap;
use temper_proto::GroupRequest;
use temper_rollout::{BeamHypothesis, BeamSpec, Engine, EngineConfig, PolicyModel};
use temper_types::{FinishReason, GroupId, SamplingParams};

const VOCAB: u32 = 61;
const PROMPT: [u32; 19] = [5, 17, 3, 40, 8, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14];

/// Log-probs of every id behind any prefix, each computed as a request of its own.
struct Oracle {
    engine: Engine<PolicyModel>,
    known: BTreeMap<Vec<u32>, Vec<f32>>,
    next_group: u64,
}

impl Oracle {
    fn new(model: Model) -> Self {
        let config = EngineConfig { block_size: 16, max_num_seqs: 64, ..EngineConfig::default() };
        Oracle { engine: engine_with(model, &config), known: BTreeMap::new(), next_group: 0 }
    }

    fn log_probs(&mut self, response: &[u32]) -> Vec<f32> {
        if let Some(known) = self.known.get(response) {
            return known.clone();
        }
        let first = self.next_group;
        self.next_group += u64::from(VOCAB);
        let one = |id: u32| GroupRequest {
            group_id: GroupId(first + u64::from(id)),
            prompt_token_ids: [&PROMPT[..], response].concat(),
            seeds: vec![0],
            sampling: SamplingParams { max_new_tokens: 1, allowed_token_ids: vec![id], ..SamplingParams::default() },
            ..GroupRequest::default()
        };
        let results = run_all(&mut self.engine, (0..VOCAB).map(one).collect());
        let out: Vec<f32> = results.iter().map(|result| result.samples[0].log_probs[0]).collect();
        self.known.insert(response.to_vec(), out.clone());
        out
    }
}

fn score(log_probs: &[f32], penalty: f64) -> f64 {
    log_probs.iter().map(|p| f64::from(*p)).sum::<f64>() / (log_probs.len() as f64).powf(penalty)
}

/// Beam search in the plainest words, to the longest response: stopping early may change nothing.
fn reference(oracle: &mut Oracle, spec: &BeamSpec) -> Vec<BeamHypothesis> {
    let mut beams: Vec<(Vec<u32>, Vec<f32>, f64)> = vec![(Vec::new(), Vec::new(), 0.0)];
    let mut results: Vec<BeamHypothesis> = Vec::new();
    for len in 1..=spec.max_new_tokens {
        let mut next = Vec::new();
        for (token_ids, log_probs, sum) in &beams {
            for (id, p) in oracle.log_probs(token_ids).into_iter().enumerate() {
                let ids: Vec<u32> = token_ids.iter().copied().chain([id as u32]).collect();
                next.push((ids, log_probs.iter().copied().chain([p]).collect::<Vec<f32>>(), sum + f64::from(p)));
            }
        }
        next.sort_by(|a, b| b.2.total_cmp(&a.2));
        beams.clear();
        for (rank, (ids, log_probs, sum)) in next.into_iter().enumerate() {
            let is_stop = spec.stop_token_ids.contains(&ids[ids.len() - 1]);
            let finish_reason = if is_stop { FinishReason::Stop } else { FinishReason::Length };
            if is_stop && rank >= spec.width || !is_stop && beams.len() == spec.width {
                continue;
            }
            if is_stop || len == spec.max_new_tokens {
                let score = score(&log_probs, spec.length_penalty);
                results.push(BeamHypothesis {
                    token_ids: ids.clone(),
                    log_probs: log_probs.clone(),
                    score,
                    finish_reason,
                });
            }
            if !is_stop {
                beams.push((ids, log_probs, sum));
            }
        }
    }
    results.sort_by(|a, b| b.score.total_cmp(&a.score));
    results.truncate(spec.width);
    results
}

fn check(model: Model, spec: &BeamSpec) {
    let expected = reference(&mut Oracle::new(model), spec);
    let small = EngineConfig { block_size: 16, prefill_chunk: 7, ..EngineConfig::default() };
    for config in [EngineConfig::default(), small] {
        let (found, _) = engine_with(model, &config).beam_search(&PROMPT, spec).expect("it fits");
        let sum = |h: &BeamHypothesis| (h.token_ids.clone(), h.log_probs.clone(), h.finish_reason);
        assert_eq!(found.iter().map(sum).collect::<Vec<_>>(), expected.iter().map(sum).collect::<Vec<_>>(), "{spec:?}");
        for (a, b) in found.iter().zip(&expected) {
            assert!((a.score - b.score).abs() < 1e-12, "{} against {}", a.score, b.score);
        }
    }
}

#[test]
fn the_search_equals_a_plain_one() {
    let stop_token_ids: Vec<u32> = (0..VOCAB).step_by(9).collect();
    for (seed, width, length_penalty) in [(5, 3, 1.0), (6, 2, 0.0), (7, 2, -0.5)] {
        let spec = BeamSpec { width, length_penalty, max_new_tokens: 4, stop_token_ids: stop_token_ids.clone() };
        check(Model::llama(seed), &spec);
    }
    check(Model::llama(8), &BeamSpec { width: 3, length_penalty: 1.0, max_new_tokens: 3, stop_token_ids: vec![] });
}

/// Where the likeliest ids all end a response, as many others go on.
#[test]
fn more_stop_ids_than_beams_leave_no_beam_out() {
    let model = Model::llama(5);
    let log_probs = Oracle::new(model).log_probs(&[]);
    let mut ids: Vec<u32> = (0..VOCAB).collect();
    ids.sort_by(|a, b| log_probs[*b as usize].total_cmp(&log_probs[*a as usize]));
    ids.truncate(9);
    let spec = BeamSpec { width: 2, length_penalty: 5.0, max_new_tokens: 4, stop_token_ids: ids };
    check(model, &spec);
    let (found, _) = engine_of(model).beam_search(&PROMPT, &spec).expect("it fits");
    assert!(found[0].token_ids.len() > 1, "a longer response is better: {found:?}");
}

/// As wide as the vocabulary, the search over two tokens is exhaustive: its best is the best of all.
#[test]
fn a_beam_as_wide_as_the_vocabulary_finds_the_best_of_all() {
    let model = Model::llama(5);
    let mut oracle = Oracle::new(model);
    let first = oracle.log_probs(&[]);
    let mut best = (Vec::new(), f64::NEG_INFINITY);
    for (a, p) in first.iter().enumerate() {
        for (b, q) in oracle.log_probs(&[a as u32]).into_iter().enumerate() {
            let sum = f64::from(*p) + f64::from(q);
            if sum > best.1 {
                best = (vec![a as u32, b as u32], sum);
            }
        }
    }
    let spec = BeamSpec { width: VOCAB as usize, length_penalty: 0.0, max_new_tokens: 2, stop_token_ids: vec![] };
    let (found, _) = engine_of(model).beam_search(&PROMPT, &spec).expect("it fits");
    assert_eq!((&found[0].token_ids, found.len()), (&best.0, VOCAB as usize));
    assert!((found[0].score - best.1).abs() < 1e-12);
}

#[test]
fn a_search_that_does_not_fit_is_refused_and_leaves_the_engine_whole() {
    let model = Model::llama(5);
    let config = EngineConfig { num_blocks: 8, ..EngineConfig::default() };
    let mut engine = engine_with(model, &config);
    let spec = |width, max_new_tokens, stop: &[u32]| BeamSpec {
        width,
        length_penalty: 1.0,
        max_new_tokens,
        stop_token_ids: stop.to_vec(),
    };
    for (spec, expected) in [
        (spec(0, 4, &[]), "beam.width = 0"),
        (spec(2, 0, &[]), "beam.max_new_tokens = 0"),
        (spec(2, 4, &[61]), "beam.token_id = 61"),
        (BeamSpec { length_penalty: f64::NAN, ..spec(2, 4, &[]) }, "beam.length_penalty = NaN"),
        (spec(9, 60, &[]), "at most 8 of the pool's blocks"),
        (spec(1, 2000, &[]), "1024 positions in all"),
    ] {
        let error = engine.beam_search(&PROMPT, &spec).expect_err("does not fit").to_string();
        assert!(error.contains(expected), "{error}");
    }
    let request = || GroupRequest {
        prompt_token_ids: PROMPT.to_vec(),
        seeds: vec![1, 2],
        sampling: SamplingParams { max_new_tokens: 20, ..SamplingParams::default() },
        ..GroupRequest::default()
    };
    let before = run_all(&mut engine, vec![request()]);
    engine.beam_search(&PROMPT, &spec(2, 10, &[])).expect("it fits");
    let after = run_all(&mut engine, vec![request()]);
    assert_eq!(before[0].samples[1].log_probs, after[0].samples[1].log_probs, "nothing stale is found afterwards");
    engine.submit(vec![request()]).expect("it fits");
    assert!(engine.beam_search(&PROMPT, &spec(2, 10, &[])).is_err(), "a group is open");
}
