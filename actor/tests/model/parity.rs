//! Forward results against transformers.

use crate::support::{Fixture, Paged, assert_close, ids, numbers};
use temper_actor::{CheckpointReader, OutputGrads, PackedPolicy, ParamStore, Recompute, TrainArena, TrainBatch};
use temper_tensor::{DType, SampleRow};

const POLICIES: [&str; 5] = ["llama", "llama_mha_v5cfg", "qwen2", "qwen3", "mistral_swa"];

#[test]
fn log_probs_and_entropies_match_transformers() {
    let mut arena = TrainArena::new();
    for name in POLICIES {
        let fixture = Fixture::load(name);
        for case in fixture.cases() {
            let batch = case.log_prob_batch();
            let stats = fixture.policy.score_only(&batch, 1.0, &mut arena);
            assert_close(&case.label, &stats.log_probs, &case.at_targets("logprobs", 1), 1e-4);
            assert_close(&case.label, &stats.entropies, &case.at_targets("entropy", 1), 1e-4);
            let labels = case.has_label();
            let scored: Vec<f64> =
                stats.log_probs.iter().zip(&labels).filter(|(_, l)| **l).map(|(x, _)| f64::from(*x)).collect();
            let nll = -scored.iter().sum::<f64>() / scored.len() as f64;
            assert_close(&case.label, &[nll as f32], &[case.json["nll"].as_f64().unwrap()], 1e-4);
        }
    }
}

#[test]
fn greedy_outputs_match_transformers() {
    for name in POLICIES {
        let fixture = Fixture::load(name);
        let prompt = ids(&fixture.reference["greedy"]["prompt"]);
        let want = ids(&fixture.reference["greedy"]["output"]);
        let mut paged = Paged::new(&fixture.policy, 1, want.len(), 16);
        let mut got = prompt.clone();
        let mut fed = 0;
        while got.len() < want.len() {
            let chunk = got[fed..].to_vec();
            paged.step(&[(0, &chunk)]);
            fed = got.len();
            let row = [chunk.len() as u32 - 1];
            let mut drawn = Vec::new();
            fixture.policy.sample(&mut paged.workspace, &row, &[greedy()], &mut drawn);
            got.push(drawn[0].token_id);
        }
        assert_eq!(got, want, "{name}");
    }
}

fn greedy() -> SampleRow<'static> {
    SampleRow::plain(0.0, 0.5)
}

#[test]
fn values_of_a_critic_match_transformers() {
    let fixture = Fixture::load("critic_qwen2");
    for case in fixture.cases() {
        let (mut batch, mut want) = (TrainBatch::new(), Vec::new());
        for (index, row) in case.rows().iter().enumerate() {
            batch.push_values(&row.token_ids, &row.positions, 0..row.token_ids.len());
            let values = numbers(&case.json["values"][index]);
            want.extend_from_slice(&values[row.offset..row.offset + row.token_ids.len()]);
        }
        let got = fixture.policy.values_only(&batch, &mut TrainArena::new());
        assert_close(&case.label, &got, &want, 1e-4);
    }
}

#[test]
fn scores_of_a_reward_model_match_transformers() {
    let fixture = Fixture::load("reward_llama");
    for case in fixture.cases() {
        let mut batch = TrainBatch::new();
        for row in case.rows() {
            let last = row.token_ids.len() - 1;
            batch.push_values(&row.token_ids, &row.positions, [last]);
        }
        let got = fixture.policy.values_only(&batch, &mut TrainArena::new());
        assert_close(&case.label, &got, &numbers(&case.json["scores"]), 1e-4);
    }
}

