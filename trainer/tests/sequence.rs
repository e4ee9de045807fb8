//! Ranks that share the rows of every micro-batch against ranks that do not: what the model says bit for bit, updates
//! within a bound, bytes and memory as foretold, failures by name.

mod common;

use common::{alone, device, model_dir, optimizer, policy_stage, row_of_group, sequence};
use std::sync::Arc;
use std::time::Duration;
use temper_actor::{CheckpointReader, ModelConfig, ParamStore};
use temper_algos::{LossMode, SharedValueLossConfig, ValueLossConfig};
use temper_collective::Operation;
use temper_proto::{
    Backbone, DistillSpec, GlobalCounts, LogProbs, MiniBatch, PolicyRole, PreferencePair, ScalarModelSpec, ScalarRole,
    StageSpec, TokenSequence, TrainRow, TrainerService, UpdateReport,
};
use temper_trainer::{Error, Passes, Sharding, Trainer, TrainerGroup, exchange_bytes_sent, load_local_ranks};
use temper_types::{DType, ErrorCode, PolicyVersion};

const TIMEOUT: Duration = Duration::from_secs(60);
/// Ranks, those that share rows, and a model: heads 4 over 2, so that of 4 ranks two compute with one key/value head.
const LAYOUTS: [(&str, usize, usize); 5] =
    [("llama", 2, 2), ("llama", 4, 2), ("llama", 4, 4), ("qwen2", 2, 2), ("qwen3", 4, 4)];

fn try_ranks(name: &str, (world, size): (usize, usize), sharding: Sharding) -> Result<Vec<Trainer>, Error> {
    let (device, dir) = (device(), model_dir(name));
    load_local_ranks(world, sharding, TIMEOUT, |ranks| {
        let ranks = ranks.with_sequence_parallel(size)?;
        Trainer::load_rank(Arc::clone(&device), (&dir, DType::F32), Vec::new(), Some(ranks))
    })
}

fn group(name: &str, layout: (usize, usize), sharding: Sharding) -> TrainerGroup {
    TrainerGroup::of_trainers(try_ranks(name, layout, sharding).expect("the ranks load")).expect("ranks")
}

/// Groups of two rows with one prompt, and one long response that no micro-batch but its own holds.
fn mini_batch(step: u64) -> MiniBatch {
    let row = |index: usize| {
        let mut row = row_of_group(step, index, (index == 4).then_some(50));
        row.sequence.response_mask.iter_mut().enumerate().for_each(|(t, on)| *on = u8::from(t % 7 != 6));
        row
    };
    batch_of((0..8).map(row).collect())
}

fn batch_of(rows: Vec<TrainRow>) -> MiniBatch {
    let count = |row: &TrainRow| row.sequence.response_mask.iter().filter(|on| **on == 1).count() as u64;
    let (num_tokens, num) = (rows.iter().map(count).sum(), rows.len() as u64);
    let global = GlobalCounts { num_tokens, num_sequences: num, num_rows: num, loss_scale_factor: 8.0 };
    MiniBatch { rows, global, temperature: 1.0, learning_rate: 1e-3 }
}

fn sequences(batch: &MiniBatch) -> Vec<TokenSequence> {
    batch.rows.iter().map(|row| row.sequence.clone()).collect()
}

fn stage(loss_mode: LossMode) -> StageSpec {
    policy_stage(loss_mode, 12)
}

fn recomputing(loss_mode: LossMode) -> StageSpec {
    StageSpec { recompute_activations: true, ..stage(loss_mode) }
}

/// Updates in a new stage; the reports without the clock.
fn train(service: &dyn TrainerService, spec: StageSpec, num_steps: u64) -> Vec<UpdateReport> {
    service.begin_stage(spec).expect("a stage");
    let step = |step| {
        let mut report = service.update(mini_batch(step)).expect("an update");
        report.metrics.retain(|name, _| !name.starts_with("communication"));
        report
    };
    (0..num_steps).map(step).collect()
}

