//! Distillation updates: learning, the laws of an update, and teachers that are refused.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use temper_algos::distill::DistillConfig;
use temper_algos::{Objective, SftLossType};
use temper_proto::{
    DistillService, DistillSpec, GlobalCounts, MiniBatch, OptimizerConfig, ServiceResult, StageSpec, TokenSequence,
    TrainRow, TrainerService,
};
use temper_tensor::{CpuConfig, CpuDevice};
use temper_trainer::{LocalTrainerService, Trainer};
use temper_types::{DType, ErrorCode};

fn model_dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../actor/tests/data").join(name)
}

fn service(threads: usize) -> LocalTrainerService {
    let device = Arc::new(CpuDevice::new(CpuConfig { num_threads: threads, isa: None }));
    LocalTrainerService::new(Trainer::load(device, &model_dir("llama"), DType::F32, Vec::new()).expect("a fixture"))
}

fn stage(max_micro_batch_tokens: usize) -> StageSpec {
    StageSpec {
        name: "distill".to_owned(),
        objective_json: serde_json::to_string(&Objective::Sft(SftLossType::Nll)).expect("plain data"),
        optimizer: OptimizerConfig { learning_rate: 3e-3, ..OptimizerConfig::default() },
        needs_reference: false,
        max_micro_batch_tokens,
        recompute_activations: false,
    }
}

fn begin(service: &LocalTrainerService, teacher: &str, loss: &DistillConfig, max_tokens: usize) -> ServiceResult<()> {
    service.begin_stage(stage(max_tokens))?;
    let loss_json = serde_json::to_string(loss).expect("plain data");
    service.begin_distillation(DistillSpec { teacher: model_dir(teacher), loss_json })
}

/// Rows of different lengths; some tokens are masked.
fn batch() -> MiniBatch {
    let row = |index: u32| {
        let ids = |from: u32, len: u32| (0..len).map(|i| (from + 11 * i + 7 * index) % 96).collect::<Vec<u32>>();
        let response_token_ids = ids(5, 4 + index);
        let mut response_mask = vec![1; response_token_ids.len()];
        response_mask[1] = u8::from(index.is_multiple_of(2));
        let sequence = TokenSequence { prompt_token_ids: ids(1, 3 + index % 3), response_token_ids, response_mask };
        TrainRow::demonstration(sequence)
    };
    let rows: Vec<TrainRow> = (0..6).map(row).collect();
    let num_tokens = rows.iter().flat_map(|r| &r.sequence.response_mask).map(|m| u64::from(*m)).sum();
    let global = GlobalCounts { num_tokens, num_sequences: 6, num_rows: 6, loss_scale_factor: 1.0 };
    MiniBatch { rows, global, temperature: 1.0, learning_rate: 3e-3 }
}

fn losses() -> [DistillConfig; 4] {
    let jsd = |beta| DistillConfig { beta, ..DistillConfig::default() };
    [jsd(0.0), jsd(0.5), jsd(1.0), DistillConfig { beta: 0.0, top_k: 16, temperature: 0.9 }]
}

#[test]
fn every_divergence_falls_and_the_policy_comes_nearer_to_its_teacher() {
    for loss in losses() {
        let service = service(2);
        begin(&service, "qwen3", &loss, 4096).expect("a stage");
        let reports: Vec<_> = (0..12).map(|_| service.update_distilled(batch()).expect("an update")).collect();
        let (first, last) = (&reports[0], &reports[11]);
        assert!(last.loss < 0.8 * first.loss, "{loss:?}: {} to {}", first.loss, last.loss);
        assert!(last.metrics["kl"] < first.metrics["kl"], "{loss:?}");
        if loss.beta == 1.0 {
            assert_eq!(first.loss, first.metrics["kl"]);
        }
    }
}

#[test]
fn a_policy_that_is_its_teacher_has_nothing_to_learn() {
    for loss in &losses()[..3] {
        let service = service(2);
        begin(&service, "llama", loss, 4096).expect("a stage");
        let report = service.update_distilled(batch()).expect("an update");
        assert!(report.loss.abs() < 1e-7 && report.grad_norm < 1e-5, "{loss:?}: {report:?}");
    }
}

