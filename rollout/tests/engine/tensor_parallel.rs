//! Engines whose model is divided over ranks, against the engine of the whole model.

use std::net::TcpListener;
use std::path::Path;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};
use temper_actor::{Family, ModelConfig, PackedPolicy, ParamStore};
use temper_collective::reshard::{Layout, Receiver, Split, Tensor, Unit, plan};
use temper_collective::{Collective, Operation, SocketConfig, connect, connect_threads};
use temper_proto::{
    GroupRequest, GroupResult, RolloutService, ServiceResult, WeightManifest, WeightRange, WeightService, WeightSink,
};
use temper_rollout::{
    EngineConfig, LocalRolloutService, RankGroup, Sources, SyncedRolloutService, TokenByteTable, WeightReceiver, follow,
};
use temper_tensor::{CpuConfig, CpuDevice, Device};
use temper_types::{DType, ErrorCode, GroupId, PolicyVersion, SamplingParams};

const VOCAB: usize = 61;
const LONG: Duration = Duration::from_secs(60);

fn device() -> Arc<dyn Device> {
    Arc::new(CpuDevice::new(CpuConfig { num_threads: 2, isa: None }))
}

fn config(family: Family) -> ModelConfig {
    let json = serde_json::json!({
        "model_type": family.model_type(), "architectures": [format!("{}ForCausalLM", family.class_prefix())],
        "vocab_size": VOCAB, "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 10, "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true, "initializer_range": 0.4,
        "hidden_act": "silu",
    });
    let serde_json::Value::Object(json) = json else { panic!("an object") };
    ModelConfig::from_json(json, Path::new("config.json")).expect("a valid configuration")
}

/// Limits under which prompts are cut into chunks and sequences give way to others.
fn tight() -> EngineConfig {
    EngineConfig {
        max_num_seqs: 9,
        max_batch_tokens: 40,
        prefill_chunk: 11,
        block_size: 16,
        num_blocks: 22,
        reserve_tokens: 1,
        ..EngineConfig::default()
    }
}

fn version(params: &ParamStore, number: u64) -> PolicyVersion {
    PolicyVersion { number, hash: params.content_hash(&*device()) }
}

/// An engine of the whole model, or of rank 0's part of it where there is a group.
fn service(
    (params, model): (&ParamStore, &ModelConfig),
    (dtype, limits): (DType, EngineConfig),
    group: Option<&Arc<RankGroup>>,
) -> (LocalRolloutService, Arc<RwLock<PackedPolicy>>) {
    let dev = device();
    let mut policy = match group {
        None => PackedPolicy::new(&dev, params, model, dtype),
        Some(group) => PackedPolicy::new_part(&dev, params, group.part(), dtype),
    };
    policy.version = version(params, 1);
    let (policy, bytes) = (Arc::new(RwLock::new(policy)), Arc::new(TokenByteTable(vec![vec![b'a']; VOCAB])));
    let service = LocalRolloutService::new(dev, Arc::clone(&policy), limits, bytes).expect("valid limits");
    let service = match group {
        None => service,
        Some(group) => service.with_ranks(Arc::clone(group)),
    };
    (service, policy)
}

/// Threads that hold the other parts of `params`.
fn threads(
    (params, model): (&ParamStore, &ModelConfig),
    dtype: DType,
    (num_ranks, timeout): (usize, Duration),
) -> Arc<RankGroup> {
    let group = RankGroup::of_threads(&device(), (model, dtype), num_ranks, timeout).expect("a model that fits");
    group.hand_out(&*device(), params, version(params, 1).hash).expect("every rank is there");
    Arc::new(group)
}

fn requests() -> Vec<GroupRequest> {
    let request = |group: u64| GroupRequest {
        group_id: GroupId(group),
        prompt_token_ids: (0..5 + 13 * group as u32).map(|t| (7 * t + group as u32) % VOCAB as u32).collect(),
        seeds: (0..4).map(|sample| group * 10 + sample).collect(),
        sampling: SamplingParams {
            max_new_tokens: 20 + 6 * group as u32,
            top_p: if group == 2 { 0.8 } else { 1.0 },
            ..SamplingParams::default()
        },
        ..GroupRequest::default()
    };
    (0..4).map(request).collect()
}

/// Tokens, and the bits of their log-probs, of every sample.
type Said = Vec<(Vec<u32>, Vec<u32>)>;

fn said(results: Vec<GroupResult>) -> Said {
    let samples = results.into_iter().flat_map(|result| result.samples);
    samples.map(|s| (s.token_ids, s.log_probs.iter().map(|p| p.to_bits()).collect())).collect()
}

fn generate(service: &impl RolloutService) -> Said {
    service.submit(requests()).expect("every request fits");
    let mut results: Vec<_> = std::iter::from_fn(|| service.next_group(LONG).expect("no rank is lost")).collect();
    results.sort_by_key(|result| result.group_id);
    said(results)
}

