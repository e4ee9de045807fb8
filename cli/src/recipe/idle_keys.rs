//! Keys that somebody gave and nothing reads, because a switch beside them is off: said, not refused, for a recipe that
//! another extends may well hold settings of such a part. Not every such key is known here, but those that are named do
//! nothing.

use super::check_replay::policy_stages;
use super::{Recipe, Source};
use temper_algos::filters::ReweightMethod;
use temper_algos::{AdvEstimator, IsLevel, KlControllerType, LossMode, TrlLossType};
use temper_controller::{PartialPolicy, PolicyStage};
use temper_rollout::{Replay, Speculative};

/// A key, or a table of keys, below that of its rules; what reads it; and whether that is there.
type Rule = (&'static str, &'static str, bool);

/// A line for each key that was given for nothing.
pub(super) fn lines(recipe: &Recipe, source: &Source) -> Vec<String> {
    let mut lines = Vec::new();
    let mut say = |table: &str, rules: &[Rule]| {
        for (key, reader, _) in rules.iter().filter(|(.., is_read)| !is_read) {
            let given = source.given_at(&format!("{table}.{key}")).into_iter();
            lines.extend(given.map(|(key, at)| format!("no effect: {key} ({at}) is read where {reader}")));
        }
    };
    let engine = &recipe.engine;
    say(
        "engine",
        &[
            ("lenience", "engine.replay = \"lenient\"", engine.replay == Replay::Lenient),
            ("max_draft_tokens", "engine.speculative is not \"off\"", engine.speculative != Speculative::Off),
        ],
    );
    for (index, stage) in policy_stages(recipe) {
        let at = |table: &str| format!("stage.{index}.{table}");
        say(&at("algorithm.policy_loss"), &loss_rules(stage));
        say(&at("algorithm.advantage"), &advantage_rules(stage));
        say(&at("algorithm"), &switch_rules(stage));
        say(&format!("stage.{index}"), &stage_rules(stage));
    }
    lines
}

fn loss_rules(stage: &PolicyStage) -> Vec<Rule> {
    let loss = &stage.algorithm.policy_loss;
    let (mode, correction) = (loss.loss_mode, &loss.rollout_correction);
    // TRL's losses have an estimator of their own.
    let estimates_kl = loss.use_kl_loss && mode != LossMode::Trl;
    let estimator = "use_kl_loss = true and loss_mode is not \"trl\"";
    let has_taus = match mode {
        LossMode::Trl => loss.trl.loss_type == TrlLossType::Sapo,
        mode => mode == LossMode::Sapo,
    };
    let gate = "loss_mode, or trl.loss_type under it, is \"sapo\"";
    let has_weights = correction.rollout_is != IsLevel::None;
    vec![
        ("trl", "loss_mode = \"trl\"", mode == LossMode::Trl),
        ("kl_loss_coef", "use_kl_loss = true", loss.use_kl_loss),
        ("kl_loss_type", estimator, estimates_kl),
        ("unbiased_kl", estimator, estimates_kl),
        ("tau_pos", gate, has_taus),
        ("tau_neg", gate, has_taus),
        ("clip_cov_ratio", "loss_mode = \"clip_cov\"", mode == LossMode::ClipCov),
        ("clip_cov_lb", "loss_mode = \"clip_cov\"", mode == LossMode::ClipCov),
        ("clip_cov_ub", "loss_mode = \"clip_cov\"", mode == LossMode::ClipCov),
        ("kl_cov_ratio", "loss_mode = \"kl_cov\"", mode == LossMode::KlCov),
        ("ppo_kl_coef", "loss_mode = \"kl_cov\"", mode == LossMode::KlCov),
        ("dro_beta", "loss_mode = \"dro\"", mode == LossMode::Dro),
        ("rollout_correction.rollout_is_threshold", "rollout_is is not \"none\"", has_weights),
        ("rollout_correction.rollout_is_batch_normalize", "rollout_is is not \"none\"", has_weights),
        ("rollout_correction.rollout_rs_threshold", "rollout_rs names an option", !correction.rollout_rs.is_empty()),
        ("rollout_correction.loss_type", "loss_mode = \"bypass_mode\"", mode == LossMode::BypassMode),
    ]
}

