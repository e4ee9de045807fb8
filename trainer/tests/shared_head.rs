//! A value head on the policy's trunk: one update moves both, its gradient reaches the trunk, it resumes to the bit.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use temper_actor::{CheckpointReader, ModelConfig, PackedPolicy, ParamStore, TrainArena, TrainBatch};
use temper_algos::{Objective, SftLossType, SharedValueLossConfig, ValueLossConfig};
use temper_proto::{
    Backbone, GlobalCounts, MiniBatch, OptimizerConfig, ScalarModelService, ScalarModelSpec, ScalarRole, StageSpec,
    TokenSequence, TrainRow, TrainerService,
};
use temper_tensor::{CpuConfig, CpuDevice, Device};
use temper_trainer::{LocalTrainerService, Trainer};
use temper_types::{DType, ErrorCode, Philox};

const VF_COEF: f64 = 0.5;

fn device() -> Arc<dyn Device> {
    Arc::new(CpuDevice::new(CpuConfig { num_threads: 2, isa: None }))
}

fn model_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../actor/tests/data/llama")
}

/// A supervised stage without clipping, whose log-likelihood stands for any policy loss.
fn without_head() -> LocalTrainerService {
    let trainer = Trainer::load(device(), &model_dir(), DType::F32, Vec::new()).expect("the fixture loads");
    let service = LocalTrainerService::new(trainer);
    let stage = StageSpec {
        name: "test".to_owned(),
        objective_json: serde_json::to_string(&Objective::Sft(SftLossType::Nll)).expect("plain data"),
        optimizer: OptimizerConfig { max_grad_norm: 0.0, ..OptimizerConfig::default() },
        needs_reference: false,
        max_micro_batch_tokens: 12,
        recompute_activations: false,
    };
    service.begin_stage(stage).expect("a stage");
    service
}

fn spec(role: ScalarRole, vf_coef: f64) -> ScalarModelSpec {
    let value_loss = ValueLossConfig { cliprange_value: 0.0, ..ValueLossConfig::default() };
    let loss = SharedValueLossConfig { vf_coef, value_loss };
    ScalarModelSpec {
        role,
        loss_json: serde_json::to_string(&loss).expect("plain data"),
        optimizer: OptimizerConfig::default(),
        backbone: Backbone::Shared,
        seed: 1,
    }
}

fn with_head() -> LocalTrainerService {
    let service = without_head();
    service.begin_scalar_model(spec(ScalarRole::Critic, VF_COEF)).expect("a head");
    service
}

/// Three rows, two of them of one prompt; returns between 1 and 3.
fn batch(learning_rate: f64) -> MiniBatch {
    let noise = Philox::new(5);
    let row = |(i, (prompt, len)): (u64, (&[u32], usize))| {
        let sequence = TokenSequence {
            prompt_token_ids: prompt.to_vec(),
            response_token_ids: (0..len as u64).map(|t| noise.below(96, t, i) as u32).collect(),
            response_mask: vec![1; len],
        };
        let returns = (0..len as u64).map(|t| 1.0 + 2.0 * noise.uniform(t, 40 + i)).collect();
        TrainRow { returns, values: vec![0.0; len], ..TrainRow::demonstration(sequence) }
    };
    let shapes: [(&[u32], usize); 3] = [(&[3, 1, 4], 4), (&[3, 1, 4], 2), (&[9, 2], 5)];
    let rows: Vec<TrainRow> = (0..).zip(shapes).map(row).collect();
    let global = GlobalCounts { num_tokens: 11, num_sequences: 3, num_rows: 3, loss_scale_factor: 5.0 };
    MiniBatch { rows, global, temperature: 1.0, learning_rate }
}

fn sequences(batch: &MiniBatch) -> Vec<TokenSequence> {
    batch.rows.iter().map(|row| row.sequence.clone()).collect()
}

