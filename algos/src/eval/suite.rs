//! Which function of which peer a document means.

use super::case::{Case, Results};
use super::{
    areal, gdpo, openrlhf, openrlhf_policy, reference, rollout, slime, trl, trl_loss, trl_preference, verl_advantages,
    verl_kl, verl_losses, verl_misc,
};
use crate::Error;

/// A peer's function, or a family of functions that one document holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Suite {
    VerlAdvantage(verl_advantages::Function),
    VerlPolicyLoss(verl_losses::Function),
    VerlAggLoss,
    VerlPpoLoss,
    VerlKlPenalty,
    VerlApplyKlPenalty,
    VerlKlController,
    VerlBypass,
    VerlWeights,
    VerlRejection,
    VerlOffPolicy,
    VerlValue,
    VerlSft,
    VerlEntropy,
    VerlMasked,
    VerlSchedule,
    VerlOverlong,
    VerlPfPpo,
    VerlResponseMask,
    VerlDistill,
    TrlDpo,
    TrlRatio,
    TrlGrpoAdvantages,
    TrlRlooAdvantages,
    TrlSft,
    TrlJsd,
    TrlUtils,
    TrlGrpo,
    TrlGmpo,
    TrlRloo,
    TrlCpo,
    TrlCpoFull,
    TrlOdds,
    TrlOrpoFull,
    TrlKto,
    TrlOnlineDpo,
    TrlReward,
    Gdpo,
    HfLogits,
    TorchOptim,
    OpenrlhfAdvantages,
    OpenrlhfKl,
    OpenrlhfReward,
    OpenrlhfLosses,
    OpenrlhfPolicy,
    ArealMisc,
    ArealActor,
    Slime,
}

impl Suite {
    /// The suite of a document.
    ///
    /// # Errors
    /// If no suite knows the function.
    pub(super) fn find(source: &str, function: &str) -> Result<Suite, Error> {
        let peer = source.split_whitespace().next().unwrap_or("");
        let first = function.split([',', '/']).next().unwrap_or("").trim();
        let first = first.split_whitespace().next().unwrap_or("");
        if let (true, Some(advantage)) = (peer == "verl", verl_advantages::Function::find(first)) {
            return Ok(Suite::VerlAdvantage(advantage));
        }
        if let (true, Some(loss)) = (peer == "verl", verl_losses::Function::find(first)) {
            return Ok(Suite::VerlPolicyLoss(loss));
        }
        if function.contains("vLLM importance ratio") {
            return Ok(Suite::TrlRatio);
        }
        Ok(match (peer, first) {
            ("verl", "agg_loss") => Suite::VerlAggLoss,
            ("verl", "ppo_loss") => Suite::VerlPpoLoss,
            ("verl", "kl_penalty") => Suite::VerlKlPenalty,
            ("verl", "apply_kl_penalty") => Suite::VerlApplyKlPenalty,
            ("verl", "AdaptiveKLController.update") => Suite::VerlKlController,
            ("verl", "compute_policy_loss_bypass_mode") => Suite::VerlBypass,
            ("verl", "compute_rollout_correction_weights") => Suite::VerlWeights,
            ("verl", "compute_rollout_rejection_mask") => Suite::VerlRejection,
            ("verl", "compute_offpolicy_metrics") => Suite::VerlOffPolicy,
            ("verl", "compute_value_loss") => Suite::VerlValue,
            ("verl", "sft_loss") => Suite::VerlSft,
            ("verl", "compute_entropy_loss") => Suite::VerlEntropy,
            ("verl", "masked_sum") => Suite::VerlMasked,
            ("verl", "get_cosine_schedule_with_warmup") => Suite::VerlSchedule,
            ("verl", "DAPORewardManager.run_single") => Suite::VerlOverlong,
            ("verl", "compute_pf_ppo_reweight_data.compute_weights") => Suite::VerlPfPpo,
            ("verl", "get_response_mask") => Suite::VerlResponseMask,
            ("verl", "compute_forward_kl_topk") => Suite::VerlDistill,
            ("trl", "DPOTrainer._compute_loss") => Suite::TrlDpo,
            ("trl", "CPOTrainer.cpo_loss") => Suite::TrlCpo,
            ("trl", "CPOTrainer.get_batch_loss_metrics") => Suite::TrlCpoFull,
            ("trl", "ORPOTrainer.odds_ratio_loss") => Suite::TrlOdds,
            ("trl", "ORPOTrainer.get_batch_loss_metrics") => Suite::TrlOrpoFull,
            ("trl", "KTOTrainer._compute_loss") => Suite::TrlKto,
            ("trl", "OnlineDPOTrainer.training_step") => Suite::TrlOnlineDpo,
            ("trl", "RewardTrainer.compute_loss") => Suite::TrlReward,
            ("BigBinnie/GDPO", "_CE_loss") => Suite::Gdpo,
            ("trl", "GRPOTrainer._generate_and_score_completions") => Suite::TrlGrpoAdvantages,
            ("trl", "RLOOTrainer._generate_and_score_completions") => Suite::TrlRlooAdvantages,
            ("trl", "SFTTrainer.compute_loss") => Suite::TrlSft,
            ("trl", "GKDTrainer.generalized_jsd_loss") => Suite::TrlJsd,
            ("trl", "selective_log_softmax") => Suite::TrlUtils,
            ("trl", "GRPOTrainer._compute_loss") => Suite::TrlGrpo,
            ("trl", "GMPOTrainer._compute_loss") => Suite::TrlGmpo,
            ("trl", "RLOOTrainer._compute_loss") => Suite::TrlRloo,
            ("transformers", "TemperatureLogitsWarper") => Suite::HfLogits,
            ("torch", "torch.optim.AdamW") => Suite::TorchOptim,
            ("openrlhf", "compute_advantages_and_returns") => Suite::OpenrlhfAdvantages,
            ("openrlhf", "compute_approx_kl") => Suite::OpenrlhfKl,
            ("openrlhf", "compute_reward") => Suite::OpenrlhfReward,
            ("openrlhf", "ValueLoss") => Suite::OpenrlhfLosses,
            ("openrlhf", "PolicyLoss") => Suite::OpenrlhfPolicy,
            ("areal", "sapo_loss_fn") => Suite::ArealMisc,
            ("areal", "ppo_actor_loss_fn") => Suite::ArealActor,
            ("slime", "compute_approx_kl") => Suite::Slime,
            _ => {
                let cause = format!("no function `{first}` of `{peer}` is known");
                return Err(Error::Case { case: String::new(), key: "function".to_owned(), cause });
            }
        })
    }

