use super::{InitConfig, fill_tensor, init_model};
use crate::config::{Family, ModelConfig};
use crate::tokenizer::{SpecialTokens, Tokenizer};
use crate::weights_io::{CheckpointReader, TensorKind, TensorSpec, tensor_specs};
use std::fs;

fn tiny() -> InitConfig {
    InitConfig {
        family: Family::Llama,
        hidden_size: 16,
        intermediate_size: 24,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        max_position_embeddings: 32,
        rope_theta: 10_000.0,
        tie_word_embeddings: false,
        initializer_range: 0.02,
        alphabet: "sort 0123456789=\né".into(),
    }
}

#[test]
fn a_new_directory_of_every_family_loads() {
    for family in Family::ALL {
        let dir = tempfile::tempdir().unwrap();
        let made = init_model(dir.path(), &InitConfig { family, ..tiny() }, 7).unwrap();
        let config = ModelConfig::load(dir.path()).unwrap();
        assert_eq!((config.family, config.vocab_size, config.head_dim), (family, made.vocab_size, 4));
        assert!(config.windows.iter().all(Option::is_none));
        let reader = CheckpointReader::open(dir.path()).unwrap();
        assert_eq!(reader.validate(&config).unwrap(), Vec::<String>::new());
        let tokenizer = Tokenizer::load(dir.path()).unwrap();
        assert_eq!(tokenizer.missing_ids(config.vocab_size), [] as [u32; 0]);
        assert_eq!(tokenizer.vocab_size(), config.vocab_size);
        assert_eq!(tokenizer.eos_token_id(), Some(config.eos_token_ids[0]));
        assert_eq!(tokenizer.pad_token_id(), config.pad_token_id);
        assert_eq!(tokenizer.bos_token_id(), config.bos_token_id);
    }
}

#[test]
fn text_becomes_one_token_a_character_and_back() {
    let dir = tempfile::tempdir().unwrap();
    init_model(dir.path(), &tiny(), 7).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let text = "sort 8526=\né<eos>";
    let ids = tokenizer.encode(text, SpecialTokens::Include).unwrap();
    assert_eq!(ids.len(), 13);
    assert_eq!(ids[..5], [3, 4, 5, 6, 7]);
    assert_eq!(tokenizer.decode(&ids, SpecialTokens::Include).unwrap(), text);
    assert_eq!(tokenizer.decode(&ids, SpecialTokens::Omit).unwrap(), "sort 8526=\né");
    let bytes: Vec<u8> = ids.iter().flat_map(|id| tokenizer.token_bytes(*id).unwrap()).copied().collect();
    assert_eq!(bytes, text.as_bytes());
    let message = tokenizer.encode("sort 8+2", SpecialTokens::Include).unwrap_err().to_string();
    assert!(message.contains("'+' at byte 6"), "{message}");
}

#[test]
fn weights_depend_on_seed_and_name_alone() {
    let make = |init: &InitConfig, seed| {
        let dir = tempfile::tempdir().unwrap();
        init_model(dir.path(), init, seed).unwrap();
        fs::read(dir.path().join("model.safetensors")).unwrap()
    };
    assert_eq!(make(&tiny(), 7), make(&tiny(), 7));
    assert_ne!(make(&tiny(), 7), make(&tiny(), 8));
    let specs = tensor_specs(&tiny().model_config().unwrap());
    let draw = |spec: &TensorSpec| {
        let mut data = vec![0.0f32; spec.num_elements()];
        fill_tensor(spec, 1.0, 7, &mut data);
        data
    };
    let (first, second) = (&specs[2], specs.iter().find(|spec| spec.name.contains("layers.1.self_attn.q")).unwrap());
    assert_eq!(first.shape, second.shape);
    assert_ne!(draw(first), draw(second));
}

/// Frozen bits: a change here changes every run that starts from a new model.
#[test]
fn the_first_weights_are_these() {
    let spec = TensorSpec { name: "model.embed_tokens.weight".into(), shape: vec![4], kind: TensorKind::Embedding };
    let mut data = [0.0f32; 4];
    fill_tensor(&spec, 0.02, 42, &mut data);
    assert_eq!(data.map(f32::to_bits), [1_019_751_689, 1_009_735_040, 3_164_673_649, 3_166_195_544]);
}

#[test]
fn matrices_are_normal_norms_one_biases_zero() {
    let spec = |kind| TensorSpec { name: "t".into(), shape: vec![400, 500], kind };
    let mut data = vec![f32::NAN; 200_000];
    fill_tensor(&spec(TensorKind::Matrix), 0.5, 1, &mut data);
    let moment = |power: i32| data.iter().map(|x| (f64::from(*x) / 0.5).powi(power)).sum::<f64>() / 200_000.0;
    // Standard errors of the four moments are 0.0022, 0.0032, 0.0087 and 0.022.
    for (power, expected, tolerance) in [(1, 0.0, 0.009), (2, 1.0, 0.013), (3, 0.0, 0.035), (4, 3.0, 0.09)] {
        assert!((moment(power) - expected).abs() < tolerance, "moment {power}: {}", moment(power));
    }
    fill_tensor(&spec(TensorKind::Norm), 0.5, 1, &mut data);
    assert!(data.iter().all(|x| *x == 1.0));
    fill_tensor(&spec(TensorKind::Bias), 0.5, 1, &mut data);
    assert!(data.iter().all(|x| *x == 0.0));
}

#[test]
fn settings_out_of_range_are_refused_by_name() {
    let check = |edit: &dyn Fn(&mut InitConfig), expected: &str| {
        let mut init = tiny();
        edit(&mut init);
        let message = init.model_config().unwrap_err().to_string();
        assert!(message.starts_with("init: ") && message.contains(expected), "{message}");
    };
    check(&|c| c.hidden_size = 0, "`hidden_size` is 0: expected from 1");
    check(&|c| c.hidden_size = 12, "`hidden_size` is 12: expected a multiple of twice num_attention_heads = 4");
    check(&|c| c.num_key_value_heads = 3, "`num_key_value_heads` is 3");
    check(&|c| c.rope_theta = f64::NAN, "`rope_theta` is NaN");
    check(&|c| c.initializer_range = 0.0, "`initializer_range` is 0");
    check(&|c| c.num_hidden_layers = 1 << 21, "`num_hidden_layers`");
    check(&|c| c.alphabet = String::new(), "`alphabet` is 0 characters");
    check(&|c| c.alphabet = "aba".into(), "'a' stands twice");
}

#[test]
fn unknown_settings_are_refused_and_defaults_are_those_documented() {
    let given = r#"{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 32, "alphabet": "ab"}"#;
    let init: InitConfig = serde_json::from_str(given).unwrap();
    assert_eq!(init, InitConfig { tie_word_embeddings: true, alphabet: "ab".into(), ..tiny() });
    let typo = given.replacen("hidden_size", "hiden_size", 1);
    assert!(serde_json::from_str::<InitConfig>(&typo).unwrap_err().to_string().contains("unknown field `hiden_size`"));
}

/// Growth of the settings is a reviewed act.
#[test]
fn the_settings_are_these() {
    let schema = schemars::schema_for!(InitConfig).to_value();
    let mut keys: Vec<&str> = schema["properties"].as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    let expected = "alphabet family hidden_size initializer_range intermediate_size max_position_embeddings \
        num_attention_heads num_hidden_layers num_key_value_heads rope_theta tie_word_embeddings";
    assert_eq!(keys, expected.split_whitespace().collect::<Vec<_>>());
    assert_eq!(schema["additionalProperties"], false);
}
