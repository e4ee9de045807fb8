//! Several ranks against one, and shardings against each other: weights, reports, memory, bytes, failures, checkpoints.

mod common;

use common::{alone, device, model_dir, optimizer, policy_stage, row_of_group, sequence};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;
use temper_actor::{CheckpointReader, ModelConfig, UnitShapes};
use temper_algos::{LossMode, ValueLossConfig};
use temper_collective::{Collective, SocketConfig, connect};
use temper_proto::{
    Backbone, DistillSpec, GlobalCounts, MiniBatch, PolicyRole, PreferencePair, ScalarModelSpec, ScalarRole, StageSpec,
    TokenSequence, TrainRow, TrainerService, UpdateReport,
};
use temper_trainer::{
    Memory, ProcessRole, ProcessShare, Ranks, Sharding, Trainer, TrainerGroup, load_local_ranks, update_bytes_sent,
};
use temper_types::{DType, ErrorCode, PolicyVersion};

const TIMEOUT: Duration = Duration::from_secs(60);
const MAX_TOKENS: usize = 24;
const SHARDINGS: [Sharding; 3] = [Sharding::Zero1, Sharding::Zero2, Sharding::Zero3];

fn local_ranks(name: &str, world: usize, sharding: Sharding) -> Vec<Trainer> {
    let (device, dir) = (device(), model_dir(name));
    let load = |ranks| Trainer::load_rank(Arc::clone(&device), (&dir, DType::F32), Vec::new(), Some(ranks));
    load_local_ranks(world, sharding, TIMEOUT, load).expect("the ranks load")
}

fn group(name: &str, world: usize, sharding: Sharding) -> TrainerGroup {
    TrainerGroup::of_trainers(local_ranks(name, world, sharding)).expect("ranks")
}

/// Groups of two rows with one prompt; lengths differ, so that ranks have different numbers of micro-batches.
fn mini_batch(step: u64) -> MiniBatch {
    let rows: Vec<TrainRow> = (0..10).map(|index| row_of_group(step, index, None)).collect();
    let num_tokens = rows.iter().map(|r| r.sequence.response_token_ids.len() as u64).sum();
    let global = GlobalCounts { num_tokens, num_sequences: 10, num_rows: 10, loss_scale_factor: 8.0 };
    MiniBatch { rows, global, temperature: 1.0, learning_rate: 1e-3 }
}

fn stage(loss_mode: LossMode) -> StageSpec {
    policy_stage(loss_mode, MAX_TOKENS)
}

/// Three updates; the last report (without the clock) and the weights.
fn train(service: &dyn TrainerService, loss_mode: LossMode) -> (UpdateReport, PolicyVersion) {
    service.begin_stage(stage(loss_mode)).expect("a stage");
    let mut last = UpdateReport::default();
    for step in 0..3 {
        last = service.update(mini_batch(step)).expect("an update");
        service.mix_reference(0.5).expect("mixed");
    }
    last.metrics.retain(|name, _| !name.starts_with("communication"));
    (last, service.publish(3).expect("a version"))
}

fn close(what: &str, got: f64, expected: f64, bound: f64) {
    assert!((got - expected).abs() <= bound * expected.abs().max(1.0), "{what}: {got}, expected {expected}");
}

