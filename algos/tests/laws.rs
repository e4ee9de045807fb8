//! Laws that every algorithm keeps, over random batches.

mod common;

use common::Arrays;
use proptest::prelude::*;
use temper_algos::preference::{
    CpoConfig, DpoConfig, DpoLossType, OrpoConfig, Pair, PreferenceCounts, PreferenceInput, PreferenceOutput, cpo_loss,
    dpo_loss, orpo_loss,
};
use temper_algos::rollout_correction::{IsLevel, RolloutCorrectionConfig, Threshold, rollout_correction};
use temper_algos::{
    AdvEstimator, AdvantageConfig, AdvantageInput, GlobalCounts, LossAggMode, LossMode, LossOutput, PolicyLossConfig,
    PolicyLossInput, Rewards, Scope, SftLossType, TokenBatch, TrlConfig, TrlLossType, compute_advantages, policy_loss,
    sft_loss,
};

const LOSS_MODES: [LossMode; 15] = [
    LossMode::Vanilla,
    LossMode::Gspo,
    LossMode::Cispo,
    LossMode::Sapo,
    LossMode::GeoMean,
    LossMode::Gpg,
    LossMode::Reinforce,
    LossMode::ClipCov,
    LossMode::KlCov,
    LossMode::DppoTv,
    LossMode::DppoKl,
    LossMode::Dro,
    LossMode::Trl,
    LossMode::SequencePpo,
    LossMode::BypassMode,
];

const AGG_MODES: [LossAggMode; 5] = [
    LossAggMode::TokenMean,
    LossAggMode::TokenSum,
    LossAggMode::SeqMeanTokenSum,
    LossAggMode::SeqMeanTokenSumNorm,
    LossAggMode::SeqMeanTokenMean,
];

const TRL_TYPES: [TrlLossType; 8] = [
    TrlLossType::Grpo,
    TrlLossType::Bnpo,
    TrlLossType::DrGrpo,
    TrlLossType::Dapo,
    TrlLossType::Luspo,
    TrlLossType::Cispo,
    TrlLossType::Sapo,
    TrlLossType::Vespo,
];

const ESTIMATORS: [AdvEstimator; 17] = [
    AdvEstimator::Grpo,
    AdvEstimator::GrpoVectorized,
    AdvEstimator::GrpoPassk,
    AdvEstimator::Rloo,
    AdvEstimator::RlooVectorized,
    AdvEstimator::ReinforcePlusPlus,
    AdvEstimator::ReinforcePlusPlusBaseline,
    AdvEstimator::Remax,
    AdvEstimator::Opo,
    AdvEstimator::Gpg,
    AdvEstimator::Gae,
    AdvEstimator::OptimalTokenBaseline,
    AdvEstimator::TirOptimalTokenBaseline,
    AdvEstimator::Gdpo,
    AdvEstimator::ReinforceBaseline,
    AdvEstimator::FlashReinforce,
    AdvEstimator::TrlGrpo,
];

fn config(mode: usize, agg: usize, trl: usize) -> PolicyLossConfig {
    PolicyLossConfig {
        loss_mode: LOSS_MODES[mode],
        loss_agg_mode: AGG_MODES[agg],
        clip_ratio_high: Some(0.28),
        entropy_coeff: 0.01,
        use_kl_loss: true,
        kl_loss_coef: 0.1,
        dro_beta: 0.2,
        clip_cov_lb: 0.01,
        clip_cov_ratio: 0.2,
        kl_cov_ratio: 0.2,
        trl: TrlConfig { loss_type: TRL_TYPES[trl], ..TrlConfig::default() },
        ..PolicyLossConfig::default()
    }
}

fn loss(a: &Arrays, config: &PolicyLossConfig, counts: Option<&GlobalCounts>) -> LossOutput {
    let batch = TokenBatch::new(&a.offsets, &a.mask).expect("a batch");
    let input = PolicyLossInput {
        batch,
        log_probs: &a.log_probs,
        old_log_probs: &a.old,
        advantages: &a.advantages,
        ref_log_probs: Some(&a.reference),
        entropies: Some(&a.entropies),
        rollout_is_weights: Some(&a.weights),
        rollout_log_probs: Some(&a.engine),
        noise_seed: 5,
    };
    let own = GlobalCounts::of(&batch, 12.0);
    policy_loss(config, &input, counts.unwrap_or(&own)).expect("a loss")
}

