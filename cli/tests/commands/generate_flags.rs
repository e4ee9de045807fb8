//! Flags that change what is drawn, or who drafts, or that search instead.

use crate::support::{fail, fixture, lines, new_model, numbers, succeed, text};
use serde_json::{Value, json};
use std::path::Path;

const BASE: [&str; 8] = ["--prompt", "sort 12=", "--n", "4", "--max-new-tokens", "24", "--ignore-eos", "--seed"];

fn generate(model: &Path, more: &[&str]) -> Vec<Value> {
    lines(&succeed(&[&["generate", "--model", text(model)][..], &BASE, &["3"], more].concat()))
}

fn ids(rows: &[Value]) -> Vec<u64> {
    rows.iter().flat_map(|row| row["response_token_ids"].as_array().unwrap()).map(|id| id.as_u64().unwrap()).collect()
}

#[test]
fn bias_allowed_ids_and_bad_words_steer_what_is_drawn() {
    let dir = tempfile::tempdir().unwrap();
    let model = new_model(dir.path());
    let plain = generate(&model, &[]);
    let distinct: std::collections::BTreeSet<u64> = ids(&plain).into_iter().collect();
    assert!(distinct.len() > 5);

    let allowed = generate(&model, &["--allowed-token-id", "7", "--allowed-token-id", "9"]);
    assert!(ids(&allowed).iter().all(|id| [7, 9].contains(id)));
    assert!(numbers(&allowed[0]["surviving_mass"]).iter().all(|mass| *mass < 1.0), "what was left is told");

    let biased = generate(&model, &["--logit-bias", "8=100"]);
    assert!(ids(&biased).iter().all(|id| *id == 8));
    let banned = generate(&model, &["--logit-bias", "8=-100", "--logit-bias", "9=-100"]);
    assert!(ids(&banned).iter().all(|id| ![8, 9].contains(id)));

    // One character is one token: the most frequent pair of the plain responses never comes again.
    let word: String = plain[0]["response"].as_str().unwrap().trim().chars().take(2).collect();
    let worded = generate(&model, &["--bad-word", &word, "--bad-word", "a"]);
    for row in &worded {
        let response = row["response"].as_str().unwrap();
        assert!(!response.contains('a') && !response.contains(&word), "{word:?} in {response:?}");
    }
}

#[test]
fn flags_that_cannot_be_met_say_what_would_be_right() {
    let dir = tempfile::tempdir().unwrap();
    let (model, bare) = (new_model(dir.path()), fixture("llama"));
    let base = ["generate", "--model", text(&model), "--prompt", "a", "--max-new-tokens", "4"];
    let case = |more: &[&str], code, parts: &[&str]| fail(&[&base[..], more].concat(), code, parts);
    case(&["--logit-bias", "8"], 2, &["--logit-bias", "42=-1.5", "\"8\""]);
    case(&["--logit-bias", "8=much"], 2, &["--logit-bias", "8=much"]);
    case(&["--logit-bias", "99999=1"], 1, &["logit_bias", "99999", "is no token id"]);
    case(&["--allowed-token-id", "99999"], 1, &["allowed_token_ids", "99999"]);
    case(&["--bad-word", " "], 2, &["bad_words"]);
    case(&["--bad-word", "~"], 2, &["--bad-word", "~"]);
    case(&["--speculative", "model"], 2, &["--draft-model DIR"]);
    case(&["--speculative", "suffix", "--draft-model", text(&model)], 2, &["--draft-model", "model or auto"]);
    case(&["--draft-model", text(&bare)], 1, &["draft model", "vocabulary"]);
    case(&["--beam-width", "2", "--n", "3"], 2, &["--beam-width 2", "at least --n 3"]);
    case(&["--beam-width", "2", "--temperature", "0.5"], 2, &["--beam-width", "--temperature"]);
    case(&["--beam-width", "2", "--speculative", "suffix"], 2, &["--beam-width", "--speculative"]);
    case(&["--length-penalty", "2"], 2, &["--beam-width"]);
    fail(
        &["generate", "--model", text(&bare), "--prompt", "a", "--max-new-tokens", "4", "--bad-word", "no"],
        2,
        &["--bad-word", "tokenizer.json"],
    );
}

/// The same rows with a draft model, be it the model itself or another one of its vocabulary.
#[test]
fn a_draft_model_changes_no_row() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (model, draft) = (new_model(dir.path()), new_model(other.path()));
    let plain = generate(&model, &[]);
    assert_eq!(generate(&model, &["--draft-model", text(&draft)]), plain);
    assert_eq!(generate(&model, &["--draft-model", text(&draft), "--speculative", "auto"]), plain);
}

#[test]
fn beams_come_best_first_and_score_what_score_says() {
    let dir = tempfile::tempdir().unwrap();
    let model = new_model(dir.path());
    let search = |width: &str, penalty: &str| {
        let n = if width == "1" { "1" } else { "3" };
        let args = ["generate", "--model", text(&model), "--prompt", "sort 12=", "--max-new-tokens", "10", "--n", n];
        lines(&succeed(&[&args[..], &["--beam-width", width, "--length-penalty", penalty]].concat()))
    };
    let rows = search("6", "0.5");
    assert_eq!(rows.len(), 3);
    let scores: Vec<f64> = rows.iter().map(|row| row["beam_score"].as_f64().unwrap()).collect();
    assert!(scores.is_sorted_by(|a, b| a >= b), "{scores:?}");
    for (row, score) in rows.iter().zip(&scores) {
        let log_probs = numbers(&row["rollout_log_probs"]);
        let expected = log_probs.iter().sum::<f64>() / (log_probs.len() as f64).sqrt();
        assert!((score - expected).abs() < 1e-4, "{score} {expected}");
    }
    assert_ne!(rows[0]["response_token_ids"], rows[1]["response_token_ids"]);
    let greedy = ["generate", "--model", text(&model), "--prompt", "sort 12=", "--max-new-tokens", "10"];
    let greedy = lines(&succeed(&[&greedy[..], &["--temperature", "0"]].concat()));
    let one = search("1", "0");
    assert_eq!(one[0]["response_token_ids"], greedy[0]["response_token_ids"], "one beam is the greedy response");
    assert_eq!(one[0]["finish_reason"], json!(greedy[0]["finish_reason"]));
}