/// ZeRO-1, 2, 3 and hybrid of one world: bit for bit the same. Against one rank: losses, gradient norms and log-probs
/// after three steps to 1e-4, as only the order of additions differs.
#[test]
fn shardings_agree_to_the_bit_and_worlds_within_a_bound() {
    for (name, worlds) in [("llama", &[1usize, 2, 3, 4][..]), ("qwen2", &[2])] {
        let single = alone(name);
        let (expected, _) = train(&single, LossMode::Vanilla);
        let sequences: Vec<TokenSequence> = mini_batch(7).rows.into_iter().map(|row| row.sequence).collect();
        let says = |service: &dyn TrainerService, role| service.log_probs(role, &sequences, 1.0).expect("log-probs");
        for world in worlds {
            let hybrids =
                (1..=*world).filter(|size| world % size == 0).map(|shard_size| Sharding::Hybrid { shard_size });
            let mut first: Option<(UpdateReport, PolicyVersion)> = None;
            for sharding in SHARDINGS.into_iter().chain(hybrids) {
                let group = group(name, *world, sharding);
                let got = train(&group, LossMode::Vanilla);
                let first = first.get_or_insert_with(|| got.clone());
                assert_eq!(&got, first, "{name} {world} {sharding:?}");
                close("loss", got.0.loss, expected.loss, 1e-4);
                close("grad_norm", got.0.grad_norm, expected.grad_norm, 1e-4);
                assert_eq!(got.0.num_tokens, expected.num_tokens);
                for (name, value) in &expected.metrics {
                    close(name, got.0.metrics[name], *value, 1e-4);
                }
                for role in [PolicyRole::Policy, PolicyRole::Reference] {
                    let (ours, theirs) = (says(&group, role), says(&single, role));
                    for (a, b) in ours.log_probs.concat().iter().zip(theirs.log_probs.concat()) {
                        close("a log-prob", f64::from(*a), f64::from(b), 1e-4);
                    }
                    assert_eq!(ours.entropies.len(), sequences.len());
                }
            }
        }
    }
}

/// A loss over the whole mini-batch is computed from everybody's log-probs. (What it selects turns on small
/// differences, so that worlds are compared on their first step.)
#[test]
fn losses_over_a_whole_mini_batch_are_divided_too() {
    let first = |service: &dyn TrainerService| {
        service.begin_stage(stage(LossMode::ClipCov)).expect("a stage");
        service.update(mini_batch(0)).expect("an update")
    };
    let expected = first(&alone("llama"));
    let mut versions = Vec::new();
    for sharding in SHARDINGS {
        let group = group("llama", 3, sharding);
        let report = first(&group);
        close("loss", report.loss, expected.loss, 1e-6);
        close("grad_norm", report.grad_norm, expected.grad_norm, 1e-5);
        assert_eq!(report.log_probs, expected.log_probs);
        versions.push(train(&group, LossMode::ClipCov).1);
    }
    assert!(versions.iter().all(|version| *version == versions[0]));
}

/// Every rank holds what the prediction says, and sends what the formula says.
#[test]
fn memory_and_bytes_are_as_predicted() {
    for name in ["llama", "qwen2"] {
        let shapes = UnitShapes::new(&ModelConfig::load(&model_dir(name)).expect("a config"));
        for world in [2, 4] {
            for sharding in SHARDINGS.into_iter().chain([Sharding::Hybrid { shard_size: 2 }]) {
                let ranks = local_ranks(name, world, sharding);
                let num_rounds = rounds_of(&mini_batch(0), world);
                let checked: Vec<_> = std::thread::scope(|scope| {
                    let run = |mut rank: Trainer| {
                        scope.spawn(move || {
                            rank.begin_stage(stage(LossMode::Vanilla)).expect("a stage");
                            rank.update(&mini_batch(0)).expect("an update");
                            let before = rank.counts().expect("ranks");
                            let report = rank.update(&mini_batch(0)).expect("an update");
                            let sent = rank.counts().expect("ranks").since(&before).total().bytes_sent;
                            (rank.memory(), sent, report)
                        })
                    };
                    let threads: Vec<_> = ranks.into_iter().map(run).collect();
                    threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
                });
                for (rank, (memory, sent, report)) in checked.into_iter().enumerate() {
                    let what = format!("{name} {sharding:?} rank {rank} of {world}");
                    assert_eq!(memory, Memory::predict(&shapes, sharding, (rank, world)), "{what}");
                    let predicted = update_bytes_sent(&shapes, sharding, (rank, world), num_rounds);
                    // Beside units: the squares of blocks, and the numbers of the report.
                    let small = small_bytes(&shapes, sharding, (rank, world));
                    assert_eq!(sent, predicted + small, "{what}");
                    assert_eq!(report.metrics["communication_bytes"], sent as f64);
                    assert!(report.metrics["communication_seconds"] > 0.0);
                }
            }
        }
    }
}

