//! Objectives through a whole update: what they read of the model, what they report, and the laws of supervised ones.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use temper_algos::preference::DpoConfig;
use temper_algos::{BypassLoss, IsLevel, LossMode, Objective, PolicyLossConfig, SftLossType};
use temper_proto::{
    GlobalCounts, LogProbs, MiniBatch, OptimizerConfig, PolicyRole, StageSpec, TokenSequence, TrainRow, UpdateReport,
};
use temper_tensor::{CpuConfig, CpuDevice};
use temper_trainer::Trainer;
use temper_types::DType;

fn trainer(objective: &Objective, max_micro_batch_tokens: usize) -> Trainer {
    let device = Arc::new(CpuDevice::new(CpuConfig { num_threads: 2, isa: None }));
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../actor/tests/data/llama");
    let mut trainer = Trainer::load(device, &dir, DType::F32, Vec::new()).expect("the fixture loads");
    let spec = StageSpec {
        name: "test".to_owned(),
        objective_json: serde_json::to_string(objective).expect("plain data"),
        optimizer: OptimizerConfig { max_grad_norm: 0.0, ..OptimizerConfig::default() },
        needs_reference: false,
        max_micro_batch_tokens,
        recompute_activations: false,
    };
    trainer.begin_stage(spec).expect("a stage");
    trainer
}

/// A sequence whose last `num_masked` response tokens do not count.
fn sequence(prompt: &[u32], response: &[u32], num_masked: usize) -> TokenSequence {
    let counted = response.len() - num_masked;
    TokenSequence {
        prompt_token_ids: prompt.to_vec(),
        response_token_ids: response.to_vec(),
        response_mask: (0..response.len()).map(|t| u8::from(t < counted)).collect(),
    }
}

fn mini_batch(rows: Vec<TrainRow>) -> MiniBatch {
    let active = |row: &TrainRow| row.sequence.response_mask.iter().filter(|m| **m == 1).count() as u64;
    let global = GlobalCounts {
        num_tokens: rows.iter().map(active).sum(),
        num_sequences: rows.iter().filter(|row| active(row) > 0).count() as u64,
        num_rows: rows.len() as u64,
        loss_scale_factor: 8.0,
    };
    MiniBatch { rows, global, temperature: 1.0, learning_rate: 1e-3 }
}

fn log_probs(trainer: &mut Trainer, sequences: &[TokenSequence]) -> LogProbs {
    trainer.log_probs(PolicyRole::Policy, sequences, 1.0).expect("log-probs")
}

fn sum(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v)).sum()
}

fn close(what: &str, got: f64, expected: f64, tolerance: f64) {
    let bound = tolerance * (1.0 + expected.abs());
    assert!((got - expected).abs() <= bound, "{what}: expected {expected}, got {got}");
}

#[test]
fn bypass_mode_reports_its_correction() {
    let mut config = PolicyLossConfig { loss_mode: LossMode::BypassMode, ..PolicyLossConfig::default() };
    config.rollout_correction.loss_type = BypassLoss::Reinforce;
    config.rollout_correction.rollout_is = IsLevel::Token;
    let mut trainer = trainer(&Objective::Policy(config), 4096);
    let sequences = [sequence(&[1, 2, 3], &[4, 5, 6], 0), sequence(&[1, 2], &[7, 8], 0)];
    let now = log_probs(&mut trainer, &sequences).log_probs;
    let row = |(sequence, now): (&TokenSequence, &Vec<f32>), gap: f32| TrainRow {
        rollout_log_probs: now.iter().map(|v| v - gap).collect(),
        advantages: vec![1.0; now.len()],
        ..TrainRow::demonstration(sequence.clone())
    };
    let rows = |gap: f32| sequences.iter().zip(&now).map(|pair| row(pair, gap)).collect();
    let metrics: BTreeMap<String, f64> = trainer.update(&mini_batch(rows(0.25))).expect("an update").metrics;
    close("kl", metrics["rollout_corr/kl"], -0.25, 1e-6);
    close("weights", metrics["rollout_corr/rollout_is_mean"], 0.25_f64.exp(), 1e-6);
    close("ESS", metrics["rollout_corr/rollout_is_eff_sample_size"], 1.0, 1e-6);
    assert!(metrics["rollout_corr/chi2_token"] > 0.0 && metrics["rollout_corr/ppl_ratio"] != 1.0, "{metrics:?}");
}

