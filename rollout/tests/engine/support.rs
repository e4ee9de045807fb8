//! Engines over small random policies.

use std::path::Path;
use std::sync::{Arc, RwLock};
use std::time::Duration;
use temper_actor::{Family, ModelConfig, PackedPolicy, ParamStore, PolicyFormat};
use temper_proto::{GroupRequest, GroupResult};
use temper_rollout::{Clock, Engine, EngineConfig, EngineOptions, PolicyModel};
use temper_tensor::{CpuConfig, CpuDevice, Device};
use temper_types::{DType, WeightFormat};

/// A clock that stands still.
pub struct NoTime;

impl Clock for NoTime {
    fn now(&self) -> Duration {
        Duration::ZERO
    }
}

/// A policy of 61 ids with random weights.
#[derive(Debug, Clone, Copy)]
pub struct Model {
    pub seed: u64,
    pub family: Family,
    pub format: PolicyFormat,
}

/// Every format that a policy generates in.
pub const FORMATS: [PolicyFormat; 4] = [
    PolicyFormat { dtype: DType::F32, weights: WeightFormat::Exact },
    PolicyFormat { dtype: DType::Bf16, weights: WeightFormat::Exact },
    PolicyFormat { dtype: DType::F32, weights: WeightFormat::Int8 },
    PolicyFormat { dtype: DType::Bf16, weights: WeightFormat::Int8 },
];

impl Model {
    /// A Llama in f32.
    pub fn llama(seed: u64) -> Self {
        Model { seed, family: Family::Llama, format: DType::F32.into() }
    }

    /// Its packed weights on a device of two threads.
    pub fn policy(self) -> (Arc<dyn Device>, Arc<RwLock<PackedPolicy>>) {
        let family = self.family;
        let json = serde_json::json!({
            "model_type": family.model_type(),
            "architectures": [format!("{}ForCausalLM", family.class_prefix())],
            "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": true, "initializer_range": 0.4,
            "hidden_act": "silu",
        });
        let serde_json::Value::Object(json) = json else { panic!("an object") };
        let config = ModelConfig::from_json(json, Path::new("config.json")).expect("a valid configuration");
        let device: Arc<dyn Device> = Arc::new(CpuDevice::new(CpuConfig { num_threads: 2, isa: None }));
        let params = ParamStore::init(&*device, &config, self.seed);
        let policy = PackedPolicy::new(&device, &params, &config, self.format);
        (device, Arc::new(RwLock::new(policy)))
    }
}

/// An engine over `model`, with room for everything.
pub fn engine_of(model: Model) -> Engine<PolicyModel> {
    engine_with(model, &EngineConfig { max_num_seqs: 512, max_batch_tokens: 2048, ..EngineConfig::default() })
}

/// An engine over `model`, without drafters.
pub fn engine_with(model: Model, config: &EngineConfig) -> Engine<PolicyModel> {
    let (device, policy) = model.policy();
    let config = &EngineConfig { weights: model.format.weights, ..config.clone() };
    let (model, limits) = PolicyModel::new(device, policy, config).expect("limits within range");
    let options = EngineOptions {
        limits,
        max_queued_samples: 1 << 20,
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

/// Generate, and return the results by group.
pub fn run_all(engine: &mut Engine<PolicyModel>, requests: Vec<GroupRequest>) -> Vec<GroupResult> {
    engine.submit(requests).expect("every request fits");
    let mut results = Vec::new();
    while !engine.is_idle() {
        engine.step().expect("the policy can be read");
        results.extend(std::iter::from_fn(|| engine.pop_finished()));
    }
    results.sort_by_key(|result| result.group_id);
    results
}
