//! The policy loop over fake workers: what reaches the trainer, what is recorded, and what a resumed run repeats.

mod changes;
mod critic;
mod estimators;
mod fakes;
mod partial;
mod replay;
mod staleness;
mod streaming;

use fakes::{Behaviour, Call, engine_log_prob, first_id, metrics, run_in, run_spec, spec, stage, updates};
use serde_json::{Value, json};
use std::path::Path;
use temper_controller::{Error, PolicyStage, ReferenceConfig, Stage, ValidationConfig};
use temper_data::trajectories::read_dataset;
use temper_proto::{PolicyRole, ScoreRequest};
use temper_types::Sample;

fn run(stage: PolicyStage, behaviour: Behaviour) -> (tempfile::TempDir, Vec<Call>) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let calls = run_in(dir.path(), stage, behaviour).expect("the run ends well");
    (dir, calls)
}

fn number(row: &serde_json::Map<String, Value>, key: &str) -> f64 {
    row.get(key).and_then(Value::as_f64).unwrap_or_else(|| panic!("no number `{key}` in {row:?}"))
}

fn samples(dir: &Path) -> Vec<Sample> {
    read_dataset(&dir.join("rollouts")).expect("a dataset")
}

fn correction(settings: Value) -> Value {
    json!({"policy_loss": {"rollout_correction": settings}})
}

#[test]
fn on_policy_weights_are_exactly_one_and_nothing_is_rejected() {
    let both = json!({"rollout_is": "token", "rollout_is_batch_normalize": true, "rollout_rs": "token_k1,seq_mean_k2",
        "rollout_rs_threshold": "0.999_1.001,1e-9"});
    let (dir, calls) = run(stage(1, correction(both)), Behaviour::default());
    let rows: Vec<_> = updates(&calls).into_iter().flat_map(|batch| &batch.rows).collect();
    assert_eq!(rows.len(), 16);
    for row in rows {
        assert!(row.rollout_weights.iter().all(|w| *w == 1.0), "{:?}", row.rollout_weights);
        assert_eq!(row.rollout_weights.len(), row.sequence.response_token_ids.len());
        assert!(row.sequence.response_mask.iter().all(|m| *m == 1));
    }
    let row = &metrics(dir.path())[0];
    assert_eq!(number(row, "rollout_train_log_prob_diff_max"), 0.0);
    for (key, expected) in [("kl", 0.0), ("chi2_token", 0.0), ("ppl_ratio", 1.0), ("rollout_rs_masked_fraction", 0.0)] {
        assert_eq!(number(row, &format!("rollout_corr/{key}")), expected, "{key}");
    }
    assert!((number(row, "rollout_corr/rollout_is_eff_sample_size") - 1.0).abs() < 1e-7);
}

#[test]
fn off_policy_tokens_are_weighed_and_cut() {
    let behaviour = Behaviour { gap: 0.5, ..Behaviour::default() };
    let (dir, calls) =
        run(stage(1, correction(json!({"rollout_is": "token", "rollout_is_threshold": 1.25}))), behaviour);
    let mut num_cut = 0;
    for row in updates(&calls).into_iter().flat_map(|batch| &batch.rows) {
        for (id, weight) in row.sequence.response_token_ids.iter().zip(&row.rollout_weights) {
            assert_eq!(*weight, if id % 2 == 1 { 1.25 } else { 1.0 });
            num_cut += usize::from(id % 2 == 1);
        }
        let ids = &row.sequence.response_token_ids;
        let old: Vec<f32> = ids.iter().map(|id| engine_log_prob(*id) + if id % 2 == 1 { 0.5 } else { 0.0 }).collect();
        assert_eq!(row.old_log_probs, old, "old log-probs are computed before the weights");
    }
    assert!(num_cut > 5);
    let row = &metrics(dir.path())[0];
    assert!(number(row, "rollout_corr/k3_kl") > 0.0 && number(row, "rollout_corr/rollout_is_eff_sample_size") < 1.0);
    assert!(number(row, "rollout_corr/chi2_token") > 0.0 && number(row, "rollout_corr/ppl_ratio") != 1.0);
}