fn saved(service: &LocalTrainerService) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let state = dir.path().join("optimizer");
    std::fs::create_dir_all(&state).expect("writable");
    service.save_model(&dir.path().join("model")).expect("saved");
    service.save_state(&state).expect("saved");
    (dir, state)
}

fn load(dir: &Path) -> (ParamStore, ModelConfig) {
    let config = ModelConfig::load(dir).expect("a model directory");
    let reader = CheckpointReader::open(dir).expect("a checkpoint");
    (ParamStore::load(&*device(), &config, &reader).expect("all tensors"), config)
}

/// Weight and bias of the head in a state.
fn head(state: &Path) -> Vec<f64> {
    let text = std::fs::read_to_string(state.join("shared_head.json")).expect("the head");
    let file: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let bits = file["params"].as_array().expect("numbers");
    bits.iter().map(|b| f64::from_bits(b.as_u64().expect("bits"))).collect()
}

/// The policy's loss and the value loss, written out over the model's own forward.
fn loss_of((params, config, head): (&ParamStore, &ModelConfig, &[f64]), batch: &MiniBatch) -> (f64, f64) {
    let packed = PackedPolicy::new(&device(), params, config, DType::F32);
    let (mut nll, mut values) = (0.0, 0.0);
    for row in &batch.rows {
        let ids = [&row.sequence.prompt_token_ids[..], &row.sequence.response_token_ids].concat();
        let mut one = TrainBatch::new();
        one.push_sequence(&ids, row.sequence.prompt_token_ids.len()..ids.len());
        let says = packed.score_only(&one, 1.0, &mut TrainArena::new());
        nll -= says.log_probs.iter().map(|v| f64::from(*v)).sum::<f64>();
        let hidden = packed.hidden_only(&one, &mut TrainArena::new());
        for (h, target) in hidden.chunks_exact(head.len() - 1).zip(&row.returns) {
            let v: f64 = h.iter().zip(head).map(|(h, w)| f64::from(*h) * w).sum::<f64>() + head[head.len() - 1];
            values += 0.5 * (v - target).powi(2);
        }
    }
    (nll / batch.global.num_tokens as f64, values / batch.global.num_tokens as f64)
}

#[test]
fn the_first_update_moves_the_policy_as_if_there_were_no_head() {
    let (plain, shared) = (without_head(), with_head());
    let batch = batch(1e-3);
    let before = shared.values(&sequences(&batch)).expect("values");
    assert!(before.iter().flatten().all(|v| *v == 0.0), "a head begins at 0");
    let (of_plain, of_shared) = (plain.update(batch.clone()).expect("one"), shared.update(batch.clone()).expect("one"));
    assert_eq!(plain.publish(1).expect("a version"), shared.publish(1).expect("a version"), "to the bit");
    assert!(of_shared.grad_norm > of_plain.grad_norm, "the head's gradient is part of the norm");
    let values = of_shared.metrics["value_loss"];
    assert!((of_shared.loss - of_plain.loss - VF_COEF * values).abs() < 1e-12);
    assert_eq!((of_shared.metrics["value_mean"], of_shared.metrics["value_clipfrac"]), (0.0, 0.0));
    assert!(shared.values(&sequences(&batch)).expect("values").iter().flatten().any(|v| *v != 0.0));
    plain.update(batch.clone()).expect("another");
    shared.update(batch).expect("another");
    assert_ne!(plain.publish(2).expect("a version"), shared.publish(2).expect("a version"), "now it reaches the trunk");
}

