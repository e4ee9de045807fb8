//! Every loss's gradient against central differences in f64.
//!
//! A coordinate at a kink (where the two one-sided slopes differ) is passed over and counted; at most a quarter may be.
//! Losses whose weights are detached are linear in the log-probs, `loss = sum_t d_t log_prob_t`, and that is checked.

mod common;

use common::Arrays;
use temper_algos::distill::{forward_kl_top_k, generalized_jsd};
use temper_algos::distribution::{token_gradient, token_statistics};
use temper_algos::preference::{
    CpoConfig, CpoLossType, DpoConfig, DpoLossType, FDivergence, GdpoConfig, GdpoInput, KtoConfig, KtoInput,
    KtoLossType, OrpoConfig, Pair, PreferenceCounts, PreferenceInput, RewardModelConfig, cpo_loss, dpo_loss, gdpo_loss,
    kto_loss, orpo_loss, reward_model_loss,
};
use temper_algos::{
    DecoupledOptions, GlobalCounts, ImportanceLevel, KlType, LossAggMode, LossMode, PolicyLossConfig, PolicyLossInput,
    SftLossType, TokenBatch, TrlConfig, TrlLossType, ValueLossConfig, ValueLossInput, decoupled_loss, policy_loss,
    sft_loss, value_loss,
};

const STEP: f64 = 1e-5;

/// Compare a gradient with central differences of its own loss.
fn check(name: &str, x: &[f64], f: impl Fn(&[f64]) -> (f64, Vec<f64>)) {
    let (centre, gradient) = f(x);
    assert_eq!(gradient.len(), x.len(), "{name}: length of the gradient");
    let mut kinks = 0;
    for i in 0..x.len() {
        let moved = |h: f64| {
            let mut y = x.to_vec();
            y[i] += h;
            f(&y).0
        };
        let (up, down) = (moved(STEP), moved(-STEP));
        let (right, left) = ((up - centre) / STEP, (centre - down) / STEP);
        let scale = 1.0 + right.abs().max(left.abs());
        if (right - left).abs() > 1e-3 * scale {
            kinks += 1;
            continue;
        }
        let expected = (up - down) / (2.0 * STEP);
        assert!((gradient[i] - expected).abs() < 1e-6 * scale, "{name}[{i}]: expected {expected}, got {}", gradient[i]);
    }
    assert!(kinks * 4 <= x.len(), "{name}: {kinks} of {} coordinates lie at kinks", x.len());
}

fn arrays(seed: u64) -> Arrays {
    Arrays::new(seed, &[5, 3, 0, 6, 1, 4], 0.2)
}

fn policy(a: &Arrays, config: &PolicyLossConfig, log_probs: &[f64], entropies: &[f64]) -> (f64, Vec<f64>, Vec<f64>) {
    let batch = TokenBatch::new(&a.offsets, &a.mask).expect("a batch");
    let input = PolicyLossInput {
        batch,
        log_probs,
        old_log_probs: &a.old,
        advantages: &a.advantages,
        ref_log_probs: Some(&a.reference),
        entropies: Some(entropies),
        rollout_is_weights: Some(&a.weights),
        rollout_log_probs: Some(&a.engine),
        noise_seed: 3,
    };
    let out = policy_loss(config, &input, &GlobalCounts::of(&batch, 9.0)).expect("a loss");
    (out.loss, out.d_log_probs, out.d_entropies)
}

fn config(loss_mode: LossMode) -> PolicyLossConfig {
    PolicyLossConfig {
        loss_mode,
        clip_ratio_high: Some(0.28),
        dro_beta: 0.3,
        clip_cov_lb: 0.01,
        clip_cov_ratio: 0.3,
        kl_cov_ratio: 0.3,
        ..PolicyLossConfig::default()
    }
}

#[test]
fn policy_losses_match_central_differences() {
    let smooth = [
        LossMode::Vanilla,
        LossMode::Gspo,
        LossMode::Sapo,
        LossMode::GeoMean,
        LossMode::Gpg,
        LossMode::Reinforce,
        LossMode::KlCov,
        LossMode::Dro,
        LossMode::SequencePpo,
    ];
    for (seed, mode) in smooth.into_iter().enumerate() {
        let mut a = arrays(seed as u64);
        if mode == LossMode::Gspo {
            // Token weights would break the sequence form whose gradient the token form sums to.
            a.weights.fill(1.0);
        }
        let config = config(mode);
        check(&format!("{mode:?}"), &a.log_probs, |x| {
            let (loss, d, _) = policy(&a, &config, x, &a.entropies);
            (loss, d)
        });
    }
}