#[test]
fn rejected_tokens_leave_the_mask_and_the_counts() {
    let settings = json!({"rollout_rs": "token_k1", "rollout_rs_threshold": "0.9_1.1"});
    let behaviour = Behaviour { gap: 0.5, ..Behaviour::default() };
    let (dir, calls) = run(stage(1, correction(settings)), behaviour);
    let (mut num_kept, mut counted) = (0, 0);
    for batch in updates(&calls) {
        counted += batch.global.num_tokens;
        for row in &batch.rows {
            let expected: Vec<u8> = row.sequence.response_token_ids.iter().map(|id| u8::from(id % 2 == 0)).collect();
            assert_eq!(row.sequence.response_mask, expected);
            assert!(row.rollout_weights.is_empty());
            let masked = row.advantages.iter().zip(&expected).filter(|(_, m)| **m == 0);
            assert!(masked.into_iter().all(|(a, _)| *a == 0.0));
            num_kept += expected.iter().map(|m| u64::from(*m)).sum::<u64>();
        }
    }
    assert_eq!(counted, num_kept);
    assert!(number(&metrics(dir.path())[0], "rollout_corr/rollout_rs_masked_fraction") > 0.0);
}

#[test]
fn bypass_mode_computes_no_old_log_probs() {
    let algorithm = json!({"policy_loss": {"loss_mode": "bypass_mode", "rollout_correction": {"rollout_is": "token"}}});
    let (_dir, calls) = run(PolicyStage { mini_batches: 2, ..stage(1, algorithm) }, Behaviour::default());
    assert!(!calls.iter().any(|call| matches!(call, Call::LogProbs(..))), "{calls:?}");
    let rows: Vec<_> = updates(&calls).into_iter().flat_map(|batch| &batch.rows).collect();
    assert!(rows.iter().all(|row| row.rollout_log_probs.len() == row.sequence.response_token_ids.len()));
}

#[test]
fn remax_subtracts_the_reward_of_a_greedy_response_that_is_recorded_and_not_trained_on() {
    let algorithm = json!({"advantage": {"adv_estimator": "remax"}});
    let (dir, calls) = run(PolicyStage { num_generations: 1, ..stage(1, algorithm) }, Behaviour::default());
    let rows: Vec<_> = updates(&calls).into_iter().flat_map(|batch| &batch.rows).collect();
    assert_eq!(rows.len(), 4);
    // The greedy response starts with id 2: its reward is 1.
    for row in rows {
        let reward = f64::from(row.sequence.response_token_ids[0] % 3) / 2.0;
        assert!(row.advantages.iter().all(|a| *a == reward - 1.0), "{row:?}");
    }
    let all = samples(dir.path());
    let greedy: Vec<&Sample> = all.iter().filter(|s| s.sample_index.0 == 1).collect();
    assert_eq!((all.len(), greedy.len()), (8, 4));
    assert!(
        greedy.iter().all(|s| s.response_token_ids == [2, 0] && s.response_mask == [0, 0] && s.advantages.is_empty())
    );
    let row = &metrics(dir.path())[0];
    assert_eq!((number(row, "baseline_reward_mean"), number(row, "num_samples")), (1.0, 4.0));
}

#[test]
fn a_failed_greedy_response_masks_its_group_out() {
    let reward = |r: &ScoreRequest| {
        let is_lost = r.response == "2" && r.key.prompt_id.0.is_multiple_of(2);
        (!is_lost).then(|| f64::from(first_id(r) % 3))
    };
    let algorithm = json!({"advantage": {"adv_estimator": "remax"}});
    let (dir, calls) =
        run(PolicyStage { prompts_per_step: 8, ..stage(1, algorithm) }, Behaviour { reward, ..Behaviour::default() });
    let lost = number(&metrics(dir.path())[0], "num_baseline_errors") as usize;
    assert!(lost > 0 && lost < 8, "{lost}");
    assert_eq!(updates(&calls)[0].rows.len(), 4 * (8 - lost));
}

