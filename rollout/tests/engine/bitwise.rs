//! Decode, chunked prefill and the training forward give the same bits, whatever the engine's limits.
//!
//! The policies are small, random and of every family; each case draws its own limits, batch, order, threads, format
//! and sampling parameters, and is compared with each sample generated alone and with the training forward.

use crate::support::FORMATS;
use proptest::prelude::*;
use std::path::Path;
use std::sync::{Arc, RwLock};
use temper_actor::{Family, ModelConfig, PackedPolicy, ParamStore, PolicyFormat, TrainArena, TrainBatch};
use temper_proto::{GeneratedSample, GroupRequest, RolloutService, RolloutStats};
use temper_rollout::{EngineConfig, LocalRolloutService, TokenByteTable};
use temper_tensor::{CpuConfig, CpuDevice, Device};
use temper_types::{DType, GroupId, PromptId, SamplingParams, WeightFormat};

const VOCAB: u32 = 93;
const MASKED: [u32; 2] = [40, 92];

/// A two-layer model with odd sizes, a window shorter than its sequences where the family has one, and weights large
/// enough for laws far from uniform.
fn config(family: Family) -> ModelConfig {
    let mut json = serde_json::json!({
        "model_type": family.model_type(),
        "architectures": [format!("{}ForCausalLM", family.class_prefix())],
        "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": family == Family::Llama,
        "initializer_range": 0.3, "hidden_act": "silu",
    });
    if family == Family::Mistral {
        json["sliding_window"] = 19.into();
    }
    let serde_json::Value::Object(json) = json else { panic!("an object") };
    ModelConfig::from_json(json, Path::new("config.json")).expect("a valid configuration")
}

struct Fixture {
    device: Arc<dyn Device>,
    policy: Arc<RwLock<PackedPolicy>>,
}

fn fixture(family: Family, format: impl Into<PolicyFormat>, num_threads: usize) -> Fixture {
    let device: Arc<dyn Device> = Arc::new(CpuDevice::new(CpuConfig { num_threads, isa: None }));
    let config = config(family);
    let params = ParamStore::init(&*device, &config, 11);
    let mut policy = PackedPolicy::new(&device, &params, &config, format);
    policy.set_masked_ids(MASKED.to_vec());
    Fixture { device, policy: Arc::new(RwLock::new(policy)) }
}

