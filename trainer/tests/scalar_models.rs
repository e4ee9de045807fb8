//! Critic and reward model: gradients against central differences, AdamW by hand, masks, learning, and resume.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use temper_actor::{CheckpointReader, Head, ModelConfig, PackedPolicy, ParamStore, TrainArena, TrainBatch};
use temper_algos::preference::RewardModelConfig;
use temper_algos::{Objective, SftLossType, ValueLossConfig};
use temper_proto::{
    Backbone, GlobalCounts, MiniBatch, OptimizerConfig, PreferencePair, ScalarModelService, ScalarModelSpec,
    ScalarRole, StageSpec, TokenSequence, TrainRow, TrainerService,
};
use temper_tensor::{CpuConfig, CpuDevice, Device};
use temper_trainer::{LocalTrainerService, Trainer};
use temper_types::{DType, ErrorCode, Philox};

const SEED: u64 = 11;
const LEARNING_RATE: f64 = 1e-3;

fn model_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../actor/tests/data/llama")
}

fn device() -> Arc<dyn Device> {
    Arc::new(CpuDevice::new(CpuConfig { num_threads: 2, isa: None }))
}

fn optimizer() -> OptimizerConfig {
    OptimizerConfig { learning_rate: LEARNING_RATE, weight_decay: 0.1, max_grad_norm: 0.5, ..Default::default() }
}

/// A trainer in a stage with a scalar model.
fn service(role: ScalarRole, backbone: Backbone) -> LocalTrainerService {
    let trainer = Trainer::load(device(), &model_dir(), DType::F32, Vec::new()).expect("the fixture loads");
    let service = LocalTrainerService::new(trainer);
    begin(&service, role, backbone);
    service
}

fn begin(service: &LocalTrainerService, role: ScalarRole, backbone: Backbone) {
    let objective = Objective::Sft(SftLossType::Nll);
    let stage = StageSpec {
        name: "test".to_owned(),
        objective_json: serde_json::to_string(&objective).expect("plain data"),
        optimizer: OptimizerConfig::default(),
        needs_reference: false,
        max_micro_batch_tokens: 24,
        recompute_activations: false,
    };
    service.begin_stage(stage).expect("a stage");
    let loss_json = match role {
        ScalarRole::Critic => serde_json::to_string(&value_config()),
        ScalarRole::RewardModel => serde_json::to_string(&RewardModelConfig { center_rewards_coefficient: 0.01 }),
    };
    let loss_json = loss_json.expect("plain data");
    let spec = ScalarModelSpec { role, loss_json, optimizer: optimizer(), backbone, seed: SEED };
    service.begin_scalar_model(spec).expect("a scalar model");
}

fn value_config() -> ValueLossConfig {
    ValueLossConfig { cliprange_value: 0.2, ..ValueLossConfig::default() }
}

fn sequence(seed: u64, prompt: usize, mask: &[u8]) -> TokenSequence {
    let noise = Philox::new(seed);
    let mut ids = (0..).map(|i| noise.below(96, i, 0) as u32);
    TokenSequence {
        prompt_token_ids: ids.by_ref().take(prompt).collect(),
        response_token_ids: ids.take(mask.len()).collect(),
        response_mask: mask.to_vec(),
    }
}

/// Four rows, some tokens masked; `masked` stands where the mask is 0.
fn batch(service: &LocalTrainerService, masked: f64) -> MiniBatch {
    let masks: [&[u8]; 4] = [&[1, 1, 1, 0, 1], &[0, 1, 1], &[1; 7], &[1, 0]];
    let sequences: Vec<TokenSequence> = (0..4).map(|i| sequence(i, 3 + i as usize, masks[i as usize])).collect();
    let values = service.values(&sequences).expect("values");
    let noise = Philox::new(99);
    let row = |(i, (sequence, mut values)): (usize, (TokenSequence, Vec<f32>))| {
        let mut returns: Vec<f64> = (0..values.len()).map(|t| noise.uniform(t as u64, i as u64) * 4.0 - 2.0).collect();
        for (t, mask) in sequence.response_mask.iter().enumerate() {
            // Old values away from the present ones, so that the clip acts on some tokens.
            values[t] += (noise.uniform(t as u64, 50 + i as u64) - 0.5) as f32;
            if *mask == 0 {
                (returns[t], values[t]) = (masked, masked as f32);
            }
        }
        TrainRow { returns, values, ..TrainRow::demonstration(sequence) }
    };
    let rows: Vec<TrainRow> = sequences.into_iter().zip(values).enumerate().map(row).collect();
    let num_tokens = rows.iter().flat_map(|r| &r.sequence.response_mask).filter(|m| **m == 1).count() as u64;
    let global = GlobalCounts { num_tokens, num_sequences: 4, num_rows: 4, loss_scale_factor: 7.0 };
    MiniBatch { rows, global, temperature: 1.0, learning_rate: LEARNING_RATE }
}

