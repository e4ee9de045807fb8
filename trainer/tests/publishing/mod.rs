//! Ranks that train and publish, for tests of what others get of their weights.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use temper_algos::{Objective, PolicyLossConfig};
use temper_proto::{GlobalCounts, MiniBatch, OptimizerConfig, StageSpec, TokenSequence, TrainRow, TrainerService};
use temper_tensor::{CpuConfig, CpuDevice, Device};
use temper_trainer::{LocalTrainerService, Sharding, Trainer, TrainerGroup, load_local_ranks};
use temper_types::DType;

pub fn model_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../actor/tests/data/llama")
}

pub fn device() -> Arc<dyn Device> {
    Arc::new(CpuDevice::new(CpuConfig { num_threads: 1, isa: None }))
}

pub fn ranks(world: usize, sharding: Sharding) -> Vec<Arc<LocalTrainerService>> {
    let (device, dir) = (device(), model_dir());
    let load = |ranks| Trainer::load_rank(Arc::clone(&device), (&dir, DType::F32), Vec::new(), Some(ranks));
    let trainers = load_local_ranks(world, sharding, Duration::from_secs(60), load).expect("the ranks load");
    trainers.into_iter().map(|trainer| Arc::new(LocalTrainerService::new(trainer))).collect()
}

pub fn together(ranks: &[Arc<LocalTrainerService>]) -> TrainerGroup {
    let rank = |rank: &Arc<LocalTrainerService>| Arc::clone(rank) as Arc<dyn TrainerService>;
    TrainerGroup::new(ranks.iter().map(rank).collect()).expect("ranks")
}

pub fn begin(service: &dyn TrainerService) {
    let objective = Objective::Policy(PolicyLossConfig::default());
    let stage = StageSpec {
        name: "test".to_owned(),
        objective_json: serde_json::to_string(&objective).expect("plain data"),
        optimizer: OptimizerConfig::default(),
        needs_reference: true,
        max_micro_batch_tokens: 16,
        recompute_activations: false,
    };
    service.begin_stage(stage).expect("a stage");
}

pub fn update(service: &dyn TrainerService, step: u32) {
    let row = |index: u32| {
        let response_token_ids: Vec<u32> = (0..4).map(|i| (step * 31 + index * 7 + i * 3) % 90).collect();
        let sequence =
            TokenSequence { prompt_token_ids: vec![1, 2, index], response_mask: vec![1; 4], response_token_ids };
        TrainRow { advantages: vec![f64::from(index) - 1.5; 4], ..TrainRow::demonstration(sequence) }
    };
    let global = GlobalCounts { num_tokens: 16, num_sequences: 4, num_rows: 4, loss_scale_factor: 8.0 };
    let batch = MiniBatch { rows: (0..4).map(row).collect(), global, temperature: 1.0, learning_rate: 1e-2 };
    service.update(batch).expect("an update");
}