fn advantage_rules(stage: &PolicyStage) -> Vec<Rule> {
    let advantage = &stage.algorithm.advantage;
    let estimator = advantage.adv_estimator;
    let discounts = matches!(estimator, AdvEstimator::Gae | AdvEstimator::ReinforcePlusPlus);
    let is_trl = estimator == AdvEstimator::TrlGrpo;
    let components = "adv_estimator = \"gdpo\", or \"trl_grpo\" that normalises before it sums";
    vec![
        ("gamma", "adv_estimator = \"gae\" or \"reinforce_plus_plus\"", discounts),
        ("lam", "adv_estimator = \"gae\"", estimator == AdvEstimator::Gae),
        ("f_norm", "adv_estimator = \"gpg\"", estimator == AdvEstimator::Gpg),
        ("gdpo_reward_keys", components, advantage.reads_components()),
        ("gdpo_reward_weights", components, advantage.reads_components()),
        ("scale_rewards", "adv_estimator = \"trl_grpo\"", is_trl),
        ("multi_objective_aggregation", "adv_estimator = \"trl_grpo\"", is_trl),
    ]
}

fn switch_rules(stage: &PolicyStage) -> Vec<Rule> {
    let algorithm = &stage.algorithm;
    let (kl, has_filter) = (&algorithm.kl_in_reward, algorithm.filter_groups.enable);
    let adapts = !kl.use_kl_in_reward || kl.kl_ctrl.kind == KlControllerType::Adaptive;
    let is_pow = algorithm.pf_ppo.reweight_method == ReweightMethod::Pow;
    let (has_overlong, has_pf) = (algorithm.overlong.enable, algorithm.pf_ppo.enable);
    vec![
        ("kl_in_reward.kl_penalty", "use_kl_in_reward = true", kl.use_kl_in_reward),
        ("kl_in_reward.kl_ctrl", "use_kl_in_reward = true", kl.use_kl_in_reward),
        ("kl_in_reward.kl_ctrl.target_kl", "kl_ctrl.type = \"adaptive\"", adapts),
        ("kl_in_reward.kl_ctrl.horizon", "kl_ctrl.type = \"adaptive\"", adapts),
        ("filter_groups.metric", "filter_groups.enable = true", has_filter),
        ("filter_groups.max_num_gen_batches", "filter_groups.enable = true", has_filter),
        ("overlong.len", "overlong.enable = true", has_overlong),
        ("overlong.penalty_factor", "overlong.enable = true", has_overlong),
        ("overlong.max_response_length", "overlong.enable = true", has_overlong),
        ("pf_ppo.reweight_method", "pf_ppo.enable = true", has_pf),
        ("pf_ppo.weight_pow", "pf_ppo.enable = true and reweight_method = \"pow\"", has_pf && is_pow),
    ]
}

fn stage_rules(stage: &PolicyStage) -> Vec<Rule> {
    let has_rounds = stage.partial_rollouts.as_ref().is_none_or(|partial| partial.policy != PartialPolicy::Finish);
    let (enabled, has_curriculum) = ("curriculum.enable = true", stage.curriculum.enable);
    vec![
        ("reference.mixup_alpha", "reference.sync_every_steps is above 0", stage.reference.sync_every_steps > 0),
        ("partial_rollouts.round_tokens", "partial_rollouts.policy is not \"finish\"", has_rounds),
        ("curriculum.min_pass_rate", enabled, has_curriculum),
        ("curriculum.max_pass_rate", enabled, has_curriculum),
        ("curriculum.correct_at", enabled, has_curriculum),
        ("curriculum.smoothing", enabled, has_curriculum),
        ("curriculum.revisit_after", enabled, has_curriculum),
    ]
}
