//! What tests of several ranks begin with.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use temper_algos::{LossMode, Objective, PolicyLossConfig};
use temper_proto::{OptimizerConfig, StageSpec, TokenSequence, TrainRow};
use temper_tensor::{CpuConfig, CpuDevice, Device};
use temper_trainer::{LocalTrainerService, Trainer};
use temper_types::{DType, Philox};

pub fn model_dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../actor/tests/data").join(name)
}

pub fn device() -> Arc<dyn Device> {
    Arc::new(CpuDevice::new(CpuConfig { num_threads: 1, isa: None }))
}

/// One rank.
pub fn alone(name: &str) -> LocalTrainerService {
    let trainer = Trainer::load(device(), &model_dir(name), DType::F32, Vec::new()).expect("the fixture loads");
    LocalTrainerService::new(trainer)
}

pub fn sequence(seed: u64, prompt: usize, response: usize) -> TokenSequence {
    let noise = Philox::new(seed);
    let ids = |first: usize, len: usize| (first..first + len).map(|i| noise.below(90, i as u64, 0) as u32).collect();
    TokenSequence {
        prompt_token_ids: ids(0, prompt),
        response_token_ids: ids(100, response),
        response_mask: vec![1; response],
    }
}

/// Row `index` of the mini-batch of `step`, of groups of two rows with one prompt: a response of 3 to 11 tokens, or
/// of `response`.
pub fn row_of_group(step: u64, index: usize, response: Option<usize>) -> TrainRow {
    let (noise, group) = (Philox::new(900 + step), index as u64 / 2);
    let mut one = sequence(step * 50 + group, 3 + group as usize, 0);
    let response = response.unwrap_or_else(|| 3 + noise.below(9, index as u64, 0) as usize);
    one.response_token_ids = sequence(step * 50 + 20 + index as u64, 1, response).response_token_ids;
    one.response_mask = vec![1; response];
    let advantage = noise.uniform(index as u64, 3) * 2.0 - 1.0;
    TrainRow { advantages: vec![advantage; response], ..TrainRow::demonstration(one) }
}

pub fn optimizer() -> OptimizerConfig {
    OptimizerConfig { learning_rate: 1e-3, weight_decay: 0.1, max_grad_norm: 0.5, ..OptimizerConfig::default() }
}

/// A stage of a policy loss.
pub fn policy_stage(loss_mode: LossMode, max_micro_batch_tokens: usize) -> StageSpec {
    let objective = Objective::Policy(PolicyLossConfig { loss_mode, entropy_coeff: 0.01, ..Default::default() });
    StageSpec {
        name: "test".to_owned(),
        objective_json: serde_json::to_string(&objective).expect("plain data"),
        optimizer: optimizer(),
        needs_reference: true,
        max_micro_batch_tokens,
        recompute_activations: false,
    }
}
