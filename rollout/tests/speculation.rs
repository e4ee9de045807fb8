//! Speculation and the prefix cache over random policies: the same tokens and log-prob bits with and without them, in
//! f32 and in bf16.

use std::path::Path;
use std::sync::{Arc, RwLock};
use std::time::Duration;
use temper_actor::{Family, ModelConfig, PackedPolicy, ParamStore};
use temper_proto::{GroupRequest, GroupResult};
use temper_rollout::speculation::{Budget, Drafter, ReplayDrafter, SuffixDrafter};
use temper_rollout::{Clock, Engine, EngineConfig, EngineOptions, PolicyModel, Speculation};
use temper_tensor::{CpuConfig, CpuDevice, Device};
use temper_types::{DType, GroupId, PromptId, SamplingParams};

struct NoTime;

impl Clock for NoTime {
    fn now(&self) -> Duration {
        Duration::ZERO
    }
}

fn engine(family: Family, dtype: DType, config: &EngineConfig) -> Engine<PolicyModel> {
    let json = serde_json::json!({
        "model_type": family.model_type(),
        "architectures": [format!("{}ForCausalLM", family.class_prefix())],
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true, "initializer_range": 0.4,
        "hidden_act": "silu",
    });
    let serde_json::Value::Object(json) = json else { panic!("an object") };
    let config_of_model = ModelConfig::from_json(json, Path::new("config.json")).expect("a valid configuration");
    let device: Arc<dyn Device> = Arc::new(CpuDevice::new(CpuConfig { num_threads: 2, isa: None }));
    let params = ParamStore::init(&*device, &config_of_model, 5);
    let policy = Arc::new(RwLock::new(PackedPolicy::new(&device, &params, &config_of_model, dtype)));
    let (model, limits) = PolicyModel::new(device, policy, config).expect("limits within range");
    let options = EngineOptions {
        limits,
        max_queued_samples: 1000,
        token_bytes: None,
        clock: Arc::new(NoTime),
        worker: "test".to_owned(),
        speculation: config.speculation(),
        prefix_cache: config.prefix_cache,
    };
    let mut engine = Engine::new(model, options);
    engine.set_speculation(None);
    engine
}

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

fn run(engine: &mut Engine<PolicyModel>, pass: u64) -> Vec<GroupResult> {
    engine.submit(requests(pass)).expect("every request fits");
    let mut results = Vec::new();
    while !engine.is_idle() {
        engine.step().expect("the policy can be read");
        results.extend(std::iter::from_fn(|| engine.pop_finished()));
    }
    results.sort_by_key(|result| result.group_id);
    results
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

fn check(family: Family, dtype: DType, config: &EngineConfig) {
    let mut plain = engine(family, dtype, &EngineConfig { prefix_cache: false, ..EngineConfig::default() });
    let mut drafting = engine(family, dtype, config);
    let drafters: Vec<Box<dyn Drafter>> = vec![Box::new(ReplayDrafter::new(12)), Box::new(SuffixDrafter::new(12))];
    let speculation = Speculation::with_drafters(config.speculation(), drafters, Budget::all());
    drafting.set_speculation(Some(speculation));
    for pass in 0..3 {
        let (expected, results) = (run(&mut plain, pass), run(&mut drafting, pass));
        assert_eq!(fingerprint(&results), fingerprint(&expected), "{family:?} {dtype:?} pass {pass}");
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
    for dtype in [DType::F32, DType::Bf16] {
        for family in [Family::Llama, Family::Qwen3] {
            check(family, dtype, &EngineConfig::default());
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
    for dtype in [DType::F32, DType::Bf16] {
        check(Family::Llama, dtype, &config);
    }
}