#[test]
fn any_number_of_ranks_says_what_the_whole_model_says() {
    let cases = [
        (Family::Llama, DType::F32, 4),
        (Family::Qwen2, DType::F32, 2),
        (Family::Qwen2, DType::Bf16, 4),
        (Family::Qwen3, DType::Bf16, 2),
    ];
    for (family, dtype, num_ranks) in cases {
        let model = config(family);
        let params = ParamStore::init(&*device(), &model, 3);
        let expected = generate(&service((&params, &model), (dtype, EngineConfig::default()), None).0);
        assert_eq!(expected.len(), 16);
        let group = threads((&params, &model), dtype, (num_ranks, LONG));
        let (engine, _) = service((&params, &model), (dtype, tight()), Some(&group));
        assert_eq!(generate(&engine), expected, "{family:?} in {dtype} over {num_ranks} ranks");
        let stats = engine.stats();
        assert!(stats.num_preemptions > 0 && stats.kv_blocks_in_use == 0, "{stats:?}");
        if family == Family::Llama {
            // The pool's memory is new on every rank.
            assert!(engine.sleep().expect("it is idle") > 0);
            assert_eq!(generate(&engine), expected, "{family:?} after its sleep");
        }
    }
}

/// Weights that a trainer holds.
struct Held(ParamStore, PolicyVersion);

impl WeightService for Held {
    fn manifest(&self) -> ServiceResult<WeightManifest> {
        let unit_lens = self.0.units().iter().map(|unit| unit.buffer().len() as u64).collect();
        Ok(WeightManifest { version: self.1, unit_lens })
    }

    fn pull(&self, _: PolicyVersion, ranges: &[WeightRange], sink: WeightSink<'_>) -> ServiceResult<()> {
        ranges.iter().try_for_each(|range| {
            let (start, len) = (range.start as usize, range.len as usize);
            let mut values = vec![0.0; len];
            device().read(self.0.unit(range.unit as usize).buffer().view(start..start + len), &mut values);
            sink(&values)
        })
    }
}

/// What a resharding plan says that ranks other than 0 lack of a model that rank 0 holds whole, in bytes.
fn lower_bound(params: &ParamStore, model: &ModelConfig, num_ranks: usize) -> usize {
    let split = |name: &str| match name {
        n if n.contains("o_proj.weight") || n.contains("down_proj.weight") => Split::Columns,
        n if n.contains("gate_proj") || n.contains("up_proj") => Split::Rows { granule: 1 },
        n if n.contains("_proj") => Split::Rows { granule: model.head_dim },
        _ => Split::Whole,
    };
    let tensor = |slot: &temper_actor::TensorSlot| Tensor {
        name: slot.name.clone(),
        start: slot.range.start,
        rows: slot.shape[0],
        columns: slot.shape.get(1).copied().unwrap_or(1),
        split: split(&slot.name),
    };
    let unit = |unit: &temper_actor::Unit| Unit {
        len: unit.buffer().len(),
        tensors: unit.slots().iter().map(tensor).collect(),
    };
    let units: Vec<Unit> = params.units().iter().map(unit).collect();
    let layouts = (Layout::Replicated { world: 1 }, Layout::Tensor { world: num_ranks, tp: num_ranks });
    let of_rank = |rank| {
        let transfers = plan(&units, layouts, Receiver { rank, source_rank: None }).expect("layouts that fit");
        transfers.iter().map(|transfer| transfer.range.len() * size_of::<f32>()).sum::<usize>()
    };
    (1..num_ranks).map(of_rank).sum()
}

#[test]
fn new_weights_reach_every_rank_once_and_are_served_together() {
    let model = config(Family::Qwen2);
    let [old, new] = [3, 4].map(|seed| ParamStore::init(&*device(), &model, seed));
    let expected = generate(&service((&new, &model), (DType::F32, EngineConfig::default()), None).0);
    for num_ranks in [2, 4] {
        let group = threads((&old, &model), DType::F32, (num_ranks, LONG));
        let (engine, policy) = service((&old, &model), (DType::F32, tight()), Some(&group));
        let before = generate(&engine);
        assert_ne!(before, expected);
        let wanted = version(&new, 2);
        let sources = Sources::one(Arc::new(Held(new.duplicate(&*device()), wanted)));
        let receiver =
            WeightReceiver::new(device(), policy, old.duplicate(&*device()), sources, "rollout-0".to_owned());
        let service = SyncedRolloutService::new(engine, receiver.divided_over(Arc::clone(&group)));
        let counts = group.counts();
        service.set_version(wanted).expect("every rank takes them");
        let sent = group.counts().since(&counts).total().bytes_sent as usize;
        // Each rank is also told which weights come, and the hash of what came.
        let told = (num_ranks - 1) * (1 + 16 + 16);
        assert_eq!(sent, lower_bound(&new, &model, num_ranks) + told, "{num_ranks} ranks");
        assert_eq!(generate(&service), expected, "{num_ranks} ranks");
        // The same weights under another number move nothing.
        let counts = group.counts();
        service.set_version(PolicyVersion { number: 3, ..wanted }).expect("it holds them");
        assert_eq!(group.counts().since(&counts).total().bytes_sent, 0);
        assert_eq!(generate(&service), expected);
    }
}