/// The loss of verl's critic, written out over the model's own forward.
fn loss_of(params: &ParamStore, config: &ModelConfig, batch: &MiniBatch) -> f64 {
    let device = device();
    let packed = PackedPolicy::new(&device, params, config, DType::F32);
    let (mut sum, clip) = (0.0, value_config().cliprange_value);
    for row in &batch.rows {
        let ids = [&row.sequence.prompt_token_ids[..], &row.sequence.response_token_ids].concat();
        let positions: Vec<u32> = (0..ids.len() as u32).collect();
        let first = row.sequence.prompt_token_ids.len() - 1;
        let mut one = TrainBatch::new();
        one.push_values(&ids, &positions, first..ids.len() - 1);
        let values = packed.values_only(&one, &mut TrainArena::new());
        for (t, v) in values.iter().map(|v| f64::from(*v)).enumerate() {
            if row.sequence.response_mask[t] == 1 {
                let (old, target) = (f64::from(row.values[t]), row.returns[t]);
                let clipped = v.clamp(old - clip, old + clip);
                sum += 0.5 * (v - target).powi(2).max((clipped - target).powi(2));
            }
        }
    }
    sum / batch.global.num_tokens as f64
}

fn load(dir: &Path) -> (ParamStore, ModelConfig) {
    let config = ModelConfig::load(dir).expect("a model directory");
    let reader = CheckpointReader::open(dir).expect("a checkpoint");
    (ParamStore::load(&*device(), &config, &reader).expect("all tensors"), config)
}

fn saved(service: &LocalTrainerService) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let state = dir.path().join("optimizer");
    std::fs::create_dir_all(&state).expect("writable");
    service.save_state(&state).expect("saved");
    (dir, state)
}

const PROBED: [(&str, &[usize]); 4] = [
    ("score.weight", &[0, 5]),
    ("score.bias", &[0]),
    ("model.layers.0.mlp.down_proj.weight", &[3, 40]),
    ("model.norm.weight", &[2]),
];

#[test]
fn two_critic_steps_follow_central_differences_and_adamw_by_hand() {
    let service = service(ScalarRole::Critic, Backbone::Policy);
    let batch = batch(&service, 0.0);
    let device = device();
    let (body, base) = load(&model_dir());
    let config = base.with_head(Head::TokenValue).expect("a critic");
    let mut params = ParamStore::init_on(&*device, &config, &body, SEED);
    let (mut first, mut second) = (params.zeros_like(&*device), params.zeros_like(&*device));
    for step in 1..=2 {
        let expected_loss = loss_of(&params, &config, &batch);
        let report = service.update_critic(batch.clone()).expect("an update");
        assert!((report.loss - expected_loss).abs() < 1e-6, "step {step}: {} vs {expected_loss}", report.loss);
        assert!(report.metrics["value_clipfrac"] > 0.0, "the clip acts: {:?}", report.metrics);
        let (_dir, state) = saved(&service);
        let (m, _) = load(&state.join("critic_exp_avg"));
        let (v, _) = load(&state.join("critic_exp_avg_sq"));
        let (next, _) = load(&state.join("critic"));
        let scale = (0.5 / (report.grad_norm + 1e-6)).min(1.0);
        for (name, at) in PROBED {
            let tensor = |store: &ParamStore| store.read_tensor(&*device, name).expect("a tensor");
            for &i in at {
                let gradient = central_difference(&mut params, (name, i), &config, &batch);
                let m_new = 0.9 * f64::from(tensor(&first)[i]) + 0.1 * gradient * scale;
                close((name, i), f64::from(tensor(&m)[i]), m_new, 2e-2, 2e-5);
                let (m_i, v_i) = (f64::from(tensor(&m)[i]), f64::from(tensor(&v)[i]));
                let clipped = (m_i - 0.9 * f64::from(tensor(&first)[i])) / 0.1;
                close((name, i), v_i, 0.999 * f64::from(tensor(&second)[i]) + 0.001 * clipped * clipped, 1e-4, 1e-10);
                let old = f64::from(tensor(&params)[i]);
                let (m_hat, v_hat) = (m_i / (1.0 - 0.9_f64.powi(step)), v_i / (1.0 - 0.999_f64.powi(step)));
                let stepped = old * (1.0 - LEARNING_RATE * 0.1) - LEARNING_RATE * m_hat / (v_hat.sqrt() + 1e-8);
                close((name, i), f64::from(tensor(&next)[i]), stepped, 1e-4, 1e-7);
            }
        }
        (params, first, second) = (next, m, v);
    }
}

