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

/// The same keys under switches that are on, and those that a switch turns off.
#[test]
fn a_switch_decides_what_has_effect() {
    let cases = [
        ("policy_loss.loss_mode=trl", "policy_loss.trl.delta=4.0", true),
        ("policy_loss.loss_mode=trl", "policy_loss.kl_loss_coef=0.1", false),
        ("policy_loss.loss_mode=trl policy_loss.use_kl_loss=true", "policy_loss.kl_loss_coef=0.1", true),
        ("policy_loss.loss_mode=trl policy_loss.use_kl_loss=true", "policy_loss.kl_loss_type=k3", false),
        ("policy_loss.loss_mode=trl", "policy_loss.tau_pos=1.1", false),
        ("policy_loss.loss_mode=trl policy_loss.trl.loss_type=sapo", "policy_loss.tau_pos=1.1", true),
        ("policy_loss.loss_mode=sapo", "policy_loss.tau_pos=1.1", true),
        ("policy_loss.loss_mode=clip_cov", "policy_loss.clip_cov_ub=4.0", true),
        ("policy_loss.loss_mode=clip_cov", "policy_loss.kl_cov_ratio=0.1", false),
        (
            "policy_loss.rollout_correction.rollout_is=token",
            "policy_loss.rollout_correction.rollout_is_threshold=3.0",
            true,
        ),
        ("overlong.enable=true", "overlong.len=2", true),
        ("filter_groups.enable=true", "filter_groups.metric=exact_match", true),
        ("pf_ppo.enable=true pf_ppo.reweight_method=max_min", "pf_ppo.weight_pow=2.0", false),
        ("pf_ppo.enable=true pf_ppo.reweight_method=pow", "pf_ppo.weight_pow=2.0", true),
        ("kl_in_reward.use_kl_in_reward=true", "kl_in_reward.kl_ctrl.kl_coef=0.1", true),
        ("kl_in_reward.use_kl_in_reward=true", "kl_in_reward.kl_ctrl.horizon=9.0", false),
        (
            "kl_in_reward.use_kl_in_reward=true kl_in_reward.kl_ctrl.type=adaptive",
            "kl_in_reward.kl_ctrl.horizon=9.0",
            true,
        ),
    ];
    for (switches, key, has_effect) in cases {
        let set = |assignment: &str| format!("--set=stage.1.algorithm.{assignment}");
        let sets: Vec<String> = switches.split(' ').chain([key]).map(set).collect();
        let args: Vec<&str> =
            ["check", "../recipes/quickstart.toml"].into_iter().chain(sets.iter().map(String::as_str)).collect();
        let named = format!("no effect: stage.1.algorithm.{} ", key.split('=').next().unwrap_or_default());
        assert_eq!(succeed(&args).contains(&named), !has_effect, "{key} under {switches}");
    }
}