#[test]
fn clip_cov_matches_where_its_candidates_stay() {
    // A tiny share drops one token; its gradient is 0 and the rest is the clipped surrogate.
    let a = arrays(31);
    let config = PolicyLossConfig { clip_cov_ratio: 1e-6, ..config(LossMode::ClipCov) };
    let (_, d, _) = policy(&a, &config, &a.log_probs, &a.entropies);
    let plain = PolicyLossConfig { loss_mode: LossMode::Vanilla, clip_ratio_c: 0.0, ..config };
    let (_, expected, _) = policy(&a, &plain, &a.log_probs, &a.entropies);
    let differing: Vec<usize> = (0..d.len()).filter(|t| d[*t] != expected[*t]).collect();
    assert_eq!(differing.len(), 1);
    assert_eq!(d[differing[0]], 0.0);
}

#[test]
fn aggregation_modes_kl_and_entropy_match_central_differences() {
    let modes = [
        LossAggMode::TokenMean,
        LossAggMode::TokenSum,
        LossAggMode::SeqMeanTokenSum,
        LossAggMode::SeqMeanTokenSumNorm,
        LossAggMode::SeqMeanTokenMean,
    ];
    for (seed, loss_agg_mode) in modes.into_iter().enumerate() {
        for kl_loss_type in [KlType::K1, KlType::Abs, KlType::K2, KlType::K3] {
            let a = arrays(100 + seed as u64);
            let config = PolicyLossConfig {
                loss_agg_mode,
                use_kl_loss: true,
                kl_loss_coef: 0.3,
                kl_loss_type,
                entropy_coeff: 0.02,
                ..config(LossMode::Vanilla)
            };
            let name = format!("{loss_agg_mode:?} {kl_loss_type:?}");
            check(&name, &a.log_probs, |x| {
                let (loss, d, _) = policy(&a, &config, x, &a.entropies);
                (loss, d)
            });
            check(&format!("{name} entropy"), &a.entropies, |x| {
                let (loss, _, d) = policy(&a, &config, &a.log_probs, x);
                (loss, d)
            });
        }
    }
}

#[test]
fn straight_through_kl_has_the_gradient_of_k2() {
    for (plus, plain) in [(KlType::K1Plus, KlType::K1), (KlType::AbsPlus, KlType::Abs), (KlType::K3Plus, KlType::K3)] {
        for (p, r) in [(-0.3, -1.2), (-2.0, -0.1), (-1.0, -1.0)] {
            assert_eq!(plus.estimate(p, r).value, plain.estimate(p, r).value);
            assert_eq!(plus.estimate(p, r).d, KlType::K2.estimate(p, r).d);
        }
    }
}

#[test]
fn trl_losses_match_central_differences() {
    let types = [TrlLossType::Grpo, TrlLossType::Bnpo, TrlLossType::DrGrpo, TrlLossType::Dapo, TrlLossType::Luspo];
    for (seed, loss_type) in types.into_iter().chain([TrlLossType::Sapo]).enumerate() {
        for level in [ImportanceLevel::Token, ImportanceLevel::Sequence] {
            for corrected in [false, true] {
                let a = arrays(200 + seed as u64);
                let trl = TrlConfig {
                    loss_type,
                    importance_sampling_level: level,
                    use_bias_correction_kl: corrected,
                    delta: 1.6,
                    ..TrlConfig::default()
                };
                let base = config(LossMode::Trl);
                let config =
                    PolicyLossConfig { use_kl_loss: true, kl_loss_coef: 0.2, entropy_coeff: 0.01, trl, ..base };
                check(&format!("{loss_type:?} {level:?} {corrected}"), &a.log_probs, |x| {
                    let (loss, d, _) = policy(&a, &config, x, &a.entropies);
                    (loss, d)
                });
            }
        }
    }
}

#[test]
fn losses_with_detached_weights_are_linear_in_the_log_probs() {
    let trl = |loss_type| PolicyLossConfig {
        clip_ratio_high: Some(1.2),
        trl: TrlConfig { loss_type, ..TrlConfig::default() },
        ..config(LossMode::Trl)
    };
    let mut configs = vec![
        config(LossMode::Cispo),
        config(LossMode::DppoTv),
        config(LossMode::DppoKl),
        trl(TrlLossType::Cispo),
        trl(TrlLossType::Vespo),
    ];
    let mut bypass = config(LossMode::BypassMode);
    bypass.rollout_correction.loss_type = temper_algos::BypassLoss::Reinforce;
    bypass.rollout_correction.rollout_is = temper_algos::IsLevel::Token;
    bypass.rollout_correction.rollout_rs = "seq_mean_k3".to_owned();
    bypass.rollout_correction.rollout_rs_threshold = Some(temper_algos::Threshold::Upper(0.05));
    configs.push(bypass);
    for config in configs {
        let a = arrays(300);
        let (loss, d, _) = policy(&a, &config, &a.log_probs, &a.entropies);
        let linear: f64 = d.iter().zip(&a.log_probs).map(|(d, p)| d * p).sum();
        assert!(d.iter().any(|d| *d != 0.0), "{:?} has no gradient", config.loss_mode);
        assert!((loss - linear).abs() < 1e-12 * (1.0 + loss.abs()), "{:?}: {loss} and {linear}", config.loss_mode);
    }
}