fn central_difference(
    params: &mut ParamStore,
    (name, i): (&str, usize),
    config: &ModelConfig,
    batch: &MiniBatch,
) -> f64 {
    const STEP: f32 = 2e-3;
    let device = device();
    let original = params.read_tensor(&*device, name).expect("a tensor");
    let mut at = |x: f32| {
        let mut moved = original.clone();
        moved[i] = x;
        params.write_tensor(&*device, name, &moved).expect("a tensor");
        loss_of(params, config, batch)
    };
    let difference = (at(original[i] + STEP) - at(original[i] - STEP)) / f64::from(2.0 * STEP);
    params.write_tensor(&*device, name, &original).expect("a tensor");
    difference
}

fn close(what: (&str, usize), got: f64, expected: f64, rtol: f64, atol: f64) {
    let allowed = rtol * expected.abs() + atol;
    assert!((got - expected).abs() <= allowed, "{what:?}: expected {expected}, got {got}");
}

#[test]
fn masked_tokens_give_the_critic_no_gradient() {
    let moments = |masked: f64| {
        let service = service(ScalarRole::Critic, Backbone::Policy);
        let batch = batch(&service, masked);
        let report = service.update_critic(batch).expect("an update");
        let (_dir, state) = saved(&service);
        let bytes = std::fs::read(state.join("critic_exp_avg/model.safetensors")).expect("moments");
        (report.loss, bytes)
    };
    assert_eq!(moments(0.0), moments(1e30));
}

#[test]
fn a_return_that_is_not_finite_changes_no_weight() {
    let service = service(ScalarRole::Critic, Backbone::Policy);
    let good = batch(&service, 0.0);
    let sequences: Vec<TokenSequence> = good.rows.iter().map(|row| row.sequence.clone()).collect();
    let before = service.values(&sequences).expect("values");
    for bad in [f64::NAN, f64::INFINITY, 1e300] {
        let mut batch = good.clone();
        batch.rows[2].returns[1] = bad;
        assert_eq!(service.update_critic(batch).expect_err("not finite").code, ErrorCode::NonFinite);
        assert_eq!(service.values(&sequences).expect("values"), before);
    }
    let error = service.update_reward_model(&pairs(0, 2), 1e-3).expect_err("no reward model here");
    assert!(error.to_string().contains("no reward model"), "{error}");
    assert!(service.scores(&sequences).expect_err("none yet").to_string().contains("no stage has trained"));
}

/// Chosen responses end on an even id, rejected ones on an odd id.
fn pairs(first: u64, count: u64) -> Vec<PreferencePair> {
    let side = |seed: u64, last: u32| {
        let mut sequence = sequence(seed, 4, &[1; 5]);
        sequence.response_token_ids[4] = last;
        sequence
    };
    let pair = |i: u64| {
        let noise = Philox::new(i);
        let draw = |counter| 2 * noise.below(48, counter, 9) as u32;
        PreferencePair { chosen: side(2 * i, draw(0)), rejected: side(2 * i + 1, draw(1) + 1), margin: 0.0 }
    };
    (first..first + count).map(pair).collect()
}

