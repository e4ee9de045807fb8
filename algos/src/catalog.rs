//! Every algorithm by name: where it comes from, and the recipe keys that choose it.

use serde::Serialize;

/// What part of training an algorithm is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Rewards to advantages.
    Advantage,
    /// A policy loss.
    PolicyLoss,
    /// Aggregation of token losses.
    Aggregation,
    /// A KL estimator or its use.
    Kl,
    /// Correction between engine and trainer.
    RolloutCorrection,
    /// Which samples take part.
    SamplingControl,
    /// A loss over preferences or labels.
    Preference,
    /// Supervised losses, distillation, value and reward models.
    Supervised,
}

/// One algorithm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// The field's name.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// The paper (arXiv number), or the code that defined it.
    pub paper: &'static str,
    /// Keys that choose it in a recipe's stage, or the function where it has no key.
    pub keys: &'static str,
}

const fn entry(kind: Kind, name: &'static str, paper: &'static str, keys: &'static str) -> Entry {
    Entry { name, kind, paper, keys }
}

/// All algorithms.
pub fn list() -> Vec<Entry> {
    [ADVANTAGES, POLICY_LOSSES, AROUND_THE_LOSS, PREFERENCES].concat()
}

const ADVANTAGES: &[Entry] = &[
    entry(Kind::Advantage, "grpo", "2402.03300", "advantage.adv_estimator = \"grpo\""),
    entry(Kind::Advantage, "dr_grpo", "2503.20783", "advantage.norm_adv_by_std_in_grpo = false"),
    entry(Kind::Advantage, "grpo_vectorized", "verl", "advantage.adv_estimator = \"grpo_vectorized\""),
    entry(Kind::Advantage, "grpo_passk", "2503.19595", "advantage.adv_estimator = \"grpo_passk\""),
    entry(Kind::Advantage, "rloo", "2402.14740", "advantage.adv_estimator = \"rloo\""),
    entry(Kind::Advantage, "rloo_vectorized", "verl", "advantage.adv_estimator = \"rloo_vectorized\""),
    entry(Kind::Advantage, "reinforce_plus_plus", "2501.03262", "advantage.adv_estimator = \"reinforce_plus_plus\""),
    entry(
        Kind::Advantage,
        "reinforce_plus_plus_baseline",
        "2501.03262",
        "advantage.adv_estimator = \"reinforce_plus_plus_baseline\"",
    ),
    entry(Kind::Advantage, "remax", "2310.10505", "advantage.adv_estimator = \"remax\""),
    entry(Kind::Advantage, "opo", "2505.23585", "advantage.adv_estimator = \"opo\""),
    entry(Kind::Advantage, "gpg", "2504.02546", "advantage.adv_estimator = \"gpg\""),
    entry(
        Kind::Advantage,
        "gae",
        "1506.02438",
        "kind = \"ppo\", or advantage.adv_estimator = \"gae\" with [stage.critic]",
    ),
    entry(Kind::Advantage, "optimal_token_baseline", "verl", "advantage.adv_estimator = \"optimal_token_baseline\""),
    entry(
        Kind::Advantage,
        "tir_optimal_token_baseline",
        "verl",
        "advantage.adv_estimator = \"tir_optimal_token_baseline\"",
    ),
    entry(Kind::Advantage, "gdpo", "2601.05242", "advantage.adv_estimator = \"gdpo\", advantage.gdpo_reward_keys"),
    entry(
        Kind::Advantage,
        "scale_rewards, normalize_then_sum",
        "TRL",
        "advantage.adv_estimator = \"trl_grpo\", scale_rewards, multi_objective_aggregation",
    ),
    entry(Kind::Advantage, "flash_reinforce", "OpenRLHF", "advantage.adv_estimator = \"flash_reinforce\""),
    entry(Kind::Advantage, "reinforce_baseline", "OpenRLHF", "advantage.adv_estimator = \"reinforce_baseline\""),
];

