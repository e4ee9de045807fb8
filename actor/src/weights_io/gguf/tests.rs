use super::{GgufType, export_gguf, import_gguf, parse};
use crate::config::ModelConfig;
use crate::tokenizer::{SpecialTokens, Tokenizer};
use crate::weights_io::{CheckpointReader, SINGLE_FILE, tensor_specs};
use half::f16;
use proptest::prelude::*;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use temper_types::DType;

/// A copy of a fixture with a byte-level tokenizer of `vocab_size` ids, one of them without a token.
fn model(name: &str, pre_tokenizer: &Value, edits: &[(&str, Value)]) -> tempfile::TempDir {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
    let dir = tempfile::tempdir().unwrap();
    fs::copy(source.join(SINGLE_FILE), dir.path().join(SINGLE_FILE)).unwrap();
    let mut config: Value = serde_json::from_slice(&fs::read(source.join("config.json")).unwrap()).unwrap();
    for (key, value) in edits {
        config[*key] = value.clone();
    }
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let mut vocab = json!({"<pad>": 0, "<bos>": 1, "<eos>": 2, "hi": 3, "Ġhi": 4, "<tool>": 79});
    for (id, c) in (5..).zip("!1234AB<>hioltĠĊÃ©".chars()) {
        vocab[c.to_string()] = id.into();
    }
    let added = |id: u32, content: &str, special: bool| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": special})
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [added(0, "<pad>", true), added(1, "<bos>", true), added(2, "<eos>", true),
            added(79, "<tool>", false)],
        "pre_tokenizer": pre_tokenizer,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": mentions_llama3(pre_tokenizer),
            "vocab": vocab, "merges": [["h", "i"], ["Ġ", "hi"]]},
    });
    fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let settings = json!({"eos_token": "<eos>", "chat_template": "{{ messages[0].content }}"});
    fs::write(dir.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
    dir
}

fn mentions_llama3(pre_tokenizer: &Value) -> bool {
    *pre_tokenizer == super::tokenizer::PreTokenizer::Llama3.json()
}

fn smollm() -> Value {
    super::tokenizer::PreTokenizer::SmolLm.json()
}

fn gguf(dir: &Path, kind: GgufType) -> PathBuf {
    let file = dir.join("m.gguf");
    export_gguf(dir, &file, kind).unwrap();
    file
}

#[test]
fn export_and_import_give_the_model_back() {
    for (name, kind) in [
        ("llama", GgufType::F32),
        ("llama", GgufType::F16),
        ("llama_mha_v5cfg", GgufType::Bf16),
        ("qwen2", GgufType::F32),
        ("qwen3", GgufType::Bf16),
    ] {
        let source = model(name, &smollm(), &[]);
        let out = tempfile::tempdir().unwrap();
        let summary = import_gguf(&gguf(source.path(), kind), out.path(), DType::F32).unwrap();
        let (before, after) = (ModelConfig::load(source.path()).unwrap(), ModelConfig::load(out.path()).unwrap());
        let shape =
            |c: &ModelConfig| (tensor_specs(c), c.rope, c.rms_norm_eps.to_bits(), c.head_dim, c.windows.clone());
        assert_eq!(shape(&before), shape(&after), "{name}");
        assert_eq!((before.bos_token_id, &before.eos_token_ids), (after.bos_token_id, &after.eos_token_ids));
        assert!(summary.has_chat_template);
        let [a, b] = [source.path(), out.path()].map(|dir| CheckpointReader::open(dir).unwrap());
        for spec in tensor_specs(&after) {
            // Fixture values are representable in bf16; F16 rounds the small ones.
            let rounded = |x: &f32| if kind == GgufType::F16 { f16::from_f32(*x).to_f32() } else { *x };
            let matrix = spec.shape.len() == 2;
            let expected = a.read_f32(&spec.name).unwrap();
            let expected: Vec<f32> = if matrix { expected.iter().map(rounded).collect() } else { expected };
            assert_eq!(b.read_f32(&spec.name).unwrap(), expected, "{name} {}", spec.name);
        }
    }
}

