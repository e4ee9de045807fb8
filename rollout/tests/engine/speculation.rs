//! Speculation and the prefix cache over random policies: the same tokens and log-prob bits with and without them, in
//! every format.

use crate::support::{FORMATS, Model, engine_with, run_all};
use temper_actor::{Family, PolicyFormat};
use temper_proto::{GroupRequest, GroupResult};
use temper_rollout::speculation::{Budget, Drafter, ReplayDrafter, SuffixDrafter};
use temper_rollout::{EngineConfig, Speculation};
use temper_types::{GroupId, PromptId, SamplingParams};

/// Two groups a pass; the noise of the second pass is that of the first, the third has its own.
fn requests(pass: u64) -> Vec<GroupRequest> {
    let group = |index: u64| GroupRequest {
        group_id: GroupId(2 * pass + index),
        prompt_id: PromptId(index),
        epoch: pass,
        prompt_token_ids: (0..37 + index).map(|i| ((i * 13 + index * 7) % 60) as u32).collect(),
        seeds: (0..4).map(|sample| 100 * index + sample + 1000 * (pass / 2)).collect(),
        sampling: SamplingParams {
            max_new_tokens: 40,
            temperature: 0.4,
            frequency_penalty: if index == 0 { 0.0 } else { 0.3 },
            top_p: if index == 0 { 1.0 } else { 0.9 },
            logit_bias: [(17, -1.0), (20, 1.5)].into(),
            bad_words_ids: vec![vec![20, 20], vec![3]],
            stop_token_ids: vec![17],
            min_new_tokens: 6,
            ..SamplingParams::default()
        },
        ..GroupRequest::default()
    };
    (0..2).map(group).collect()
}

fn fingerprint(results: &[GroupResult]) -> Vec<(Vec<u32>, [Vec<u32>; 3], String)> {
    let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
    let samples = results.iter().flat_map(|result| &result.samples);
    let of = |s: &temper_proto::GeneratedSample| {
        let floats = [&s.log_probs, &s.sampled_log_probs, &s.surviving_mass].map(|values| bits(values));
        (s.token_ids.clone(), floats, format!("{:?}", s.finish_reason))
    };
    samples.map(of).collect()
}

fn check(family: Family, format: PolicyFormat, config: &EngineConfig) {
    let model = Model { seed: 5, family, format };
    let mut plain = engine_with(model, &EngineConfig { prefix_cache: false, ..EngineConfig::default() });
    let mut drafting = engine_with(model, config);
    let drafters: Vec<Box<dyn Drafter>> = vec![Box::new(ReplayDrafter::new(12)), Box::new(SuffixDrafter::new(12))];
    let speculation = Speculation::with_drafters(config.speculation(), drafters, Budget::all());
    drafting.set_speculation(Some(speculation));
    for pass in 0..3 {
        let (expected, results) = (run_all(&mut plain, requests(pass)), run_all(&mut drafting, requests(pass)));
        assert_eq!(fingerprint(&results), fingerprint(&expected), "{family:?} {format:?} pass {pass}");
    }
    let total = drafting.stats().speculation.total();
    assert!(total.num_accepted_tokens > 50, "the second pass repeats the first: {total:?}");
    assert!(total.num_accepted_tokens < total.num_draft_tokens, "the third does not: {total:?}");
    assert_eq!(drafting.stats().kv_blocks_in_use, 0);
    assert_eq!(plain.stats().prefix_cache_hits, 0);
    assert!(config.num_blocks > 0 || drafting.stats().prefix_cache_hits == 2 * 2 * 32, "later passes find the prompts");
}

#[test]
fn drafts_change_no_bit_of_a_policy() {
    for format in FORMATS {
        for family in [Family::Llama, Family::Qwen3] {
            check(family, format, &EngineConfig::default());
        }
    }
}

#[test]
fn drafts_change_no_bit_under_preemption_and_small_chunks() {
    let config = EngineConfig {
        block_size: 16,
        num_blocks: 11,
        reserve_tokens: 0,
        watermark: 0.0,
        max_num_seqs: 7,
        max_batch_tokens: 19,
        prefill_chunk: 5,
        ..EngineConfig::default()
    };
    for format in FORMATS {
        check(Family::Llama, format, &config);
    }
}
