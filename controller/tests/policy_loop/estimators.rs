//! Every estimator and every loss that a recipe can name, through the loop; and what they read of the rewards.

use super::fakes::{Behaviour, first_id, stage, updates};
use super::{correction, metrics, number, run};
use serde_json::{Value, json};
use temper_controller::PolicyStage;
use temper_proto::{MiniBatch, ScoreRequest};

fn trained(algorithm: Value) -> Vec<MiniBatch> {
    let (_dir, calls) = run(stage(1, algorithm), Behaviour { gap: 0.25, ..Behaviour::default() });
    updates(&calls).into_iter().cloned().collect()
}

#[test]
fn every_estimator_reaches_the_trainer() {
    for name in [
        "grpo",
        "grpo_vectorized",
        "grpo_passk",
        "rloo",
        "rloo_vectorized",
        "reinforce_plus_plus",
        "reinforce_plus_plus_baseline",
        "reinforce_baseline",
        "flash_reinforce",
        "trl_grpo",
        "remax",
        "opo",
        "gpg",
        "optimal_token_baseline",
        "tir_optimal_token_baseline",
        "gdpo",
    ] {
        let batches = trained(json!({"advantage": {"adv_estimator": name}}));
        let advantages: Vec<f64> =
            batches.iter().flat_map(|b| &b.rows).flat_map(|row| row.advantages.clone()).collect();
        assert!(advantages.iter().any(|a| *a != 0.0), "{name}");
        assert!(advantages.iter().all(|a| a.is_finite()), "{name}");
    }
}

#[test]
fn gdpo_reads_the_components_it_names_with_their_weights() {
    let advantages = |keys: Value, weights: Value| {
        let advantage = json!({"adv_estimator": "gdpo", "gdpo_reward_keys": keys, "gdpo_reward_weights": weights});
        let rows = trained(json!({ "advantage": advantage }));
        rows.iter().flat_map(|b| &b.rows).map(|row| row.advantages[0]).collect::<Vec<f64>>()
    };
    let (fake, length) = (advantages(json!(["fake"]), json!([])), advantages(json!(["length"]), json!([])));
    assert_ne!(fake, length);
    let all = advantages(json!([]), json!([]));
    assert_eq!(advantages(json!(["fake", "length"]), json!([1.0, 1.0])), all);
    assert!(all != fake && all != length);
    assert_eq!(advantages(json!(["length", "fake"]), json!([0.0, 1.0])), fake);
}

#[test]
fn trl_grpo_normalises_components_where_it_is_told_to() {
    let advantages = |settings: Value| {
        let mut advantage = json!({"adv_estimator": "trl_grpo"});
        advantage.as_object_mut().expect("a table").extend(settings.as_object().expect("a table").clone());
        let rows = trained(json!({ "advantage": advantage }));
        rows.iter().flat_map(|b| &b.rows).map(|row| row.advantages[0]).collect::<Vec<f64>>()
    };
    let plain = advantages(json!({}));
    let batch = advantages(json!({"scale_rewards": "batch"}));
    let decoupled = advantages(json!({"multi_objective_aggregation": "normalize_then_sum"}));
    assert!(plain != batch && plain != decoupled && batch != decoupled);
    assert!((decoupled.iter().sum::<f64>()).abs() < 1e-5, "normalised over the batch");
}

#[test]
fn tokens_of_a_large_second_moment_are_rejected() {
    let gap = Behaviour { gap: 0.5, ..Behaviour::default() };
    let (dir, calls) = run(stage(1, correction(json!({"m2_threshold": 0.01}))), gap);
    let share = number(&metrics(dir.path())[0], "rollout_corr/m2_masked_fraction");
    let rows: Vec<_> = updates(&calls).into_iter().flat_map(|batch| &batch.rows).collect();
    let masks: Vec<u8> = rows.iter().flat_map(|row| row.sequence.response_mask.clone()).collect();
    let num_masked = masks.iter().filter(|m| **m == 0).count();
    assert!(num_masked > 0 && (share - num_masked as f64 / masks.len() as f64).abs() < 1e-12, "{share}");
    for row in rows {
        let ids = row.sequence.response_token_ids.iter().zip(&row.sequence.response_mask);
        assert!(ids.filter(|(_, mask)| **mask == 0).all(|(id, _)| id % 2 == 1), "only drifted tokens leave");
    }
    let (dir, _) = run(stage(1, correction(json!({"m2_threshold": 0.0}))), Behaviour::default());
    assert_eq!(number(&metrics(dir.path())[0], "rollout_corr/m2_masked_fraction"), 0.0, "on-policy nothing leaves");
}

#[test]
fn length_penalties_are_components_of_every_sample() {
    let reward = |r: &ScoreRequest| Some(f64::from(first_id(r) % 3));
    let algorithm = json!({"stop_properly_penalty_coef": 0.5,
        "overlong": {"enable": true, "len": 2, "max_response_length": 3}});
    let behaviour = Behaviour { reward, ..Behaviour::default() };
    let (dir, _) = run(PolicyStage { ..stage(1, algorithm.clone()) }, behaviour);
    let mut of_the_stage = stage(1, algorithm);
    // The longest response of the stage stands for a length that is not said.
    of_the_stage.algorithm.overlong.max_response_length = 0;
    of_the_stage.sampling.max_new_tokens = 3;
    let (same, _) = run(of_the_stage, behaviour);
    assert_eq!(super::samples(same.path()).len(), super::samples(dir.path()).len());
    for sample in super::samples(dir.path()).into_iter().chain(super::samples(same.path())) {
        let Some(temper_types::RewardOutcome::Scored { reward, components }) = &sample.outcome else {
            panic!("scored")
        };
        let names: Vec<&str> = components.iter().map(|c| c.name.as_str()).collect();
        assert_eq!(names, ["fake", "length", "stop_properly_penalty", "overlong_penalty"]);
        assert_eq!(components[2].value, 0.0, "every response of this engine stops by itself");
        let exceeded = sample.response_token_ids.len() as f64 - 1.0;
        assert_eq!(components[3].value, (-exceeded / 2.0).min(0.0));
        assert_eq!(*reward, components[0].value + components[3].value);
    }
}