#[test]
fn decoupled_loss_matches_central_differences() {
    for level in [ImportanceLevel::Token, ImportanceLevel::Sequence] {
        let a = arrays(41);
        let batch = TokenBatch::new(&a.offsets, &a.mask).expect("a batch");
        let options = DecoupledOptions { clip_low: 0.2, clip_high: 0.28, dual_clip: 3.0, level };
        check(&format!("decoupled {level:?}"), &a.log_probs, |x| {
            let input = PolicyLossInput {
                batch,
                log_probs: x,
                old_log_probs: &a.old,
                advantages: &a.advantages,
                rollout_is_weights: Some(&a.weights),
                ..PolicyLossInput::default()
            };
            let out = decoupled_loss(&options, &input, &GlobalCounts::of(&batch, 1.0)).expect("a loss");
            (out.loss, out.d_log_probs)
        });
    }
}

#[test]
fn sft_and_value_losses_match_central_differences() {
    let a = arrays(51);
    let batch = TokenBatch::new(&a.offsets, &a.mask).expect("a batch");
    check("nll", &a.log_probs, |x| {
        let out = sft_loss(SftLossType::Nll, &batch, x, 11).expect("a loss");
        (out.loss, out.d_log_probs)
    });
    let dft = sft_loss(SftLossType::Dft, &batch, &a.log_probs, 11).expect("a loss");
    let linear: f64 = dft.d_log_probs.iter().zip(&a.log_probs).map(|(d, p)| d * p).sum();
    assert!((dft.loss - linear).abs() < 1e-12);
    for cliprange_value in [0.0, 0.2] {
        let config = ValueLossConfig { cliprange_value, loss_agg_mode: LossAggMode::SeqMeanTokenMean };
        check("value", &a.log_probs, |x| {
            let input = ValueLossInput { batch, predictions: x, old_values: &a.old, returns: &a.reference };
            let out = value_loss(&config, &input, &GlobalCounts::of(&batch, 1.0)).expect("a loss");
            (out.loss, out.d_predictions)
        });
    }
}

const PAIRS: [Pair; 3] =
    [Pair { chosen: 0, rejected: 1 }, Pair { chosen: 2, rejected: 3 }, Pair { chosen: 5, rejected: 4 }];

fn preference<'a>(a: &'a Arrays, log_probs: &'a [f64]) -> PreferenceInput<'a> {
    PreferenceInput {
        batch: TokenBatch::new(&a.offsets, &a.mask).expect("a batch"),
        pairs: &PAIRS,
        log_probs,
        ref_log_probs: Some(&a.reference),
        ..PreferenceInput::default()
    }
}

fn pair_arrays(seed: u64) -> Arrays {
    let mut a = Arrays::new(seed, &[5, 3, 2, 6, 1, 4], 0.2);
    a.mask[13] = 1;
    a.mask[16] = 1;
    a
}

#[test]
fn the_dpo_family_matches_central_differences() {
    use DpoLossType::*;
    let kinds = [
        Sigmoid,
        Cdpo,
        Robust,
        Hinge,
        Ipo,
        IpoSum,
        SigmoidNorm,
        ExoPair,
        NcaPair,
        BcoPair,
        SppoHard,
        Aot,
        AotUnpaired,
        ApoZero,
        ApoDown,
        Discopop,
        Sft,
    ];
    let divergences =
        [FDivergence::ReverseKl, FDivergence::ForwardKl, FDivergence::JsDivergence, FDivergence::AlphaDivergence];
    for (seed, kind) in kinds.into_iter().enumerate() {
        for f_divergence_type in divergences {
            let a = pair_arrays(400 + seed as u64);
            let config = DpoConfig {
                loss_type: vec![kind, Sigmoid],
                loss_weights: vec![0.7, 0.2],
                beta: 0.4,
                label_smoothing: 0.1,
                discopop_tau: 0.5,
                ld_alpha: Some(0.5),
                f_divergence_type,
                ..DpoConfig::default()
            };
            check(&format!("{kind:?} {f_divergence_type:?}"), &a.log_probs, |x| {
                let input = preference(&a, x);
                let out = dpo_loss(&config, &input, &PreferenceCounts::of(&input)).expect("a loss");
                (out.loss, out.d_log_probs)
            });
        }
    }
}