fn close(what: &str, got: f64, expected: f64, bound: f64) {
    assert!((got - expected).abs() <= bound * expected.abs().max(1.0), "{what}: {got}, expected {expected}");
}

fn close_reports(got: &UpdateReport, expected: &UpdateReport, bound: f64) {
    close("loss", got.loss, expected.loss, bound);
    close("grad_norm", got.grad_norm, expected.grad_norm, bound);
    close("entropy", got.entropy, expected.entropy, bound);
    assert_eq!(got.num_tokens, expected.num_tokens);
    assert_eq!(got.metrics.keys().collect::<Vec<_>>(), expected.metrics.keys().collect::<Vec<_>>());
    expected.metrics.iter().for_each(|(name, value)| close(name, got.metrics[name], *value, bound));
    for (ours, theirs) in got.log_probs.iter().zip(&expected.log_probs) {
        assert_eq!(ours.len(), theirs.len());
        ours.iter().zip(theirs).for_each(|(a, b)| close("a log-prob", f64::from(*a), f64::from(*b), bound));
    }
}

fn bits(rows: &[Vec<f32>]) -> Vec<Vec<u32>> {
    rows.iter().map(|row| row.iter().map(|x| x.to_bits()).collect()).collect()
}

fn all_bits(says: &LogProbs) -> [Vec<Vec<u32>>; 3] {
    [bits(&says.log_probs), bits(&says.entropies), bits(&says.sum_pi_squared)]
}

/// Largest relative difference of a tensor of two saved models, in Euclidean norms.
fn weight_gap(a: &dyn TrainerService, b: &dyn TrainerService) -> f64 {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let device = device();
    let load = |service: &dyn TrainerService, name: &str| {
        let path = dir.path().join(name);
        service.save_model(&path).expect("saved");
        let config = ModelConfig::load(&path).expect("a model directory");
        ParamStore::load(&*device, &config, &CheckpointReader::open(&path).expect("a model")).expect("all tensors")
    };
    let (a, b) = (load(a, "a"), load(b, "b"));
    let gap = |name: &str| {
        let [a, b] = [&a, &b].map(|store| store.read_tensor(&*device, name).expect("a tensor"));
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        norm(&mut a.iter().zip(&b).map(|(a, b)| f64::from(*a - *b))) / norm(&mut b.iter().map(|x| f64::from(*x)))
    };
    a.tensors().map(|(_, slot)| gap(&slot.name)).fold(0.0, f64::max)
}

/// Before any update: policy, reference, and what an update reports of its first step, bit for bit those of one rank.
#[test]
fn the_model_says_the_same_bits() {
    for (name, world, size) in LAYOUTS {
        let (single, group) = (alone(name), group(name, (world, size), Sharding::Zero2));
        let batch = mini_batch(7);
        for service in [&single as &dyn TrainerService, &group] {
            service.begin_stage(stage(LossMode::Vanilla)).expect("a stage");
        }
        for role in [PolicyRole::Policy, PolicyRole::Reference] {
            let says = |service: &dyn TrainerService| service.log_probs(role, &sequences(&batch), 0.9).expect("says");
            assert_eq!(all_bits(&says(&group)), all_bits(&says(&single)), "{name} {world} {size}");
        }
        let update = |service: &dyn TrainerService| service.update(batch.clone()).expect("an update").log_probs;
        assert_eq!(bits(&update(&group)), bits(&update(&single)), "{name} {world} {size}");
    }
}

