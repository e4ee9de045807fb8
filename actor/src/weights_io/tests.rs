use super::{CheckpointReader, INDEX_FILE, SINGLE_FILE, TensorData, TensorSpec, WriteOptions, tensor_specs};
use super::{safetensors as header, write_checkpoint};
use crate::config::{Head, ModelConfig};
use crate::error::Error;
use half::bf16;
use proptest::prelude::*;
use std::fs;
use std::path::{Path, PathBuf};
use temper_types::DType;

const FIXTURES: [&str; 7] =
    ["llama", "llama_mha_v5cfg", "qwen2", "qwen3", "mistral_swa", "critic_qwen2", "reward_llama"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn copy_to(target: &Path, config: &ModelConfig, reader: &CheckpointReader, options: &WriteOptions) {
    let read = |spec: &TensorSpec| Ok(TensorData::F32(reader.read_f32(&spec.name)?.into()));
    write_checkpoint(target, config, options, read).unwrap();
}

/// A copy of a fixture whose weights file went through `damage`, and what opening and validating it says.
fn damaged(name: &str, damage: impl FnOnce(Vec<u8>) -> Vec<u8>) -> String {
    let dir = tempfile::tempdir().unwrap();
    let bytes = fs::read(fixture(name).join(SINGLE_FILE)).unwrap();
    fs::write(dir.path().join(SINGLE_FILE), damage(bytes)).unwrap();
    let config = ModelConfig::load(&fixture(name)).unwrap();
    let result = CheckpointReader::open(dir.path()).and_then(|reader| reader.validate(&config));
    let message = result.expect_err("a damaged file is accepted").to_string();
    assert!(message.contains(dir.path().to_str().unwrap()), "the message names no file: {message}");
    message
}

/// Replace text in the header and correct its length.
fn edit_header(bytes: &[u8], edit: impl FnOnce(&str) -> String) -> Vec<u8> {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header = edit(std::str::from_utf8(&bytes[8..8 + length]).unwrap());
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &bytes[8 + length..]].concat()
}

#[test]
fn fixtures_hold_exactly_the_expected_tensors() {
    for name in FIXTURES {
        let config = ModelConfig::load(&fixture(name)).unwrap();
        let reader = CheckpointReader::open(&fixture(name)).unwrap();
        assert_eq!(reader.validate(&config).unwrap(), Vec::<String>::new(), "{name}");
        assert_eq!(reader.names().count(), tensor_specs(&config).len(), "{name}");
    }
}

#[test]
fn round_trip_is_bitwise_in_both_formats_single_and_sharded() {
    for name in FIXTURES {
        let config = ModelConfig::load(&fixture(name)).unwrap();
        let source = CheckpointReader::open(&fixture(name)).unwrap();
        for (dtype, max_shard_bytes) in [(DType::F32, usize::MAX), (DType::Bf16, usize::MAX), (DType::F32, 20_000)] {
            let dir = tempfile::tempdir().unwrap();
            let options = WriteOptions { dtype, max_shard_bytes, side_files_from: None };
            copy_to(dir.path(), &config, &source, &options);
            let reader = CheckpointReader::open(dir.path()).unwrap();
            assert_eq!(reader.validate(&ModelConfig::load(dir.path()).unwrap()).unwrap(), Vec::<String>::new());
            assert_eq!(dir.path().join(INDEX_FILE).exists(), max_shard_bytes == 20_000);
            for spec in tensor_specs(&config) {
                // Fixture values are representable in bf16.
                assert_eq!(reader.read_f32(&spec.name).unwrap(), source.read_f32(&spec.name).unwrap(), "{name}");
            }
        }
    }
}

