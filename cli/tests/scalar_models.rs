//! A run with a reward model and a critic: killed with -9 and resumed it is the run that was not, and what scored its
//! responses is the directory that it left behind.

mod common;
#[path = "run/metrics.rs"]
mod metrics;

use common::{SMALL, recipe, stderr, temper};
use metrics::metrics;
use serde_json::{Map, Value, json};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Output;
use temper_controller::latest_checkpoint;
use temper_data::trajectories::read_dataset;
use temper_types::{RewardOutcome, Sample, SampleTimings};

const STAGES: &str = r#"
[data.pairs]
generate = { generator = { task = "sort_digits", min_digits = 2, max_digits = 3 }, num_rows = 32, seed = 4, preferences = true }
[data.held_out_pairs]
generate = { generator = { task = "sort_digits", min_digits = 2, max_digits = 3 }, num_rows = 8, split = "test", preferences = true }

[[reward.components]]
kind = "reward_model"
model = "trained"
[[reward.components]]
kind = "exact_match"
weight = 0.0

[[stage]]
kind = "sft"
data = "demonstrations"
steps = 2
batch_size = 16
optimizer = { learning_rate = 1e-2 }

[[stage]]
kind = "reward_model"
data = "pairs"
held_out = "held_out_pairs"
steps = 3
batch_size = 8
center_rewards_coefficient = 0.01
optimizer = { learning_rate = 1e-3 }

[[stage]]
kind = "ppo"
steps = 4
prompts_per_step = 4
num_generations = 2
mini_batches = 2
epochs = 2
optimizer = { learning_rate = 1e-3 }
sampling = { max_new_tokens = 6 }
algorithm = { kl_in_reward = { use_kl_in_reward = true, kl_ctrl = { type = "adaptive" } } }
[stage.critic]
backbone = "reward_model"
warmup_steps = 1
epochs = 2
optimizer = { learning_rate = 1e-3, weight_decay = 0.01 }
"#;

/// The small recipe with these stages and this reward in place of its own.
fn three_stages() -> String {
    let (head, rest) = SMALL.split_once("[[reward.components]]").expect("a reward");
    let (_, tail) = rest.split_once("[validation]").expect("a validation");
    format!("{head}{STAGES}\n[validation]{tail}")
}

fn train(recipe: &Path, run_dir: &Path, args: &[&str], kill_at: Option<&str>) -> Output {
    let mut command = temper();
    command.arg("train").arg(recipe).arg("--run-dir").arg(run_dir).args(args);
    if let Some(point) = kill_at {
        command.env("TEMPER_KILL_AT", point);
    }
    command.output().expect("the binary starts")
}

fn last_checkpoint(run_dir: &Path) -> PathBuf {
    latest_checkpoint(&run_dir.join("checkpoints")).expect("readable").expect("a checkpoint").path
}

/// Weights of every model, rows of metrics, and samples.
type Outcome = (Vec<Vec<u8>>, Vec<Map<String, Value>>, Vec<Sample>);

/// Everything that two equal runs have in common.
fn outcome(run_dir: &Path) -> Outcome {
    let last = last_checkpoint(run_dir);
    assert!(last.ends_with("step-9"), "{}", last.display());
    let weights = ["model", "reward_model", "optimizer/critic", "optimizer/critic_exp_avg_sq"];
    let read = |name| std::fs::read(last.join(name).join("model.safetensors")).expect("weights");
    let mut samples = read_dataset(&run_dir.join("rollouts")).expect("a dataset");
    for sample in &mut samples {
        sample.timings = SampleTimings::default();
        sample.worker = String::new();
        (sample.num_drafted, sample.num_accepted) = (0, 0);
    }
    (weights.map(read).into(), metrics(run_dir), samples)
}

#[test]
fn kills_in_every_stage_leave_the_result_as_it_was_and_the_reward_is_the_saved_models() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), &three_stages());
    let (whole, killed) = (dir.path().join("whole"), dir.path().join("killed"));
    let output = train(&recipe, &whole, &[], None);
    assert!(output.status.success(), "{}", stderr(&output));
    let expected = outcome(&whole);
    let points = ["4:update", "5:record", "6:update", "7:checkpoint_manifest", "8:advantages", "9:update"];
    for (index, point) in points.into_iter().enumerate() {
        let args: &[&str] = if index == 0 { &[] } else { &["--resume"] };
        let output = train(&recipe, &killed, args, Some(point));
        assert_eq!(output.status.signal(), Some(9), "{point}: {}", stderr(&output));
    }
    let output = train(&recipe, &killed, &["--resume"], None);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(outcome(&killed) == expected, "the resumed run differs");
    the_metrics_tell_of_both_models(&expected.1);
    the_saved_model_gives_the_rewards(dir.path(), &whole, &expected.2);
}