/// f64 numbers that go to others: one square per block of this rank's shards to those of its copy; 14 numbers of the
/// report to everybody.
fn small_bytes(shapes: &UnitShapes, sharding: Sharding, (rank, world): (usize, usize)) -> u64 {
    let num_shards = sharding.num_shards(world);
    let blocks = |unit| {
        let len = shapes.unit_len(unit);
        temper_collective::shard_ranges(len, num_shards)[rank % num_shards].len().div_ceil(1024)
    };
    let squares: usize = (0..shapes.num_units()).map(blocks).sum();
    8 * (squares * (num_shards - 1) + 14 * (world - 1)) as u64
}

/// Backwards of an update: found by asking a world of that size how often it reduced its first unit.
fn rounds_of(batch: &MiniBatch, world: usize) -> u64 {
    let shapes = UnitShapes::new(&ModelConfig::load(&model_dir("llama")).expect("a config"));
    let ranks = local_ranks("llama", world, Sharding::Zero2);
    std::thread::scope(|scope| {
        let run = |mut rank: Trainer| {
            scope.spawn(move || {
                rank.begin_stage(stage(LossMode::Vanilla)).expect("a stage");
                let before = rank.counts().expect("ranks");
                rank.update(batch).expect("an update");
                rank.counts().expect("ranks").since(&before)
            })
        };
        let threads: Vec<_> = ranks.into_iter().map(run).collect();
        let counts: Vec<_> = threads.into_iter().map(|thread| thread.join().expect("no panic")).collect();
        let calls = counts[0].of(temper_collective::Operation::ReduceScatter).num_calls;
        assert_eq!(calls % shapes.num_units() as u64, 0);
        calls / shapes.num_units() as u64
    })
}

fn scalar_spec(role: ScalarRole) -> ScalarModelSpec {
    let loss_json = match role {
        ScalarRole::Critic => serde_json::to_string(&ValueLossConfig::default()).expect("plain data"),
        ScalarRole::RewardModel => "{}".to_owned(),
    };
    ScalarModelSpec { role, loss_json, optimizer: optimizer(), backbone: Backbone::Policy, seed: 3 }
}

/// Critic and reward model: the same over ranks, divided.
#[test]
fn scalar_models_learn_alike_on_any_number_of_ranks() {
    let pairs: Vec<PreferencePair> = (0..5)
        .map(|i| PreferencePair { chosen: sequence(i, 4, 6), rejected: sequence(i + 70, 4, 3), margin: 0.1 })
        .collect();
    let run = |service: &dyn TrainerService| {
        service.begin_stage(stage(LossMode::Vanilla)).expect("a stage");
        service.begin_scalar_model(scalar_spec(ScalarRole::Critic)).expect("a critic");
        let mut batch = mini_batch(1);
        let sequences: Vec<TokenSequence> = batch.rows.iter().map(|row| row.sequence.clone()).collect();
        for (row, values) in batch.rows.iter_mut().zip(service.values(&sequences).expect("values")) {
            row.returns = values.iter().map(|v| f64::from(*v) + 0.5).collect();
            row.values = values;
        }
        let critic = service.update_critic(batch.clone()).expect("an update");
        let critic_again = service.update_critic(batch).expect("an update");
        let values = service.values(&sequences).expect("values").concat();
        service.begin_scalar_model(scalar_spec(ScalarRole::RewardModel)).expect("a reward model");
        let reward = service.update_reward_model(&pairs, 1e-3).expect("an update");
        let reward_again = service.update_reward_model(&pairs, 1e-3).expect("an update");
        let scores = service.scores(&sequences).expect("scores");
        let numbers = [critic, critic_again, reward, reward_again];
        assert_eq!(numbers[2].num_tokens, 5 * 17);
        let numbers: Vec<f64> = numbers.iter().flat_map(|r| [r.loss, r.grad_norm]).collect();
        [numbers, values.iter().chain(&scores).map(|x| f64::from(*x)).collect()].concat()
    };
    let expected = run(&alone("llama"));
    let mut first: Option<Vec<f64>> = None;
    for sharding in SHARDINGS.into_iter().chain([Sharding::Hybrid { shard_size: 1 }]) {
        let got = run(&group("llama", 2, sharding));
        got.iter().zip(&expected).for_each(|(a, b)| close("a number", *a, *b, 1e-3));
        assert_eq!(&got, first.get_or_insert_with(|| got.clone()), "{sharding:?}");
    }
}

