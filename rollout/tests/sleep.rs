//! An engine that sleeps: its K/V memory is the system's again, and comes back for the same bits.

use std::path::Path;
use std::sync::{Arc, RwLock};
use std::time::Duration;
use temper_actor::{ModelConfig, PackedPolicy, ParamStore};
use temper_proto::{GroupRequest, GroupResult, RolloutService};
use temper_rollout::{EngineConfig, LocalRolloutService, TokenByteTable};
use temper_tensor::{CpuConfig, CpuDevice, Device};
use temper_types::{DType, GroupId, SamplingParams};

/// An engine over a small random policy of 61 ids.
fn service(config: EngineConfig) -> LocalRolloutService {
    let json = serde_json::json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 61, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": true, "initializer_range": 0.4, "hidden_act": "silu",
    });
    let serde_json::Value::Object(json) = json else { panic!("an object") };
    let model = ModelConfig::from_json(json, Path::new("config.json")).expect("a valid configuration");
    let device: Arc<dyn Device> = Arc::new(CpuDevice::new(CpuConfig { num_threads: 2, isa: None }));
    let policy = PackedPolicy::new(&device, &ParamStore::init(&*device, &model, 3), &model, DType::F32);
    let bytes = TokenByteTable((0..61).map(|id| vec![id]).collect());
    LocalRolloutService::new(device, Arc::new(RwLock::new(policy)), config, Arc::new(bytes))
        .expect("limits within range")
}

/// Resident memory of this process in bytes; `None` where the system does not tell.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

/// Prompts that share no block.
const NUM_PROMPTS: u64 = 60;
/// Tokens of each.
const PROMPT_LEN: u32 = 1000;
/// Bytes of keys and values of a token: 2 layers, 2 heads, 8 numbers of 4 bytes, values in room for 16.
const TOKEN_BYTES: u64 = 2 * 2 * (8 + 16) * 4;

/// Answer every prompt; keys and values of all of them fit the pool together.
fn generate(service: &LocalRolloutService, round: u64) -> Vec<GroupResult> {
    let request = |prompt: u64| GroupRequest {
        group_id: GroupId(round * NUM_PROMPTS + prompt),
        prompt_token_ids: (0..PROMPT_LEN).map(|at| (at * (prompt as u32 + 1) + at / 7) % 61).collect(),
        seeds: (0..2).collect(),
        sampling: SamplingParams { max_new_tokens: 4, ..SamplingParams::default() },
        ..GroupRequest::default()
    };
    service.submit((0..NUM_PROMPTS).map(request).collect()).expect("they fit");
    let next = || service.next_group(Duration::from_secs(60)).expect("it generates").expect("a group is open");
    let mut results: Vec<GroupResult> = (0..NUM_PROMPTS).map(|_| next()).collect();
    results.sort_by_key(|result| result.group_id);
    results
}

fn content(results: &[GroupResult]) -> Vec<(Vec<u32>, Vec<u32>)> {
    let bits = |log_probs: &[f32]| log_probs.iter().map(|p| p.to_bits()).collect();
    results.iter().flat_map(|r| &r.samples).map(|s| (s.token_ids.clone(), bits(&s.log_probs))).collect()
}

#[test]
fn an_engine_that_sleeps_gives_its_memory_back_and_wakes_to_the_same_bits() {
    let config = EngineConfig { num_blocks: 8192, block_size: 16, max_num_seqs: 64, ..EngineConfig::default() };
    let used = NUM_PROMPTS * u64::from(PROMPT_LEN) * TOKEN_BYTES;
    let service = service(config);
    assert_eq!(service.sleep(), Ok(0), "it has taken nothing yet");
    let first = generate(&service, 0);
    for round in 1..3 {
        let awake = resident_bytes();
        let freed = service.sleep().expect("it is idle");
        assert!(freed >= used, "{freed} bytes are given back: expected the pool, in which {used} were used");
        assert_eq!(service.stats().kv_blocks_in_use, 0);
        if let (Some(awake), Some(asleep)) = (awake, resident_bytes()) {
            let returned = awake.saturating_sub(asleep);
            assert!(returned > used / 10 * 9, "round {round}: {returned} of {used} bytes are the system's again");
        }
        assert_eq!(content(&generate(&service, round)), content(&first), "round {round}");
    }
}
