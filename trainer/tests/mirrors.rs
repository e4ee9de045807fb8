//! The state of a lost rank from the memory of the others: to the bit, whenever it died.

mod common;

use common::{alone, device, model_dir, optimizer, policy_stage, row_of_group};
use std::sync::Arc;
use std::time::Duration;
use temper_algos::{LossMode, ValueLossConfig};
use temper_collective::connect_threads;
use temper_proto::{
    Backbone, GlobalCounts, HeldShard, MiniBatch, MirrorPlan, MirrorService, PreferencePair, ScalarModelSpec,
    ScalarRole, ShardSource, TrainRow,
};
use temper_trainer::{Error, ProcessRole, ProcessShare, Ranks, Sharding, Trainer, agree_on_mirrors};
use temper_types::{DType, ErrorCode, PolicyVersion};

const TIMEOUT: Duration = Duration::from_secs(60);
const SHARDINGS: [Sharding; 4] =
    [Sharding::Zero1, Sharding::Zero2, Sharding::Zero3, Sharding::Hybrid { shard_size: 2 }];

/// A world of ranks as processes see it: each leads its own.
fn world(world: usize, sharding: Sharding) -> Vec<Ranks> {
    let place = |collective| Ranks::new(collective, sharding, (ProcessRole::Leader, ProcessShare::default()));
    connect_threads(world, TIMEOUT).into_iter().map(|collective| place(collective).expect("a divisor")).collect()
}

fn load(ranks: Ranks) -> Trainer {
    let mut trainer = Trainer::load_rank(device(), (&model_dir("llama"), DType::F32), Vec::new(), Some(ranks))
        .expect("the fixture loads");
    trainer.keep_mirrors().expect("there are others");
    trainer
}

