//! `temper check`: what it says of a recipe that is right.

use crate::support::succeed;

/// What somebody gave and nothing reads is said with its place; what is read is not, nor is a default.
#[test]
fn keys_without_effect_are_named() {
    let stage = |key: &str| format!("stage.1.{key}");
    let idle = [
        ("engine.lenience".to_owned(), "1.5"),
        (stage("reference.mixup_alpha"), "0.5"),
        (stage("curriculum.smoothing"), "0.5"),
        (stage("partial_rollouts.round_tokens"), "3"),
        (stage("algorithm.policy_loss.trl.delta"), "4.0"),
        (stage("algorithm.policy_loss.tau_pos"), "1.1"),
        (stage("algorithm.policy_loss.rollout_correction.rollout_is_threshold"), "3.0"),
        (stage("algorithm.policy_loss.rollout_correction.rollout_rs_threshold"), "3.0"),
        (stage("algorithm.advantage.lam"), "0.9"),
        (stage("algorithm.advantage.gdpo_reward_keys"), "[\"exact_match\"]"),
        (stage("algorithm.kl_in_reward.kl_ctrl.horizon"), "100.0"),
        (stage("algorithm.filter_groups.metric"), "seq_reward"),
        (stage("algorithm.overlong.len"), "2"),
        (stage("algorithm.pf_ppo.weight_pow"), "2.0"),
    ];
    let read = [
        (stage("partial_rollouts.policy"), "finish"),
        (stage("algorithm.policy_loss.use_kl_loss"), "true"),
        (stage("algorithm.policy_loss.kl_loss_coef"), "0.01"),
        (stage("algorithm.advantage.norm_adv_by_std_in_grpo"), "false"),
    ];
    let sets: Vec<String> = idle.iter().chain(&read).map(|(key, value)| format!("--set={key}={value}")).collect();
    let said = succeed(
        &[&["check", "../recipes/quickstart.toml"][..], &sets.iter().map(String::as_str).collect::<Vec<_>>()].concat(),
    );
    let mut named: Vec<&str> = said.lines().filter_map(|line| line.strip_prefix("no effect: ")).collect();
    named.iter().for_each(|line| assert!(line.contains(" (--set) is read where "), "{line}"));
    named.iter_mut().for_each(|line| *line = line.split(' ').next().unwrap_or_default());
    let mut expected: Vec<&str> = idle.iter().map(|(key, _)| key.as_str()).collect();
    named.sort_unstable();
    expected.sort_unstable();
    assert_eq!(named, expected);
    assert!(!succeed(&["check", "../recipes/quickstart.toml"]).contains("no effect"));
}
