use super::{Family, Head, ModelConfig, RopeScaling};
use proptest::prelude::*;
use serde_json::{Map, Value, json};
use std::path::Path;
use temper_types::DType;

fn fixture(name: &str) -> ModelConfig {
    ModelConfig::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)).unwrap()
}

fn source(name: &str) -> Map<String, Value> {
    fixture(name).source
}

/// The fixture with some keys set (`null` removes one), read again.
fn edited(name: &str, edits: Value) -> Result<ModelConfig, String> {
    let mut map = source(name);
    for (key, value) in edits.as_object().unwrap() {
        match value {
            Value::Null => drop(map.shift_remove(key)),
            value => drop(map.insert(key.clone(), value.clone())),
        }
    }
    ModelConfig::from_json(map, Path::new("m/config.json")).map_err(|error| error.to_string())
}

#[test]
fn fixtures_are_read_as_transformers_reads_them() {
    let llama = fixture("llama");
    assert_eq!((llama.family, llama.head, llama.q_size(), llama.kv_size()), (Family::Llama, Head::CausalLm, 48, 24));
    assert!(!llama.tie_word_embeddings && !llama.qkv_bias && llama.windows == [None, None]);
    assert_eq!((llama.bos_token_id, llama.eos_token_ids.as_slice(), llama.pad_token_id), (Some(1), &[2][..], Some(0)));
    let v5 = fixture("llama_mha_v5cfg");
    assert_eq!((v5.rope.theta, v5.rope.scaling), (500_000.0, RopeScaling::Default));
    assert!(v5.tie_word_embeddings && v5.rms_norm_eps == 1e-6);
    let qwen2 = fixture("qwen2");
    assert!(qwen2.qkv_bias && !qwen2.o_bias && !qwen2.qk_norm && qwen2.head_dim == 8);
    let qwen3 = fixture("qwen3");
    assert!(!qwen3.qkv_bias && qwen3.qk_norm && qwen3.head_dim == 16 && qwen3.q_size() == 64);
    assert_eq!(fixture("mistral_swa").windows, [Some(4), Some(4)]);
    assert_eq!(fixture("critic_qwen2").head, Head::TokenValue);
    assert_eq!(fixture("reward_llama").head, Head::SequenceScore);
}

#[test]
fn writing_keeps_every_key_and_reads_back_equal() {
    for name in ["llama", "llama_mha_v5cfg", "qwen2", "qwen3", "mistral_swa", "critic_qwen2", "reward_llama"] {
        let mut map = source(name);
        map.insert("a_key_of_tomorrow".into(), json!({"kept": true}));
        let config = ModelConfig::from_json(map, Path::new("m/config.json")).unwrap();
        let Value::Object(written) = config.to_json(DType::Bf16) else { panic!("not an object") };
        assert_eq!(written["a_key_of_tomorrow"], json!({"kept": true}));
        let key = if name == "llama_mha_v5cfg" { "dtype" } else { "torch_dtype" };
        assert_eq!(written[key], "bfloat16", "{name}");
        let again = ModelConfig::from_json(written, Path::new("m/config.json")).unwrap();
        assert_eq!(ModelConfig { source: Map::new(), ..again }, ModelConfig { source: Map::new(), ..config });
    }
}

#[test]
fn a_head_is_exchanged_with_its_labels() {
    let critic = fixture("qwen2").with_head(Head::TokenValue).unwrap();
    assert_eq!(critic.head, Head::TokenValue);
    assert_eq!(critic.to_json(DType::F32)["architectures"], json!(["Qwen2ForTokenClassification"]));
    assert_eq!(critic.to_json(DType::F32)["id2label"], json!({"0": "LABEL_0"}));
    let policy = critic.with_head(Head::CausalLm).unwrap();
    assert_eq!(policy.to_json(DType::F32), fixture("qwen2").to_json(DType::F32));
}

/// Values of transformers' `ROPE_INIT_FUNCTIONS` (computed in f32 there, hence the tolerance).
#[test]
fn rope_frequencies_follow_the_published_formulas() {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64});
    let scaled = edited("llama", json!({"rope_scaling": llama3})).unwrap().inv_frequencies();
    let plain = fixture("llama").inv_frequencies();
    assert_eq!(plain.len(), 6);
    for (pair, frequency) in plain.iter().enumerate() {
        let expected = 10_000f64.powf(-(2.0 * pair as f64) / 12.0);
        assert!((f64::from(*frequency) / expected - 1.0).abs() < 1e-7);
    }
    // Wavelengths 6.28, 29.2, 135, ...: under 16 kept, over 64 divided by 8, between interpolated.
    assert_eq!(scaled[0], plain[0]);
    let wavelength = 2.0 * std::f64::consts::PI / f64::from(plain[1]);
    let smooth = (64.0 / wavelength - 1.0) / 3.0;
    let expected = f64::from(plain[1]) * ((1.0 - smooth) / 8.0 + smooth);
    assert!((f64::from(scaled[1]) / expected - 1.0).abs() < 1e-6);
    assert!(scaled[2..].iter().zip(&plain[2..]).all(|(s, p)| *s == p / 8.0));
    let linear = edited("llama", json!({"rope_scaling": {"type": "linear", "factor": 2.0}})).unwrap();
    assert!(linear.inv_frequencies().iter().zip(&plain).all(|(s, p)| *s == p / 2.0));
}