/// The trunk's gradient of the second update, read out of its moments, is that of both losses together.
#[test]
fn the_value_loss_reaches_the_trunk() {
    let service = with_head();
    // A large step: what the head has learned then weighs in the trunk's gradient.
    service.update(batch(0.3)).expect("an update");
    let (first_dir, first) = saved(&service);
    let head = head(&first);
    let (mut params, config) = load(&first_dir.path().join("model"));
    let small = batch(1e-3);
    let (nll, values) = loss_of((&params, &config, &head), &small);
    let report = service.update(small.clone()).expect("an update");
    assert!((report.metrics["value_loss"] - values).abs() < 1e-5 * (1.0 + values), "{report:?}: {values}");
    assert!((report.loss - nll - VF_COEF * values).abs() < 1e-5 * (1.0 + report.loss), "{report:?}");
    let (_dir, second) = saved(&service);
    let moment =
        |state: &Path, name: &str| load(&state.join("exp_avg")).0.read_tensor(&*device(), name).expect("a tensor");
    for (name, i) in [("model.layers.0.mlp.down_proj.weight", 3), ("model.norm.weight", 2), ("model.norm.weight", 7)] {
        let gradient = (f64::from(moment(&second, name)[i]) - 0.9 * f64::from(moment(&first, name)[i])) / 0.1;
        let original = params.read_tensor(&*device(), name).expect("a tensor");
        let mut at = |step: f32| {
            let mut moved = original.clone();
            moved[i] += step;
            params.write_tensor(&*device(), name, &moved).expect("a tensor");
            loss_of((&params, &config, &head), &small)
        };
        let (up, down) = (at(4e-3), at(-4e-3));
        params.write_tensor(&*device(), name, &original).expect("a tensor");
        let (of_policy, of_values) = ((up.0 - down.0) / 8e-3, VF_COEF * (up.1 - down.1) / 8e-3);
        let expected = of_policy + of_values;
        assert!(of_values.abs() > 1e-4, "{name}: the value loss has a part in it: {of_values}");
        assert!((gradient - expected).abs() < 3e-2 * expected.abs() + 2e-3, "{name}[{i}]: {gradient}, {expected}");
    }
}

#[test]
fn the_head_learns_and_resumes_bit_for_bit() {
    let service = with_head();
    let first = service.update(batch(5e-3)).expect("an update").metrics["value_loss"];
    for _ in 0..30 {
        service.update(batch(5e-3)).expect("an update");
    }
    let (dir, state) = saved(&service);
    let version = service.publish(31).expect("a version");
    let resumed = with_head();
    resumed.restore(&dir.path().join("model"), &state, version).expect("restored");
    let ids = sequences(&batch(5e-3));
    assert_eq!(resumed.values(&ids).expect("values"), service.values(&ids).expect("values"));
    let expected = service.update(batch(5e-3)).expect("an update");
    assert_eq!(resumed.update(batch(5e-3)).expect("an update"), expected);
    assert_eq!(resumed.publish(32).expect("a version"), service.publish(32).expect("a version"));
    assert!(expected.metrics["value_loss"] < 0.2 * first, "{} of {first}", expected.metrics["value_loss"]);

    std::fs::remove_file(state.join("shared_head.json")).expect("removable");
    let error = with_head().restore(&dir.path().join("model"), &state, version).expect_err("no head");
    assert!(error.to_string().contains("shared_head.json"), "{error}");
}

#[test]
fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let service = with_head();
    let before = service.publish(0).expect("a version");
    let error = service.update_critic(batch(1e-3)).expect_err("no critic of its own");
    assert!(error.to_string().contains("learns in the policy's update"), "{error}");
    let mut bad = batch(1e-3);
    bad.rows[1].returns[0] = f64::NAN;
    let error = service.update(bad).expect_err("not finite");
    assert_eq!(error.code, ErrorCode::NonFinite, "{error}");
    assert_eq!(service.publish(0).expect("a version"), before);
    assert!(service.values(&sequences(&batch(1e-3))).expect("values").iter().flatten().all(|v| *v == 0.0));
    for (spec, says) in
        [(spec(ScalarRole::RewardModel, VF_COEF), "only a critic"), (spec(ScalarRole::Critic, 0.0), "a number above 0")]
    {
        let error = service.begin_scalar_model(spec).expect_err(says);
        assert!(error.to_string().contains(says), "{error}");
    }
}