#[test]
fn distillation_is_divided_too() {
    let run = |service: &dyn TrainerService| {
        service.begin_stage(stage(LossMode::Vanilla)).expect("a stage");
        let loss_json = r#"{"beta":0.5}"#.to_owned();
        let spec = DistillSpec { teacher: model_dir("llama"), loss_json };
        service.begin_distillation(spec).expect("a teacher");
        // One step of something else first: a student that is its teacher learns nothing.
        service.update(mini_batch(0)).expect("an update");
        let report = service.update_distilled(mini_batch(1)).expect("an update");
        assert!(report.log_probs.iter().all(|row| !row.is_empty()));
        [report.loss, report.grad_norm, report.metrics["kl"]]
    };
    let expected = run(&alone("llama"));
    let got = SHARDINGS.map(|sharding| run(&group("llama", 2, sharding)));
    assert!(got.iter().all(|numbers| *numbers == got[0]));
    got[0].iter().zip(expected).for_each(|(a, b)| close("a number", *a, b, 1e-4));
}

/// A checkpoint of one sharding is that of any other, to the bit; of another world it goes on within a bound.
#[test]
fn a_checkpoint_loads_at_any_world_size() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (model, state) = (dir.path().join("model"), dir.path().join("optimizer"));
    std::fs::create_dir_all(&state).expect("writable");
    let saver = group("llama", 2, Sharding::Zero3);
    let (_, version) = train(&saver, LossMode::Vanilla);
    saver.save_model(&model).expect("saved");
    saver.save_state(&state).expect("saved");
    let expected = saver.update(mini_batch(5)).expect("an update");
    let expected_version = saver.publish(9).expect("a version");
    let whole = CheckpointReader::open(&state.join("exp_avg")).expect("moments as a whole");
    drop(whole);
    for (world, sharding) in [(2, Sharding::Zero1), (2, Sharding::Hybrid { shard_size: 1 }), (3, Sharding::Zero2)] {
        let group = group("llama", world, sharding);
        group.begin_stage(stage(LossMode::Vanilla)).expect("a stage");
        group.restore(&model, &state, version).expect("restored");
        let report = group.update(mini_batch(5)).expect("an update");
        close("loss", report.loss, expected.loss, 1e-5);
        close("grad_norm", report.grad_norm, expected.grad_norm, 1e-4);
        if world == 2 {
            assert_eq!(group.publish(9).expect("a version"), expected_version, "{sharding:?}");
        }
    }
    let single = alone("llama");
    single.begin_stage(stage(LossMode::Vanilla)).expect("a stage");
    single.restore(&model, &state, version).expect("restored");
    close("loss", single.update(mini_batch(5)).expect("an update").loss, expected.loss, 1e-5);
    // A shard on its own proves nothing: other weights are refused by all ranks.
    let group = group("llama", 2, Sharding::Zero3);
    group.begin_stage(stage(LossMode::Vanilla)).expect("a stage");
    let error = group.restore(&model, &state, expected_version).expect_err("other weights");
    assert_eq!(error.code, ErrorCode::DataLoss, "{error}");
}