#[test]
fn both_rope_forms_say_the_same() {
    let parameters = json!({"rope_type": "linear", "factor": 4.0, "rope_theta": 7000.0});
    let v5 = edited("llama", json!({"rope_theta": null, "rope_scaling": null, "rope_parameters": parameters})).unwrap();
    let scaling = json!({"type": "linear", "factor": 4.0});
    let classic = edited("llama", json!({"rope_theta": 7000, "rope_scaling": scaling})).unwrap();
    assert_eq!(v5.rope, classic.rope);
}

#[test]
fn windows_follow_the_families() {
    let on = json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 1, "layer_types": null});
    assert_eq!(edited("qwen2", on).unwrap().windows, [None, Some(8)]);
    let types = json!({"use_sliding_window": true, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"]});
    assert_eq!(edited("qwen3", types).unwrap().windows, [Some(8), None]);
    assert_eq!(edited("qwen2", json!({"sliding_window": 8})).unwrap().windows, [None, None]);
    assert_eq!(edited("mistral_swa", json!({"sliding_window": null})).unwrap().windows, [Some(4096); 2]);
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let cases = [
        ("llama", json!({"model_type": "gemma2"}), "`model_type` is \"gemma2\": expected one of llama, qwen2"),
        ("llama", json!({"architectures": ["LlamaModel"]}), "`architectures` is [\"LlamaModel\"]"),
        ("llama", json!({"hidden_act": "gelu"}), "`hidden_act` is \"gelu\": expected \"silu\""),
        ("llama", json!({"hidden_size": null}), "`hidden_size` is missing"),
        ("llama", json!({"hidden_size": 0}), "`hidden_size` is 0"),
        ("llama", json!({"hidden_size": 1u64 << 60}), "`hidden_size` is 1152921504606846976"),
        ("llama", json!({"hidden_size": "48"}), "`hidden_size` is \"48\""),
        ("llama", json!({"num_key_value_heads": 3}), "a divisor of num_attention_heads = 4"),
        ("llama", json!({"head_dim": 11}), "an even number"),
        ("llama", json!({"head_dim": null, "hidden_size": 50}), "a divisor of hidden_size = 50"),
        (
            "llama",
            json!({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}),
            "`rope_scaling.rope_type` is \"yarn\"",
        ),
        ("llama", json!({"rope_scaling": {"rope_type": "linear"}}), "`rope_scaling.factor` is missing"),
        ("llama", json!({"rope_parameters": {"full_attention": {}}}), "expected one of default, linear, llama3"),
        ("llama", json!({"partial_rotary_factor": 0.5}), "`partial_rotary_factor` is 0.5"),
        ("llama", json!({"rms_norm_eps": -1.0}), "`rms_norm_eps` is -1.0"),
        ("llama", json!({"sliding_window": 4}), "`sliding_window` is 4"),
        ("llama", json!({"quantization_config": {"bits": 4}}), "`quantization_config`"),
        ("llama", json!({"eos_token_id": [2, "x"]}), "`eos_token_id` is [2,\"x\"]"),
        ("llama", json!({"num_hidden_layers": 1_000_000}), "at most 4096"),
        ("mistral_swa", json!({"attention_bias": true}), "`attention_bias` is true"),
        ("qwen2", json!({"layer_types": ["full_attention"]}), "a list of 2"),
        ("qwen2", json!({"rope_theta": null}), "`rope_theta` is missing"),
        ("llama", json!({"rope_scaling": {"type": "linear", "factor": 1e-212}}), "a number from 1e-6 to 1e6"),
        ("reward_llama", json!({"id2label": {"0": "a", "1": "b"}}), "one label"),
    ];
    for (name, edits, expected) in cases {
        let message = edited(name, edits.clone()).expect_err(&format!("{name} {edits} is accepted"));
        assert!(message.starts_with("m/config.json: ") && message.contains(expected), "{edits}: {message}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any values under the keys that are read: an error or a usable configuration, never a panic.
    #[test]
    fn mutated_configurations_never_panic(
        name in prop::sample::select(vec!["llama", "qwen2", "qwen3", "mistral_swa", "reward_llama"]),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any_value()), 1..4),
    ) {
        let mut map = source(name);
        for (at, value) in edits {
            let key = map.keys().nth(at.index(map.len())).unwrap().clone();
            map.insert(key, value);
        }
        if let Ok(config) = ModelConfig::from_json(map, Path::new("m/config.json")) {
            prop_assert_eq!(config.inv_frequencies().len(), config.head_dim / 2);
            prop_assert!(config.inv_frequencies().iter().all(|f| f.is_finite()));
            prop_assert_eq!(config.windows.len(), config.num_hidden_layers);
            prop_assert!(config.num_attention_heads.is_multiple_of(config.num_key_value_heads));
        }
    }
}

fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0i64..64).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z_]{0,8}".prop_map(Value::from),
        Just(json!(["full_attention", "sliding_attention"])),
        (any::<f64>(), any::<f64>()).prop_map(|(factor, low)| json!({"rope_type": "llama3", "factor": factor,
            "low_freq_factor": low, "high_freq_factor": low + 1.0, "original_max_position_embeddings": 8})),
    ]
}