    /// Run one case.
    pub(super) fn run(self, case: &Case<'_>) -> Result<Results, Error> {
        match self {
            Suite::VerlAdvantage(function) => verl_advantages::run(function, case),
            Suite::VerlPolicyLoss(function) => verl_losses::run(function, case),
            Suite::VerlAggLoss => verl_losses::agg(case),
            Suite::VerlPpoLoss => verl_losses::total(case),
            Suite::VerlKlPenalty => verl_kl::penalty(case),
            Suite::VerlApplyKlPenalty => verl_kl::apply(case),
            Suite::VerlKlController => verl_kl::controller(case),
            Suite::VerlBypass => rollout::bypass(case),
            Suite::VerlWeights => rollout::weights(case),
            Suite::VerlRejection => rollout::rejection(case),
            Suite::VerlOffPolicy => rollout::off_policy(case),
            Suite::VerlValue => verl_misc::value(case),
            Suite::VerlSft => verl_misc::sft(case),
            Suite::VerlEntropy => verl_misc::entropy(case),
            Suite::VerlMasked => verl_misc::masked(case),
            Suite::VerlSchedule => verl_misc::schedule(case),
            Suite::VerlOverlong => verl_misc::overlong(case),
            Suite::VerlPfPpo => verl_misc::pf_ppo(case),
            Suite::VerlResponseMask => verl_misc::response(case),
            Suite::VerlDistill => verl_misc::distill(case),
            Suite::TrlRatio => trl::ratio(case),
            Suite::TrlGrpoAdvantages => trl::grpo_advantages(case),
            Suite::TrlRlooAdvantages => trl::rloo_advantages(case),
            Suite::TrlSft => trl::sft(case),
            Suite::TrlJsd => trl::jsd(case),
            Suite::TrlUtils => trl::utils(case),
            Suite::TrlGrpo => trl_loss::grpo(case),
            Suite::TrlGmpo => trl_loss::gmpo(case),
            Suite::TrlRloo => trl_loss::rloo(case),
            Suite::TrlDpo => trl_preference::dpo(case),
            Suite::TrlCpo => trl_preference::cpo(case),
            Suite::TrlCpoFull => trl_preference::cpo_full(case),
            Suite::TrlOdds => trl_preference::odds(case),
            Suite::TrlOrpoFull => trl_preference::orpo_full(case),
            Suite::TrlKto => trl_preference::kto(case),
            Suite::TrlOnlineDpo => trl_preference::online(case),
            Suite::TrlReward => trl_preference::reward(case),
            Suite::Gdpo => gdpo::run(case),
            Suite::HfLogits => reference::logits(case),
            Suite::TorchOptim => reference::optim(case),
            Suite::OpenrlhfAdvantages => openrlhf::advantages(case),
            Suite::OpenrlhfKl => openrlhf::kl(case),
            Suite::OpenrlhfReward => openrlhf::reward(case),
            Suite::OpenrlhfLosses => openrlhf::losses(case),
            Suite::OpenrlhfPolicy => openrlhf_policy::loss(case),
            Suite::ArealMisc => areal::misc(case),
            Suite::ArealActor => areal::actor(case),
            Suite::Slime => slime::run(case),
        }
    }
}
