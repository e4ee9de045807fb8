//! A stage that distils a teacher: it learns, it resumes, it knows its teacher, and what is refused.

mod common;
#[path = "run/metrics.rs"]
mod metrics;

use common::{SMALL, recipe, stderr, temper};
use metrics::metrics;
use serde_json::{Map, Value};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Output;
use temper_controller::latest_checkpoint;
use temper_data::trajectories::read_dataset;

const DISTILL: &str = r#"
[[stage]]
kind = "distill"
data = "demonstrations"
steps = 4
prompts_per_step = 8
num_generations = 2
on_policy_fraction = 0.5
teacher = { path = "teacher/init" }
loss = { beta = 0.5 }
optimizer = { learning_rate = 1e-2 }
sampling = { max_new_tokens = 6 }
[checkpoint]
every_steps = 1
keep_last = 9
[placement]
threads = 2
"#;

/// The small recipe up to its stages, then `stages`.
fn with_stages(stages: &str) -> String {
    let head = SMALL.split("[[stage]]").next().expect("the recipe has a head");
    format!("{head}{stages}")
}

fn run(dir: &Path, args: &[&str], kill_at: Option<&str>) -> Output {
    let mut command = temper();
    command.current_dir(dir).args(args);
    if let Some(point) = kill_at {
        command.env("TEMPER_KILL_AT", point);
    }
    command.output().expect("the binary starts")
}

/// A directory with a teacher of other weights and width, and a recipe.
fn prepared(text: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let sft = "[[stage]]\nkind = \"sft\"\ndata = \"demonstrations\"\nsteps = 1\nbatch_size = 2\n";
    recipe(dir.path(), &with_stages(sft));
    let sets = ["--set", "model.init.hidden_size=48", "--set", "seed=9"];
    let output = run(dir.path(), &[&["train", "recipe.toml", "--run-dir", "teacher"], &sets[..]].concat(), None);
    assert!(output.status.success(), "{}", stderr(&output));
    recipe(dir.path(), text);
    dir
}

fn weights(dir: &Path) -> Vec<u8> {
    let last = latest_checkpoint(&dir.join("checkpoints")).expect("readable").expect("a checkpoint");
    std::fs::read(last.model().join("model.safetensors")).expect("weights")
}

fn number(row: &Map<String, Value>, key: &str) -> f64 {
    row.get(key).and_then(Value::as_f64).unwrap_or_else(|| panic!("no `{key}` in {row:?}"))
}

#[test]
fn a_distillation_learns_and_resumes_bit_for_bit_with_its_own_teacher_only() {
    let dir = prepared(&with_stages(DISTILL));
    let train = |name: &str, more: &[&str], kill_at: Option<&str>| {
        run(dir.path(), &[&["train", "recipe.toml", "--run-dir", name], more].concat(), kill_at)
    };
    let output = train("whole", &[], None);
    assert!(output.status.success(), "{}", stderr(&output));
    let rows = metrics(&dir.path().join("whole"));
    assert!(number(&rows[3], "kl") < number(&rows[0], "kl"), "{rows:?}");
    let (mut sampled, mut given) = (0.0, 0.0);
    for row in &rows {
        let (samples, completions) = (number(row, "num_samples"), number(row, "num_completions"));
        assert_eq!(samples / 2.0 + completions, 8.0, "a prompt has two samples or its completion");
        (sampled, given) = (sampled + samples, given + completions);
        if samples > 0.0 {
            assert_eq!(number(row, "rollout_train_log_prob_diff_max"), 0.0);
            assert!(number(row, "response_length_mean") > 0.0);
        }
    }
    assert!(sampled > 0.0 && given > 0.0, "both answer: {sampled} and {given}");
    let recorded = read_dataset(&dir.path().join("whole/rollouts")).expect("trajectories");
    assert_eq!(recorded.len() as f64, sampled);

    for (index, point) in ["1:update", "2:rollout", "3:checkpoint_rename"].iter().enumerate() {
        let args: &[&str] = if index == 0 { &[] } else { &["--resume"] };
        assert_eq!(train("killed", args, Some(point)).status.signal(), Some(9), "{point}");
    }
    let output = train("killed", &["--resume"], None);
    assert!(output.status.success(), "{}", stderr(&output));
    let (whole, killed) = (dir.path().join("whole"), dir.path().join("killed"));
    assert_eq!(metrics(&killed), rows);
    assert!(weights(&killed) == weights(&whole), "the weights differ");

    let teacher = dir.path().join("teacher");
    let last = latest_checkpoint(&teacher.join("checkpoints")).expect("readable").expect("a checkpoint");
    let file = "model.safetensors";
    std::fs::copy(last.model().join(file), teacher.join("init").join(file)).expect("another teacher");
    let output = train("whole", &["--resume"], None);
    assert!(!output.status.success(), "a teacher with other weights");
    assert!(stderr(&output).contains("teacher"), "{}", stderr(&output));
}

/// Each change of the recipe, and what the error must say.
const REFUSED: [(&str, &str, &[&str]); 7] = [
    ("teacher = { path = \"teacher/init\" }", "", &["teacher", "expected teacher = { path"]),
    ("\"teacher/init\"", "\"nowhere\"", &["stage.0.teacher.path", "nowhere"]),
    ("beta = 0.5", "beta = 0.5, top_k = 4", &["stage.0.loss", "beta"]),
    ("beta = 0.5", "beta = 1.5", &["stage.0.loss", "beta"]),
    ("beta = 0.5", "betta = 0.5", &["betta", "beta"]),
    ("on_policy_fraction = 0.5", "on_policy_fraction = 2.0", &["on_policy_fraction", "from 0 to 1"]),
    ("data = \"demonstrations\"", "data = \"train\"", &["stage.0.data", "completion", "on_policy_fraction = 1"]),
];

#[test]
fn what_cannot_work_is_refused_before_the_first_step() {
    let dir = prepared("");
    for (from, to, expected) in REFUSED {
        recipe(dir.path(), &with_stages(&DISTILL.replace(from, to)));
        let output = run(dir.path(), &["check", "recipe.toml"], None);
        assert_eq!(output.status.code(), Some(2), "{to}: {}", stderr(&output));
        for part in expected {
            assert!(stderr(&output).contains(part), "{to}: no `{part}` in {}", stderr(&output));
        }
    }
    let other = with_stages(DISTILL).replace("=orst", "=orstx");
    recipe(dir.path(), &other);
    let output = run(dir.path(), &["train", "recipe.toml", "--run-dir", "other"], None);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("expected the same tokenizer"), "{}", stderr(&output));
}
