//! `temper eval`: metrics follow from the responses it keeps, and failures are counted.

use crate::support::{fail, new_model, succeed, text, write};
use serde_json::{Value, json};
use temper_types::RewardOutcome;

fn rows() -> String {
    let row = |source: &str, prompt: &str, truth: Option<&str>| {
        let mut row = json!({"data_source": source, "prompt": prompt});
        if let Some(truth) = truth {
            row["reward_model"] = json!({"style": "rule", "ground_truth": truth});
        }
        format!("{row}\n")
    };
    [
        row("first", "ab=", Some("a")),
        row("first", "cd=", Some("0")),
        row("second", "ef=", Some("e")),
        row("second", "gh=", None),
    ]
    .concat()
}

/// `contains` scores often enough on random text that the metrics are neither 0 nor 1 everywhere.
#[test]
fn metrics_are_those_of_the_kept_responses() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data, out) = (new_model(dir.path()), write(dir.path(), "d.jsonl", &rows()), dir.path().join("kept"));
    let report = succeed(&[
        "eval",
        "--model",
        text(&model),
        "--data",
        &data,
        "--reward",
        "contains",
        "--n",
        "4",
        "--max-new-tokens",
        "24",
        "--output",
        text(&out),
        "--json",
    ]);
    let report: Value = serde_json::from_str(&report).unwrap();
    let samples = temper_data::trajectories::read_dataset(&out).unwrap();
    assert_eq!(samples.len(), 16);
    for source in ["first", "second"] {
        let of_source = samples.iter().filter(|s| s.data_source == source);
        let rewards: Vec<f64> = of_source.filter_map(|s| s.outcome.as_ref()?.reward()).collect();
        let mean = rewards.iter().sum::<f64>() / rewards.len() as f64;
        let got = &report["sources"][source];
        assert!((got["mean@4"].as_f64().unwrap() - mean).abs() < 1e-12, "{got}");
        assert!((got["pass@1"].as_f64().unwrap() - mean).abs() < 1e-12, "{got}");
        assert!(got["best@4"].as_f64().unwrap() >= mean && got["pass@4"].as_f64() == got["best@4"].as_f64(), "{got}");
        assert!(got["maj@4"].is_number() && got["pass@2"].is_number(), "{got}");
    }
    let failed = samples.iter().filter(|s| matches!(s.outcome, Some(RewardOutcome::Failed(_)))).count();
    assert_eq!((failed, &report["sources"]["second"]["num_failed"]), (4, &json!(4)));
    let failures = report["sources"]["second"]["failures"].as_object().unwrap();
    assert!(failures.keys().all(|cause| cause.contains("contains")), "{failures:?}");
    assert_eq!(report["sources"]["first"]["num_failed"], 0);
}

#[test]
fn text_output_limit_and_two_files() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (new_model(dir.path()), write(dir.path(), "d.jsonl", &rows()));
    let args = ["eval", "--model", text(&model), "--reward", "exact_match", "--max-new-tokens", "4", "--data", &data];
    let report = succeed(&[&args[..], &["--limit", "2"]].concat());
    assert!(report.contains("first: 2 prompts, 2 samples") && report.contains("mean@1"), "{report}");
    assert!(!report.contains("second"), "{report}");
    let report = succeed(&[&args[..], &["--data", &data]].concat());
    assert!(report.contains("first: 4 prompts") && report.contains("2 samples not scored"), "{report}");
}

#[test]
fn bad_rewards_and_data_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (new_model(dir.path()), write(dir.path(), "d.jsonl", &rows()));
    let case = |reward: &str, code, parts: &[&str]| {
        let args = ["eval", "--model", text(&model), "--data", &data, "--max-new-tokens", "4", "--reward", reward];
        fail(&args, code, parts);
    };
    case("exact_matc", 2, &["--reward", "exact_match"]);
    case("regex", 2, &["--reward", "pattern"]);
    case("{\"components\": []}", 2, &["--reward"]);
    // Refused before the model is read: here it is not even there.
    let trained = r#"{"components": [{"kind": "number"}, {"kind": "reward_model", "model": "trained"}]}"#;
    let args = ["eval", "--model", "nowhere", "--data", &data, "--reward", trained];
    fail(&args, 2, &["--reward", "`reward_model`", "only a run has at hand"]);
    for threshold in ["nan", "inf"] {
        let args = ["eval", "--model", "nowhere", "--data", &data, "--reward", "number", "--correct-at", threshold];
        fail(&args, 2, &["--correct-at", "expected a finite number"]);
    }
    let unknown = write(dir.path(), "u.jsonl", "{\"prompt\": \"ab\"}\n");
    let args = ["eval", "--model", text(&model), "--data", &unknown, "--max-new-tokens", "4", "--reward", "number"];
    fail(&args, 1, &["no sample could be scored", "number"]);
    let bad = write(dir.path(), "b.jsonl", "{\"prompt\": \"ab\"}\n{}\n");
    fail(&["eval", "--model", text(&model), "--data", &bad, "--reward", "number"], 1, &["b.jsonl", "line 2"]);
}
