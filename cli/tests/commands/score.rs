//! `temper score` against transformers.

use crate::common::temper;
use crate::support::{assert_close, fail, fixture, lines, numbers, reference, run, succeed, text, write};
use serde_json::{Value, json};
use std::path::Path;

const POLICIES: [&str; 5] = ["llama", "llama_mha_v5cfg", "qwen2", "qwen3", "mistral_swa"];

/// Values of a row where the mask is 1, and the column of the first of them.
fn unpadded(case: &Value, key: &str, row: usize) -> Vec<Value> {
    let mask = numbers(&case["attention_mask"][row]);
    let values = case[key][row].as_array().unwrap();
    values.iter().zip(&mask).filter(|(_, m)| **m == 1.0).map(|(v, _)| v.clone()).collect()
}

fn offset(case: &Value, row: usize) -> usize {
    numbers(&case["attention_mask"][row]).iter().position(|m| *m == 1.0).unwrap()
}

/// The rows of a case as lines for `score`.
fn input(case: &Value) -> String {
    let num_rows = case["input_ids"].as_array().unwrap().len();
    let row = |row| json!({"input_ids": unpadded(case, "input_ids", row), "position_ids": unpadded(case, "position_ids", row)});
    (0..num_rows).map(|index| format!("{}\n", row(index))).collect()
}

fn score(dir: &Path, model: &str, input: &str, args: &[&str]) -> Vec<Value> {
    let (input, model) = (write(dir, "in.jsonl", input), fixture(model));
    lines(&succeed(&[&["score", "--model", text(&model), "--input", &input], args].concat()))
}

#[test]
fn log_probs_and_entropies_match_transformers() {
    let dir = tempfile::tempdir().unwrap();
    for name in POLICIES {
        for case in reference(name)["cases"].as_array().unwrap() {
            let rows = score(dir.path(), name, &input(case), &[]);
            for (index, row) in rows.iter().enumerate() {
                let label = format!("{name}/{} row {index}", case["name"]);
                let (start, scored) = (offset(case, index), numbers(&row["log_probs"]));
                let want = |key: &str| numbers(&case[key][index])[start..start + scored.len()].to_vec();
                assert_eq!(scored.len() + 1, unpadded(case, "input_ids", index).len(), "{label}");
                assert_close(&label, &scored, &want("logprobs"), 1e-4);
                assert_close(&label, &numbers(&row["entropies"]), &want("entropy"), 1e-4);
            }
        }
    }
}

/// The case whose every token but the first of a row counts in the loss.
#[test]
fn gradient_norms_match_transformers() {
    let dir = tempfile::tempdir().unwrap();
    let norms = dir.path().join("norms.json");
    for name in POLICIES {
        let reference = reference(name);
        let case = &reference["cases"][0];
        assert_eq!(case["name"], "unpadded");
        score(dir.path(), name, &input(case), &["--grad-norms", text(&norms), "--micro-batch-tokens", "1"]);
        let got: Value = serde_json::from_str(&std::fs::read_to_string(&norms).unwrap()).unwrap();
        let want = case["grads"].as_object().unwrap();
        assert_eq!(got.as_object().unwrap().len(), want.len(), "{name}");
        for (tensor, want) in want {
            let (got, want) = (got[tensor].as_f64().unwrap(), want["norm"].as_f64().unwrap());
            assert!((got - want).abs() <= 1e-3 * want, "{name}: {tensor}: {got}, want {want}");
        }
    }
}

#[test]
fn values_and_scores_match_transformers() {
    let dir = tempfile::tempdir().unwrap();
    for case in reference("critic_qwen2")["cases"].as_array().unwrap() {
        for (index, row) in score(dir.path(), "critic_qwen2", &input(case), &[]).iter().enumerate() {
            let got = numbers(&row["values"]);
            let want = numbers(&case["values"][index])[offset(case, index)..][..got.len()].to_vec();
            assert_close("values", &got, &want, 1e-4);
        }
    }
    for case in reference("reward_llama")["cases"].as_array().unwrap() {
        let rows = score(dir.path(), "reward_llama", &input(case), &[]);
        let got: Vec<f64> = rows.iter().map(|row| row["score"].as_f64().unwrap()).collect();
        assert_close("scores", &got, &numbers(&case["scores"]), 1e-4);
    }
}

