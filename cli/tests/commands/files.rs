//! `temper export`, `import` and `algos`: files in, files out.

use crate::support::{fail, fixture, lines, new_model, succeed, text, write};
use serde_json::{Value, json};

/// Log-probs of a fixed text under a model.
fn scored(dir: &std::path::Path, model: &str) -> Vec<Value> {
    let input = write(dir, "ids.jsonl", "{\"input_ids\": [5, 9, 11, 3, 20, 8]}\n");
    lines(&succeed(&["score", "--model", model, "--input", &input]))
}

#[test]
fn an_exported_model_is_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out, half) = (new_model(dir.path()), dir.path().join("out"), dir.path().join("half"));
    let written = succeed(&["export", "--checkpoint", text(&model), "--output", text(&out), "--json"]);
    let written: Value = serde_json::from_str(&written).unwrap();
    assert_eq!((&written["format"], &written["dtype"]), (&json!("hf"), &json!("f32")));
    assert_eq!(scored(dir.path(), text(&out)), scored(dir.path(), text(&model)));
    assert!(out.join("tokenizer.json").is_file());
    succeed(&["export", "--checkpoint", text(&model), "--output", text(&half), "--dtype", "bf16"]);
    let config: Value = serde_json::from_str(&std::fs::read_to_string(half.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["torch_dtype"], "bfloat16");
    let size = |dir: &std::path::Path| dir.join("model.safetensors").metadata().unwrap().len();
    assert!(size(&half) < size(&out) * 6 / 10);
    // The directory around a model is a checkpoint too.
    succeed(&["export", "--checkpoint", text(dir.path()), "--output", text(&dir.path().join("again"))]);
}

/// An export onto its own source would read weights that it has begun to replace.
#[test]
fn an_export_never_writes_over_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let model = new_model(dir.path());
    let weights = || std::fs::read(model.join("model.safetensors")).unwrap();
    let before = weights();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&model, &link).unwrap();
    let refuse = |output: &std::path::Path, says: &str| {
        let args = ["export", "--checkpoint", text(&model), "--output", text(output), "--dtype", "bf16"];
        fail(&args, 2, &[text(output), says]);
        assert!(weights() == before, "{} was written", output.display());
    };
    for output in [&model, &link, &model.join("."), &model.join("../model"), &link.join("new/deeper")] {
        refuse(output, "part of the checkpoint");
    }
    assert!(!model.join("new").exists());
    let other = dir.path().join("other");
    std::fs::create_dir(&other).unwrap();
    std::fs::write(other.join("notes"), "kept").unwrap();
    refuse(&other, "the directory is not empty");
    std::fs::remove_file(other.join("notes")).unwrap();
    succeed(&["export", "--checkpoint", text(&model), "--output", text(&other)]);
}

#[test]
fn exports_and_imports_that_cannot_be_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (new_model(dir.path()), dir.path().join("x"));
    let export = ["export", "--output", text(&out), "--checkpoint"];
    fail(&[&export[..], &[text(&model), "--dtype", "f16"]].concat(), 2, &["f16", "expected f32 or bf16"]);
    let empty = dir.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    fail(&[&export[..], &[text(&empty)]].concat(), 2, &["config.json"]);
    let critic = fixture("critic_qwen2");
    fail(&[&export[..], &[text(&critic), "--format", "gguf"]].concat(), 1, &["critic_qwen2"]);
    let garbage = write(dir.path(), "bad.gguf", "GGUF but not really");
    fail(&["import", &garbage, "--output", text(&out)], 1, &["bad.gguf"]);
    fail(&["import", "none.gguf", "--output", text(&out)], 2, &["none.gguf is no file"]);
    assert!(!out.join("config.json").exists());
}

#[test]
fn algorithms_are_listed_with_what_they_do() {
    let rows: Value = serde_json::from_str(&succeed(&["algos", "list", "--json"])).unwrap();
    for (key, name) in [
        ("adv_estimator", "grpo"),
        ("adv_estimator", "gae"),
        ("loss_mode", "vanilla"),
        ("loss_agg_mode", "seq-mean-token-sum"),
        ("kl_penalty", "low_var_kl"),
    ] {
        let row = rows.as_array().unwrap().iter().find(|row| row["key"] == key && row["name"] == name);
        assert!(row.is_some_and(|row| !row["description"].as_str().unwrap().is_empty()), "{key} {name}");
    }
    assert!(succeed(&["algos", "list"]).contains("  grpo "));
}

/// Results are those of the library, which the vectors of the peers check.
#[test]
fn vectors_are_evaluated_by_the_functions_of_training() {
    let vectors = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../algos/tests/vectors");
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.json");
    for name in ["verl_adv_reinforce_plus_plus.json", "verl_ppo_loss_total.json"] {
        let path = vectors.join(name);
        succeed(&["algos", "eval", text(&path), "--output", text(&out)]);
        let got = std::fs::read_to_string(&out).unwrap();
        let document: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        let want = temper_algos::eval::eval_file(&document).unwrap();
        assert!(got == format!("{want:#}\n"), "{name}: the command and the library differ");
        let got: Value = serde_json::from_str(&got).unwrap();
        let names = |document: &Value| {
            let cases = document["cases"].as_array().unwrap();
            cases.iter().map(|case| case["name"].clone()).collect::<Vec<_>>()
        };
        assert_eq!(names(&got), names(&document));
    }
    let unknown = write(dir.path(), "u.json", r#"{"source": "verl 1", "function": "nothing", "cases": []}"#);
    fail(&["algos", "eval", &unknown], 2, &["u.json", "nothing"]);
    let broken = write(dir.path(), "b.json", "{");
    fail(&["algos", "eval", &broken], 2, &["b.json", "not JSON"]);
}