#[test]
fn ranks_over_sockets_say_the_same() {
    let model = config(Family::Llama);
    let params = ParamStore::init(&*device(), &model, 5);
    let expected = generate(&service((&params, &model), (DType::F32, EngineConfig::default()), None).0);
    let listeners = [0, 1].map(|_| TcpListener::bind("127.0.0.1:0").expect("a free port"));
    let addresses = listeners.iter().map(|l| l.local_addr().expect("bound")).collect::<Vec<_>>();
    let join = |rank: usize| -> Collective {
        let addresses = addresses.clone();
        let config = SocketConfig { rank, addresses, token: 9, tls: None, connect_timeout: LONG, timeout: LONG };
        connect(&config, &listeners[rank]).expect("connected")
    };
    std::thread::scope(|scope| {
        let follower = scope.spawn(|| follow(&device(), &model, DType::F32, join(1)));
        let group = Arc::new(RankGroup::lead(&model, join(0)).expect("a model that fits"));
        group.hand_out(&*device(), &params, version(&params, 1).hash).expect("rank 1 is there");
        let (engine, _) = service((&params, &model), (DType::F32, tight()), Some(&group));
        assert_eq!(generate(&engine), expected);
        drop((engine, group));
        assert_eq!(follower.join().expect("no panic"), Ok(()), "it was told that it is over");
    });
}

#[test]
fn a_rank_that_is_lost_is_named() {
    let model = config(Family::Llama);
    let params = ParamStore::init(&*device(), &model, 5);
    let hash = version(&params, 1).hash;
    let lead = |timeout| {
        let mut ranks = connect_threads(2, timeout);
        let other = ranks.pop().expect("two ranks");
        (RankGroup::lead(&model, ranks.remove(0)).expect("a model that fits"), other)
    };
    let (group, other) = lead(LONG);
    drop(other);
    let error = group.hand_out(&*device(), &params, hash).expect_err("nobody is there");
    assert_eq!(error.code(), ErrorCode::Unavailable);
    assert!(error.to_string().starts_with("tensor-parallel ranks: rank 1 was lost in "), "{error}");
    assert!(error.to_string().ends_with("its connection is closed"), "{error}");
    assert_eq!(group.lost(), Some(&error));

    let (group, _silent) = lead(Duration::from_millis(100));
    let error = group.hand_out(&*device(), &params, hash).expect_err("it says nothing").to_string();
    assert!(error.contains("rank 1 was lost in barrier: nothing came from it within 0.1 s"), "{error}");

    // A rank of another model gives up, and says why.
    let (group, other) = lead(LONG);
    let model_of_other = config(Family::Qwen2);
    let follower = std::thread::spawn(move || follow(&device(), &model_of_other, DType::F32, other));
    let error = group.hand_out(&*device(), &params, hash).expect_err("another model").to_string();
    assert!(error.contains("rank 1 was lost"), "{error}");
    let error = follower.join().expect("no panic").expect_err("another model").to_string();
    assert!(error.contains("values of a unit: expected"), "{error}");
}

#[test]
fn a_rank_with_other_weights_computes_nothing() {
    let model = config(Family::Llama);
    let [params, others] = [5, 6].map(|seed| ParamStore::init(&*device(), &model, seed));
    let group = threads((&others, &model), DType::F32, (2, LONG));
    let (engine, _) = service((&params, &model), (DType::F32, EngineConfig::default()), Some(&group));
    engine.submit(requests()).expect("every request fits");
    for _ in 0..2 {
        let error = engine.next_group(LONG).expect_err("rank 1 gave up");
        assert_eq!(error.code, ErrorCode::Unavailable);
        assert!(error.to_string().contains("rank 1 was lost"), "{error}");
    }
    assert_eq!(engine.stats().num_generated_tokens, 0);
}

#[test]
fn ranks_wait_longer_for_work_than_for_each_other() {
    let model = config(Family::Llama);
    let params = ParamStore::init(&*device(), &model, 5);
    let timeout = Duration::from_secs(2);
    let group = threads((&params, &model), DType::F32, (2, timeout));
    let begin = Instant::now();
    let calls = || group.counts().of(Operation::Broadcast).num_calls;
    let first = calls();
    while begin.elapsed() < timeout * 3 / 2 {
        std::thread::park_timeout(Duration::from_millis(50));
    }
    assert!(calls() >= first + 2, "rank 0 says that it is there");
    let (engine, _) = service((&params, &model), (DType::F32, EngineConfig::default()), Some(&group));
    assert_eq!(generate(&engine).len(), 16);
}