/// Samples of every group in the order of `requests`.
fn generate(
    fixture: &Fixture,
    config: EngineConfig,
    requests: &[GroupRequest],
) -> (Vec<Vec<GeneratedSample>>, RolloutStats) {
    let weights = fixture.policy.read().expect("no writer panicked").weights();
    let config = EngineConfig { weights, ..config };
    let bytes = TokenByteTable((0..VOCAB).map(|id| vec![id as u8]).collect());
    let service =
        LocalRolloutService::new(Arc::clone(&fixture.device), Arc::clone(&fixture.policy), config, Arc::new(bytes))
            .expect("limits within range");
    service.submit(requests.to_vec()).expect("every request fits");
    let timeout = std::time::Duration::from_secs(600);
    let results: Vec<_> = std::iter::from_fn(|| service.next_group(timeout).expect("no deadline passes")).collect();
    assert_eq!((results.len(), service.stats().kv_blocks_in_use), (requests.len(), 0));
    let find = |request: &GroupRequest| {
        results.iter().find(|result| result.group_id == request.group_id).expect("every group has a result")
    };
    (requests.iter().map(|request| find(request).samples.clone()).collect(), service.stats())
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Everything of a sample but its timings, as bits.
fn fingerprint(sample: &GeneratedSample) -> (Vec<u32>, [Vec<u32>; 3], String) {
    let floats = [&sample.log_probs, &sample.sampled_log_probs, &sample.surviving_mass].map(|v| bits(v));
    (sample.token_ids.clone(), floats, format!("{:?} {:?}", sample.finish_reason, sample.policy_versions))
}

/// Each sample generated alone, in large chunks.
fn generate_alone(fixture: &Fixture, request: &GroupRequest) -> Vec<GeneratedSample> {
    let config = EngineConfig { max_num_seqs: 1, block_size: 16, num_blocks: 16, ..EngineConfig::default() };
    generate(fixture, config, std::slice::from_ref(request)).0.remove(0)
}

/// The engine's log-probs are the bits of the training forward over the same tokens.
fn check_training_forward(fixture: &Fixture, requests: &[GroupRequest], samples: &[Vec<GeneratedSample>]) {
    let policy = fixture.policy.read().expect("no writer panicked");
    let mut arena = TrainArena::new();
    for (request, group) in requests.iter().zip(samples) {
        let mut batch = TrainBatch::new();
        let mut engine_log_probs = Vec::new();
        for sample in group {
            let tokens = [request.prompt_token_ids.as_slice(), &sample.token_ids].concat();
            batch.push_sequence(&tokens, request.prompt_token_ids.len()..tokens.len());
            engine_log_probs.extend(bits(&sample.log_probs));
        }
        let stats = policy.score_only(&batch, request.sampling.log_prob_temperature(), &mut arena);
        assert_eq!(bits(&stats.log_probs), engine_log_probs, "group {}", request.group_id);
        assert!(stats.log_probs.iter().all(|x| x.is_finite()));
    }
}

fn sampling() -> impl Strategy<Value = SamplingParams> {
    let variants = [
        SamplingParams::default(),
        SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        SamplingParams { temperature: 0.7, top_p: 0.8, ..SamplingParams::default() },
        SamplingParams { top_k: 7, min_p: 0.02, ..SamplingParams::default() },
        SamplingParams { repetition_penalty: 1.3, frequency_penalty: 0.4, ..SamplingParams::default() },
        SamplingParams { stop_token_ids: vec![3, 30, 60], min_new_tokens: 4, ..SamplingParams::default() },
        SamplingParams {
            logit_bias: [(5, 3.0), (60, -2.0)].into(),
            bad_words_ids: vec![vec![5], vec![7, 8], vec![1, 2, 3]],
            ..SamplingParams::default()
        },
        SamplingParams { allowed_token_ids: vec![9, 4, 3, 80], top_p: 0.9, ..SamplingParams::default() },
    ];
    (prop::sample::select(variants.to_vec()), 1u32..20)
        .prop_map(|(params, len)| SamplingParams { max_new_tokens: len.max(params.min_new_tokens), ..params })
}

fn group() -> impl Strategy<Value = GroupRequest> {
    (prop::collection::vec(0u32..VOCAB - 1, 1..70), prop::collection::vec(any::<u64>(), 1..7), sampling()).prop_map(
        |(prompt_token_ids, seeds, sampling)| GroupRequest {
            group_id: GroupId(0),
            prompt_id: PromptId(0),
            epoch: 0,
            prompt_token_ids,
            seeds,
            sampling,
            ..GroupRequest::default()
        },
    )
}

fn requests() -> impl Strategy<Value = Vec<GroupRequest>> {
    prop::collection::vec(group(), 1..7).prop_map(|mut groups| {
        for (group, id) in groups.iter_mut().zip(0..) {
            group.group_id = GroupId(id);
        }
        groups
    })
}

fn limits() -> impl Strategy<Value = EngineConfig> {
    (1usize..40, 1usize..80, 1usize..50, prop::sample::select(vec![16usize, 32, 64]), 0usize..14).prop_map(
        |(max_num_seqs, spare, prefill_chunk, block_size, spare_blocks)| EngineConfig {
            max_num_seqs,
            max_batch_tokens: max_num_seqs + spare,
            prefill_chunk,
            block_size,
            num_blocks: 90usize.div_ceil(block_size) + spare_blocks,
            reserve_tokens: 4,
            ..EngineConfig::default()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    /// Tokens and log-prob bits depend on the request alone.
    #[test]
    fn no_limit_and_no_batch_mate_changes_a_bit(
        family in prop::sample::select(Family::ALL.to_vec()),
        format in prop::sample::select(FORMATS.to_vec()),
        num_threads in 1usize..4,
        config in limits(),
        requests in requests(),
        reversed in any::<bool>(),
    ) {
        let alone = fixture(family, format, 1);
        let mut expected: Vec<_> = requests.iter().map(|request| generate_alone(&alone, request)).collect();
        check_training_forward(&alone, &requests, &expected);
        let mut requests = requests;
        if reversed {
            requests.reverse();
            expected.reverse();
        }
        let (samples, _) = generate(&fixture(family, format, num_threads), config, &requests);
        for (group, expected) in samples.iter().flatten().zip(expected.iter().flatten()) {
            prop_assert_eq!(fingerprint(group), fingerprint(expected));
        }
    }
}

/// `count` groups of one sample each, 30 prompt tokens, 12 new ones.
fn singles(count: u64) -> Vec<GroupRequest> {
    let request = |id: u64| GroupRequest {
        group_id: GroupId(id),
        prompt_id: PromptId(id),
        epoch: 0,
        prompt_token_ids: (0..30).map(|i| ((i * 13 + id * 7) % 90) as u32).collect(),
        seeds: vec![id],
        sampling: SamplingParams { max_new_tokens: 12, ..SamplingParams::default() },
        ..GroupRequest::default()
    };
    (0..count).map(request).collect()
}

fn check_batch_sizes(format: impl Into<PolicyFormat>) {
    let fixture = fixture(Family::Qwen3, format, 2);
    let requests = singles(64);
    let (expected, _) = generate(&fixture, EngineConfig { max_num_seqs: 1, ..EngineConfig::default() }, &requests);
    check_training_forward(&fixture, &requests, &expected);
    for max_num_seqs in [2, 3, 7, 16, 31, 64] {
        let config = EngineConfig { max_num_seqs, ..EngineConfig::default() };
        let (samples, stats) = generate(&fixture, config, &requests);
        assert_eq!(stats.num_preemptions, 0);
        for (sample, expected) in samples.iter().flatten().zip(expected.iter().flatten()) {
            assert_eq!(fingerprint(sample), fingerprint(expected), "{max_num_seqs} sequences at once");
        }
    }
}

#[test]
fn batches_of_1_to_64_agree_in_f32() {
    check_batch_sizes(DType::F32);
}

#[test]
fn batches_of_1_to_64_agree_in_bf16() {
    check_batch_sizes(DType::Bf16);
}

#[test]
fn batches_of_1_to_64_agree_with_int8_weights() {
    check_batch_sizes(PolicyFormat { dtype: DType::Bf16, weights: WeightFormat::Int8 });
}

#[test]
fn an_engine_holds_the_weights_that_it_was_asked_for() {
    let fixture = fixture(Family::Llama, PolicyFormat { dtype: DType::F32, weights: WeightFormat::Int8 }, 1);
    let bytes = Arc::new(TokenByteTable(Vec::new()));
    let made = LocalRolloutService::new(fixture.device, fixture.policy, EngineConfig::default(), bytes);
    let problem = made.err().expect("exact weights were asked for").to_string();
    assert!(problem.contains("rollout.weights = exact") && problem.contains("expected \"int8\""), "{problem}");
}

#[test]
fn preempted_sequences_come_back_with_the_same_bits() {
    for format in FORMATS {
        let fixture = fixture(Family::Llama, format, 2);
        let mut requests = singles(6);
        for request in &mut requests {
            request.seeds = vec![1, 2, 3];
            request.sampling.max_new_tokens = 60;
        }
        let (expected, _) = generate(&fixture, EngineConfig::default(), &requests);
        let tiny = EngineConfig {
            block_size: 16,
            num_blocks: 13,
            reserve_tokens: 0,
            watermark: 0.0,
            ..EngineConfig::default()
        };
        let (samples, stats) = generate(&fixture, tiny, &requests);
        assert!(stats.num_preemptions > 0, "a pool of 13 blocks is too small");
        assert_eq!(stats.peak_kv_blocks, 13);
        for (sample, expected) in samples.iter().flatten().zip(expected.iter().flatten()) {
            assert_eq!(fingerprint(sample), fingerprint(expected));
        }
        check_training_forward(&fixture, &requests, &samples);
    }
}

#[test]
fn masked_ids_are_never_drawn_and_seeds_differ() {
    let fixture = fixture(Family::Llama, DType::F32, 2);
    let mut request = singles(1).remove(0);
    request.seeds = (0..48).collect();
    let (samples, _) = generate(&fixture, EngineConfig::default(), &[request]);
    let drawn: Vec<&[u32]> = samples[0].iter().map(|sample| sample.token_ids.as_slice()).collect();
    assert!(drawn.iter().all(|ids| ids.iter().all(|id| !MASKED.contains(id))));
    assert!(drawn.windows(2).any(|pair| pair[0] != pair[1]), "siblings draw with noise of their own");
    let mut request = singles(1).remove(0);
    request.sampling.allowed_token_ids = MASKED.to_vec();
    let service = LocalRolloutService::new(
        Arc::clone(&fixture.device),
        Arc::clone(&fixture.policy),
        EngineConfig::default(),
        Arc::new(TokenByteTable(vec![vec![0]; VOCAB as usize])),
    );
    let error = service.expect("limits within range").submit(vec![request]).expect_err("nothing can be drawn");
    assert!(error.to_string().contains("the tokenizer has none of the"), "{error}");
}
