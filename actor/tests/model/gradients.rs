//! Gradients against transformers, and with recomputation against without.

use crate::support::{Case, Fixture, assert_close, numbers};
use serde_json::Value;
use temper_actor::{OutputGrads, ParamStore, Recompute, TrainArena, TrainBatch};

/// Compare every tensor of `case.grads`: norms within 1e-3 relative, the listed elements within 1e-4 of the norm.
fn check_grads(fixture: &Fixture, case: &Case, grads: &ParamStore) {
    let reference = case.json["grads"].as_object().unwrap();
    assert_eq!(reference.len(), grads.tensors().count(), "{}: number of tensors", case.label);
    for (name, want) in reference {
        let label = format!("{}: gradient of {name}", case.label);
        let got = grads.read_tensor(&*fixture.dev, name).unwrap_or_else(|| panic!("{label}: no such tensor"));
        let norm = want["norm"].as_f64().unwrap();
        let got_norm = got.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        assert!((got_norm - norm).abs() <= 1e-3 * norm, "{label}: norm {got_norm}, want {norm}");
        let tolerance = 1e-4 * norm.max(1e-3);
        let first = numbers(&want["first8"]);
        assert_close(&label, &got[..first.len()], &first, tolerance);
        if let Some(full) = want.get("full") {
            assert_close(&label, &got, &flat(full), tolerance);
        }
    }
}

fn flat(value: &Value) -> Vec<f64> {
    match value.as_array() {
        Some(list) => list.iter().flat_map(flat).collect(),
        None => vec![value.as_f64().unwrap()],
    }
}

/// Gradients with and without recomputation; the bits agree.
fn both_ways(
    fixture: &Fixture,
    batch: &TrainBatch,
    output_grads: impl Fn(&mut temper_actor::Tape<'_>) -> Vec<f32>,
) -> ParamStore {
    let mut arena = TrainArena::new();
    let mut run = |recompute| {
        let mut grads = fixture.params.zeros_like(&*fixture.dev);
        let mut tape = fixture.policy.train_forward(batch, recompute, &mut arena);
        let d = output_grads(&mut tape);
        let outputs = match batch.target_ids.is_empty() {
            false => OutputGrads::LogProbs { d_log_probs: &d, d_entropies: &[], temperature: 1.0 },
            true => OutputGrads::Values { d_values: &d },
        };
        fixture.policy.backward(&fixture.params, tape, outputs, &mut grads);
        grads
    };
    let (kept, recomputed) = (run(Recompute::None), run(Recompute::Layers));
    assert_eq!(kept.content_hash(&*fixture.dev), recomputed.content_hash(&*fixture.dev), "{}", fixture.name);
    kept
}

#[test]
fn policy_gradients_match_transformers() {
    for name in ["llama", "llama_mha_v5cfg", "qwen2", "qwen3", "mistral_swa"] {
        let fixture = Fixture::load(name);
        for case in fixture.cases() {
            let labels = case.has_label();
            let count = labels.iter().filter(|l| **l).count() as f32;
            let d: Vec<f32> = labels.iter().map(|l| if *l { -1.0 / count } else { 0.0 }).collect();
            let grads = both_ways(&fixture, &case.log_prob_batch(), |_| d.clone());
            check_grads(&fixture, &case, &grads);
            let total = grads.sum_squares(&*fixture.dev).sqrt() as f32;
            let want = case.json["grad_norm_total"].as_f64().unwrap();
            assert_close(&case.label, &[total], &[want], 1e-3 * want);
        }
    }
}

#[test]
fn critic_gradients_match_transformers() {
    let fixture = Fixture::load("critic_qwen2");
    for case in fixture.cases() {
        let mut batch = TrainBatch::new();
        for row in case.rows() {
            batch.push_values(&row.token_ids, &row.positions, 0..row.token_ids.len());
        }
        let n = batch.num_targets() as f32;
        let grads =
            both_ways(&fixture, &batch, |tape| fixture.policy.values(tape).into_iter().map(|v| v / n).collect());
        check_grads(&fixture, &case, &grads);
    }
}

#[test]
fn reward_gradients_match_transformers() {
    let fixture = Fixture::load("reward_llama");
    for case in fixture.cases() {
        let mut batch = TrainBatch::new();
        for row in case.rows() {
            batch.push_values(&row.token_ids, &row.positions, [row.token_ids.len() - 1]);
        }
        let grads = both_ways(&fixture, &batch, |tape| {
            let s = fixture.policy.values(tape);
            let d = -1.0 / (1.0 + (s[0] - s[1]).exp());
            vec![d, -d, 0.1]
        });
        check_grads(&fixture, &case, &grads);
    }
}

/// The gradient of temperature-scaled log-probs and entropies against central differences along random directions.
#[test]
fn temperature_and_entropy_gradients_match_differences() {
    let mut fixture = Fixture::load("qwen3");
    let batch = fixture.cases()[0].log_prob_batch();
    let (dev, temperature) = (fixture.dev.clone(), 0.7);
    let weights: Vec<f32> = (0..batch.num_targets()).map(|i| ((i * 7 % 5) as f32 - 2.0) / 10.0).collect();
    let mut arena = TrainArena::new();
    let mut grads = fixture.params.zeros_like(&*dev);
    let tape = fixture.policy.train_forward(&batch, Recompute::None, &mut arena);
    let outputs = OutputGrads::LogProbs { d_log_probs: &weights, d_entropies: &weights, temperature };
    fixture.policy.backward(&fixture.params, tape, outputs, &mut grads);
    for name in ["model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"] {
        let base = fixture.params.read_tensor(&*dev, name).unwrap();
        let grad = grads.read_tensor(&*dev, name).unwrap();
        let norm = grad.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let mut loss_at = |step: f64| {
            let moved: Vec<f32> =
                base.iter().zip(&grad).map(|(w, g)| (f64::from(*w) + step * f64::from(*g) / norm) as f32).collect();
            fixture.params.write_tensor(&*dev, name, &moved).unwrap();
            fixture.policy.repack(&fixture.params);
            let stats = fixture.policy.score_only(&batch, temperature, &mut arena);
            let sums = stats.log_probs.iter().zip(&stats.entropies).zip(&weights);
            sums.map(|((l, h), w)| f64::from(*w) * (f64::from(*l) + f64::from(*h))).sum::<f64>()
        };
        let slope = (loss_at(1e-2) - loss_at(-1e-2)) / 2e-2;
        loss_at(0.0);
        assert!((slope - norm).abs() <= 1e-2 * norm, "{name}: slope {slope}, gradient norm {norm}");
    }
}