#[test]
fn the_reference_implementation_reads_what_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let config = ModelConfig::load(&fixture("qwen3")).unwrap();
    let source = CheckpointReader::open(&fixture("qwen3")).unwrap();
    copy_to(dir.path(), &config, &source, &WriteOptions { dtype: DType::Bf16, ..WriteOptions::default() });
    let bytes = fs::read(dir.path().join(SINGLE_FILE)).unwrap();
    let file = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.len(), tensor_specs(&config).len());
    for spec in tensor_specs(&config) {
        let view = file.tensor(&spec.name).unwrap();
        assert_eq!((view.shape(), view.dtype()), (spec.shape.as_slice(), ::safetensors::Dtype::BF16));
        let values: Vec<f32> =
            view.data().as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect();
        assert_eq!(values, source.read_f32(&spec.name).unwrap());
    }
    let (_, metadata) = ::safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
}

#[test]
fn an_older_checkpoint_is_replaced_whole_and_side_files_travel() {
    let (origin, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(origin.path().join("tokenizer.json"), "{}").unwrap();
    let config = ModelConfig::load(&fixture("llama")).unwrap();
    let source = CheckpointReader::open(&fixture("llama")).unwrap();
    let single = WriteOptions { side_files_from: Some(origin.path()), ..WriteOptions::default() };
    let names = || {
        let mut names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    copy_to(dir.path(), &config, &source, &single);
    let first = names();
    assert_eq!(first, ["config.json", SINGLE_FILE, "tokenizer.json"]);
    copy_to(dir.path(), &config, &source, &WriteOptions { max_shard_bytes: 90_000, ..single.clone() });
    assert!(!dir.path().join(SINGLE_FILE).exists() && dir.path().join(INDEX_FILE).exists());
    copy_to(dir.path(), &config, &source, &single);
    assert_eq!(names(), first);
}

#[test]
fn a_wrong_number_of_elements_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let config = ModelConfig::load(&fixture("llama")).unwrap();
    let result =
        write_checkpoint(dir.path(), &config, &WriteOptions::default(), |_| Ok(TensorData::F32(vec![].into())));
    assert!(result.unwrap_err().to_string().contains("`model.embed_tokens.weight`: expected 4608 elements"));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn damaged_files_are_refused_by_file_and_tensor() {
    let check = |expected: &str, damage: &dyn Fn(Vec<u8>) -> Vec<u8>| {
        let message = damaged("llama", damage);
        assert!(message.contains(expected), "expected `{expected}` in: {message}");
    };
    check("0 bytes are too few", &|_| Vec::new());
    check("truncated?", &|b| b[..b.len() - 1].to_vec());
    check("truncated?", &|b| b[..100].to_vec());
    check("data bytes are in the file", &|b| [b, vec![0]].concat());
    check("the header claims 18446744073709551615 bytes", &|b| [&[0xff; 8], &b[8..]].concat());
    check("is not valid JSON", &|b| edit_header(&b, |h| h.replacen('{', "[", 1)));
    let header_edit = |from: &'static str, to: &'static str| {
        move |b: Vec<u8>| {
            edit_header(&b, |h| {
                assert!(h.contains(from), "{from} is not in {h}");
                h.replacen(from, to, 1)
            })
        }
    };
    check(
        "`lm_head.weight`: expected 4608 elements",
        &header_edit("\"F32\",\"shape\":[96,48]", "\"BF16\",\"shape\":[96,48]"),
    );
    check("dtype F8_E4M3", &|b| edit_header(&b, |h| h.replacen("\"F32\"", "\"F8_E4M3\"", 1)));
    check("expected shape [96, 48]", &header_edit("[96,48]", "[48,96]"));
    check("a shape whose size", &header_edit("[96,48]", "[9223372036854775807,9223372036854775807,9]"));
    check("non-negative integers", &header_edit("[96,48]", "[-96,-48]"));
    check(
        "`model.norm.weight`: expected shape [48] for LlamaForCausalLM, got no such",
        &header_edit("model.norm", "model.nurm"),
    );
    check("one entry in the header", &header_edit("layers.1.input_layernorm", "layers.0.input_layernorm"));
    check("data_offsets", &header_edit("\"data_offsets\":[0,", "\"data_offsets\":[4,"));
}

#[test]
fn a_tied_head_and_extra_tensors_are_reported_rightly() {
    // A tied configuration over an untied checkpoint: the head is there and differs, so it is named.
    let reader = CheckpointReader::open(&fixture("llama")).unwrap();
    let mut json = ModelConfig::load(&fixture("llama")).unwrap().to_json(DType::F32);
    json["tie_word_embeddings"] = true.into();
    let serde_json::Value::Object(map) = json else { panic!("not an object") };
    let tied = ModelConfig::from_json(map, Path::new("config.json")).unwrap();
    assert_eq!(reader.validate(&tied).unwrap(), ["lm_head.weight"]);
    // A value head over the checkpoint of a policy is missing, not invented.
    let critic = ModelConfig::load(&fixture("llama")).unwrap().with_head(Head::TokenValue).unwrap();
    let message = reader.validate(&critic).unwrap_err().to_string();
    assert!(message.contains("`score.weight`: expected shape [1, 48] for LlamaForTokenClassification"), "{message}");
}

#[test]
fn directories_without_weights_and_with_pickles_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let open = || CheckpointReader::open(dir.path()).err().unwrap();
    assert!(open().to_string().contains("expected model.safetensors or"));
    fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
    assert!(matches!(open(), Error::Pickle { file } if file.ends_with("pytorch_model.bin")));
}

#[test]
fn an_index_that_disagrees_with_its_shards_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(fixture("llama").join(SINGLE_FILE), dir.path().join("a.safetensors")).unwrap();
    let check = |index: &str, expected: &str| {
        fs::write(dir.path().join(INDEX_FILE), index).unwrap();
        let message = CheckpointReader::open(dir.path()).err().unwrap().to_string();
        assert!(message.contains(expected), "{index}: {message}");
    };
    check("[]", "no object `weight_map`");
    check(r#"{"weight_map": {"x": "a.safetensors"}}"#, "`x`: expected it here");
    check(r#"{"weight_map": {"x": "../a.safetensors"}}"#, "the plain name");
    check(r#"{"weight_map": {"x": "b.safetensors"}}"#, "cannot open");
    fs::copy(dir.path().join("a.safetensors"), dir.path().join("b.safetensors")).unwrap();
    let both = r#"{"weight_map": {"lm_head.weight": "a.safetensors", "x": "b.safetensors"}}"#;
    check(both, "one tensor of this name");
}

#[test]
fn ranges_are_read_and_bounded() {
    let reader = CheckpointReader::open(&fixture("llama")).unwrap();
    let all = reader.read_f32("model.norm.weight").unwrap();
    let mut part = [0.0; 5];
    reader.read_f32_range("model.norm.weight", 43, &mut part).unwrap();
    assert_eq!(part, all[43..]);
    assert!(reader.read_f32_range("model.norm.weight", 44, &mut part).is_err());
    assert!(reader.read_f32_range("model.norm.weight", usize::MAX, &mut part).is_err());
    assert!(reader.read_f32_into("model.norm.weight", &mut part).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any bytes of header, length and file end: an error or a checkpoint whose tensors can be read, never a panic.
    #[test]
    fn mutated_files_never_panic(
        edits in prop::collection::vec((0usize..2600, any::<u8>()), 0..4),
        cut in prop::option::of(0usize..72_000),
        length in prop::option::of(any::<u64>()),
    ) {
        let mut bytes = fs::read(fixture("reward_llama").join(SINGLE_FILE)).unwrap();
        for (at, value) in edits {
            bytes[at] = value;
        }
        if let Some(length) = length {
            bytes[..8].copy_from_slice(&length.to_le_bytes());
        }
        bytes.truncate(cut.unwrap_or(usize::MAX));
        if let Ok(entries) = header::parse(&bytes, Path::new("f")) {
            for entry in entries {
                prop_assert!(entry.range.end <= bytes.len());
                if let Some(element_bytes) = entry.dtype.size_bytes() {
                    prop_assert_eq!(element_bytes * entry.shape.iter().product::<usize>(), entry.range.len());
                }
            }
        }
    }
}