/// Errors are counted also where every reward of a validation failed.
#[test]
fn a_validation_that_cannot_be_scored_says_so() {
    let reward = |r: &ScoreRequest| {
        let is_validation = r.key.group_id.0 > u64::MAX / 2;
        (!is_validation).then(|| f64::from(first_id(r) % 3))
    };
    let behaviour = Behaviour { reward, ..Behaviour::default() };
    let mut spec = spec(stage(1, json!({})), behaviour.replay);
    spec.validation = ValidationConfig { data: "train".to_owned(), num_samples: 2, ..ValidationConfig::default() };
    let dir = tempfile::tempdir().expect("a temporary directory");
    run_spec(dir.path(), spec, behaviour).expect("the run ends well");
    let row = &metrics(dir.path())[0];
    for prefix in ["val_start", "val"] {
        assert_eq!(number(row, &format!("{prefix}/temper/sort_digits/num_reward_errors")), 16.0, "{row:?}");
        assert!(!row.contains_key(&format!("{prefix}/temper/sort_digits/mean@2")), "no mean of nothing: {row:?}");
    }
}

#[test]
fn token_baselines_read_the_sum_of_squares() {
    for name in ["optimal_token_baseline", "tir_optimal_token_baseline"] {
        let algorithm = json!({"advantage": {"adv_estimator": name}});
        let (_dir, calls) = run(stage(1, algorithm), Behaviour::default());
        assert_eq!(calls[0], Call::LogProbs(PolicyRole::Policy, 16));
        let rows = &updates(&calls)[0].rows;
        assert!(rows.iter().any(|row| row.advantages.iter().any(|a| *a != 0.0)), "{name}");
        // The baseline of a position weighs rows by `1 - 2 p + sum p^2` so far: check the first position by hand.
        let group = &rows[..4];
        let reward = |row: &temper_proto::TrainRow| f64::from(row.sequence.response_token_ids[0] % 3) / 2.0;
        let weight = |row: &temper_proto::TrainRow| 1.5 - 2.0 * f64::from(row.old_log_probs[0]).exp();
        let total: f64 = group.iter().map(weight).sum();
        let baseline = group.iter().map(|row| reward(row) * weight(row)).sum::<f64>() / (total + 1e-8);
        for row in group {
            assert!((row.advantages[0] - (reward(row) - baseline)).abs() < 1e-6, "{name}: {row:?}");
        }
    }
}

#[test]
fn the_reference_moves_when_it_is_due() {
    let algorithm = json!({"policy_loss": {"use_kl_loss": true}});
    let reference = ReferenceConfig { sync_every_steps: 2, mixup_alpha: 0.25 };
    let (_dir, calls) = run(PolicyStage { reference, ..stage(5, algorithm) }, Behaviour::default());
    let kinds: String = calls
        .iter()
        .map(|call| match call {
            Call::LogProbs(PolicyRole::Policy, _) => 'p',
            Call::LogProbs(PolicyRole::Reference, _) => 'r',
            Call::Update(_) => 'u',
            Call::Critic(_) => 'c',
            Call::Mix(alpha) => {
                if *alpha == 0.25 {
                    'M'
                } else {
                    '?'
                }
            }
        })
        .collect();
    assert_eq!(kinds, "ruruMruruMru");
}