#[test]
fn every_known_pre_tokenizer_survives() {
    for pre in super::tokenizer::PreTokenizer::ALL {
        let source = model("llama", &pre.json(), &[]);
        let out = tempfile::tempdir().unwrap();
        import_gguf(&gguf(source.path(), GgufType::F32), out.path(), DType::Bf16).unwrap();
        let [a, b] = [source.path(), out.path()].map(|dir| Tokenizer::load(dir).unwrap());
        for text in ["hi hi!", "1234 A<tool>B\nhié", "<bos>hi<eos>"] {
            let ids = a.encode(text, SpecialTokens::Omit).unwrap();
            assert_eq!(b.encode(text, SpecialTokens::Omit).unwrap(), ids, "{pre:?} {text}");
            assert_eq!(b.decode(&ids, SpecialTokens::Omit).unwrap(), a.decode(&ids, SpecialTokens::Omit).unwrap());
        }
        assert_eq!(a.missing_ids(96), b.missing_ids(96));
        assert_eq!(b.special_ids().collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!((b.added_ids().count(), b.eos_token_id()), (4, Some(2)));
    }
}

#[test]
fn what_gguf_cannot_say_is_not_exported() {
    let check = |source: tempfile::TempDir, expected: &str| {
        let out = source.path().join("m.gguf");
        let message = export_gguf(source.path(), &out, GgufType::F16).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
        assert!(!out.exists());
    };
    check(model("critic_qwen2", &smollm(), &[]), "a causal LM");
    check(model("mistral_swa", &smollm(), &[]), "`sliding_window` is 4");
    check(model("llama", &json!(null), &[]), "`pre_tokenizer` is null");
    let other = model("llama", &smollm(), &[]);
    let path = other.path().join("tokenizer.json");
    let text = fs::read_to_string(&path).unwrap().replace("\"ignore_merges\":false", "\"ignore_merges\":true");
    fs::write(&path, text).unwrap();
    check(other, "`model.ignore_merges` is true");
}

/// Llama 3 scaling leaves as divisors and is refused on the way back, because factors cannot be told from them.
#[test]
fn llama3_scaling_is_exported_as_divisors() {
    let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64});
    let source = model("llama", &smollm(), &[("rope_scaling", scaling)]);
    let path = gguf(source.path(), GgufType::F32);
    let file = parse::GgufFile::open(&path).unwrap();
    let divisors = file.read_f32(file.tensor("rope_freqs.weight").unwrap());
    assert_eq!((divisors[0], divisors[5]), (1.0, 8.0));
    let message = import_gguf(&path, &source.path().join("out"), DType::F32).unwrap_err().to_string();
    assert!(message.contains("`rope_freqs.weight`"), "{message}");
    let linear = model("llama", &smollm(), &[("rope_scaling", json!({"type": "linear", "factor": 4.0}))]);
    let out = linear.path().join("out");
    let summary = import_gguf(&gguf(linear.path(), GgufType::F32), &out, DType::F32).unwrap();
    assert_eq!(summary.config.rope, ModelConfig::load(linear.path()).unwrap().rope);
}

/// Replace bytes that stand exactly once, by as many others.
fn replace(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let at: Vec<usize> = (0..bytes.len() - from.len()).filter(|i| bytes[*i..].starts_with(from)).collect();
    assert_eq!(at.len(), 1, "{:?} stands {} times", String::from_utf8_lossy(from), at.len());
    [&bytes[..at[0]], to, &bytes[at[0] + from.len()..]].concat()
}

#[test]
fn damaged_files_are_refused_by_file_key_and_tensor() {
    let source = model("llama", &smollm(), &[]);
    let bytes = fs::read(gguf(source.path(), GgufType::F32)).unwrap();
    let check = |expected: &str, damaged: Vec<u8>| {
        let file = source.path().join("damaged.gguf");
        fs::write(&file, damaged).unwrap();
        let out = source.path().join("out");
        let message = import_gguf(&file, &out, DType::F32).unwrap_err().to_string();
        assert!(message.contains("damaged.gguf") && message.contains(expected), "expected `{expected}` in: {message}");
        assert!(!out.exists(), "something is written for: {message}");
    };
    let typed = |name: &str, code: u32| {
        [name.as_bytes(), &1u32.to_le_bytes(), &48u64.to_le_bytes(), &code.to_le_bytes()].concat()
    };
    check("`magic`", Vec::new());
    check("does not begin with `GGUF`", [b"GGML", &bytes[4..]].concat());
    check("version 1: expected 2 or 3", [b"GGUF\x01", &bytes[5..]].concat());
    check("truncated?", bytes[..1000].to_vec());
    check("truncated?", bytes[..bytes.len() - 64].to_vec());
    check("`general.architecture` is \"llamb\"", replace(&bytes, b"llama\x11", b"llamb\x11"));
    check("`tokenizer.ggml.pre` is \"smollx\"", replace(&bytes, b"smollm", b"smollx"));
    check("`tokenizer.ggml.model` is \"gpt3\"", replace(&bytes, b"gpt2", b"gpt3"));
    check(
        "`blk.0.attn_q.weight`: expected shape [48, 48], got no such",
        replace(&bytes, b"blk.0.attn_q.w", b"blk.0.attn_x.w"),
    );
    check(
        "`output_norm.weight`: expected type F32, F16",
        replace(&bytes, &typed("output_norm.weight", 0), &typed("output_norm.weight", 14)),
    );
    check("got type Q6_K", replace(&bytes, &typed("output_norm.weight", 0), &typed("output_norm.weight", 14)));
    check("whole Q4_1 blocks", replace(&bytes, &typed("output_norm.weight", 0), &typed("output_norm.weight", 3)));
    check(
        "`llama.attention.key_length` stands twice",
        replace(&bytes, b"llama.rope.dimension_count", b"llama.attention.key_length"),
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any bytes in the directory part, any length: an error or tensors that lie inside the file, never a panic.
    #[test]
    fn mutated_files_never_panic(
        edits in prop::collection::vec((0usize..6000, any::<u8>()), 0..6),
        word in prop::option::of((0usize..6000, any::<u64>())),
        cut in prop::option::of(0usize..60_000),
    ) {
        let mut bytes = sample().to_vec();
        for (at, value) in edits {
            bytes[at] = value;
        }
        if let Some((at, value)) = word {
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        bytes.truncate(cut.unwrap_or(usize::MAX));
        if let Ok((_, tensors)) = parse::parse(&bytes, Path::new("f")) {
            for tensor in tensors {
                let mut out = vec![0.0; tensor.num_elements()];
                tensor.block_type.decode(&bytes[tensor.range.clone()], &mut out);
            }
        }
    }
}

fn sample() -> &'static [u8] {
    static BYTES: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    BYTES.get_or_init(|| {
        let source = model("llama_mha_v5cfg", &smollm(), &[]);
        fs::read(gguf(source.path(), GgufType::F32)).unwrap()
    })
}