/// Masters from a checkpoint, a checkpoint packed directly, a repacked policy and a saved and reloaded store are the
/// same policy, and the content hash tells a change of one unit in the last place.
#[test]
fn loading_packing_and_saving_keep_every_bit() {
    let mut fixture = Fixture::load("qwen3");
    let (dev, config) = (fixture.dev.clone(), fixture.policy.config().clone());
    let batch = fixture.cases()[0].log_prob_batch();
    let mut arena = TrainArena::new();
    let want = fixture.policy.score_only(&batch, 1.0, &mut arena);

    let dir = tempfile::tempdir().unwrap();
    fixture.params.save(&*dev, dir.path(), &config, &Default::default()).unwrap();
    let reader = CheckpointReader::open(dir.path()).unwrap();
    let direct = PackedPolicy::load(&dev, &config, &reader, DType::F32).unwrap();
    assert_eq!(direct.score_only(&batch, 1.0, &mut arena), want);
    let reloaded = ParamStore::load(&*dev, &config, &reader).unwrap();
    let hash = fixture.params.content_hash(&*dev);
    assert_eq!(reloaded.content_hash(&*dev), hash);

    let name = "model.layers.1.mlp.down_proj.weight";
    let original = fixture.params.read_tensor(&*dev, name).unwrap();
    let mut bumped = original.clone();
    bumped[7] = f32::from_bits(bumped[7].to_bits() + 1);
    fixture.params.write_tensor(&*dev, name, &bumped).unwrap();
    assert_ne!(fixture.params.content_hash(&*dev), hash);
    fixture.policy.repack(&fixture.params.zeros_like(&*dev));
    assert_ne!(fixture.policy.score_only(&batch, 1.0, &mut arena), want);
    fixture.params.write_tensor(&*dev, name, &original).unwrap();
    fixture.policy.repack(&fixture.params);
    assert_eq!(fixture.policy.score_only(&batch, 1.0, &mut arena), want);
    assert_eq!(fixture.params.content_hash(&*dev), hash);
}

/// The layout of masters has exactly the canonical tensors.
#[test]
fn masters_have_the_canonical_tensors() {
    for name in ["llama", "qwen2", "qwen3", "mistral_swa", "critic_qwen2", "reward_llama"] {
        let fixture = Fixture::load(name);
        let specs = temper_actor::tensor_specs(fixture.policy.config());
        let mut want: Vec<_> = specs.into_iter().map(|spec| (spec.name, spec.shape)).collect();
        let mut got: Vec<_> =
            fixture.params.tensors().map(|(_, slot)| (slot.name.clone(), slot.shape.clone())).collect();
        want.sort();
        got.sort();
        assert_eq!(got, want, "{name}");
    }
}

#[test]
fn a_moving_average_moves_by_its_decay() {
    let fixture = Fixture::load("llama");
    let dev = &*fixture.dev;
    let mut average = fixture.params.zeros_like(dev);
    average.lerp_from(dev, &fixture.params, 0.75);
    let name = "model.norm.weight";
    let (got, want) = (average.read_tensor(dev, name).unwrap(), fixture.params.read_tensor(dev, name).unwrap());
    let want: Vec<f64> = want.iter().map(|x| 0.25 * f64::from(*x)).collect();
    assert_close(name, &got, &want, 1e-7);
    average.copy_from(dev, &fixture.params);
    assert_eq!(average.content_hash(dev), fixture.params.content_hash(dev));
    assert_eq!(fixture.params.num_parameters(), average.num_parameters());
}

/// Fresh weights depend on the seed alone; a critic made from a policy keeps its body and gets a new head.
#[test]
fn a_critic_is_made_from_a_policy() {
    let fixture = Fixture::load("qwen2");
    let dev = &*fixture.dev;
    let config = fixture.policy.config().with_head(temper_actor::Head::TokenValue).unwrap();
    let fresh = |seed| ParamStore::init(dev, &config, seed);
    assert_eq!(fresh(1).content_hash(dev), fresh(1).content_hash(dev));
    assert_ne!(fresh(1).content_hash(dev), fresh(2).content_hash(dev));
    let critic = ParamStore::init_on(dev, &config, &fixture.params, 1);
    for name in ["model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.bias", "model.norm.weight"] {
        assert_eq!(critic.read_tensor(dev, name), fixture.params.read_tensor(dev, name), "{name}");
    }
    assert_eq!(critic.read_tensor(dev, "score.weight"), fresh(1).read_tensor(dev, "score.weight"));
    assert_eq!(critic.read_tensor(dev, "score.bias"), Some(vec![0.0]));
}

/// Batches without rows or without targets are no special case.
#[test]
fn empty_batches_give_empty_results() {
    let fixture = Fixture::load("llama");
    let mut arena = TrainArena::new();
    let mut no_targets = TrainBatch::new();
    no_targets.push_values(&[1, 2, 3], &[0, 1, 2], []);
    for batch in [TrainBatch::new(), no_targets] {
        let stats = fixture.policy.score_only(&batch, 1.0, &mut arena);
        assert_eq!(stats, Default::default());
        let tape = fixture.policy.train_forward(&batch, Recompute::None, &mut arena);
        let outputs = OutputGrads::LogProbs { d_log_probs: &[], d_entropies: &[], temperature: 1.0 };
        let mut grads = fixture.params.zeros_like(&*fixture.dev);
        fixture.policy.backward(&fixture.params, tape, outputs, &mut grads);
        assert_eq!(grads.sum_squares(&*fixture.dev), 0.0);
    }
}