/// One rank's row is bad: no weight changes anywhere, the row is named as in the mini-batch, and the ranks go on.
#[test]
fn a_failure_on_one_rank_changes_nothing_and_is_named() {
    for sharding in SHARDINGS {
        let group = group("llama", 3, sharding);
        group.begin_stage(stage(LossMode::Vanilla)).expect("a stage");
        let before = group.publish(0).expect("a version");
        for (bad, place) in [(f64::NAN, "row 7"), (1e300, "the gradient of `")] {
            let mut batch = mini_batch(0);
            batch.rows[7].advantages[0] = bad;
            let error = group.update(batch).expect_err("not finite");
            assert_eq!(error.code, ErrorCode::NonFinite, "{error}");
            assert!(error.to_string().contains(place), "{error}");
            assert_eq!(group.publish(0).expect("a version"), before);
        }
        let mut batch = mini_batch(0);
        batch.rows[2].sequence.response_token_ids[0] = 96;
        let error = group.update(batch).expect_err("no such id");
        assert!(error.to_string().contains("token id 96"), "{error}");
        group.update(mini_batch(0)).expect("all is well again");
    }
}

/// A rank that is gone is named, and nobody waits for ever.
#[test]
fn a_lost_rank_is_named() {
    let mut ranks = local_ranks("llama", 3, Sharding::Zero2);
    drop(ranks.remove(1));
    let group = TrainerGroup::of_trainers(ranks).expect("ranks");
    let error = group.publish(1).expect_err("rank 1 is gone");
    assert_eq!(error.code, ErrorCode::Unavailable);
    assert!(
        error.to_string().contains("rank 1 was lost in broadcast") || error.to_string().contains("rank 1 was lost in"),
        "{error}"
    );
}

#[test]
fn a_shard_size_that_does_not_fit_is_refused() {
    let (device, dir) = (device(), model_dir("llama"));
    let load = |ranks| Trainer::load_rank(Arc::clone(&device), (&dir, DType::F32), Vec::new(), Some(ranks));
    let error = load_local_ranks(3, Sharding::Hybrid { shard_size: 2 }, TIMEOUT, load).expect_err("2 of 3");
    assert!(error.to_string().contains("shard_size: is 2: expected a divisor of the world of 3 ranks"), "{error}");
}

/// Ranks over sockets, each with packed weights of its own as in processes of their own, give the bits of threads.
#[test]
fn sockets_give_the_bits_of_threads() {
    let (_, expected) = train(&group("llama", 2, Sharding::Zero3), LossMode::Vanilla);
    let listeners: Vec<TcpListener> = (0..2).map(|_| TcpListener::bind("127.0.0.1:0").expect("a port")).collect();
    let addresses: Vec<SocketAddr> = listeners.iter().map(|l| l.local_addr().expect("bound")).collect();
    let ranks: Vec<Trainer> = std::thread::scope(|scope| {
        let start = |(rank, listener): (usize, TcpListener)| {
            let addresses = addresses.clone();
            scope.spawn(move || {
                let config =
                    SocketConfig { rank, addresses, token: 1, tls: None, connect_timeout: TIMEOUT, timeout: TIMEOUT };
                let world: Collective = connect(&config, &listener).expect("connected");
                let own = (ProcessRole::Leader, ProcessShare::default());
                let ranks = Ranks::new(world, Sharding::Zero3, own).expect("a rank");
                let place = model_dir("llama");
                Trainer::load_rank(device(), (&place, DType::F32), Vec::new(), Some(ranks)).expect("loaded")
            })
        };
        let threads: Vec<_> = listeners.into_iter().enumerate().map(start).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    let group = TrainerGroup::of_trainers(ranks).expect("ranks");
    assert_eq!(train(&group, LossMode::Vanilla).1, expected);
}
