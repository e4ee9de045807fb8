//! `temper bench`: every figure is there and follows from its samples.

use crate::support::{fail, fixture, new_model, numbers, succeed, text};
use serde_json::Value;

fn bench(args: &[&str]) -> Value {
    serde_json::from_str(&succeed(&[&["bench"][..], args, &["--json"]].concat())).unwrap()
}

/// The median, the mean of the middle two where their number is even.
fn median(value: &Value) -> f64 {
    let mut samples = numbers(value);
    samples.sort_by(f64::total_cmp);
    let (n, middle) = (samples.len(), samples.len() / 2);
    if n.is_multiple_of(2) { (samples[middle - 1] + samples[middle]) / 2.0 } else { samples[middle] }
}

fn assert_near(label: &str, got: &Value, want: f64) {
    let got = got.as_f64().unwrap();
    assert!((got - want).abs() <= 1e-3 * want.abs() + 1e-3, "{label}: got {got}, want {want}");
}

#[test]
fn generation_is_timed() {
    let model = fixture("llama");
    let report = bench(&[
        "rollout",
        "--model",
        text(&model),
        "--batch",
        "2",
        "--prompt-len",
        "5",
        "--new-tokens",
        "6",
        "--runs",
        "3",
        "--group",
        "4",
    ]);
    let quantised = bench(
        &[
            &["rollout", "--model", text(&model), "--weights", "int8"][..],
            &["--prompt-len", "5", "--new-tokens", "2", "--runs", "1"],
        ]
        .concat(),
    );
    assert_eq!((&report["weights"], &quantised["weights"]), (&Value::from("exact"), &Value::from("int8")));
    let group = &report["group"];
    assert_eq!((&group["prompt_rows_of_1"], &group["prompt_rows_of_n"]), (&Value::from(5), &Value::from(5)));
    assert_near("group", &group["first_token_s_of_n"], median(&group["samples_s_of_n"]));
    for (key, expected) in [("num_requests_running", 0.0), ("num_preemptions_total", 0.0), ("weight_version", 0.0)] {
        assert_eq!(report["metrics"][key].as_f64(), Some(expected), "{key}");
    }
    assert_eq!(report["metrics"]["spec_decode_num_drafts_total"].as_f64(), Some(0.0));
    assert_eq!(numbers(&report["samples_s"]).len(), 3);
    assert_near("tokens_per_second", &report["tokens_per_second"], 12.0 / median(&report["samples_s"]));
    assert_near("prefill_tok_s", &report["prefill_tok_s"], 10.0 / median(&report["prefill_samples_s"]));
    assert!(report["rss_mb"].as_u64().unwrap() > 0);
    let roofline = &report["roofline"];
    for key in ["read_gb_s", "peak_gflops", "decode_tok_s"] {
        assert!(roofline[key].as_f64().unwrap() > 0.0, "{key} in {roofline}");
    }
    let reached = report["decode_tok_s"].as_f64().unwrap() / roofline["decode_tok_s"].as_f64().unwrap();
    assert_near("share", &roofline["share"], reached);
}

#[test]
fn training_steps_are_timed() {
    let model = fixture("llama");
    for more in [&["--dtype", "bf16"][..], &["--recompute", "--micro-batch-tokens", "10"]] {
        let args = ["train", "--model", text(&model), "--batch", "2", "--seq", "8", "--runs", "3"];
        let report = bench(&[&args[..], more].concat());
        assert_near("step_tok_s", &report["step_tok_s"], 16.0 / median(&report["samples_s"]));
        assert!(report["loss"].as_f64().unwrap() > 0.0);
    }
}

#[test]
fn weights_move_once_for_every_layout_over_every_path() {
    let model = fixture("llama");
    let report = bench(&["sync", "--model", text(&model), "--from", "replicated:2,fsdp:3,hybrid:4/2", "--runs", "3"]);
    let bytes = report["weight_bytes"].as_u64().unwrap();
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 3 * 2 * 2, "layouts, engines, paths");
    for path in ["grpc", "shared"] {
        assert_eq!(rows.iter().filter(|row| row["path"] == path).count(), 3 * 2, "{path}");
    }
    for row in rows {
        assert_eq!(row["moved_bytes"], row["lower_bound_bytes"], "{row}");
        assert_eq!(row["moved_bytes"].as_u64(), row["to"].as_u64().map(|engines| engines * bytes));
        assert_eq!(row["sync_s"].as_f64(), Some(median(&row["samples_s"])));
        let (syncs, copies) = (numbers(&row["samples_s"]), numbers(&row["copy_samples_s"]));
        let mut ratios: Vec<f64> = syncs.iter().zip(&copies).map(|(sync, copy)| sync / copy).collect();
        ratios.sort_by(f64::total_cmp);
        assert_near("ratio", &row["ratio"], ratios[1]);
    }
}

#[test]
fn whole_grpo_steps_are_timed() {
    let dir = tempfile::tempdir().unwrap();
    let init = new_model(dir.path());
    let args = ["grpo", "--model", text(&init), "--prompts", "2", "--gens", "3", "--len", "5", "--steps", "4"];
    let report = bench(&args);
    let steps = numbers(&report["steps"]);
    assert_eq!((steps.len(), numbers(&report["rewards"]).len()), (4, 4));
    let (gen_s, train_s) = (numbers(&report["gen_samples_s"]), numbers(&report["train_samples_s"]));
    for (step, (gen_s, train_s)) in steps.iter().zip(gen_s.iter().zip(&train_s)) {
        assert!(gen_s + train_s <= *step, "{report}");
    }
    assert!(report["start_to_first_step_s"].as_f64().unwrap() >= report["load_s"].as_f64().unwrap());
}

#[test]
fn products_are_timed_against_the_peak() {
    let report = bench(&["gemm", "--shapes", "64x128", "--rows", "8", "--dtype", "f32", "--threads", "1"]);
    let row = &report["rows"][0];
    assert_near("gflops", &row["gflops"], 2.0 * 8.0 * 64.0 * 128.0 / median(&row["samples_s"]) / 1e9);
    assert!(report["peaks"][0]["peak_gflops"].as_f64().unwrap() > 0.0);
    let report = bench(&["gemm", "--shapes", "64x128", "--rows", "1", "--dtype", "int8", "--threads", "1"]);
    assert_eq!((&report["rows"][0]["dtype"], report["rows"][0]["M"].as_u64()), (&Value::from("int8"), Some(1)));
}

#[test]
fn bad_usage_exits_with_2() {
    let model = fixture("llama");
    fail(&["bench", "rollout", "--model", text(&model), "--batch", "0"], 2, &["--batch 0"]);
    fail(&["bench", "train", "--model", text(&model), "--seq", "1"], 2, &["--seq 1"]);
    fail(&["bench", "gemm", "--shapes", "64by128"], 2, &["--shapes 64by128", "KxN"]);
    fail(&["bench", "gemm", "--dtype", "f64"], 2, &["f64", "int8"]);
    fail(&["bench", "gemm", "--dtype", "int8", "--kind", "input-grad"], 2, &["--kind forward"]);
    fail(
        &["bench", "sync", "--model", text(&model), "--from", "hybrid:4/3"],
        2,
        &["--from hybrid:4/3", "RANKS/SHARDS"],
    );
}
