//! Stages over preferences: one step against `temper score` and the formula, resume, labels, and what is refused.

mod common;
#[path = "run/metrics.rs"]
mod metrics;

use common::{SMALL, recipe, stderr, temper};
use metrics::metrics;
use serde_json::{Map, Value, json};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Output;
use temper_actor::{SpecialTokens, Tokenizer};
use temper_controller::latest_checkpoint;
use temper_types::PromptContent;

const PAIRS: [(&str, &str, &str); 3] =
    [("sort 21=", "12", "21"), ("sort 431=", "134", "143"), ("sort 70=", "07", "70")];

/// The small recipe up to its stages, then `stages`.
fn with_stages(stages: &str) -> String {
    let head = SMALL.split("[[stage]]").next().expect("the recipe has a head");
    format!(
        "{head}\n[data.pairs]\nfiles = [\"pairs.jsonl\"]\n{stages}\n[checkpoint]\nevery_steps = 1\nkeep_last = 9\n\
         [placement]\nthreads = 2\n"
    )
}

fn write_pairs(dir: &Path) {
    let beliefs = json!({"belief": "1=", "belief_probs": {"1": 0.75, "2": 0.25, "3": 0.0}});
    let row = |(prompt, chosen, rejected)| json!({"prompt": prompt, "chosen": chosen, "rejected": rejected, "extra_info": beliefs});
    write_rows(dir, &PAIRS.map(row));
}

fn write_rows(dir: &Path, rows: &[Value]) {
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    std::fs::write(dir.join("pairs.jsonl"), lines.join("\n")).expect("writable");
}

/// Train in `dir` into `run`; paths of data are relative to `dir`.
fn train(dir: &Path, run: &str, args: &[&str], kill_at: Option<&str>) -> Output {
    let mut command = temper();
    command.current_dir(dir).args(["train", "recipe.toml", "--run-dir", run]).args(args);
    if let Some(point) = kill_at {
        command.env("TEMPER_KILL_AT", point);
    }
    command.output().expect("the binary starts")
}

fn train_whole(dir: &Path, run: &str, args: &[&str]) -> Vec<Map<String, Value>> {
    let output = train(dir, run, args, None);
    assert!(output.status.success(), "{}", stderr(&output));
    metrics(&dir.join(run))
}

fn weights(dir: &Path, run: &str) -> Vec<u8> {
    let last = latest_checkpoint(&dir.join(run).join("checkpoints")).expect("readable").expect("a checkpoint");
    std::fs::read(last.model().join("model.safetensors")).expect("weights")
}

/// Summed log-probs of every pair's chosen and rejected response by `temper score`.
fn scored(dir: &Path, model: &Path) -> Vec<(f64, f64)> {
    let tokenizer = Tokenizer::load(&dir.join(model)).expect("a tokenizer");
    let eos = tokenizer.eos_token_id().expect("an end");
    let (mut lines, mut starts) = (String::new(), Vec::new());
    for (prompt, chosen, rejected) in PAIRS {
        for response in [chosen, rejected] {
            let mut ids = tokenizer.encode_prompt(&PromptContent::Text(prompt.to_owned())).expect("ids");
            starts.push(ids.len() - 1);
            ids.extend(tokenizer.encode(response, SpecialTokens::Omit).expect("ids"));
            ids.push(eos);
            lines.push_str(&format!("{}\n", json!({ "input_ids": ids })));
        }
    }
    std::fs::write(dir.join("ids.jsonl"), lines).expect("writable");
    let mut command = temper();
    command.current_dir(dir).args(["score", "--input", "ids.jsonl", "--output", "scores.jsonl", "--model"]);
    let output = command.arg(model).output().expect("the binary starts");
    assert!(output.status.success(), "{}", stderr(&output));
    let text = std::fs::read_to_string(dir.join("scores.jsonl")).expect("scores");
    let sum = |(line, start): (&str, &usize)| {
        let row: Value = serde_json::from_str(line).expect("a row");
        let log_probs = row["log_probs"].as_array().expect("log-probs");
        log_probs[*start..].iter().map(|v| v.as_f64().expect("a number")).sum::<f64>()
    };
    let sums: Vec<f64> = text.lines().zip(&starts).map(sum).collect();
    sums.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect()
}

fn number(row: &Map<String, Value>, key: &str) -> f64 {
    row.get(key).and_then(Value::as_f64).unwrap_or_else(|| panic!("no `{key}` in {row:?}"))
}

fn assert_near(got: f64, expected: f64, what: &str) {
    assert!((got - expected).abs() < 2e-5 * expected.abs().max(1.0), "{what}: {got}, expected {expected}");
}