/// After three updates with objectives over tokens and over sequences: all numbers to 1e-4 and every tensor to 1e-3 of
/// one rank's; shardings and recomputation change no bit.
#[test]
fn updates_agree_within_a_bound() {
    for (name, world, size) in LAYOUTS {
        for mode in [LossMode::Vanilla, LossMode::Gspo] {
            let (single, first) = (alone(name), group(name, (world, size), Sharding::Zero2));
            let expected = train(&single, stage(mode), 3);
            let got = train(&first, stage(mode), 3);
            got.iter().zip(&expected).for_each(|(got, expected)| close_reports(got, expected, 1e-4));
            let gap = weight_gap(&first, &single);
            assert!(gap < 1e-3, "{name} {world} {size} {mode:?}: {gap}");
            if mode != LossMode::Vanilla || size < world {
                continue;
            }
            let version = first.publish(3).expect("a version");
            let hybrid = Sharding::Hybrid { shard_size: 1 };
            for (sharding, spec) in [
                (Sharding::Zero1, stage(mode)),
                (Sharding::Zero3, recomputing(mode)),
                (hybrid, stage(mode)),
                (Sharding::Zero2, recomputing(mode)),
            ] {
                let other = group(name, (world, size), sharding);
                assert_eq!(train(&other, spec, 3), got, "{name} {world} {size} {sharding:?}");
                assert_eq!(other.publish(3).expect("a version"), version, "{name} {world} {size} {sharding:?}");
            }
        }
    }
}

/// An objective over the whole mini-batch reads the same bits, so that its loss is the same number.
#[test]
fn an_objective_over_a_mini_batch_is_the_same_number() {
    for (world, size) in [(2, 2), (4, 2)] {
        let expected = &train(&alone("llama"), stage(LossMode::ClipCov), 1)[0];
        let got = &train(&group("llama", (world, size), Sharding::Zero3), stage(LossMode::ClipCov), 1)[0];
        assert_eq!(got.loss.to_bits(), expected.loss.to_bits());
        assert_eq!(got.metrics, expected.metrics);
        close_reports(got, expected, 1e-5);
    }
}

fn scalar_spec(role: ScalarRole, backbone: Backbone) -> ScalarModelSpec {
    let value_loss = ValueLossConfig::default();
    let loss_json = match (role, backbone) {
        (ScalarRole::RewardModel, _) => "{}".to_owned(),
        (_, Backbone::Shared) => {
            serde_json::to_string(&SharedValueLossConfig { vf_coef: 0.5, value_loss }).expect("plain data")
        }
        _ => serde_json::to_string(&value_loss).expect("plain data"),
    };
    ScalarModelSpec { role, loss_json, optimizer: optimizer(), backbone, seed: 3 }
}

/// A batch whose values are the service's.
fn with_values(service: &dyn TrainerService) -> (MiniBatch, Vec<Vec<f32>>) {
    let mut batch = mini_batch(1);
    let values = service.values(&sequences(&batch)).expect("values");
    for (row, values) in batch.rows.iter_mut().zip(&values) {
        row.returns = values.iter().map(|v| f64::from(*v) + 0.5).collect();
        row.values.clone_from(values);
    }
    (batch, values)
}

fn critic(service: &dyn TrainerService) -> (Vec<Vec<u32>>, Vec<f64>) {
    service.begin_stage(stage(LossMode::Vanilla)).expect("a stage");
    service.begin_scalar_model(scalar_spec(ScalarRole::Critic, Backbone::Policy)).expect("a critic");
    let (batch, before) = with_values(service);
    let reports = [(); 3].map(|()| service.update_critic(batch.clone()).expect("an update"));
    let after = service.values(&sequences(&batch)).expect("values").concat();
    let numbers = reports.iter().flat_map(|r| [r.loss, r.grad_norm, r.metrics["value_mean"], r.num_tokens as f64]);
    (bits(&before), numbers.chain(after.iter().map(|x| f64::from(*x))).collect())
}