const POLICY_LOSSES: &[Entry] = &[
    entry(Kind::PolicyLoss, "ppo", "1707.06347", "policy_loss.loss_mode = \"vanilla\""),
    entry(Kind::PolicyLoss, "dual clip", "1912.09729", "policy_loss.clip_ratio_c"),
    entry(Kind::PolicyLoss, "clip-higher", "2503.14476", "policy_loss.clip_ratio_low, clip_ratio_high"),
    entry(Kind::PolicyLoss, "gspo", "2507.18071", "policy_loss.loss_mode = \"gspo\""),
    entry(Kind::PolicyLoss, "cispo", "2506.13585", "policy_loss.loss_mode = \"cispo\""),
    entry(Kind::PolicyLoss, "sapo", "2511.20347", "policy_loss.loss_mode = \"sapo\""),
    entry(Kind::PolicyLoss, "gmpo", "2507.20673", "policy_loss.loss_mode = \"geo_mean\""),
    entry(Kind::PolicyLoss, "gpg", "2504.02546", "policy_loss.loss_mode = \"gpg\""),
    entry(Kind::PolicyLoss, "reinforce", "verl", "policy_loss.loss_mode = \"reinforce\""),
    entry(Kind::PolicyLoss, "clip_cov", "2505.22617", "policy_loss.loss_mode = \"clip_cov\""),
    entry(Kind::PolicyLoss, "kl_cov", "2505.22617", "policy_loss.loss_mode = \"kl_cov\""),
    entry(Kind::PolicyLoss, "dppo_tv", "2602.04879", "policy_loss.loss_mode = \"dppo_tv\""),
    entry(Kind::PolicyLoss, "dppo_kl", "2602.04879", "policy_loss.loss_mode = \"dppo_kl\""),
    entry(Kind::PolicyLoss, "dro", "2405.19107", "policy_loss.loss_mode = \"dro\", dro_beta"),
    entry(Kind::PolicyLoss, "sequence ppo", "TRL", "policy_loss.loss_mode = \"sequence_ppo\""),
    entry(Kind::PolicyLoss, "bypass_mode", "verl", "policy_loss.loss_mode = \"bypass_mode\", rollout_correction"),
    entry(Kind::PolicyLoss, "decoupled ppo", "2505.24298", "policy_loss.rollout_correction.rollout_is = \"token\""),
    entry(Kind::PolicyLoss, "TRL grpo", "TRL", "policy_loss.loss_mode = \"trl\", trl.loss_type = \"grpo\""),
    entry(Kind::PolicyLoss, "TRL bnpo", "TRL", "policy_loss.loss_mode = \"trl\", trl.loss_type = \"bnpo\""),
    entry(
        Kind::PolicyLoss,
        "TRL dr_grpo",
        "2503.20783",
        "policy_loss.loss_mode = \"trl\", trl.loss_type = \"dr_grpo\"",
    ),
    entry(Kind::PolicyLoss, "TRL dapo", "2503.14476", "policy_loss.loss_mode = \"trl\", trl.loss_type = \"dapo\""),
    entry(Kind::PolicyLoss, "luspo", "2602.05261", "policy_loss.loss_mode = \"trl\", trl.loss_type = \"luspo\""),
    entry(Kind::PolicyLoss, "vespo", "2602.10693", "policy_loss.loss_mode = \"trl\", trl.loss_type = \"vespo\""),
    entry(Kind::PolicyLoss, "two-sided clip", "INTELLECT-2", "policy_loss.trl.delta"),
    entry(Kind::PolicyLoss, "high-entropy mask", "2506.01939", "policy_loss.trl.top_entropy_quantile"),
    entry(Kind::PolicyLoss, "off-policy mask", "DeepSeek-V3.2", "policy_loss.trl.off_policy_mask_threshold"),
    entry(Kind::PolicyLoss, "m2po", "2510.01161", "policy_loss.rollout_correction.m2_threshold"),
    entry(Kind::PolicyLoss, "opsm", "slime", "policy_loss.opsm_delta"),
];

