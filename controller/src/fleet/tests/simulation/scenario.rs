//! What a seed stands for: how many workers, which faults, when.

use super::super::super::{AtBump, PlaneConfig, Time};
use super::rng::Rng;

/// Everything about a run but its course.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scenario {
    pub seed: u64,
    pub num_rollout: usize,
    pub num_reward: usize,
    pub num_steps: u64,
    pub groups_per_step: u64,
    pub samples_per_group: u64,
    pub config: PlaneConfig,
    /// Messages take up to so long.
    pub max_delay: Time,
    /// Of 1000 messages so many are dropped, sent twice, or take ten times as long.
    pub drop: u64,
    pub duplicate: u64,
    pub straggle: u64,
    /// Of 1000 transfers of weights so many arrive damaged.
    pub corrupt: u64,
    /// Jobs of the first worker of each role take so many times as long.
    pub slowness: u64,
    /// Nothing fails any more after this.
    pub faults_end: Time,
    /// Everything is done by then.
    pub deadline: Time,
    /// Worker, from, to: nothing passes.
    pub partitions: Vec<(usize, Time, Time)>,
    /// Worker, when, for how long it is down.
    pub crashes: Vec<(usize, Time, Time)>,
    /// Worker, when it joins for the first time.
    pub joins: Vec<Time>,
    /// When the controller crashes, and for how long.
    pub controller_crashes: Vec<(Time, Time)>,
    /// From when to when the journal's disk is full.
    pub full_disk: Option<(Time, Time)>,
    /// When the operator gives all up, and when he pauses and resumes.
    pub aborts: Vec<Time>,
    pub pause: Option<(Time, Time)>,
}

impl Scenario {
    pub fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let rng = &mut rng;
        let (num_rollout, num_reward) = (rng.between(1, 4) as usize, rng.between(1, 2) as usize);
        let workers = num_rollout + num_reward;
        let faults_end = rng.between(300, 900);
        let any = |rng: &mut Rng| rng.between(0, workers as u64 - 1) as usize;
        let interval = |rng: &mut Rng, most: u64| (rng.between(20, faults_end), rng.between(10, most));
        let some = |rng: &mut Rng, most: u64| 0..rng.between(0, most);
        let harsh = if rng.chance(300) { 0 } else { 1 };
        Scenario {
            seed,
            num_rollout,
            num_reward,
            num_steps: rng.between(2, 4),
            groups_per_step: rng.between(1, 4),
            samples_per_group: rng.between(1, 3),
            config: PlaneConfig {
                lease: 130,
                sync_timeout: 120,
                progress_timeout: 260,
                train_timeout: 90,
                max_attempts: 4,
                max_staleness: rng.between(0, 2),
                at_bump: if rng.chance(500) { AtBump::Finish } else { AtBump::AbortReissue },
            },
            max_delay: rng.between(2, 25),
            drop: harsh * rng.between(0, 40),
            duplicate: harsh * rng.between(0, 100),
            straggle: harsh * rng.between(0, 60),
            corrupt: harsh * rng.between(0, 150),
            slowness: if rng.chance(300) { 12 } else { 1 },
            faults_end,
            deadline: faults_end + 6000,
            partitions: some(rng, 3)
                .map(|_| any(rng))
                .collect::<Vec<_>>()
                .into_iter()
                .map(|w| {
                    let (at, length) = interval(rng, 400);
                    (w, at, at + length)
                })
                .collect(),
            crashes: some(rng, 4)
                .map(|_| any(rng))
                .collect::<Vec<_>>()
                .into_iter()
                .map(|w| {
                    let (at, length) = interval(rng, 300);
                    (w, at, length)
                })
                .collect(),
            joins: (0..workers).map(|w| if w == 0 || rng.chance(600) { 0 } else { rng.between(1, 400) }).collect(),
            controller_crashes: some(rng, 2).map(|_| interval(rng, 200)).collect(),
            full_disk: rng.chance(250).then(|| interval(rng, 150)).map(|(at, length)| (at, at + length)),
            aborts: some(rng, 2).map(|_| interval(rng, 10).0).collect(),
            pause: rng.chance(200).then(|| interval(rng, 150)).map(|(at, length)| (at, at + length)),
        }
    }
}