#[test]
fn losses_without_reference_match_central_differences() {
    for (seed, loss_type) in
        [CpoLossType::Sigmoid, CpoLossType::Hinge, CpoLossType::Ipo, CpoLossType::Simpo].into_iter().enumerate()
    {
        for alpha in [0.0, 0.25] {
            let a = pair_arrays(500 + seed as u64);
            let config = CpoConfig { loss_type, alpha, label_smoothing: 0.1, beta: 0.3, ..CpoConfig::default() };
            check(&format!("{loss_type:?} {alpha}"), &a.log_probs, |x| {
                let input = preference(&a, x);
                let out = cpo_loss(&config, &input, &PreferenceCounts::of(&input)).expect("a loss");
                (out.loss, out.d_log_probs)
            });
        }
    }
    let a = pair_arrays(510);
    let everything = vec![1; a.mask.len()];
    check("orpo", &a.log_probs, |x| {
        let input = PreferenceInput { nll_mask: Some(&everything), ..preference(&a, x) };
        let out = orpo_loss(&OrpoConfig::default(), &input, &PreferenceCounts::of(&input)).expect("a loss");
        (out.loss, out.d_log_probs)
    });
}

#[test]
fn unpaired_and_score_losses_match_central_differences() {
    let a = Arrays::new(61, &[8], 0.0);
    let labels = [true, false, true, true, false, false, true, false];
    for loss_type in [KtoLossType::Kto, KtoLossType::ApoZeroUnpaired] {
        let config = KtoConfig { loss_type, desirable_weight: 1.33, ..KtoConfig::default() };
        check(&format!("{loss_type:?}"), &a.log_probs, |x| {
            let kl_log_ratios = &[0.3, -0.1, 0.2];
            let input = KtoInput { log_probs: x, ref_log_probs: &a.reference, labels: &labels, kl_log_ratios };
            let out = kto_loss(&config, &input, 8).expect("a loss");
            (out.loss, out.d_log_probs)
        });
    }
    let config = RewardModelConfig { center_rewards_coefficient: 0.1 };
    check("reward model", &a.log_probs, |x| {
        let (chosen, rejected) = x.split_at(4);
        let margins = [0.1, 0.0, 0.4, -0.2];
        let out = reward_model_loss(&config, chosen, rejected, Some(&margins), 4).expect("a loss");
        (out.loss, [out.d_chosen, out.d_rejected].concat())
    });
}

#[test]
fn group_distributional_preferences_match_central_differences() {
    let a = Arrays::new(71, &[14], 0.0);
    let laws = [0.5, 0.3, 0.2, 0.0, 0.6, 0.4];
    check("gdpo", &a.log_probs, |x| {
        let texts = [&x[6..8], &x[8..11]];
        let chosen = [x[11] * 2.0, x[12]];
        let input = GdpoInput {
            belief_probs: &laws,
            class_log_probs: &x[..6],
            belief_log_probs: &texts,
            chosen_log_ratios: &chosen,
            rejected_log_ratios: &[x[13], 0.3],
        };
        let out = gdpo_loss(&GdpoConfig { beta: 0.5, label_smoothing: 0.1 }, &input).expect("a loss");
        let mut d = out.d_class_log_probs.clone();
        d.extend([out.d_belief_log_probs[0]; 2]);
        d.extend([out.d_belief_log_probs[1]; 3]);
        d.extend([2.0 * out.d_chosen[0], out.d_chosen[1], -out.d_chosen[0]]);
        (out.loss, d)
    });
}

#[test]
fn laws_over_the_vocabulary_match_central_differences() {
    let a = Arrays::new(81, &[9], 0.0);
    let logits: Vec<f64> = a.log_probs.iter().map(|v| 2.0 * v).collect();
    check("log-prob and entropy", &logits, |x| {
        let s = token_statistics(x, 4, 0.7).expect("statistics");
        (0.6 * s.log_prob - 0.3 * s.entropy, token_gradient(x, 4, 0.7, 0.6, -0.3).expect("a gradient"))
    });
    for clamp in [None, Some(-2.0)] {
        check("top-k forward KL", &logits, |x| {
            let out = forward_kl_top_k(x, &[-0.5, -1.6, -2.3], &[3, 7, 0], clamp).expect("a divergence");
            (out.value, out.d_logits)
        });
    }
    for beta in [0.0, 0.3, 1.0] {
        check("generalised JSD", &logits, |x| {
            let out = generalized_jsd(x, &a.old, beta, 0.8).expect("a divergence");
            (out.value, out.d_logits)
        });
    }
}