const AROUND_THE_LOSS: &[Entry] = &[
    entry(Kind::Aggregation, "token-mean", "2503.14476", "policy_loss.loss_agg_mode = \"token-mean\""),
    entry(Kind::Aggregation, "token-sum", "verl", "policy_loss.loss_agg_mode = \"token-sum\""),
    entry(Kind::Aggregation, "seq-mean-token-sum", "verl", "policy_loss.loss_agg_mode = \"seq-mean-token-sum\""),
    entry(
        Kind::Aggregation,
        "seq-mean-token-sum-norm",
        "2503.20783",
        "policy_loss.loss_agg_mode = \"seq-mean-token-sum-norm\"",
    ),
    entry(
        Kind::Aggregation,
        "seq-mean-token-mean",
        "2402.03300",
        "policy_loss.loss_agg_mode = \"seq-mean-token-mean\"",
    ),
    entry(Kind::Kl, "KL in the loss", "2402.03300", "policy_loss.use_kl_loss, kl_loss_coef, kl_loss_type"),
    entry(Kind::Kl, "KL in the reward", "1909.08593", "kl_in_reward.use_kl_in_reward, kl_penalty, kl_ctrl"),
    entry(Kind::Kl, "kl, abs, mse, low_var_kl and their + forms", "Schulman", "kl_loss_type, kl_penalty"),
    entry(Kind::Kl, "moving reference (TR-DPO)", "2404.09656", "stage: reference.sync_every_steps, mixup_alpha"),
    entry(Kind::Kl, "entropy bonus", "1602.01783", "policy_loss.entropy_coeff"),
    entry(Kind::Kl, "unbiased KL", "OpenRLHF", "policy_loss.unbiased_kl, with use_kl_loss"),
    entry(Kind::RolloutCorrection, "tis", "verl", "policy_loss.rollout_correction.rollout_is, rollout_is_threshold"),
    entry(Kind::RolloutCorrection, "icepop", "verl", "rollout_is_threshold = \"0.5_2.0\""),
    entry(
        Kind::RolloutCorrection,
        "rejection",
        "verl",
        "policy_loss.rollout_correction.rollout_rs, rollout_rs_threshold",
    ),
    entry(Kind::SamplingControl, "dynamic sampling", "2503.14476", "filter_groups.enable, metric, max_num_gen_batches"),
    entry(
        Kind::SamplingControl,
        "overlong penalty",
        "2503.14476",
        "overlong.enable, len, penalty_factor, max_response_length",
    ),
    entry(Kind::SamplingControl, "mask_truncated_completions", "2503.14476", "mask_truncated_completions = true"),
    entry(Kind::SamplingControl, "pf_ppo", "2409.06957", "pf_ppo.enable, reweight_method, weight_pow"),
    entry(Kind::SamplingControl, "best-of-n", "2504.13818", "best_of_n.best, worst"),
    entry(
        Kind::SamplingControl,
        "curriculum by pass rate",
        "temper",
        "stage: curriculum.enable, min_pass_rate, max_pass_rate, correct_at, smoothing, revisit_after",
    ),
    entry(Kind::SamplingControl, "stop-properly penalty", "ProRL", "stop_properly_penalty_coef"),
];

