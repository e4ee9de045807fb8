//! Five optimizer steps on fixed batches against transformers, verl's losses and torch's AdamW, and the laws of an
//! update: the micro-batch split, recomputation, saving and restoring change nothing.

use serde::Deserialize;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use temper_algos::{Objective, PolicyLossConfig, SftLossType};
use temper_proto::{
    GlobalCounts, MiniBatch, OptimizerConfig, PolicyRole, StageSpec, TokenSequence, TrainRow, TrainerService,
};
use temper_tensor::{CpuConfig, CpuDevice, Device};
use temper_trainer::{LocalTrainerService, Trainer};
use temper_types::{DType, ErrorCode};

#[derive(Deserialize)]
struct Fixture {
    runs: Vec<Run>,
}

#[derive(Deserialize)]
struct Run {
    algo: String,
    #[serde(default)]
    params: Value,
    optimizer: TorchOptimizer,
    max_grad_norm: f64,
    inputs: Inputs,
    steps: Vec<Step>,
    #[serde(default)]
    final_logprobs: Vec<Vec<f64>>,
}

#[derive(Deserialize)]
struct TorchOptimizer {
    lr: f64,
    betas: [f64; 2],
    eps: f64,
    weight_decay: f64,
}

#[derive(Deserialize)]
struct Inputs {
    input_ids: Vec<Vec<u32>>,
    attention_mask: Vec<Vec<u8>>,
    response_mask: Vec<Vec<u8>>,
    #[serde(default)]
    old_log_prob: Vec<Vec<f64>>,
    #[serde(default)]
    ref_log_prob: Vec<Vec<f64>>,
    #[serde(default)]
    advantages_per_row: Vec<f64>,
}

#[derive(Deserialize)]
struct Step {
    loss: f64,
    grad_norm_before_clip: f64,
    #[serde(flatten)]
    metrics: serde_json::Map<String, Value>,
}

fn model_dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../actor/tests/data").join(name)
}

fn fixture(name: &str, algo: &str) -> Run {
    let text = std::fs::read_to_string(model_dir(name).join("train_steps.json")).expect("the fixture is there");
    let fixture: Fixture = serde_json::from_str(&text).expect("the fixture has this shape");
    fixture.runs.into_iter().find(|run| run.algo == algo).expect("the fixture has this run")
}

fn device() -> Arc<dyn Device> {
    Arc::new(CpuDevice::new(CpuConfig { num_threads: 2, isa: None }))
}

fn trainer(name: &str, dtype: DType) -> Trainer {
    Trainer::load(device(), &model_dir(name), dtype, Vec::new()).expect("the fixture loads")
}

/// Indices into a padded row of the tokens of its response.
fn response_range(run: &Run, row: usize) -> std::ops::Range<usize> {
    let mask = &run.inputs.response_mask[row];
    let first = mask.iter().position(|m| *m == 1).expect("a response");
    let last = mask.iter().rposition(|m| *m == 1).expect("a response");
    first + 1..last + 2
}

fn rows(run: &Run) -> Vec<TrainRow> {
    let ids = &run.inputs.input_ids;
    let row = |index: usize| {
        let response = response_range(run, index);
        let attended = |t: &usize| run.inputs.attention_mask[index][*t] == 1;
        let per_token = |values: &Vec<Vec<f64>>| -> Vec<f32> {
            let all = values.get(index).map_or(&[][..], Vec::as_slice);
            if all.is_empty() { Vec::new() } else { response.clone().map(|t| all[t - 1] as f32).collect() }
        };
        let sequence = TokenSequence {
            prompt_token_ids: (0..response.start).filter(attended).map(|t| ids[index][t]).collect(),
            response_token_ids: ids[index][response.clone()].to_vec(),
            response_mask: vec![1; response.len()],
        };
        let advantage = run.inputs.advantages_per_row.get(index).copied().unwrap_or(0.0);
        TrainRow {
            old_log_probs: per_token(&run.inputs.old_log_prob),
            ref_log_probs: per_token(&run.inputs.ref_log_prob),
            advantages: vec![advantage; response.len()],
            ..TrainRow::demonstration(sequence)
        }
    };
    (0..ids.len()).map(row).collect()
}

fn mini_batch(run: &Run) -> MiniBatch {
    let rows = rows(run);
    let num_tokens = rows.iter().map(|r| r.sequence.response_token_ids.len() as u64).sum();
    let num_rows = rows.len() as u64;
    let global = GlobalCounts { num_tokens, num_sequences: num_rows, num_rows, loss_scale_factor: 8.0 };
    MiniBatch { rows, global, temperature: 1.0, learning_rate: run.optimizer.lr }
}