/// How lines are batched and how many threads compute changes no byte of the output.
#[test]
fn micro_batches_and_threads_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let input: String = reference("llama")["cases"].as_array().unwrap().iter().map(input).collect();
    for dtype in ["f32", "bf16"] {
        let whole = score(dir.path(), "llama", &input, &["--dtype", dtype]);
        assert_eq!(whole.len(), input.lines().count());
        for args in [["--micro-batch-tokens", "1"], ["--micro-batch-tokens", "20"], ["--threads", "1"]] {
            assert_eq!(
                score(dir.path(), "llama", &input, &[&args[..], &["--dtype", dtype]].concat()),
                whole,
                "{args:?}"
            );
        }
    }
}

#[test]
fn a_single_token_has_no_log_prob_and_a_summary_counts() {
    let dir = tempfile::tempdir().unwrap();
    let input = write(dir.path(), "in.jsonl", "{\"input_ids\": [5]}\n\n{\"input_ids\": [5, 6, 7]}\n");
    let out = dir.path().join("out.jsonl");
    let model = fixture("llama");
    let summary = succeed(&["score", "--model", text(&model), "--input", &input, "--output", text(&out), "--json"]);
    let rows = lines(&std::fs::read_to_string(&out).unwrap());
    assert_eq!(rows[0], json!({"log_probs": [], "entropies": []}));
    let summary: Value = serde_json::from_str(&summary).unwrap();
    assert_eq!(
        (&summary["num_sequences"], &summary["num_tokens"], &summary["num_scored"]),
        (&json!(2), &json!(4), &json!(2))
    );
    let mean = -numbers(&rows[1]["log_probs"]).iter().sum::<f64>() / 2.0;
    assert!((summary["mean_nll"].as_f64().unwrap() - mean).abs() < 1e-12);
}

/// A model that gives values or scores has no log-likelihood: none is reported.
#[test]
fn the_summary_says_what_was_scored() {
    let dir = tempfile::tempdir().unwrap();
    let input = write(dir.path(), "in.jsonl", "{\"input_ids\": [5]}\n{\"input_ids\": [5, 6, 7]}\n");
    let out = dir.path().join("out.jsonl");
    for (model, scored, says) in [
        ("llama", "log_probs", "2 lines, 2 tokens scored, mean negative log-likelihood "),
        ("critic_qwen2", "values", "2 lines, 4 values of tokens\n"),
        ("reward_llama", "scores", "2 lines, 2 scores of whole lines\n"),
    ] {
        let dir = fixture(model);
        let args = ["score", "--model", text(&dir), "--input", &input, "--output", text(&out)];
        let summary = succeed(&args);
        assert!(summary.starts_with(says), "{model}: {summary}");
        let summary: Value = serde_json::from_str(&succeed(&[&args[..], &["--json"]].concat())).unwrap();
        assert_eq!(summary["scored"], scored);
        assert_eq!(summary.get("mean_nll").is_some(), model == "llama", "{summary}");
    }
}