fn reward_model(service: &dyn TrainerService) -> (Vec<Vec<u32>>, Vec<f64>) {
    let pair = |i| PreferencePair { chosen: sequence(i, 4, 6), rejected: sequence(i + 70, 4, 30), margin: 0.1 };
    let pairs: Vec<PreferencePair> = (0..5).map(pair).collect();
    service.begin_stage(stage(LossMode::Vanilla)).expect("a stage");
    service.begin_scalar_model(scalar_spec(ScalarRole::RewardModel, Backbone::Policy)).expect("a reward model");
    let scores = || service.scores(&sequences(&mini_batch(2))).expect("scores");
    let before = scores();
    let reports = [(); 3].map(|()| service.update_reward_model(&pairs, 1e-3).expect("an update"));
    let numbers = reports.iter().flat_map(|r| [r.loss, r.grad_norm, r.metrics["accuracy"], r.metrics["margin_mean"]]);
    (bits(&[before]), numbers.chain(scores().iter().map(|x| f64::from(*x))).collect())
}

fn shared_head(service: &dyn TrainerService) -> (Vec<Vec<u32>>, Vec<f64>) {
    service.begin_stage(stage(LossMode::Vanilla)).expect("a stage");
    service.begin_scalar_model(scalar_spec(ScalarRole::Critic, Backbone::Shared)).expect("a head");
    let (batch, before) = with_values(service);
    let reports = [(); 3].map(|()| service.update(batch.clone()).expect("an update"));
    let after = service.values(&sequences(&batch)).expect("values").concat();
    let numbers = reports.iter().flat_map(|r| [r.loss, r.grad_norm, r.metrics["value_loss"], r.metrics["value_mean"]]);
    (bits(&before), numbers.chain(after.iter().map(|x| f64::from(*x))).collect())
}