fn objective(run: &Run) -> Objective {
    match run.algo.as_str() {
        "sft" => Objective::Sft(SftLossType::Nll),
        _ => {
            let mut config: serde_json::Map<String, Value> =
                serde_json::from_value(run.params.clone()).expect("params are an object");
            config.insert("use_kl_loss".to_owned(), Value::Bool(true));
            let config: PolicyLossConfig =
                serde_json::from_value(Value::Object(config)).expect("verl's names are ours");
            Objective::Policy(config)
        }
    }
}

fn stage(run: &Run, max_micro_batch_tokens: usize, recompute_activations: bool) -> StageSpec {
    StageSpec {
        name: "test".to_owned(),
        objective_json: serde_json::to_string(&objective(run)).expect("plain data"),
        optimizer: OptimizerConfig {
            learning_rate: run.optimizer.lr,
            beta1: run.optimizer.betas[0],
            beta2: run.optimizer.betas[1],
            eps: run.optimizer.eps,
            weight_decay: run.optimizer.weight_decay,
            max_grad_norm: run.max_grad_norm,
        },
        needs_reference: false,
        max_micro_batch_tokens,
        recompute_activations,
    }
}

fn close(what: &str, got: f64, expected: f64, rtol: f64, atol: f64) {
    let allowed = rtol * expected.abs() + atol;
    assert!((got - expected).abs() <= allowed, "{what}: expected {expected}, got {got}, allowed difference {allowed}");
}

/// Five steps; tolerances are the fixture's: step 0 to 1e-4, later steps to 2e-3.
fn check(name: &str, algo: &str, max_micro_batch_tokens: usize) {
    let run = fixture(name, algo);
    let mut trainer = trainer(name, DType::F32);
    trainer.begin_stage(stage(&run, max_micro_batch_tokens, false)).expect("a stage");
    for (index, step) in run.steps.iter().enumerate() {
        let report = trainer.update(&mini_batch(&run)).expect("an update");
        let rtol = if index == 0 { 1e-4 } else { 2e-3 };
        let what = |key: &str| format!("{name} {algo} step {index} {key}");
        close(&what("loss"), report.loss, step.loss, rtol, 1e-5);
        close(&what("grad_norm"), report.grad_norm, step.grad_norm_before_clip, rtol.max(1e-3), 1e-5);
        for key in ["pg_loss", "kl_loss", "pg_clipfrac", "ppo_kl"] {
            if let Some(expected) = step.metrics.get(key).and_then(Value::as_f64) {
                close(&what(key), report.metrics[key], expected, rtol, 1e-4);
            }
        }
    }
    let sequences: Vec<TokenSequence> = rows(&run).into_iter().map(|row| row.sequence).collect();
    let log_probs = trainer.log_probs(PolicyRole::Policy, &sequences, 1.0).expect("log-probs").log_probs;
    for (index, row) in log_probs.iter().enumerate() {
        for (t, got) in response_range(&run, index).zip(row) {
            close(
                &format!("{name} {algo} row {index} token {t}"),
                f64::from(*got),
                run.final_logprobs[index][t - 1],
                2e-3,
                2e-3,
            );
        }
    }
}

#[test]
fn five_supervised_steps_follow_transformers() {
    check("llama", "sft", 4096);
    check("qwen2", "sft", 4096);
}

#[test]
fn five_policy_steps_follow_verl() {
    check("llama", "ppo_actor", 4096);
    check("qwen2", "ppo_actor", 4096);
}

#[test]
fn micro_batches_of_any_size_follow_as_well() {
    check("llama", "ppo_actor", 1);
    check("llama", "sft", 20);
}

fn one_update(run: &Run, recompute: bool, threads: usize) -> Trainer {
    let device = Arc::new(CpuDevice::new(CpuConfig { num_threads: threads, isa: None }));
    let mut trainer = Trainer::load(device, &model_dir("llama"), DType::F32, Vec::new()).expect("the fixture loads");
    trainer.begin_stage(stage(run, 20, recompute)).expect("a stage");
    trainer.update(&mini_batch(run)).expect("an update");
    trainer
}

