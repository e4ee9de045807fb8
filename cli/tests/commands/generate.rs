//! `temper generate`: what it draws, what it writes, what it refuses.

use crate::support::{fail, fixture, lines, new_model, numbers, reference, run, succeed, text, write};
use serde_json::{Value, json};
use temper_types::FinishReason;

#[test]
fn greedy_responses_match_transformers() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["llama", "llama_mha_v5cfg", "qwen2", "qwen3", "mistral_swa"] {
        let greedy = &reference(name)["greedy"];
        let prompt_len = greedy["prompt"].as_array().unwrap().len();
        let prompts = write(dir.path(), "p.jsonl", &format!("{}\n", json!({"prompt_token_ids": greedy["prompt"]})));
        let model = fixture(name);
        let rows = lines(&succeed(&[
            "generate",
            "--model",
            text(&model),
            "--prompts",
            &prompts,
            "--max-new-tokens",
            "10",
            "--temperature",
            "0",
            "--ignore-eos",
        ]));
        assert_eq!(
            rows[0]["response_token_ids"].as_array().unwrap(),
            &greedy["output"].as_array().unwrap()[prompt_len..]
        );
        assert_eq!(rows[0]["finish_reason"], "length");
    }
}

/// The log-prob of a token is the same to the bit, generated or scored, in both number formats.
#[test]
fn log_probs_equal_those_of_score_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let model = fixture("qwen3");
    let prompts = write(
        dir.path(),
        "p.jsonl",
        "{\"prompt_token_ids\": [3, 4, 5, 6, 7, 8, 9]}\n{\"prompt_token_ids\": [11]}\n{\"prompt_token_ids\": [2, 40]}\n",
    );
    let formats = ["exact", "int8"].into_iter().flat_map(|weights| {
        [("f32", "0.7"), ("bf16", "0.7"), ("bf16", "1.0"), ("f32", "0")].map(|(dtype, t)| (weights, dtype, t))
    });
    for (weights, dtype, temperature) in formats {
        let shared = ["--model", text(&model), "--dtype", dtype, "--weights", weights, "--temperature", temperature];
        let generate = ["generate", "--prompts", &prompts, "--n", "3", "--max-new-tokens", "20", "--ignore-eos"];
        let rows = lines(&succeed(&[&generate[..], &shared].concat()));
        assert_eq!(rows.len(), 9);
        let sequence = |row: &Value| {
            let (prompt, response) = (&row["prompt_token_ids"], &row["response_token_ids"]);
            let ids = [prompt.as_array().unwrap().clone(), response.as_array().unwrap().clone()].concat();
            format!("{}\n", json!({"input_ids": ids}))
        };
        let input = write(dir.path(), "s.jsonl", &rows.iter().map(sequence).collect::<String>());
        let scored = lines(&succeed(&[&["score", "--input", &input][..], &shared].concat()));
        for (row, scored) in rows.iter().zip(&scored) {
            let generated = numbers(&row["rollout_log_probs"]);
            assert_eq!(generated.len(), 20);
            let all = numbers(&scored["log_probs"]);
            assert_eq!(all[all.len() - 20..], generated, "{weights}, {dtype} at {temperature}");
        }
    }
}

/// Rows stand in the prompts' order, and a response depends on neither threads nor other prompts behind it.
#[test]
fn rows_keep_the_prompts_order_and_a_response_its_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let model = fixture("llama");
    let prompt = |i: u32| format!("{{\"prompt_token_ids\": [{}, 7]}}\n", 10 + i);
    let all = write(dir.path(), "all.jsonl", &(0..6).map(prompt).collect::<String>());
    let first = write(dir.path(), "first.jsonl", &prompt(0));
    let generate = |prompts: &str, seed: &str, threads: &str| {
        lines(&succeed(&[
            "generate",
            "--model",
            text(&model),
            "--prompts",
            prompts,
            "--n",
            "2",
            "--max-new-tokens",
            "12",
            "--seed",
            seed,
            "--threads",
            threads,
        ]))
    };
    let rows = generate(&all, "5", "2");
    let firsts: Vec<u64> = rows.iter().map(|row| row["prompt_token_ids"][0].as_u64().unwrap()).collect();
    assert_eq!(firsts, [10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15]);
    assert_eq!(generate(&first, "5", "1"), rows[..2]);
    assert_ne!(rows[0]["response_token_ids"], rows[1]["response_token_ids"], "samples of a group differ");
    assert_ne!(generate(&all, "6", "2"), rows, "another seed draws anew");
}

