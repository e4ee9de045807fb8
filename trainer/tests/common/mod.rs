//! What tests of several ranks begin with.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use temper_proto::TokenSequence;
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