/// Every step sees the whole dataset, so its numbers follow from the weights before it, the first weights and the
/// formula alone.
#[test]
fn a_dpo_stage_agrees_with_scored_log_probs_and_the_formula() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    write_pairs(dir.path());
    let stage = "[[stage]]\nkind = \"dpo\"\ndata = \"pairs\"\nheld_out = \"pairs\"\nsteps = 3\nbatch_size = 3\n\
                 loss = { beta = 0.3, loss_type = [\"sigmoid\", \"sft\"], loss_weights = [1.0, 0.5] }\n\
                 optimizer = { learning_rate = 3e-3 }\n";
    recipe(dir.path(), &with_stages(stage));
    let rows = train_whole(dir.path(), "run", &[]);
    assert_eq!(number(&rows[0], "val_start/preference_accuracy"), 0.5, "policy and reference are the same");
    let reference = scored(dir.path(), Path::new("run/init"));
    let mut models: Vec<PathBuf> = vec!["run/init".into()];
    models.extend((1..=3).map(|step| format!("run/checkpoints/step-{step}/model").into()));
    let tokens: f64 = PAIRS.iter().map(|(_, chosen, _)| chosen.len() as f64 + 1.0).sum();
    for (step, row) in rows.iter().enumerate() {
        let now = scored(dir.path(), &models[step]);
        let rewards = |i: usize| (0.3 * (now[i].0 - reference[i].0), 0.3 * (now[i].1 - reference[i].1));
        let dpo: f64 = (0..3).map(|i| (1.0 + (rewards(i).1 - rewards(i).0).exp()).ln() / 3.0).sum();
        let nll: f64 = -now.iter().map(|(chosen, _)| chosen).sum::<f64>() / tokens;
        assert_near(number(row, "loss"), dpo + 0.5 * nll, "loss");
        assert_near(number(row, "rewards/chosen"), (0..3).map(|i| rewards(i).0 / 3.0).sum(), "rewards/chosen");
        assert_near(number(row, "logps/rejected"), now.iter().map(|p| p.1 / 3.0).sum(), "logps/rejected");
    }
    let last = scored(dir.path(), &models[3]);
    let won = last.iter().zip(&reference).filter(|(now, first)| now.0 - first.0 > now.1 - first.1).count();
    assert_near(number(&rows[2], "val/preference_accuracy"), won as f64 / 3.0, "accuracy");
    assert!(number(&rows[2], "loss") < number(&rows[0], "loss"));
}

/// Every kind of preference stage in one short run.
const FAMILY: &str = r#"
[[stage]]
kind = "dpo"
data = "pairs"
held_out = "pairs"
steps = 2
batch_size = 2
precompute_ref_log_probs = true
optimizer = { learning_rate = 1e-3 }
[[stage]]
kind = "kto"
data = "pairs"
held_out = "pairs"
steps = 2
batch_size = 4
optimizer = { learning_rate = 1e-3 }
[[stage]]
kind = "simpo"
data = "pairs"
steps = 1
batch_size = 2
optimizer = { learning_rate = 1e-3 }
[[stage]]
kind = "orpo"
data = "pairs"
steps = 1
batch_size = 2
optimizer = { learning_rate = 1e-3 }
[[stage]]
kind = "gdpo"
data = "pairs"
held_out = "pairs"
steps = 2
batch_size = 2
optimizer = { learning_rate = 1e-3 }
[[stage]]
kind = "online_dpo"
steps = 2
prompts_per_step = 8
num_generations = 4
mini_batches = 2
loss = { use_weighting = true }
sampling = { max_new_tokens = 6 }
optimizer = { learning_rate = 1e-3 }
"#;

#[test]
fn killed_and_resumed_and_split_otherwise_the_family_ends_with_the_same_bits() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    write_pairs(dir.path());
    recipe(dir.path(), &with_stages(FAMILY));
    let expected = train_whole(dir.path(), "whole", &[]);
    assert_eq!(expected.len(), 10);
    for (index, point) in
        ["2:update", "4:log_probs", "6:record", "8:update", "9:update", "10:update"].into_iter().enumerate()
    {
        let resume: &[&str] = if index == 0 { &[] } else { &["--resume"] };
        let output = train(dir.path(), "killed", resume, Some(point));
        assert_eq!(output.status.signal(), Some(9), "{point}: {}", stderr(&output));
    }
    assert_eq!(train_whole(dir.path(), "killed", &["--resume"]), expected);
    assert_eq!(weights(dir.path(), "killed"), weights(dir.path(), "whole"));
    let per_step = train_whole(dir.path(), "per_step", &["--set", "stage.dpo.precompute_ref_log_probs=false"]);
    assert_eq!(per_step, expected, "when the reference is computed changes no number");
    for row in &expected[6..8] {
        assert!(number(row, "belief_kl") > 0.0 && number(row, "belief_log_prob") < 0.0, "{row:?}");
    }
    assert!(number(&expected[7], "loss") < number(&expected[6], "loss"));
    assert!((0.0..=1.0).contains(&number(&expected[7], "val/preference_accuracy")));
    let online = &expected[9];
    assert!(number(online, "num_trained_samples") <= 16.0 && number(online, "num_trained_samples") % 2.0 == 0.0);
    let pairs = number(online, "num_trained_samples") / 2.0;
    assert_eq!(pairs + number(online, "num_filtered_groups"), 8.0, "every group is a pair or is counted");
    assert_eq!(number(online, "rollout_train_log_prob_diff_max"), 0.0);
}

