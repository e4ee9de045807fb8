//! Fixtures, and the binary's answers as JSON.

use crate::common::{stderr, temper};
use serde_json::Value;
use std::path::{Path, PathBuf};
use temper_actor::{Family, InitConfig, init_model};

/// A tiny model with what transformers computed with it.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../actor/tests/data").join(name)
}

/// `reference.json` of a fixture.
pub fn reference(name: &str) -> Value {
    let path = fixture(name).join("reference.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// A new character-level model, its tokenizer included.
pub fn new_model(dir: &Path) -> PathBuf {
    let init = InitConfig {
        family: Family::Llama,
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        max_position_embeddings: 128,
        rope_theta: 10_000.0,
        tie_word_embeddings: true,
        initializer_range: 0.3,
        alphabet: " 0123456789=abcdefghijklmnopqrstuvwxyzT".to_owned(),
    };
    let model = dir.join("model");
    init_model(&model, &init, 3).unwrap();
    model
}

/// Run with arguments and return (exit code, stdout, stderr).
pub fn run(args: &[&str]) -> (i32, String, String) {
    let output = temper().args(args).output().unwrap();
    let stdout = String::from_utf8(output.stdout.clone()).unwrap();
    (output.status.code().unwrap_or(-1), stdout, stderr(&output))
}

/// Run, expect success, and return stdout.
pub fn succeed(args: &[&str]) -> String {
    let (code, stdout, stderr) = run(args);
    assert_eq!(code, 0, "temper {}: {stderr}", args.join(" "));
    stdout
}

/// Run, expect the exit code, and every part in the message.
pub fn fail(args: &[&str], code: i32, parts: &[&str]) {
    let (got, _, stderr) = run(args);
    assert_eq!(got, code, "temper {}: {stderr}", args.join(" "));
    for part in parts {
        assert!(stderr.contains(part), "temper {}: `{part}` is not in: {stderr}", args.join(" "));
    }
}

/// Write a file and return its path as text.
pub fn write(dir: &Path, name: &str, text: &str) -> String {
    let path = dir.join(name);
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

/// A path as text.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// JSON of every line.
pub fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Numbers of a JSON list.
pub fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

/// Fail unless `|got - want| <= tolerance` everywhere.
pub fn assert_close(label: &str, got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{label}: number of values");
    for (index, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= tolerance, "{label}[{index}]: got {got}, want {want}");
    }
}
