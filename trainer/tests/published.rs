//! How weights changed since the version before, on ranks that keep what they publish.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use temper_algos::{Objective, PolicyLossConfig};
use temper_proto::{
    GlobalCounts, MiniBatch, OptimizerConfig, ServiceResult, StageSpec, TokenSequence, TrainRow, TrainerService,
    WeightRange, WeightService,
};
use temper_tensor::{CpuConfig, CpuDevice, Device};
use temper_trainer::{LocalTrainerService, Sharding, Trainer, TrainerGroup, load_local_ranks};
use temper_types::{ContentHash, DType, ErrorCode, PolicyVersion};

fn ranks(world: usize, sharding: Sharding) -> Vec<Arc<LocalTrainerService>> {
    let dir: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../actor/tests/data/llama");
    let device: Arc<dyn Device> = Arc::new(CpuDevice::new(CpuConfig { num_threads: 1, isa: None }));
    let load = |ranks| Trainer::load_rank(Arc::clone(&device), (&dir, DType::F32), Vec::new(), Some(ranks));
    let trainers = load_local_ranks(world, sharding, Duration::from_secs(60), load).expect("the ranks load");
    trainers.into_iter().map(|trainer| Arc::new(LocalTrainerService::new(trainer))).collect()
}

fn group(ranks: &[Arc<LocalTrainerService>]) -> TrainerGroup {
    let rank = |rank: &Arc<LocalTrainerService>| Arc::clone(rank) as Arc<dyn TrainerService>;
    TrainerGroup::new(ranks.iter().map(rank).collect()).expect("ranks")
}

fn begin(service: &dyn TrainerService) {
    let stage = StageSpec {
        name: "test".to_owned(),
        objective_json: serde_json::to_string(&Objective::Policy(PolicyLossConfig::default())).expect("plain data"),
        optimizer: OptimizerConfig::default(),
        needs_reference: false,
        max_micro_batch_tokens: 16,
        recompute_activations: false,
    };
    service.begin_stage(stage).expect("a stage");
}

fn update(service: &dyn TrainerService, step: u32) {
    let row = |index: u32| {
        let response_token_ids: Vec<u32> = (0..4).map(|i| (step * 31 + index * 7 + i * 3) % 90).collect();
        let sequence =
            TokenSequence { prompt_token_ids: vec![1, 2, index], response_mask: vec![1; 4], response_token_ids };
        TrainRow { advantages: vec![f64::from(index) - 1.5; 4], ..TrainRow::demonstration(sequence) }
    };
    let global = GlobalCounts { num_tokens: 16, num_sequences: 4, num_rows: 4, loss_scale_factor: 8.0 };
    let batch = MiniBatch { rows: (0..4).map(row).collect(), global, temperature: 1.0, learning_rate: 1e-3 };
    service.update(batch).expect("an update");
}

/// What a rank holds of the unit `index`, by its shared length.
fn held(rank: &LocalTrainerService, version: PolicyVersion, index: u32, of: (u64, u64)) -> Option<WeightRange> {
    let range = WeightRange { unit: index, start: of.0, len: of.1 };
    rank.pull(version, &[range], &mut |_| Ok(())).is_ok().then_some(range)
}

/// All ranges that a rank gives: whole units, or the thirds that lie inside of its part.
fn ranges(rank: &LocalTrainerService) -> Vec<WeightRange> {
    let manifest = rank.manifest().expect("a manifest");
    let mut all = Vec::new();
    for (index, len) in manifest.unit_lens.iter().enumerate() {
        let third = len / 3;
        let parts = [(0, *len), (0, third), (third, third), (2 * third, len - 2 * third)];
        all.extend(parts.into_iter().filter_map(|part| held(rank, manifest.version, index as u32, part)));
    }
    assert!(!all.is_empty());
    all
}

fn collect(mut give: impl FnMut(&mut (dyn FnMut(&[f32]) -> ServiceResult<()> + Send))) -> Vec<u32> {
    let mut bits = Vec::new();
    give(&mut |values| {
        bits.extend(values.iter().map(|x| x.to_bits()));
        Ok(())
    });
    bits
}

fn pulled(rank: &LocalTrainerService, version: PolicyVersion, ranges: &[WeightRange]) -> Vec<u32> {
    collect(|sink| rank.pull(version, ranges, sink).expect("held"))
}

fn changes(
    rank: &LocalTrainerService,
    base: ContentHash,
    version: PolicyVersion,
    ranges: &[WeightRange],
) -> Option<Vec<u32>> {
    let mut kept = false;
    let bits = collect(|sink| kept = rank.changes(base, version, ranges, sink).expect("an answer"));
    assert!(kept || bits.is_empty());
    kept.then_some(bits)
}

#[test]
fn every_rank_tells_how_its_weights_changed_since_the_version_before() {
    for (world, sharding) in [(1, Sharding::Zero2), (2, Sharding::Zero2), (2, Sharding::Zero3)] {
        let ranks = ranks(world, sharding);
        let trainer = group(&ranks);
        begin(&trainer);
        ranks.iter().for_each(|rank| rank.keep_published());
        let ranges: Vec<Vec<WeightRange>> = ranks.iter().map(|rank| ranges(rank)).collect();
        let first = ranks[0].manifest().expect("a manifest").version;
        let mut versions = vec![first];
        let mut values = vec![ranks.iter().zip(&ranges).map(|(r, of)| pulled(r, first, of)).collect::<Vec<_>>()];
        for step in 1..=3u64 {
            update(&trainer, step as u32);
            // The same weights under another number are no version of their own.
            for number in [2 * step, 2 * step + 1] {
                let version = trainer.publish(number).expect("published");
                let now: Vec<Vec<u32>> = ranks.iter().zip(&ranges).map(|(r, of)| pulled(r, version, of)).collect();
                let before = versions[step as usize - 1].hash;
                for (index, (rank, of)) in ranks.iter().zip(&ranges).enumerate() {
                    let got = changes(rank, before, version, of).expect("the version before is kept");
                    let old = &values[step as usize - 1][index];
                    let expected: Vec<u32> = now[index].iter().zip(old).map(|(a, b)| a ^ b).collect();
                    assert!(got == expected && got.iter().any(|bits| *bits != 0), "{world} {sharding:?} step {step}");
                    // Neither what is held now nor what was held long ago.
                    assert_eq!(changes(rank, version.hash, version, of), None);
                    if step > 1 {
                        assert_eq!(changes(rank, first.hash, version, of), None);
                    }
                    let error = rank.changes(before, first, of, &mut |_| Ok(())).expect_err("another version");
                    assert_eq!(error.code, ErrorCode::VersionMismatch);
                }
                if number % 2 == 0 {
                    versions.push(version);
                    values.push(now);
                }
            }
        }
    }
}

#[test]
fn a_rank_that_keeps_nothing_has_no_changes() {
    let ranks = ranks(1, Sharding::Zero2);
    let version = ranks[0].manifest().expect("a manifest").version;
    assert_eq!(changes(&ranks[0], version.hash, version, &ranges(&ranks[0])), None);
}