#[test]
fn dynamic_sampling_refills_and_says_when_it_runs_out() {
    // A prompt with an even id always gets the same reward.
    let reward = |r: &ScoreRequest| {
        Some(if r.key.prompt_id.0.is_multiple_of(2) { 1.0 } else { f64::from(r.key.sample_index.0) })
    };
    let behaviour = Behaviour { reward, ..Behaviour::default() };
    let filter = |limit: u32| json!({"filter_groups": {"enable": true, "max_num_gen_batches": limit}});
    let (dir, calls) = run(stage(1, filter(0)), behaviour);
    let row = &metrics(dir.path())[0];
    assert_eq!(updates(&calls)[0].rows.len(), 16);
    assert!(number(row, "num_gen_batches") > 1.0 && number(row, "num_filtered_groups") > 0.0);
    assert_eq!(number(row, "num_missing_groups"), 0.0);
    // Samples of the groups that were dropped got 1, the others 0, 1, 2 and 3.
    let (kept, dropped) = (16.0, 4.0 * number(row, "num_filtered_groups"));
    let expected = (1.5 * kept + dropped) / (kept + dropped);
    assert!((number(row, "generated_reward_mean") - expected).abs() < 1e-12 && number(row, "reward_mean") == 1.5);
    let (dir, calls) = run(stage(1, filter(1)), behaviour);
    let missing = number(&metrics(dir.path())[0], "num_missing_groups") as usize;
    assert!(missing > 0 && updates(&calls)[0].rows.len() == 16 - 4 * missing);
    let events = std::fs::read_to_string(dir.path().join("events.jsonl")).expect("events");
    assert!(events.contains("dynamic_sampling_ran_out"), "{events}");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let same = Behaviour { reward: |_| Some(1.0), ..Behaviour::default() };
    let error = run_in(dir.path(), stage(1, filter(3)), same).expect_err("nothing to train on").to_string();
    assert!(error.contains("3 batches") && error.contains("max_num_gen_batches"), "{error}");
}

#[test]
fn best_of_n_trains_on_the_best_and_the_worst_of_each_group() {
    let reward = |r: &ScoreRequest| Some(f64::from([2, 5, 1, 3][r.key.sample_index.0 as usize]));
    let algorithm = json!({"advantage": {"adv_estimator": "rloo"}, "best_of_n": {"best": 1, "worst": 1}});
    let (dir, calls) = run(stage(1, algorithm), Behaviour { reward, ..Behaviour::default() });
    let rows = &updates(&calls)[0].rows;
    let first: Vec<f64> = rows.iter().map(|row| row.advantages[0]).collect();
    assert_eq!(first, [4.0, -4.0].repeat(4), "leave-one-out among the two that are kept");
    assert_eq!(samples(dir.path()).len(), 16, "all are recorded");
}

#[test]
fn pf_ppo_draws_rows_by_score() {
    let reward = |r: &ScoreRequest| Some(f64::from(u8::from(r.key.sample_index.0 == 0)));
    let algorithm = json!({"pf_ppo": {"enable": true, "reweight_method": "pow", "weight_pow": 2.0}});
    let (dir, calls) =
        run(PolicyStage { mini_batches: 2, ..stage(1, algorithm) }, Behaviour { reward, ..Behaviour::default() });
    let sizes: Vec<usize> = updates(&calls).iter().map(|batch| batch.rows.len()).collect();
    assert_eq!(sizes, [8, 8]);
    let rows = updates(&calls).into_iter().flat_map(|batch| &batch.rows);
    assert!(rows.into_iter().all(|row| row.advantages[0] > 0.0), "only the four with a score have weight");
    let distinct = number(&metrics(dir.path())[0], "pf_ppo/num_distinct_rows");
    assert!((1.0..=4.0).contains(&distinct), "{distinct}");
}

/// A run of six steps, and one of the same that went on from its fourth step: equal calls after it.
fn resumes_equal(stage: PolicyStage, behaviour: Behaviour) -> tempfile::TempDir {
    let (whole, calls) = run(stage.clone(), behaviour);
    let (rest, _) = run(stage.clone(), behaviour);
    std::fs::remove_dir_all(rest.path().join("checkpoints/step-6")).expect("removable");
    let resumed = run_in(rest.path(), stage, behaviour).expect("the run goes on");
    assert!(!resumed.is_empty() && calls.ends_with(&resumed), "{} calls of {}", resumed.len(), calls.len());
    whole
}