#[test]
fn recomputation_and_threads_change_no_bit() {
    let run = fixture("llama", "ppo_actor");
    let expected = one_update(&run, false, 1).publish(1).expect("a version");
    assert_eq!(one_update(&run, true, 1).publish(1).expect("a version"), expected);
    assert_eq!(one_update(&run, false, 3).publish(1).expect("a version"), expected);
}

#[test]
fn old_log_probs_left_empty_are_the_policys_own() {
    let run = fixture("llama", "ppo_actor");
    let mut trainer = trainer("llama", DType::F32);
    trainer.begin_stage(stage(&run, 4096, false)).expect("a stage");
    let mut batch = mini_batch(&run);
    let sequences: Vec<TokenSequence> = batch.rows.iter().map(|row| row.sequence.clone()).collect();
    let own = trainer.log_probs(PolicyRole::Policy, &sequences, 1.0).expect("log-probs").log_probs;
    batch.rows.iter_mut().for_each(|row| row.old_log_probs.clear());
    let report = trainer.update(&batch).expect("an update");
    assert_eq!(report.log_probs, own);
    assert_eq!(report.metrics["ppo_kl"], 0.0);
}

#[test]
fn a_restored_trainer_goes_on_bit_for_bit() {
    for dtype in [DType::F32, DType::Bf16] {
        let run = fixture("llama", "ppo_actor");
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (model, state) = (dir.path().join("model"), dir.path().join("optimizer"));
        std::fs::create_dir_all(&state).expect("writable");
        let spec = StageSpec { needs_reference: true, ..stage(&run, 4096, false) };
        let service = LocalTrainerService::new(trainer("llama", dtype));
        service.begin_stage(spec.clone()).expect("a stage");
        service.update(mini_batch(&run)).expect("an update");
        let version = service.publish(1).expect("a version");
        service.save_model(&model).expect("saved");
        service.save_state(&state).expect("saved");
        let sequences: Vec<TokenSequence> = rows(&run).into_iter().map(|row| row.sequence).collect();
        let reference = service.log_probs(PolicyRole::Reference, &sequences, 1.0).expect("a reference");
        service.update(mini_batch(&run)).expect("an update");
        let expected = service.publish(2).expect("a version");

        let resumed = LocalTrainerService::new(trainer("llama", dtype));
        resumed.begin_stage(spec).expect("a stage");
        resumed.restore(&model, &state, version).expect("restored");
        assert_eq!(resumed.version(), version);
        assert_eq!(resumed.log_probs(PolicyRole::Reference, &sequences, 1.0).expect("a reference"), reference);
        resumed.update(mini_batch(&run)).expect("an update");
        assert_eq!(resumed.publish(2).expect("a version"), expected);

        let wrong = temper_types::PolicyVersion { number: 1, hash: expected.hash };
        let error = resumed.restore(&model, &state, wrong).expect_err("other weights");
        assert_eq!(error.code, ErrorCode::DataLoss);
    }
}

/// Mixed halfway the reference is neither policy, mixed in full it is the policy, and a checkpoint keeps it to the bit.
#[test]
fn a_reference_that_moves_is_kept_in_the_checkpoint() {
    let run = fixture("llama", "ppo_actor");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (model, state) = (dir.path().join("model"), dir.path().join("optimizer"));
    std::fs::create_dir_all(&state).expect("writable");
    let spec = StageSpec { needs_reference: true, ..stage(&run, 4096, false) };
    let sequences: Vec<TokenSequence> = rows(&run).into_iter().map(|row| row.sequence).collect();
    let says = |service: &LocalTrainerService, role| service.log_probs(role, &sequences, 1.0).expect("log-probs");
    let service = LocalTrainerService::new(trainer("llama", DType::F32));
    service.begin_stage(spec.clone()).expect("a stage");
    let frozen = says(&service, PolicyRole::Reference);
    service.update(mini_batch(&run)).expect("an update");
    let policy = says(&service, PolicyRole::Policy);
    service.mix_reference(0.5).expect("mixed");
    let mixed = says(&service, PolicyRole::Reference);
    assert!(mixed != frozen && mixed != policy);
    let version = service.publish(1).expect("a version");
    service.save_model(&model).expect("saved");
    service.save_state(&state).expect("saved");
    service.mix_reference(0.5).expect("mixed");
    let mixed_again = says(&service, PolicyRole::Reference);

    let resumed = LocalTrainerService::new(trainer("llama", DType::F32));
    resumed.begin_stage(spec).expect("a stage");
    resumed.restore(&model, &state, version).expect("restored");
    assert_eq!(says(&resumed, PolicyRole::Reference), mixed);
    resumed.mix_reference(0.5).expect("mixed");
    assert_eq!(says(&resumed, PolicyRole::Reference), mixed_again);
    resumed.mix_reference(1.0).expect("copied");
    assert_eq!(says(&resumed, PolicyRole::Reference), policy);

    for alpha in [0.0, 1.1, f64::NAN] {
        assert_eq!(service.mix_reference(alpha).expect_err("out of range").code, ErrorCode::InvalidArgument);
    }
    service.begin_stage(stage(&run, 4096, false)).expect("a stage");
    let error = service.mix_reference(0.5).expect_err("no reference");
    assert!(error.to_string().contains("keeps no reference"), "{error}");
}