fn counts(a: &Arrays) -> GlobalCounts {
    GlobalCounts::of(&TokenBatch::new(&a.offsets, &a.mask).expect("a batch"), 12.0)
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-12 * (1.0 + a.abs().max(b.abs()))
}

fn rows() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(0usize..7, 2..9)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    /// A split into micro-batches (or ranks) leaves every bit of the gradient and the sum of the losses.
    #[test]
    fn micro_batch_split_changes_nothing(
        seed in any::<u64>(), lens in rows(), mode in 0usize..15, agg in 0usize..5, trl in 0usize..8, cut in 0usize..8,
    ) {
        let config = config(mode, agg, trl);
        prop_assume!(config.scope() != Scope::MiniBatch);
        let a = Arrays::new(seed, &lens, 0.25);
        let whole = loss(&a, &config, None);
        let cut = cut.min(lens.len());
        let order: Vec<usize> = (0..lens.len()).collect();
        let parts = [a.reordered(&order[..cut]), a.reordered(&order[cut..])];
        let counts = counts(&a);
        let parts = parts.map(|part| loss(&part, &config, Some(&counts)));
        prop_assert!(close(whole.loss, parts[0].loss + parts[1].loss));
        let joined = [&parts[0].d_log_probs[..], &parts[1].d_log_probs[..]].concat();
        prop_assert_eq!(&whole.d_log_probs, &joined);
        let joined = [&parts[0].d_entropies[..], &parts[1].d_entropies[..]].concat();
        prop_assert_eq!(&whole.d_entropies, &joined);
        let mut merged = parts[0].metrics;
        merged.merge(&parts[1].metrics);
        prop_assert!(close(merged.ppo_kl(), whole.metrics.ppo_kl()));
        prop_assert_eq!(merged.num_clipped, whole.metrics.num_clipped);
    }

    /// The order of rows permutes the gradient and nothing else.
    #[test]
    fn packing_order_changes_nothing(
        seed in any::<u64>(), lens in rows(), mode in 0usize..15, agg in 0usize..5, trl in 0usize..8, turn in 1usize..8,
    ) {
        let config = config(mode, agg, trl);
        // clip_cov draws its tokens by slot; kl_cov breaks ties by slot.
        prop_assume!(!matches!(config.loss_mode, LossMode::ClipCov | LossMode::KlCov));
        let a = Arrays::new(seed, &lens, 0.25);
        let order: Vec<usize> = (0..lens.len()).map(|i| (i + turn) % lens.len()).collect();
        let b = a.reordered(&order);
        let (one, other) = (loss(&a, &config, None), loss(&b, &config, None));
        prop_assert!(close(one.loss, other.loss));
        let permuted = Arrays { log_probs: one.d_log_probs, ..a }.reordered(&order).log_probs;
        let bypass = config.loss_mode == LossMode::BypassMode;
        prop_assert!(permuted.iter().zip(&other.d_log_probs).all(|(x, y)| x == y || (bypass && close(*x, *y))));
    }

    /// Padding (masked slots with any content) changes no bit, and gets exactly no gradient.
    #[test]
    fn padding_and_masked_tokens_change_nothing(
        seed in any::<u64>(), lens in rows(), mode in 0usize..15, agg in 0usize..5, trl in 0usize..8, pad in 1usize..4,
    ) {
        let config = config(mode, agg, trl);
        prop_assume!(config.loss_mode != LossMode::ClipCov);
        let a = Arrays::new(seed, &lens, 0.25);
        let padded_lens: Vec<usize> = lens.iter().map(|len| len + pad).collect();
        let mut b = Arrays::new(seed ^ 1, &padded_lens, 0.0);
        b.mask.fill(0);
        for (row, len) in lens.iter().copied().enumerate() {
            let (from, to) = (a.offsets[row], b.offsets[row]);
            for k in 0..len {
                b.mask[to + k] = a.mask[from + k];
                b.log_probs[to + k] = a.log_probs[from + k];
                b.old[to + k] = a.old[from + k];
                b.reference[to + k] = a.reference[from + k];
                b.engine[to + k] = a.engine[from + k];
                b.entropies[to + k] = a.entropies[from + k];
                b.advantages[to + k] = a.advantages[from + k];
                b.weights[to + k] = a.weights[from + k];
            }
            for k in len..len + pad {
                b.log_probs[to + k] = f64::NAN;
                b.old[to + k] = f64::INFINITY;
            }
        }
        let (plain, padded) = (loss(&a, &config, None), loss(&b, &config, None));
        prop_assert_eq!(plain.loss, padded.loss);
        for (row, len) in lens.iter().copied().enumerate() {
            let (from, to) = (a.offsets[row], b.offsets[row]);
            let kept = &padded.d_log_probs[to..to + len];
            prop_assert_eq!(&plain.d_log_probs[from..from + len], kept);
        }
        for (t, mask) in b.mask.iter().enumerate() {
            prop_assert!(*mask == 1 || (padded.d_log_probs[t] == 0.0 && padded.d_entropies[t] == 0.0));
        }
    }

    /// Group-relative advantages add up to 0 within a group.
    #[test]
    fn group_advantages_sum_to_zero(seed in any::<u64>(), sizes in prop::collection::vec(2usize..6, 1..5)) {
        let groups: Vec<u64> = sizes.iter().enumerate().flat_map(|(g, n)| vec![g as u64; *n]).collect();
        let a = Arrays::new(seed, &vec![1; groups.len()], 0.0);
        for estimator in [AdvEstimator::Grpo, AdvEstimator::Rloo, AdvEstimator::Opo, AdvEstimator::Gpg] {
            let out = advantages(estimator, &a, &groups, &a.reference).expect("advantages");
            for g in 0..sizes.len() as u64 {
                let sum: f64 = (0..groups.len()).filter(|i| groups[*i] == g).map(|i| out[i]).sum();
                prop_assert!(sum.abs() < 1e-9, "{:?}: {}", estimator, sum);
            }
        }
    }

    /// Groups of one, equal rewards, empty and fully masked rows: finite numbers, or a named error.
    #[test]
    fn advantages_are_never_nan(
        seed in any::<u64>(), lens in rows(), masked in 0.0f64..1.2, constant in any::<bool>(),
        singles in any::<bool>(),
    ) {
        let a = Arrays::new(seed, &lens, masked);
        let groups: Vec<u64> = (0..lens.len() as u64).map(|i| if singles { i } else { i / 3 }).collect();
        let rewards: Vec<f64> = (0..lens.len()).map(|i| if constant { 0.1 } else { a.noise(i) }).collect();
        for estimator in ESTIMATORS {
            if let Ok(out) = advantages(estimator, &a, &groups, &rewards) {
                prop_assert!(out.iter().all(|v| v.is_finite()), "{:?}", estimator);
                let masked_out = out.iter().zip(&a.mask).all(|(v, m)| *m == 1 || *v == 0.0);
                prop_assert!(masked_out, "{:?} gives masked tokens an advantage", estimator);
            }
        }
    }

    /// On-policy tokens have a weight of exactly 1 and are never rejected.
    #[test]
    fn on_policy_weights_are_exactly_one(seed in any::<u64>(), lens in rows(), normalise in any::<bool>()) {
        let a = Arrays::new(seed, &lens, 0.25);
        let batch = TokenBatch::new(&a.offsets, &a.mask).expect("a batch");
        for rollout_is in [IsLevel::Token, IsLevel::Sequence] {
            for threshold in [Threshold::Upper(2.0), Threshold::Text("0.5_2.0".to_owned())] {
                let config = RolloutCorrectionConfig {
                    rollout_is,
                    rollout_is_threshold: threshold,
                    rollout_is_batch_normalize: normalise,
                    rollout_rs: "token_k1,seq_mean_k1,seq_max_k2,seq_sum_k3".to_owned(),
                    rollout_rs_threshold: Some(Threshold::Text("0.99_1.01,0.99_1.01,1e-9,1e-9".to_owned())),
                    ..RolloutCorrectionConfig::default()
                };
                let out = rollout_correction(&config, &batch, &a.old, &a.old).expect("weights");
                prop_assert_eq!(&out.response_mask, &a.mask);
                let weights = out.weights.expect("weights");
                prop_assert!(weights.iter().zip(&a.mask).all(|(w, m)| *w == f64::from(*m)));
                if batch.num_tokens() > 0 {
                    prop_assert_eq!(out.off_policy.kl, 0.0);
                    prop_assert_eq!(out.off_policy.chi2_token, 0.0);
                }
            }
        }
    }

    /// Losses over pairs do not depend on the split either, where they look at single pairs.
    #[test]
    fn a_split_of_pairs_changes_nothing(seed in any::<u64>(), cut in 0usize..4) {
        let a = Arrays::new(seed, &[4, 3, 5, 2, 6, 1, 3, 3], 0.0);
        let pairs: Vec<Pair> = (0..4).map(|i| Pair { chosen: 2 * i, rejected: 2 * i + 1 }).collect();
        let batch = TokenBatch::new(&a.offsets, &a.mask).expect("a batch");
        let input = PreferenceInput {
            batch, pairs: &pairs, log_probs: &a.log_probs, ref_log_probs: Some(&a.reference), ..Default::default()
        };
        let counts = PreferenceCounts::of(&input);
        let dpo = DpoConfig { loss_type: vec![DpoLossType::Ipo, DpoLossType::Sft], ..DpoConfig::default() };
        type Loss<'a> = &'a dyn Fn(&PreferenceInput) -> PreferenceOutput;
        let losses: [Loss; 3] = [
            &|input| dpo_loss(&dpo, input, &counts).expect("a loss"),
            &|input| cpo_loss(&CpoConfig::default(), input, &counts).expect("a loss"),
            &|input| orpo_loss(&OrpoConfig::default(), input, &counts).expect("a loss"),
        ];
        for loss in losses {
            let whole = loss(&input);
            let parts = [&pairs[..cut], &pairs[cut..]].map(|pairs| loss(&PreferenceInput { pairs, ..input }));
            prop_assert!(close(whole.loss, parts[0].loss + parts[1].loss));
            for t in 0..whole.d_log_probs.len() {
                prop_assert_eq!(whole.d_log_probs[t], parts[0].d_log_probs[t] + parts[1].d_log_probs[t]);
            }
        }
    }
}