/// Splits round sums of gradients differently; threads do not.
#[test]
fn the_split_into_micro_batches_and_threads_do_not_change_the_update() {
    let [_, loss, ..] = losses();
    let run = |threads: usize, max_tokens: usize| {
        let service = service(threads);
        begin(&service, "qwen3", &loss, max_tokens).expect("a stage");
        let report = service.update_distilled(batch()).expect("an update");
        (report, service.publish(1).expect("a version"))
    };
    let (whole, version) = run(1, 4096);
    assert_eq!(run(3, 4096), (whole.clone(), version));
    let (split, _) = run(1, 1);
    assert!((split.loss - whole.loss).abs() < 1e-12, "{} and {}", split.loss, whole.loss);
    assert!((split.grad_norm - whole.grad_norm).abs() < 1e-5 * whole.grad_norm);
    assert_eq!(split.log_probs, whole.log_probs);
}

/// What a masked token is says nothing; the last one of a row is seen by no other.
#[test]
fn masked_tokens_have_no_part() {
    let run = |last: u32| {
        let service = service(1);
        begin(&service, "qwen3", &losses()[1], 4096).expect("a stage");
        let mut batch = batch();
        let sequence = &mut batch.rows[3].sequence;
        *sequence.response_token_ids.last_mut().expect("a token") = last;
        *sequence.response_mask.last_mut().expect("a token") = 0;
        let report = service.update_distilled(batch).expect("an update");
        (report.loss, service.publish(1).expect("a version"))
    };
    assert_eq!(run(3), run(70));
}

#[test]
fn a_restored_trainer_goes_on_bit_for_bit() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (model, state) = (dir.path().join("model"), dir.path().join("optimizer"));
    std::fs::create_dir_all(&state).expect("writable");
    let [first, ..] = losses();
    let whole = service(2);
    begin(&whole, "qwen3", &first, 4096).expect("a stage");
    whole.update_distilled(batch()).expect("an update");
    let version = whole.publish(1).expect("a version");
    whole.save_model(&model).expect("saved");
    whole.save_state(&state).expect("saved");
    whole.update_distilled(batch()).expect("an update");
    let resumed = service(1);
    begin(&resumed, "qwen3", &first, 4096).expect("a stage");
    resumed.restore(&model, &state, version).expect("restored");
    resumed.update_distilled(batch()).expect("an update");
    assert_eq!(resumed.publish(2).expect("a version"), whole.publish(2).expect("a version"));
}

#[test]
fn teachers_that_cannot_teach_are_refused_by_name() {
    let service = service(1);
    let [loss, ..] = losses();
    let refused = |result: ServiceResult<()>| {
        let error = result.expect_err("a refusal");
        assert_eq!(error.code, ErrorCode::InvalidArgument, "{error}");
        error.to_string()
    };
    let text = refused(begin(&service, "llama_mha_v5cfg", &loss, 4096));
    assert!(text.contains("llama_mha_v5cfg") && text.contains("vocabulary of 80: expected 96"), "{text}");
    let text = refused(begin(&service, "reward_llama", &loss, 4096));
    assert!(text.contains("expected a language model"), "{text}");
    let text = refused(begin(&service, "qwen3", &DistillConfig { top_k: 4, ..DistillConfig::default() }, 4096));
    assert!(text.contains("beta"), "{text}");
    assert!(begin(&service, "nowhere", &loss, 4096).is_err());
    service.begin_stage(stage(4096)).expect("a stage");
    let error = service.update_distilled(batch()).expect_err("no teacher");
    assert!(error.to_string().contains("no teacher"), "{error}");
    begin(&service, "qwen3", &loss, 4096).expect("a stage");
    service.begin_stage(stage(4096)).expect("the next stage");
    assert!(service.update_distilled(batch()).is_err(), "a teacher is gone when the next stage begins");
}