fn distilled(service: &dyn TrainerService) -> (Vec<Vec<u32>>, Vec<f64>) {
    service.begin_stage(stage(LossMode::Vanilla)).expect("a stage");
    let spec = DistillSpec { teacher: model_dir("llama"), loss_json: r#"{"beta":0.5}"#.to_owned() };
    service.begin_distillation(spec).expect("a teacher");
    // One step of something else first: a student that is its teacher learns nothing.
    let before = service.update(mini_batch(0)).expect("an update").log_probs;
    let reports = [1, 2].map(|step| service.update_distilled(mini_batch(step)).expect("an update"));
    (bits(&before), reports.iter().flat_map(|r| [r.loss, r.grad_norm, r.entropy, r.metrics["kl"]]).collect())
}

/// Critic, reward model, a value head on the policy's trunk, distillation: bits before the first update, the rest
/// within 1e-3.
#[test]
fn every_kind_of_stage_learns_alike() {
    type Run = fn(&dyn TrainerService) -> (Vec<Vec<u32>>, Vec<f64>);
    let runs: [(&str, Run); 4] =
        [("critic", critic), ("reward model", reward_model), ("head", shared_head), ("distillation", distilled)];
    for (what, run) in runs {
        let (said, numbers) = run(&alone("llama"));
        for (layout, sharding) in [((2, 2), Sharding::Zero2), ((4, 2), Sharding::Zero3)] {
            let (got_said, got) = run(&group("llama", layout, sharding));
            assert_eq!(got_said, said, "{what} {layout:?}");
            assert_eq!(got.len(), numbers.len());
            got.iter().zip(&numbers).for_each(|(a, b)| close(what, *a, *b, 1e-3));
        }
    }
}

/// Bytes that turn rows into heads and back, of every rank, for one long response.
#[test]
fn exchanged_bytes_are_as_predicted() {
    let (prompt, response) = (5, 44);
    let row = TrainRow { advantages: vec![1.0; response], ..TrainRow::demonstration(sequence(3, prompt, response)) };
    let (batch, num_rows) = (batch_of(vec![row]), prompt + response - 1);
    for (name, size) in [("llama", 2), ("llama", 4), ("qwen3", 2)] {
        let config = ModelConfig::load(&model_dir(name)).expect("a config");
        for (spec, forwards) in [(stage(LossMode::Vanilla), 1), (recomputing(LossMode::Vanilla), 2)] {
            let update = |mut rank: Trainer| {
                rank.begin_stage(spec.clone()).expect("a stage");
                let before = rank.counts().expect("ranks");
                rank.update(&batch).expect("an update");
                rank.counts().expect("ranks").since(&before).of(Operation::AllToAll).bytes_sent
            };
            let ranks = try_ranks(name, (size, size), Sharding::Zero2).expect("the ranks load");
            let sent = on_all(ranks, update);
            for (rank, sent) in sent.into_iter().enumerate() {
                let rows = num_rows * rank / size..num_rows * (rank + 1) / size;
                let targets = rows.filter(|row| *row >= prompt - 1).count() as u64;
                let turned = exchange_bytes_sent(&config, (rank, size), num_rows, Passes { forwards, backwards: 1 });
                assert_eq!(sent, turned + 24 * targets * (size as u64 - 1), "{name} rank {rank} of {size}");
            }
        }
    }
}

fn on_all<R: Send>(ranks: Vec<Trainer>, run: impl Fn(Trainer) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(move || run(rank))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

/// A rank of two holds half the activations of one response, of four a quarter, and a bit.
#[test]
fn activations_of_a_response_are_divided() {
    let row = TrainRow { advantages: vec![1.0; 56], ..TrainRow::demonstration(sequence(3, 5, 56)) };
    let batch = batch_of(vec![row]);
    let after_update = |mut rank: Trainer| {
        rank.begin_stage(stage(LossMode::Vanilla)).expect("a stage");
        rank.update(&batch).expect("an update");
        rank.activation_bytes()
    };
    let single = Trainer::load(device(), &model_dir("llama"), DType::F32, Vec::new()).expect("the fixture loads");
    let whole = after_update(single) as f64;
    for size in [2, 4] {
        let ranks = try_ranks("llama", (size, size), Sharding::Zero2).expect("the ranks load");
        for bytes in on_all(ranks, after_update) {
            let share = bytes as f64 / whole;
            assert!(
                (0.9 / size as f64..1.5 / size as f64).contains(&share),
                "{share} of {whole} bytes on {size} ranks"
            );
        }
    }
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let refused = |name, layout| try_ranks(name, layout, Sharding::Zero2).expect_err("refused").to_string();
    let text = refused("llama", (3, 2));
    assert!(text.contains("sequence_parallel: is 2: expected a divisor of the world of 3 ranks"), "{text}");
    let text = refused("llama", (3, 3));
    assert!(text.contains("3 ranks cannot divide 4 query heads and 2 key/value heads"), "{text}");
    let group = group("llama", (2, 1), Sharding::Zero2).with_sequence_parallel(3);
    assert!(group.is_err_and(|error| error.to_string().contains("expected a divisor of 2 ranks")));
}

/// A rank that is gone is named in the exchange already, a bad row as in the mini-batch, and no weight changes.
#[test]
fn failures_are_named_and_change_nothing() {
    let group = group("llama", (4, 2), Sharding::Zero2);
    group.begin_stage(stage(LossMode::Gspo)).expect("a stage");
    let before: PolicyVersion = group.publish(0).expect("a version");
    let mut batch = mini_batch(0);
    batch.rows[5].advantages[0] = f64::NAN;
    let error = group.update(batch).expect_err("not finite");
    assert_eq!(error.code, ErrorCode::NonFinite, "{error}");
    assert!(error.to_string().contains("row 5"), "{error}");
    assert_eq!(group.publish(0).expect("a version"), before);
    group.update(mini_batch(0)).expect("all is well again");

    let mut ranks = try_ranks("llama", (2, 2), Sharding::Zero2).expect("the ranks load");
    drop(ranks.remove(1));
    let error = ranks[0].log_probs(PolicyRole::Policy, &sequences(&mini_batch(0)), 1.0).expect_err("rank 1 is gone");
    assert!(error.to_string().contains("rank 1 was lost in all_to_all"), "{error}");
}