/// What the laws do with a batch.
trait Rows {
    /// The rows in another order, or some of them.
    fn reordered(&self, order: &[usize]) -> Arrays;
    /// A reward for row `i`.
    fn noise(&self, i: usize) -> f64;
}

impl Rows for Arrays {
    /// Rows in another order.
    fn reordered(&self, order: &[usize]) -> Arrays {
        let mut offsets = vec![0];
        for row in order {
            offsets.push(offsets[offsets.len() - 1] + self.offsets[row + 1] - self.offsets[*row]);
        }
        fn pick<T: Copy>(from: &Arrays, values: &[T], order: &[usize]) -> Vec<T> {
            order.iter().flat_map(|row| values[from.offsets[*row]..from.offsets[row + 1]].to_vec()).collect()
        }
        Arrays {
            offsets,
            mask: pick(self, &self.mask, order),
            log_probs: pick(self, &self.log_probs, order),
            old: pick(self, &self.old, order),
            reference: pick(self, &self.reference, order),
            engine: pick(self, &self.engine, order),
            entropies: pick(self, &self.entropies, order),
            advantages: pick(self, &self.advantages, order),
            weights: pick(self, &self.weights, order),
        }
    }

    fn noise(&self, i: usize) -> f64 {
        temper_types::uniform53(self.offsets.len() as u64, i as u64) - 0.5
    }
}