#[test]
fn a_loss_that_is_not_finite_changes_no_weight() {
    let run = fixture("llama", "ppo_actor");
    let service = LocalTrainerService::new(trainer("llama", DType::F32));
    let before = service.publish(0).expect("a version");
    assert_eq!(service.update(mini_batch(&run)).expect_err("no stage").code, ErrorCode::InvalidArgument);
    service.begin_stage(stage(&run, 4096, false)).expect("a stage");
    for bad in [f64::NAN, f64::INFINITY, 1e300] {
        let mut batch = mini_batch(&run);
        batch.rows[1].advantages[0] = bad;
        let error = service.update(batch).expect_err("not finite");
        assert_eq!(error.code, ErrorCode::NonFinite, "{error}");
        assert_eq!(service.publish(0).expect("a version"), before);
    }
    let mut batch = mini_batch(&run);
    batch.rows[0].sequence.response_token_ids[0] = 96;
    let error = service.update(batch).expect_err("no such id");
    assert!(error.to_string().contains("token id 96"), "{error}");
}

/// A loss, and a gradient behind a finite loss, that are not finite: the whole mini-batch lies in the file that the
/// error names.
#[test]
fn a_batch_that_is_not_finite_is_saved() {
    let run = fixture("llama", "ppo_actor");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut trainer = trainer("llama", DType::F32);
    trainer.save_non_finite_to(dir.path().join("non_finite"));
    trainer.begin_stage(stage(&run, 20, false)).expect("a stage");
    let last = mini_batch(&run).rows.len() - 1;
    for (version, bad, text) in [(4, f64::NAN, "NaN"), (5, f64::INFINITY, "inf"), (6, 1e300, "300")] {
        trainer.publish(version).expect("a version");
        let mut batch = mini_batch(&run);
        batch.rows[last].advantages[0] = bad;
        let error = trainer.update(&batch).expect_err("not finite").to_string();
        let path = dir.path().join("non_finite").join(format!("step-{}.json", version + 1));
        assert!(error.ends_with(&format!("; the mini-batch was saved to {}", path.display())), "{error}");
        let saved = std::fs::read_to_string(&path).expect("the file is there");
        let saved: Value = serde_json::from_str(&saved).expect("JSON");
        assert!(error.starts_with(saved["error"].as_str().expect("text")), "{error}");
        let rows = saved["rows"].as_array().expect("rows");
        assert_eq!(rows.len(), last + 1);
        let place = if bad.is_finite() { "the gradient of `".to_owned() } else { format!("of row {last}, token 0") };
        assert!(error.contains(&place), "{error}: expected {place}");
        let value = rows[last]["advantages"][0].to_string();
        assert!(value.contains(text), "{value}: expected {text}");
        for (row, sent) in rows.iter().zip(&batch.rows) {
            assert_eq!(row["response_token_ids"], serde_json::json!(sent.sequence.response_token_ids));
            assert_eq!(row["prompt_token_ids"], serde_json::json!(sent.sequence.prompt_token_ids));
            let old: Vec<f32> = serde_json::from_value(row["old_log_probs"].clone()).expect("numbers");
            assert_eq!(old, sent.old_log_probs);
            assert_eq!(row.get("returns"), None);
        }
    }
    std::fs::remove_dir_all(dir.path().join("non_finite")).expect("removed");
    std::fs::write(dir.path().join("non_finite"), "in the way").expect("writable");
    let mut batch = mini_batch(&run);
    batch.rows[0].advantages[0] = f64::NAN;
    let error = trainer.update(&batch).expect_err("not finite").to_string();
    assert!(error.contains("the mini-batch was not saved: cannot create"), "{error}");
}