#[test]
fn a_curriculum_passes_over_what_is_solved_and_resumes_in_its_state() {
    // Odd prompts are solved always, even ones half of the time.
    let reward = |r: &ScoreRequest| {
        let is_solved = !r.key.prompt_id.0.is_multiple_of(2) || r.key.sample_index.0.is_multiple_of(2);
        Some(f64::from(u8::from(is_solved)))
    };
    let mut stage = stage(6, json!({}));
    stage.curriculum.enable = true;
    stage.curriculum.revisit_after = 2;
    let dir = resumes_equal(stage, Behaviour { reward, ..Behaviour::default() });
    let counts = |from: u64, to: u64, rest: u64| {
        let of_steps = samples(dir.path()).into_iter().filter(|s| (from..=to).contains(&s.step.0));
        of_steps.filter(|s| s.prompt_id.0 % 2 == rest).count()
    };
    // The first pass asks all eight; later ones ask the even ones and, now and then, the odd ones again.
    assert!(counts(3, 6, 0) > 2 * counts(3, 6, 1), "{} and {}", counts(3, 6, 0), counts(3, 6, 1));
    assert!(counts(3, 6, 1) > 0, "what was solved is asked again");
    let row = &metrics(dir.path())[5];
    assert_eq!(number(row, "curriculum/num_prompts_known"), 8.0);
    assert!((number(row, "curriculum/pass_rate_mean") - 0.75).abs() < 1e-12);
}

#[test]
fn a_curriculum_without_prompts_in_its_band_takes_those_it_passed_over() {
    let mut stage = stage(6, json!({}));
    stage.curriculum.enable = true;
    stage.curriculum.revisit_after = 1000;
    let dir = resumes_equal(stage, Behaviour { reward: |_| Some(1.0), ..Behaviour::default() });
    assert_eq!(samples(dir.path()).len(), 6 * 16);
}

#[test]
fn the_adaptive_coefficient_goes_on_where_it_was() {
    let algorithm = json!({"kl_in_reward": {"use_kl_in_reward": true, "kl_penalty": "abs",
        "kl_ctrl": {"type": "adaptive", "kl_coef": 0.3, "target_kl": 0.01, "horizon": 97.0}}});
    let dir = resumes_equal(stage(6, algorithm), Behaviour { gap: 0.5, ..Behaviour::default() });
    let coefs: Vec<f64> = metrics(dir.path()).iter().map(|row| number(row, "kl_coef")).collect();
    assert!(coefs.windows(2).all(|w| w[0] != w[1]), "{coefs:?}");
}

#[test]
fn settings_that_cannot_work_are_refused() {
    let refused = |stage: PolicyStage, says: &str| {
        let error = Stage::Policy(Box::new(stage)).validate("stage.0").expect_err(says);
        assert!(matches!(error, Error::Config { .. }) && error.to_string().contains(says), "{error}");
    };
    refused(stage(1, json!({"best_of_n": {"best": 3, "worst": 2}})), "5 of 4 samples");
    refused(stage(1, json!({"best_of_n": {"best": 1}})), "2 or more");
    refused(stage(1, correction(json!({"rollout_is": "token", "rollout_is_threshold": 0.5}))), "bounds around 1");
    let rejecting = json!({"rollout_rs": "seq_mean_k1", "rollout_rs_threshold": "1.1_1.2"});
    refused(stage(1, correction(rejecting)), "bounds around 1");
    let mut bad_band = stage(1, json!({}));
    bad_band.curriculum.min_pass_rate = 0.9;
    bad_band.curriculum.max_pass_rate = 0.1;
    refused(bad_band, "min_pass_rate to 1");
    let reference = ReferenceConfig { sync_every_steps: 3, mixup_alpha: 1.0 };
    refused(PolicyStage { reference, ..stage(1, json!({})) }, "reads no reference policy");
    let reference = ReferenceConfig { sync_every_steps: 3, mixup_alpha: 1.5 };
    refused(PolicyStage { reference, ..stage(1, json!({})) }, "at most 1");
}