fn held_out_accuracy(service: &LocalTrainerService) -> f64 {
    let pairs = pairs(10_000, 64);
    let side = |f: fn(&PreferencePair) -> &TokenSequence| {
        service.scores(&pairs.iter().map(|p| f(p).clone()).collect::<Vec<_>>()).expect("scores")
    };
    let (chosen, rejected) = (side(|p| &p.chosen), side(|p| &p.rejected));
    chosen.iter().zip(&rejected).filter(|(c, r)| c > r).count() as f64 / pairs.len() as f64
}

#[test]
fn a_reward_model_learns_what_separates_pairs_and_resumes_bit_for_bit() {
    let service = service(ScalarRole::RewardModel, Backbone::Policy);
    let mut report = Default::default();
    for step in 0..40 {
        report = service.update_reward_model(&pairs(step * 32, 32), 5e-3).expect("an update");
    }
    assert!(report.metrics["accuracy"] > 0.9, "{report:?}");
    assert!(held_out_accuracy(&service) > 0.9, "{}", held_out_accuracy(&service));

    let (dir, state) = saved(&service);
    let (model, reward_model) = (dir.path().join("model"), dir.path().join("reward_model"));
    let version = service.publish(3).expect("a version");
    service.save_model(&model).expect("saved");
    assert!(service.save_reward_model(&reward_model).expect("saved"));
    assert_eq!(load(&reward_model).1.head, Head::SequenceScore);
    let resumed = self::service(ScalarRole::RewardModel, Backbone::Policy);
    resumed.restore_reward_model(&reward_model).expect("restored");
    resumed.restore(&model, &state, version).expect("restored");
    let expected = service.update_reward_model(&pairs(0, 8), 1e-3).expect("an update");
    assert_eq!(resumed.update_reward_model(&pairs(0, 8), 1e-3).expect("an update"), expected);
    let sequences: Vec<TokenSequence> = pairs(5, 3).into_iter().map(|p| p.chosen).collect();
    let scores = service.scores(&sequences).expect("scores");
    assert_eq!(resumed.scores(&sequences).expect("scores"), scores);

    // The next stage keeps the model, and its critic can start from it: at the last row the critic says the score.
    begin(&service, ScalarRole::Critic, Backbone::RewardModel);
    assert_eq!(service.scores(&sequences).expect("scores"), scores);
    let mut longer = sequences.clone();
    longer.iter_mut().for_each(|s| s.response_token_ids.push(0));
    longer.iter_mut().for_each(|s| s.response_mask.push(1));
    let values = service.values(&longer).expect("values");
    assert_eq!(values.iter().map(|row| row[5]).collect::<Vec<f32>>(), scores);
}

#[test]
fn a_restored_critic_goes_on_bit_for_bit() {
    let service = service(ScalarRole::Critic, Backbone::Policy);
    let batch = batch(&service, 0.0);
    service.update_critic(batch.clone()).expect("an update");
    let (dir, state) = saved(&service);
    let model = dir.path().join("model");
    let version = service.publish(1).expect("a version");
    service.save_model(&model).expect("saved");
    let expected = service.update_critic(batch.clone()).expect("an update");
    let resumed = self::service(ScalarRole::Critic, Backbone::Policy);
    resumed.restore(&model, &state, version).expect("restored");
    assert_eq!(resumed.update_critic(batch.clone()).expect("an update"), expected);
    let sequences: Vec<TokenSequence> = batch.rows.iter().map(|row| row.sequence.clone()).collect();
    assert_eq!(resumed.values(&sequences).expect("values"), service.values(&sequences).expect("values"));

    let weights = state.join("critic/model.safetensors");
    let mut bytes = std::fs::read(&weights).expect("weights");
    *bytes.last_mut().expect("not empty") ^= 1;
    std::fs::write(&weights, bytes).expect("writable");
    let error = self::service(ScalarRole::Critic, Backbone::Policy).restore(&model, &state, version);
    assert!(error.expect_err("a changed bit").to_string().contains("`critic`"));
}
