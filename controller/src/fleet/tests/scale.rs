//! Thousands of workers: what a decision costs.

use super::super::{
    Action, ControlPlane, Event, GroupSpec, JobKey, Origin, PlaneConfig, Role, Settlement, Ticket, WorkerId,
};
use std::collections::VecDeque;
use std::time::{Duration, Instant};
use temper_types::{ContentHash, GroupId, PolicyVersion, PromptId};

const STEPS: u64 = 2;
const GROUPS_PER_WORKER: u64 = 4;
const SAMPLES: u64 = 8;

fn version(number: u64) -> PolicyVersion {
    PolicyVersion { number, hash: ContentHash([number as u8; 16]) }
}

fn group(id: u64, due: u64) -> GroupSpec {
    let seeds = (0..SAMPLES).map(|i| id * SAMPLES + i).collect();
    let (group, prompt) = (GroupId(id), PromptId(id));
    GroupSpec { group, prompt, seeds, due, prompt_tokens: 100, max_new_tokens: 500, prefix: id % 97, is_bound: false }
}

/// Every worker answers what it is given; the costs of events of workers and of the loop are kept apart.
struct Fleet {
    plane: ControlPlane,
    jobs: VecDeque<(Origin, Ticket)>,
    syncs: Vec<(Origin, PolicyVersion)>,
    delivered: Vec<GroupId>,
    calls: Vec<Duration>,
    bulk: Duration,
    num_entries: usize,
    now: u64,
}

impl Fleet {
    fn tell(&mut self, event: Event) {
        let is_bulk = matches!(
            event,
            Event::Submit { .. } | Event::BeginStep { .. } | Event::StepDone { .. } | Event::Publish { .. }
        );
        self.now += 1;
        let begin = Instant::now();
        let actions = self.plane.step(event, self.now);
        let cost = begin.elapsed();
        if is_bulk {
            self.bulk += cost
        } else {
            self.calls.push(cost)
        }
        for action in actions {
            match action {
                Action::Append(entries) => self.num_entries += entries.len(),
                Action::Dispatch { to, ticket, .. } => self.jobs.push_back((to, ticket)),
                Action::Sync { to, version } => self.syncs.push((to, version)),
                Action::Accept { key: JobKey::Group(group), .. } => self.delivered.push(group),
                _ => {}
            }
        }
    }

    fn attest(&mut self) {
        for (origin, version) in std::mem::take(&mut self.syncs) {
            self.tell(Event::Attest { origin, version });
        }
    }

    fn step(&mut self, step: u64, num_workers: u64) {
        let num_groups = num_workers * GROUPS_PER_WORKER;
        let groups = ((step - 1) * num_groups..step * num_groups).map(|id| group(id, step - 1)).collect();
        self.tell(Event::Submit { groups });
        for worker in 0..num_workers as u32 {
            self.tell(Event::Renew { origin: Origin { worker: WorkerId(worker), incarnation: 1 } });
            self.tell(Event::Tick);
        }
        while let Some((origin, ticket)) = self.jobs.pop_front() {
            self.tell(Event::Answer { origin, ticket, versions: vec![version(step - 1)], num_tokens: 100 * SAMPLES });
        }
        let all = |group| Settlement { group, trained: (0..SAMPLES as u32).collect() };
        let groups = std::mem::take(&mut self.delivered).into_iter().map(all).collect();
        self.tell(Event::BeginStep { step, groups });
        self.tell(Event::StepDone { step, version: Some(version(step)) });
        self.attest();
    }
}

/// Resident bytes of this process, where the system says so.
fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    Some(statm.split(' ').nth(1)?.parse::<u64>().ok()? * 4096)
}

fn run(num_workers: u64) {
    let before = resident_bytes();
    let (plane, _) = ControlPlane::new(PlaneConfig { lease: 1 << 40, ..PlaneConfig::default() });
    let mut fleet = Fleet {
        plane,
        jobs: VecDeque::new(),
        syncs: Vec::new(),
        delivered: Vec::new(),
        calls: Vec::new(),
        bulk: Duration::ZERO,
        num_entries: 0,
        now: 0,
    };
    fleet.tell(Event::Publish { version: version(0) });
    for worker in 0..num_workers as u32 {
        let origin = Origin { worker: WorkerId(worker), incarnation: 1 };
        fleet.tell(Event::Register { origin, role: Role::Rollout, capacity: 2 });
    }
    fleet.attest();
    (1..=STEPS).for_each(|step| fleet.step(step, num_workers));
    let grown = before.zip(resident_bytes()).map(|(before, after)| after.saturating_sub(before) >> 10);
    let num_samples = STEPS * num_workers * GROUPS_PER_WORKER * SAMPLES;
    let ledger = fleet.plane.ledger();
    assert_eq!((ledger.issued(), ledger.trained(), ledger.open()), (num_samples, num_samples, 0));
    assert!(fleet.plane.fences().is_empty());
    let total = fleet.calls.iter().sum::<Duration>() + fleet.bulk;
    fleet.calls.sort_unstable();
    let (median, p99) = (fleet.calls[fleet.calls.len() / 2], fleet.calls[fleet.calls.len() * 99 / 100]);
    println!(
        "{num_workers} workers, {num_samples} samples: {} ns a sample, an event of a worker: median {median:?}, p99 \
         {p99:?} of {}; the loop's own events {:?} a step; {} journal entries; memory grew by {grown:?} KiB",
        total.as_nanos() / u128::from(num_samples),
        fleet.calls.len(),
        fleet.bulk / STEPS as u32,
        fleet.num_entries,
    );
}

#[test]
fn a_thousand_workers_lose_no_sample() {
    run(1000);
}

#[test]
fn four_thousand_workers_lose_no_sample() {
    run(4000);
}