/// All of `items` at once, each on a thread; what comes of each, in order.
fn at_once<T: Send, R: Send>(items: Vec<T>, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    let work = &work;
    std::thread::scope(|scope| {
        let threads: Vec<_> = items.into_iter().map(|item| scope.spawn(move || work(item))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

fn mini_batch(step: u64) -> MiniBatch {
    let rows: Vec<TrainRow> = (0..6).map(|index| row_of_group(step, index, None)).collect();
    let num_tokens = rows.iter().map(|r| r.sequence.response_token_ids.len() as u64).sum();
    let rows = rows.into_iter().map(|row| with_returns(row, step)).collect();
    let global = GlobalCounts { num_tokens, num_sequences: 6, num_rows: 6, loss_scale_factor: 8.0 };
    MiniBatch { rows, global, temperature: 1.0, learning_rate: 1e-3 }
}

fn with_returns(row: TrainRow, step: u64) -> TrainRow {
    let len = row.sequence.response_token_ids.len();
    TrainRow { returns: vec![0.1 * step as f64; len], values: vec![0.0; len], ..row }
}

fn begin(trainer: &mut Trainer) {
    trainer.begin_stage(policy_stage(LossMode::Vanilla, 24)).expect("a stage");
    let loss_json = serde_json::to_string(&ValueLossConfig::default()).expect("plain data");
    let (role, backbone) = (ScalarRole::Critic, Backbone::Policy);
    let spec = ScalarModelSpec { role, loss_json, optimizer: optimizer(), backbone, seed: 3 };
    trainer.begin_scalar_model(spec).expect("a critic");
}

/// Everything that a step moves: policy, critic and reference.
fn step(trainer: &mut Trainer, step: u64) -> Result<(), Error> {
    trainer.update_critic(&mini_batch(step))?;
    trainer.update(&mini_batch(step))?;
    trainer.mix_reference(0.25)
}

/// What a run that nothing happened to ends with: its version, and its critic's values.
fn last_words(trainer: &mut Trainer) -> (PolicyVersion, Vec<Vec<u32>>) {
    let sequences: Vec<_> = mini_batch(9).rows.into_iter().map(|row| row.sequence).collect();
    let values = trainer.values(&sequences).expect("values");
    let bits = values.iter().map(|row| row.iter().map(|x| x.to_bits()).collect()).collect();
    (trainer.publish(9).expect("a version"), bits)
}

fn undisturbed(num_ranks: usize, sharding: Sharding) -> Vec<(PolicyVersion, Vec<Vec<u32>>)> {
    at_once(world(num_ranks, sharding), |ranks| {
        let mut trainer = load(ranks);
        begin(&mut trainer);
        (1..=4).for_each(|n| step(&mut trainer, n).expect("a step"));
        last_words(&mut trainer)
    })
}

/// Ranks after two steps, both mirrored.
fn after_two_steps(num_ranks: usize, sharding: Sharding) -> Vec<Trainer> {
    at_once(world(num_ranks, sharding), |ranks| {
        let mut trainer = load(ranks);
        begin(&mut trainer);
        for n in 1..=2 {
            step(&mut trainer, n).expect("a step");
            trainer.mirror(n).expect("mirrored");
        }
        trainer
    })
}

/// What ranks that are left hold, with a new rank in every other place, once all have met.
fn replace(trainers: Vec<Option<Trainer>>, sharding: Sharding) -> (Vec<Trainer>, Vec<Vec<HeldShard>>) {
    let num_ranks = trainers.len();
    let asked = at_once(trainers, |trainer: Option<Trainer>| {
        trainer.map(|mut trainer| {
            let held = trainer.held_shards().expect("mirrors are kept");
            (trainer, held)
        })
    });
    let (trainers, held): (Vec<_>, Vec<_>) = asked.into_iter().map(Option::unzip).unzip();
    let meeting = trainers.into_iter().zip(world(num_ranks, sharding)).collect();
    let trainers = at_once(meeting, |(trainer, ranks): (Option<Trainer>, Ranks)| match trainer {
        Some(mut trainer) => {
            trainer.rejoin(ranks).expect("they meet");
            trainer
        }
        None => load(ranks),
    });
    (trainers, held.into_iter().map(Option::unwrap_or_default).collect())
}

/// The ranks without `lost`.
fn without(trainers: Vec<Trainer>, lost: usize) -> Vec<Option<Trainer>> {
    trainers.into_iter().enumerate().map(|(rank, trainer)| (rank != lost).then_some(trainer)).collect()
}

/// Go back, and on to the end of the fourth step.
fn finish(trainers: Vec<Trainer>, plan: &MirrorPlan) -> Vec<(PolicyVersion, Vec<Vec<u32>>)> {
    at_once(trainers, |mut trainer| {
        begin(&mut trainer);
        trainer.restore_mirrored(plan).expect("it is held");
        trainer.mirror(plan.step).expect("mirrored again");
        (plan.step + 1..=4).for_each(|n| step(&mut trainer, n).expect("a step"));
        last_words(&mut trainer)
    })
}

#[test]
fn a_lost_rank_comes_back_to_the_bit_in_every_sharding() {
    for sharding in SHARDINGS {
        for num_ranks in [2, 4] {
            let expected = undisturbed(num_ranks, sharding);
            let mut trainers = after_two_steps(num_ranks, sharding);
            // All have gone past the step; the third one's updates are half done when rank 1 dies.
            trainers = at_once(trainers, |mut trainer| {
                trainer.update_critic(&mini_batch(3)).expect("an update");
                trainer.update(&mini_batch(3)).expect("an update");
                trainer
            });
            let (trainers, held) = replace(without(trainers, 1), sharding);
            let plan = agree_on_mirrors(sharding.num_shards(num_ranks), &held, |_| true).expect("all is held");
            let has_replica = sharding == Sharding::Hybrid { shard_size: 2 } && num_ranks == 4;
            let from = match (has_replica, num_ranks) {
                (true, _) => 3,
                (false, 2) => 0,
                (false, _) => 2,
            };
            assert_eq!(plan, MirrorPlan { step: 2, sources: vec![ShardSource { rank: 1, from }] }, "{sharding:?}");
            assert_eq!(finish(trainers, &plan), expected, "{sharding:?} over {num_ranks}");
        }
    }
}

/// A rank that dies while the others send and wait: the copies of the step before are whole.
#[test]
fn a_death_in_the_middle_of_a_copy_leaves_the_step_before() {
    for sharding in [Sharding::Zero2, Sharding::Zero3] {
        let expected = undisturbed(3, sharding);
        let trainers = after_two_steps(3, sharding);
        let trainers = at_once(trainers, |mut trainer| {
            step(&mut trainer, 3).expect("a step");
            trainer
        });
        // Rank 2 is gone before it has sent or taken anything of step 3.
        let mut trainers = at_once(without(trainers, 2), |mut trainer: Option<Trainer>| {
            trainer.iter_mut().for_each(|trainer| drop(trainer.mirror(3)));
            trainer
        });
        let error = trainers[0].iter_mut().find_map(|trainer| trainer.mirror(4).err()).expect("a rank is lost");
        assert!(error.to_string().contains("rank 2"), "{error}");
        let (trainers, held) = replace(trainers, sharding);
        let steps: Vec<u64> = held[0].iter().map(|held| held.step).collect();
        assert!(steps.contains(&2) && steps.contains(&3), "its own copy of step 3 is there too: {steps:?}");
        let plan = agree_on_mirrors(3, &held, |_| true).expect("step 2 is held");
        assert_eq!(plan, MirrorPlan { step: 2, sources: vec![ShardSource { rank: 2, from: 0 }] });
        assert_eq!(finish(trainers, &plan), expected, "{sharding:?}");
    }
}

/// A trainer that no test asks anything of.
fn alone_trainer() -> Trainer {
    Trainer::load(device(), &model_dir("llama"), DType::F32, Vec::new()).expect("the fixture loads")
}

/// A reward model outlives its stage, and what did not change is not sent again.
#[test]
fn a_reward_model_comes_back_and_unchanged_parts_are_sent_once() {
    let pairs = |step: u64| -> Vec<PreferencePair> {
        let rows = mini_batch(step).rows;
        let pair = |two: &[TrainRow]| PreferencePair {
            chosen: two[0].sequence.clone(),
            rejected: two[1].sequence.clone(),
            margin: 0.0,
        };
        rows.chunks_exact(2).map(pair).collect()
    };
    let begin = |trainer: &mut Trainer| {
        trainer.begin_stage(policy_stage(LossMode::Vanilla, 24)).expect("a stage");
        let (role, backbone, loss_json) = (ScalarRole::RewardModel, Backbone::Policy, "{}".to_owned());
        let spec = ScalarModelSpec { role, loss_json, optimizer: optimizer(), backbone, seed: 3 };
        trainer.begin_scalar_model(spec).expect("a reward model");
    };
    let learn = |trainer: &mut Trainer, step| trainer.update_reward_model(&pairs(step), 1e-3).expect("an update");
    let reports = at_once(world(2, Sharding::Zero3), |ranks| {
        let mut trainer = load(ranks);
        begin(&mut trainer);
        (0..3).map(|n| learn(&mut trainer, n).loss.to_bits()).collect::<Vec<_>>()
    });
    let trainers = at_once(world(2, Sharding::Zero3), |ranks| {
        let mut trainer = load(ranks);
        begin(&mut trainer);
        learn(&mut trainer, 0);
        trainer.mirror(1).expect("mirrored");
        let all = trainer.mirror(2).expect("mirrored").bytes_sent;
        let nothing = trainer.mirror(3).expect("mirrored").bytes_sent;
        (trainer, all, nothing)
    });
    for (trainer, all, nothing) in &trainers {
        // Policy, reference, reward model and its moments: four sets of a half of the weights and more.
        let half = trainer.memory().masters;
        assert!(*all > 4 * half && *all < 6 * half + 8192, "{all} bytes, half a model has {half}");
        assert!(*nothing < 4096, "the names of parts alone: {nothing}");
    }
    let trainers = trainers.into_iter().map(|(trainer, ..)| trainer).collect();
    let (trainers, held) = replace(without(trainers, 0), Sharding::Zero3);
    let plan = agree_on_mirrors(2, &held, |_| true).expect("all is held");
    let again = at_once(trainers, |mut trainer| {
        begin(&mut trainer);
        trainer.restore_mirrored(&plan).expect("it is held");
        (1..3).map(|n| learn(&mut trainer, n).loss.to_bits()).collect::<Vec<_>>()
    });
    assert!(again.iter().zip(&reports).all(|(again, report)| again[..] == report[1..]));
}

#[test]
fn replicas_send_nothing() {
    let sharding = Sharding::Hybrid { shard_size: 2 };
    let sent = at_once(world(4, sharding), |ranks| {
        let mut trainer = load(ranks);
        begin(&mut trainer);
        trainer.mirror(1).expect("kept");
        trainer.mirror(2).expect("kept").bytes_sent
    });
    assert_eq!(sent, [0; 4]);
}

#[test]
fn a_trainer_that_is_alone_or_keeps_nothing_says_so() {
    let error = alone_trainer().keep_mirrors().unwrap_err().to_string();
    assert!(error.contains("need a second rank"), "{error}");
    let service = Arc::new(alone("llama"));
    let plan = MirrorPlan::default();
    let errors = [
        service.mirror(1).unwrap_err(),
        service.held_shards().unwrap_err(),
        service.restore_mirrored(&plan).unwrap_err(),
        service.rejoin().unwrap_err(),
    ];
    assert!(errors.iter().all(|error| error.code == ErrorCode::InvalidArgument), "{errors:?}");
}