#[test]
fn bad_lines_are_named_by_file_and_line() {
    let dir = tempfile::tempdir().unwrap();
    let model = fixture("llama");
    let out = dir.path().join("out.jsonl");
    for (line, expected) in [
        ("{\"input_ids\": [1, 96]}", "\"input_ids\"[1] is 96: expected an integer from 0 below vocab_size = 96"),
        ("{\"input_ids\": [1, -2]}", "\"input_ids\"[1] is -2"),
        ("{\"input_ids\": []}", "\"input_ids\" is empty"),
        ("{\"input_ids\": 3}", "\"input_ids\" is 3: expected a list"),
        ("{\"ids\": [1]}", "no \"input_ids\""),
        ("[1, 2]", "expected an object with \"input_ids\""),
        ("{\"input_ids\": [1", "not JSON"),
        ("{\"input_ids\": [1, 2], \"position_ids\": [0]}", "1 \"position_ids\" for 2 \"input_ids\""),
        ("{\"input_ids\": [1, 2], \"position_ids\": [0, 100000]}", "max_position_embeddings"),
        ("{\"input_ids\": [1, 2], \"attention_mask\": [0, 1]}", "without padding"),
    ] {
        let input = write(dir.path(), "bad.jsonl", &format!("{{\"input_ids\": [1, 2]}}\n{line}\n"));
        let args = ["score", "--model", text(&model), "--input", &input, "--output", text(&out)];
        fail(&args, 1, &["bad.jsonl, line 2", expected]);
        assert!(!out.exists(), "a failed run leaves no output");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nor a temporary file");
    }
    let empty = write(dir.path(), "empty.jsonl", "\n");
    fail(&["score", "--model", text(&model), "--input", &empty], 1, &["empty.jsonl", "no line to score"]);
}

/// An interrupted command leaves nothing behind, and a file that was there stays as it was.
#[test]
fn an_interruption_takes_the_unfinished_file_away() {
    use std::os::unix::process::ExitStatusExt;
    for (signal, number) in [("-INT", 2), ("-TERM", 15)] {
        let dir = tempfile::tempdir().unwrap();
        let model = fixture("llama");
        let prompts = dir.path().join("prompts");
        assert!(std::process::Command::new("mkfifo").arg(&prompts).status().unwrap().success());
        let out = write(dir.path(), "out.jsonl", "earlier");
        // The result has its place when the input is opened, which is never written: the command waits for it.
        let args = ["score", "--model", text(&model), "--input", text(&prompts), "--output", &out];
        let mut child = temper().args(args).spawn().unwrap();
        let held = std::fs::OpenOptions::new().write(true).open(&prompts).unwrap();
        let names = || dir.path().read_dir().unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>();
        assert_eq!(names().len(), 3, "{:?}", names());
        let sent = std::process::Command::new("kill").args([signal, &child.id().to_string()]).status();
        assert!(sent.unwrap().success());
        assert_eq!(child.wait().unwrap().signal(), Some(number));
        drop(held);
        assert_eq!(names().len(), 2, "{:?}", names());
        assert_eq!(std::fs::read_to_string(&out).unwrap(), "earlier");
    }
}

#[test]
fn bad_usage_exits_with_2_and_bad_models_with_1() {
    let dir = tempfile::tempdir().unwrap();
    let input = write(dir.path(), "in.jsonl", "{\"input_ids\": [1, 2]}\n");
    let (model, critic) = (fixture("llama"), fixture("critic_qwen2"));
    let base = |model| vec!["score", "--model", model, "--input", &input];
    let with = |model, more: &[&'static str]| [base(model), more.to_vec()].concat();
    fail(&with(text(&model), &["--temperature", "-1"]), 2, &["--temperature -1", "0 or more"]);
    fail(&with(text(&critic), &["--grad-norms", "n.json"]), 2, &["--grad-norms", "value or reward head"]);
    let int8 = ["--weights", "int8", "--grad-norms", "n.json"];
    fail(&with(text(&model), &int8), 2, &["--grad-norms", "--weights exact"]);
    fail(&["score", "--model", text(&model)], 2, &["--input"]);
    let missing = dir.path().join("none");
    fail(&base(text(&missing)), 1, &["none/config.json"]);
    let (code, _, stderr) = run(&["score", "--model", text(&model), "--input", text(&missing)]);
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("none"), "{stderr}");
}