fn the_metrics_tell_of_both_models(rows: &[Map<String, Value>]) {
    for key in ["accuracy", "margin_mean", "loss", "val_start/held_out_pairs/pair_accuracy"] {
        assert!(rows[2][key].is_number(), "{key} of {:?}", rows[2]);
    }
    assert!(rows[4]["val/held_out_pairs/pair_accuracy"].is_number(), "{:?}", rows[4]);
    assert!(!rows[5].contains_key("loss") && rows[6]["loss"].is_number(), "only the critic learns in the first step");
    for key in ["value_loss", "value_clipfrac", "explained_variance", "critic_grad_norm", "critic_lr"] {
        assert!(rows[5..].iter().all(|row| row[key].is_number()), "{key}");
    }
    assert!(rows[8]["val/temper/sort_digits/mean@1/exact_match"].is_number(), "{:?}", rows[8]);
}

/// `temper score` reads the reward model of a checkpoint, and its scores are the rewards that the run recorded.
fn the_saved_model_gives_the_rewards(dir: &Path, run_dir: &Path, samples: &[Sample]) {
    let (input, scored) = (dir.join("ids.jsonl"), dir.join("scores.jsonl"));
    let line = |sample: &Sample| {
        let ids = [&sample.prompt_token_ids[..], &sample.response_token_ids[..]].concat();
        format!("{}\n", json!({ "input_ids": ids }))
    };
    std::fs::write(&input, samples.iter().map(line).collect::<String>()).expect("writable");
    let mut score = temper();
    score.arg("score").arg("--model").arg(last_checkpoint(run_dir).join("reward_model"));
    let output = score.arg("--input").arg(&input).arg("--output").arg(&scored).output().expect("the binary starts");
    assert!(output.status.success(), "{}", stderr(&output));
    let scores = std::fs::read_to_string(&scored).expect("scores");
    for (sample, line) in samples.iter().zip(scores.lines()) {
        let score = serde_json::from_str::<Value>(line).expect("a row")["score"].as_f64().expect("a score");
        let Some(RewardOutcome::Scored { reward, components }) = &sample.outcome else { panic!("scored") };
        assert_eq!((*reward as f32, components[0].value as f32), (score as f32, score as f32));
        assert_eq!(sample.values.len(), sample.response_token_ids.len());
    }
}

#[test]
fn what_needs_a_reward_model_or_a_critic_says_so() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let base = three_stages();
    for (from, to, says) in [
        ("kind = \"ppo\"", "kind = \"grpo\"", &["stage.2.critic", "no values"][..]),
        ("model = \"trained\"\n", "", &["reward", "missing field `model`"]),
        ("model = \"trained\"", "model = { path = \"nowhere\" }", &["reward.components.0.model.path", "nowhere"]),
        ("kind = \"reward_model\"\ndata", "kind = \"sft\"\ndata", &["stage.1", "unknown key"]),
        ("seed = 4, preferences = true", "seed = 4", &["stage.1.data", "chosen"]),
        ("held_out = \"held_out_pairs\"", "held_out = \"held_out_pair\"", &["stage.1.held_out", "did you mean"]),
        ("warmup_steps = 1", "warmup_steps = 4", &["stage.2.critic.warmup_steps", "fewer"]),
        ("center_rewards_coefficient = 0.01", "center_rewards_coefficient = -1.0", &["stage.1.center", "0 or more"]),
    ] {
        refused(dir.path(), &base.replacen(from, to, 1), says);
    }
    let (before, rest) = base.split_once("[[stage]]\nkind = \"reward_model\"").expect("a stage");
    let (_, after) = rest.split_once("[[stage]]").expect("a stage behind it");
    let without = format!("{before}[[stage]]{after}");
    refused(dir.path(), &without, &["reward.components.0.model", "no stage of kind `reward_model`", "path"]);
    let verified = without.replacen("kind = \"reward_model\"\nmodel = \"trained\"", "kind = \"number\"", 1);
    refused(dir.path(), &verified, &["stage.1.critic.backbone", "policy"]);
}

fn refused(dir: &Path, text: &str, says: &[&str]) {
    let output = temper().arg("check").arg(recipe(dir, text)).output().expect("the binary starts");
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(says.iter().all(|part| message.contains(part)), "expected {says:?} in: {message}");
}