fn advantages(
    estimator: AdvEstimator,
    a: &Arrays,
    groups: &[u64],
    rewards: &[f64],
) -> Result<Vec<f64>, temper_algos::Error> {
    let components = [rewards, rewards];
    let squares: Vec<f64> = a.old.iter().map(|o| o.exp().powi(2)).collect();
    let input = AdvantageInput {
        batch: TokenBatch::new(&a.offsets, &a.mask)?,
        group_ids: groups,
        rewards: Rewards::Sequence(&rewards[..groups.len()]),
        values: Some(&a.entropies),
        old_log_probs: Some(&a.old),
        sum_pi_squared: Some(&squares),
        rollout_is_weights: None,
        reward_baselines: Some(rewards),
        reward_components: Some(&components),
    };
    let config = AdvantageConfig { adv_estimator: estimator, ..AdvantageConfig::default() };
    compute_advantages(&config, &input).map(|out| out.advantages)
}

#[test]
fn an_empty_batch_has_loss_zero_and_no_gradient() {
    for (mode, name) in LOSS_MODES.into_iter().enumerate() {
        for lens in [&[][..], &[0, 0][..], &[3, 2][..]] {
            let mut a = Arrays::new(9, lens, 0.0);
            a.mask.fill(0);
            let out = loss(&a, &config(mode, 0, 0), None);
            assert_eq!(out.loss, 0.0, "{name:?}");
            assert!(out.d_log_probs.iter().all(|d| *d == 0.0));
        }
    }
    let batch = TokenBatch::default();
    assert_eq!(sft_loss(SftLossType::Nll, &batch, &[], 0).expect("a loss").loss, 0.0);
}