/// Truncated laws report what was drawn from beside the untruncated log-prob.
#[test]
fn truncation_reports_its_law() {
    let dir = tempfile::tempdir().unwrap();
    let model = fixture("llama");
    let prompts = write(dir.path(), "p.jsonl", "{\"prompt_token_ids\": [3, 4]}\n");
    let args = ["generate", "--model", text(&model), "--prompts", &prompts, "--max-new-tokens", "8", "--ignore-eos"];
    let row = &lines(&succeed(&[&args[..], &["--top-k", "3"]].concat()))[0];
    let keys: Vec<&str> = row.as_object().unwrap().keys().map(String::as_str).collect();
    let columns = ["prompt_token_ids", "response_token_ids", "response", "rollout_log_probs", "finish_reason"];
    assert_eq!(keys, [&columns[..], &["sampled_log_probs", "surviving_mass"]].concat());
    let (full, drawn) = (numbers(&row["rollout_log_probs"]), numbers(&row["sampled_log_probs"]));
    for ((full, drawn), mass) in full.iter().zip(&drawn).zip(numbers(&row["surviving_mass"])) {
        assert!(mass < 1.0 && (full - mass.ln() - drawn).abs() < 1e-4, "{full} {drawn} {mass}");
    }
    let plain = &lines(&succeed(&args))[0];
    assert_eq!(plain.as_object().unwrap().keys().map(String::as_str).collect::<Vec<_>>(), columns);
}

#[test]
fn text_prompts_stop_strings_and_arrow() {
    let dir = tempfile::tempdir().unwrap();
    let model = new_model(dir.path());
    let out = dir.path().join("out");
    let args = ["generate", "--model", text(&model), "--prompt", "sort 12=", "--n", "4", "--max-new-tokens", "40"];
    let rows = lines(&succeed(&args));
    for row in &rows {
        let (ids, response) = (row["response_token_ids"].as_array().unwrap(), row["response"].as_str().unwrap());
        // Ids 0 to 2 are special tokens; a new model draws them anywhere.
        let num_characters = ids.iter().filter(|id| id.as_u64().unwrap() > 2).count();
        assert_eq!(response.len(), num_characters, "one character a token, special tokens left out");
        assert_eq!(row["finish_reason"] == "stop", ids.last() == Some(&json!(2)), "2 is the end token");
    }
    let cut = response_of(&rows).chars().nth(2).unwrap().to_string();
    let stopped = lines(&succeed(&[&args[..], &["--stop", &cut]].concat()));
    for row in stopped.iter().filter(|row| row["finish_reason"] == "stop_string") {
        assert!(row["response"].as_str().unwrap().ends_with(&cut));
    }
    assert!(stopped.iter().any(|row| row["finish_reason"] == "stop_string"));
    let summary = succeed(&[&args[..], &["--format", "arrow", "--output", text(&out), "--json"]].concat());
    let summary: Value = serde_json::from_str(&summary).unwrap();
    assert_eq!(summary["num_samples"], 4);
    let samples = temper_data::trajectories::read_dataset(&out).unwrap();
    for (sample, row) in samples.iter().zip(&rows) {
        assert_eq!(json!(sample.response_token_ids), row["response_token_ids"]);
        let log_probs: Vec<f32> = numbers(&row["rollout_log_probs"]).iter().map(|x| *x as f32).collect();
        assert_eq!(sample.rollout_log_probs, log_probs);
        assert_eq!(sample.finish_reason == FinishReason::Stop, row["finish_reason"] == "stop");
        assert_ne!(sample.policy_versions[0].0, temper_types::PolicyVersion::default(), "the weights are named");
    }
    fail(&[&args[..], &["--format", "arrow", "--output", text(&out)]].concat(), 2, &["not empty"]);
}