#[test]
fn weighted_pairs_read_the_sums_of_squared_probabilities() {
    let config = DpoConfig { use_weighting: true, beta: 0.5, ..DpoConfig::default() };
    let mut trainer = trainer(&Objective::Dpo(config), 16);
    let sequences = [sequence(&[1, 2, 3], &[4, 5, 6], 0), sequence(&[1, 2, 3], &[7, 8], 0)];
    let says = log_probs(&mut trainer, &sequences);
    let confidence = |row: usize| {
        let gaps = says.log_probs[row].iter().zip(&says.sum_pi_squared[row]);
        gaps.map(|(lp, squares)| f64::from(*lp) - f64::from(*squares).ln()).sum::<f64>()
            / says.log_probs[row].len() as f64
    };
    let weight = (confidence(0) + confidence(1)).exp();
    assert!(weight < 0.99, "a pair of unlikely responses weighs less: {weight}");
    let margin = 0.5 * (sum(&says.log_probs[0]) + 6.0 - sum(&says.log_probs[1]) - 6.0);
    let rows = sequences.iter().map(|sequence| TrainRow {
        ref_log_probs: vec![-6.0 / sequence.response_token_ids.len() as f32; sequence.response_token_ids.len()],
        ..TrainRow::demonstration(sequence.clone())
    });
    let report = trainer.update(&mini_batch(rows.collect())).expect("an update");
    close("loss", report.loss, weight * (1.0 + (-margin).exp()).ln(), 1e-6);
}

fn demonstrations() -> Vec<TokenSequence> {
    vec![
        sequence(&[1, 2, 3], &[4, 5, 6, 7], 0),
        sequence(&[9], &[8, 7], 0),
        sequence(&[1, 2, 3, 5], &[6], 0),
        sequence(&[4, 4, 2], &[3, 3, 3, 1, 2], 0),
    ]
}

fn supervised(kind: SftLossType, sequences: &[TokenSequence], max_micro_batch_tokens: usize) -> UpdateReport {
    let mut trainer = trainer(&Objective::Sft(kind), max_micro_batch_tokens);
    let rows = sequences.iter().cloned().map(TrainRow::demonstration).collect();
    trainer.update(&mini_batch(rows)).expect("an update")
}

const KINDS: [SftLossType; 2] = [SftLossType::Nll, SftLossType::Dft];

/// Rows side by side in one pass or in several, in any order, padded with tokens that do not count.
#[test]
fn packing_order_and_padding_change_no_supervised_loss() {
    let all = demonstrations();
    let reversed: Vec<TokenSequence> = all.iter().rev().cloned().collect();
    let pad = |(index, one): (usize, &TokenSequence)| {
        let response: Vec<u32> = one.response_token_ids.iter().copied().chain(vec![11; index]).collect();
        sequence(&one.prompt_token_ids, &response, index)
    };
    let padded: Vec<TokenSequence> = all.iter().enumerate().map(pad).collect();
    for kind in KINDS {
        let expected = supervised(kind, &all, 4096);
        for (what, sequences, limit) in
            [("one by one", &all, 1), ("two passes", &all, 12), ("reversed", &reversed, 4096), ("padded", &padded, 14)]
        {
            let got = supervised(kind, sequences, limit);
            close(what, got.loss, expected.loss, 1e-12);
            close(what, got.grad_norm, expected.grad_norm, 1e-6);
        }
    }
}

/// The prompt and what is masked have no part in loss, gradient and count.
#[test]
fn only_completions_enter_a_supervised_loss() {
    let all = demonstrations();
    let mut trainer = trainer(&Objective::Sft(SftLossType::Nll), 4096);
    let says = log_probs(&mut trainer, &all).log_probs.concat();
    let count = says.len() as f64;
    let nll = -sum(&says) / count;
    let dft = -says.iter().map(|lp| f64::from(*lp).exp() * f64::from(*lp)).sum::<f64>() / count;
    for (kind, expected) in KINDS.into_iter().zip([nll, dft]) {
        close("loss", supervised(kind, &all, 4096).loss, expected, 1e-12);
    }
    let masked: Vec<TokenSequence> =
        all.iter().map(|one| sequence(&one.prompt_token_ids, &one.response_token_ids, 1)).collect();
    let shorter: Vec<TokenSequence> = all
        .iter()
        .map(|one| sequence(&one.prompt_token_ids, &one.response_token_ids[..one.response_token_ids.len() - 1], 0))
        .collect();
    for kind in KINDS {
        let (masked, shorter) = (supervised(kind, &masked, 4096), supervised(kind, &shorter, 4096));
        close("loss", masked.loss, shorter.loss, 1e-12);
        close("gradient", masked.grad_norm, shorter.grad_norm, 1e-6);
    }
}