#[test]
fn numbers_that_are_not_finite_are_named() {
    let mut a = Arrays::new(4, &[2, 3], 0.0);
    a.log_probs[3] = f64::NAN;
    let batch = TokenBatch::new(&a.offsets, &a.mask).expect("a batch");
    let input = PolicyLossInput {
        batch,
        log_probs: &a.log_probs,
        old_log_probs: &a.old,
        advantages: &a.advantages,
        ..PolicyLossInput::default()
    };
    let error = policy_loss(&PolicyLossConfig::default(), &input, &GlobalCounts::of(&batch, 1.0)).expect_err("NaN");
    assert_eq!(error.to_string(), "policy_loss: `log_probs` of row 1, token 1 is NaN: expected a finite number");
    let rewards = [1.0, f64::INFINITY];
    let input =
        AdvantageInput { batch, group_ids: &[0, 0], rewards: Rewards::Sequence(&rewards), ..Default::default() };
    let error = compute_advantages(&AdvantageConfig::default(), &input).expect_err("infinity");
    assert!(error.to_string().contains("row 1"), "{error}");
}

#[test]
fn a_group_of_one_and_a_group_without_variance_behave_as_documented() {
    let a = Arrays::new(4, &[1, 1, 1], 0.0);
    let groups = [0, 1, 1];
    let rewards = [0.7, 0.3, 0.3];
    let of = |estimator| advantages(estimator, &a, &groups, &rewards).expect("advantages");
    assert_eq!(of(AdvEstimator::Grpo)[1..], [0.0, 0.0]);
    assert!((of(AdvEstimator::Grpo)[0] - 0.7 / (1.0 + 1e-6)).abs() < 1e-15);
    assert_eq!(of(AdvEstimator::Rloo), [0.7, 0.0, 0.0]);
    assert_eq!(of(AdvEstimator::RlooVectorized), [0.0, 0.0, 0.0]);
    assert_eq!(of(AdvEstimator::Opo), [0.7, 0.0, 0.0]);
    let error = advantages(AdvEstimator::GrpoPassk, &a, &groups, &rewards).expect_err("a group of one");
    assert!(error.to_string().contains("two or more samples"), "{error}");
}

#[test]
fn policy_loss_settings_have_these_keys() {
    let keys =
        |value: serde_json::Value| -> Vec<String> { value.as_object().expect("a table").keys().cloned().collect() };
    let config = serde_json::to_value(PolicyLossConfig::default()).expect("JSON");
    assert_eq!(
        keys(config),
        [
            "loss_mode",
            "loss_agg_mode",
            "clip_ratio",
            "clip_ratio_low",
            "clip_ratio_high",
            "clip_ratio_c",
            "entropy_coeff",
            "use_kl_loss",
            "kl_loss_coef",
            "kl_loss_type",
            "unbiased_kl",
            "tau_pos",
            "tau_neg",
            "clip_cov_ratio",
            "clip_cov_lb",
            "clip_cov_ub",
            "kl_cov_ratio",
            "ppo_kl_coef",
            "dro_beta",
            "opsm_delta",
            "rollout_correction",
            "trl",
        ]
    );
    let config = serde_json::to_value(AdvantageConfig::default()).expect("JSON");
    assert_eq!(
        keys(config),
        [
            "adv_estimator",
            "gamma",
            "lam",
            "norm_adv_by_std_in_grpo",
            "epsilon",
            "f_norm",
            "handle_zero_tail",
            "gdpo_reward_keys",
            "gdpo_reward_weights",
            "scale_rewards",
            "multi_objective_aggregation",
        ]
    );
}