/// The longest response, so that there is something to cut.
fn response_of(rows: &[Value]) -> String {
    let responses = rows.iter().map(|row| row["response"].as_str().unwrap().to_owned());
    responses.max_by_key(String::len).unwrap()
}

#[test]
fn generation_config_is_read_only_where_it_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let model = new_model(dir.path());
    std::fs::write(model.join("generation_config.json"), r#"{"do_sample": false, "top_k": 2}"#).unwrap();
    let args =
        ["generate", "--model", text(&model), "--prompt", "ab", "--n", "4", "--max-new-tokens", "8", "--ignore-eos"];
    let distinct = |text: &str| {
        let mut all: Vec<String> = lines(text).iter().map(|row| row["response_token_ids"].to_string()).collect();
        all.sort();
        all.dedup();
        all.len()
    };
    assert!(distinct(&succeed(&args)) > 1);
    assert_eq!(distinct(&succeed(&[&args[..], &["--generation-config"]].concat())), 1);
    assert!(distinct(&succeed(&[&args[..], &["--generation-config", "--temperature", "2"]].concat())) > 1);
}

#[test]
fn bad_prompts_are_named_by_file_and_line() {
    let dir = tempfile::tempdir().unwrap();
    let (model, bare) = (new_model(dir.path()), fixture("llama"));
    let good = "{\"prompt\": \"ab\"}\n";
    let case = |model, line: &str, parts: &[&str]| {
        let prompts = write(dir.path(), "bad.jsonl", &format!("{good}{line}\n"));
        let args = ["generate", "--model", model, "--prompts", &prompts, "--max-new-tokens", "4"];
        fail(&args, 1, parts);
        assert_eq!(run(&args).1, "", "no prompt is answered where one is bad");
    };
    case(text(&model), "{\"prompt\": 3}", &["bad.jsonl", "line 2", "prompt"]);
    case(text(&model), "{\"prompt\"", &["bad.jsonl", "line 2", "JSON"]);
    case(text(&model), "{\"other\": \"x\"}", &["bad.jsonl", "line 2", "prompt_token_ids"]);
    case(text(&model), "{\"prompt_token_ids\": [99999]}", &["prompt 1", "99999"]);
    case(text(&model), "{\"prompt\": \"~\"}", &["prompt 1", "'~'"]);
    let long = format!("{{\"prompt_token_ids\": {:?}}}", [3; 5000]);
    case(text(&model), &long, &["prompt 1", "can never fit: 5000 prompt tokens"]);
    case(text(&bare), "{\"prompt_token_ids\": [1]}", &["prompt 0", "tokenizer.json"]);
}

#[test]
fn bad_usage_exits_with_2() {
    let dir = tempfile::tempdir().unwrap();
    let (model, critic) = (new_model(dir.path()), fixture("critic_qwen2"));
    let base = ["generate", "--model", text(&model), "--max-new-tokens", "4"];
    let case = |more: &[&str], parts: &[&str]| fail(&[&base[..], more].concat(), 2, parts);
    case(&[], &["--prompt"]);
    case(&["--prompt", "a", "--prompts", "f"], &["--prompts"]);
    case(&["--prompt", "a", "--speculative", "guess"], &["--speculative", "replay"]);
    case(&["--prompt", "a", "--n", "0"], &["--n 0"]);
    case(&["--prompt", "a", "--format", "arrow"], &["--output"]);
    case(&["--prompt", "a", "--top-p", "1.5"], &["top_p", "at most 1"]);
    case(&["--prompt", "a", "--temperature", "-1"], &["temperature"]);
    case(&["--prompt", "a", "--dtype", "f16"], &["bf16"]);
    fail(
        &["generate", "--model", text(&critic), "--prompt", "a", "--max-new-tokens", "4"],
        2,
        &["value or reward head"],
    );
    fail(&[&base[..], &["--prompt", "a", "--chat"]].concat(), 1, &["chat template"]);
    fail(&["generate", "--model", text(&model), "--prompt", "a", "--max-new-tokens", "4000"], 1, &["can never fit"]);
}