const PREFERENCES: &[Entry] = &[
    entry(Kind::Preference, "sigmoid (dpo)", "2305.18290", "kind = \"dpo\": loss.loss_type = [\"sigmoid\"]"),
    entry(Kind::Preference, "cdpo", "2305.18290", "loss.loss_type = [\"cdpo\"], label_smoothing"),
    entry(Kind::Preference, "robust", "2403.00409", "loss.loss_type = [\"robust\"], label_smoothing"),
    entry(Kind::Preference, "hinge (slic)", "2305.10425", "loss.loss_type = [\"hinge\"]"),
    entry(Kind::Preference, "ipo", "2310.12036", "loss.loss_type = [\"ipo\"], or [\"ipo_sum\"]"),
    entry(Kind::Preference, "sigmoid_norm", "TRL", "loss.loss_type = [\"sigmoid_norm\"]"),
    entry(Kind::Preference, "exo_pair", "2402.00856", "loss.loss_type = [\"exo_pair\"], label_smoothing"),
    entry(Kind::Preference, "nca_pair", "2402.05369", "loss.loss_type = [\"nca_pair\"]"),
    entry(Kind::Preference, "bco_pair", "2404.04656", "loss.loss_type = [\"bco_pair\"]"),
    entry(Kind::Preference, "sppo_hard", "2405.00675", "loss.loss_type = [\"sppo_hard\"]"),
    entry(Kind::Preference, "aot, aot_unpaired", "2406.05882", "loss.loss_type = [\"aot\"], [\"aot_unpaired\"]"),
    entry(Kind::Preference, "apo_zero, apo_down", "2408.06266", "loss.loss_type = [\"apo_zero\"], [\"apo_down\"]"),
    entry(Kind::Preference, "discopop", "2406.08414", "loss.loss_type = [\"discopop\"], discopop_tau"),
    entry(Kind::Preference, "ld-dpo", "2409.06411", "loss.ld_alpha"),
    entry(Kind::Preference, "wpo", "2406.11827", "loss.use_weighting"),
    entry(Kind::Preference, "f-divergences", "2309.16240", "loss.f_divergence_type"),
    entry(Kind::Preference, "cpo", "2401.08417", "kind = \"cpo\": loss.loss_type, cpo_alpha"),
    entry(Kind::Preference, "simpo", "2405.14734", "kind = \"simpo\": loss.beta, simpo_gamma"),
    entry(Kind::Preference, "alphapo", "2501.03884", "kind = \"simpo\" or \"cpo\": loss.alpha"),
    entry(Kind::Preference, "orpo", "2403.07691", "kind = \"orpo\": loss.beta"),
    entry(Kind::Preference, "kto", "2402.01306", "kind = \"kto\": loss.loss_type = \"kto\""),
    entry(
        Kind::Preference,
        "apo_zero_unpaired",
        "2408.06266",
        "kind = \"kto\": loss.loss_type = \"apo_zero_unpaired\"",
    ),
    entry(Kind::Preference, "online dpo", "2402.04792", "kind = \"online_dpo\": loss, num_generations"),
    entry(Kind::Preference, "group distributional (gdpo)", "2412.20299", "kind = \"gdpo\": loss.beta, label_smoothing"),
    entry(Kind::Supervised, "sft", "-", "loss_type = \"nll\""),
    entry(Kind::Supervised, "dft", "2508.05629", "loss_type = \"dft\""),
    entry(Kind::Supervised, "value loss", "1707.06347", "kind = \"ppo\", critic.value_loss.cliprange_value"),
    entry(
        Kind::Supervised,
        "value head on the policy's trunk",
        "OpenRLHF",
        "critic.backbone = \"shared\", critic.vf_coef",
    ),
    entry(Kind::Supervised, "reward model", "2307.09288", "kind = \"reward_model\", center_rewards_coefficient"),
    entry(Kind::Supervised, "generalised JSD (gkd)", "2306.13649", "kind = \"distill\": loss.beta, loss.temperature"),
    entry(Kind::Supervised, "top-k forward KL", "verl", "kind = \"distill\": loss.top_k"),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AdvEstimator, LossAggMode, LossMode};
    use schemars::schema_for;
    use serde_json::Value;

    /// Every name in a schema of constants.
    fn names(schema: &Value) -> Vec<String> {
        match schema {
            Value::Object(map) => {
                let own = map.get("const").and_then(Value::as_str).map(str::to_owned);
                let listed = map.get("enum").and_then(Value::as_array).into_iter().flatten();
                let listed = listed.filter_map(|v| v.as_str().map(str::to_owned));
                own.into_iter().chain(listed).chain(map.values().flat_map(names)).collect()
            }
            Value::Array(items) => items.iter().flat_map(names).collect(),
            _ => Vec::new(),
        }
    }

    #[test]
    fn every_estimator_loss_and_aggregation_is_listed_by_its_key() {
        let all: String = list().iter().map(|e| e.keys).collect::<Vec<_>>().join("\n");
        let schemas = [schema_for!(AdvEstimator), schema_for!(LossMode), schema_for!(LossAggMode)];
        let known: Vec<String> = schemas.iter().flat_map(|schema| names(schema.as_value())).collect();
        assert!(known.len() >= 14 + 15 + 5, "{known:?}");
        for name in known {
            assert!(all.contains(&format!("\"{name}\"")), "`{name}` is not listed");
        }
    }
}