/// Labelled rows give the numbers that the same responses as pairs give.
#[test]
fn labels_and_split_pairs_are_the_same_rows() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let stage = "[[stage]]\nkind = \"kto\"\ndata = \"pairs\"\nsteps = 2\nbatch_size = 6\n\
                 optimizer = { learning_rate = 1e-3 }\n";
    recipe(dir.path(), &with_stages(stage));
    write_pairs(dir.path());
    let split = train_whole(dir.path(), "split", &[]);
    let labelled = |(prompt, chosen, rejected): (&str, &str, &str)| {
        let row = |completion: &str, label: bool| json!({"prompt": prompt, "completion": completion, "label": label});
        [row(chosen, true), row(rejected, false)]
    };
    write_rows(dir.path(), &PAIRS.map(labelled).concat());
    assert_eq!(train_whole(dir.path(), "labelled", &[]), split);
    assert_near(number(&split[0], "loss"), 0.5, "loss where policy and reference are the same");
    assert!(number(&split[1], "loss") < 0.5);
}

#[test]
fn what_cannot_be_learned_from_is_refused_by_row_and_key() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let stage = |kind: &str, rest: &str| {
        format!("[[stage]]\nkind = \"{kind}\"\ndata = \"pairs\"\nsteps = 1\nbatch_size = 2\n{rest}\n")
    };
    let good = json!({"prompt": "sort 1=", "chosen": "1", "rejected": "2"});
    let cases = [
        (stage("dpo", ""), json!({"prompt": "p", "chosen": "1"}), vec!["stage.0.data", "row 1", "`rejected`"]),
        (
            stage("orpo", ""),
            json!({"prompt": "p", "chosen": "1", "rejected": "1"}),
            vec!["stage.0.data", "row 1", "`chosen` equals `rejected`"],
        ),
        (
            stage("reward_model", ""),
            json!({"prompt": "p", "chosen": "1", "rejected": "1"}),
            vec!["stage.0.data", "row 1", "`chosen` equals `rejected`"],
        ),
        (stage("kto", ""), json!({"prompt": "p", "completion": "1"}), vec!["stage.0.data", "row 1", "`label`"]),
        (
            stage("dpo", "loss = { loss_type = [\"sigmoyd\"] }"),
            good.clone(),
            vec!["stage.0.loss.loss_type", "sigmoyd", "did you mean `sigmoid`?"],
        ),
        (stage("simpo", "loss = { bta = 1.0 }"), good.clone(), vec!["stage.0.loss.bta", "did you mean `beta`?"]),
        (stage("dpo", "loss = { loss_weights = [1.0, 2.0] }"), good.clone(), vec!["stage.0.loss", "loss_weights"]),
        (stage("gdpo", ""), good.clone(), vec!["stage.0.data", "row 0", "`extra_info`", "`belief_probs`"]),
        (stage("kto", "batch_size = 1").replacen("batch_size = 2\n", "", 1), good.clone(), vec!["batch_size", "2"]),
        (stage("dpo", "held_out = \"pears\""), good.clone(), vec!["stage.0.held_out", "did you mean `pairs`?"]),
        (stage("simpoo", ""), good.clone(), vec!["stage.0.kind", "simpoo", "did you mean `simpo`?"]),
    ];
    for (stages, second, says) in cases {
        write_rows(dir.path(), &[good.clone(), second]);
        recipe(dir.path(), &with_stages(&stages));
        let output = temper().current_dir(dir.path()).args(["check", "recipe.toml"]).output().expect("it starts");
        assert_eq!(output.status.code(), Some(2), "{stages}");
        for part in says {
            assert!(stderr(&output).contains(part), "`{part}` is not in: {}", stderr(&output));
        }
    }
    write_pairs(dir.path());
    recipe(dir.path(), &with_stages("[[stage]]\nkind = \"online_dpo\"\nsteps = 1\nnum_generations = 1\n"));
    let output = temper().current_dir(dir.path()).args(["check", "recipe.toml"]).output().expect("it starts");
    assert!(stderr(&output).contains("num_generations"), "{}", stderr(&output));
}

/// The resolved recipe of a run starts the same run.
#[test]
fn a_resolved_recipe_checks_again() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    write_pairs(dir.path());
    recipe(dir.path(), &with_stages(FAMILY));
    let check = |file: &str, flag: &str| {
        let output = temper().current_dir(dir.path()).args(["check", file, flag]).output().expect("it starts");
        assert!(output.status.success(), "{}", stderr(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let resolved = check("recipe.toml", "--resolved");
    std::fs::write(dir.path().join("resolved.toml"), resolved).expect("writable");
    let identity =
        |file: &str| serde_json::from_str::<Value>(&check(file, "--json")).expect("JSON")["identity"].clone();
    assert_eq!(identity("resolved.toml"), identity("recipe.toml"));
}
