//! Workers without a model: what they answer is a function of the request and the version.

use super::simulation::mix;
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};
use temper_proto::{
    GeneratedSample, GroupRequest, GroupResult, RewardService, RolloutService, RolloutStats, ScoreRequest,
    ServiceError, ServiceResult,
};
use temper_types::{
    ContentHash, ErrorCode, FinishReason, GroupId, PolicyVersion, PromptContent, PromptId, RewardOutcome, SampleIndex,
    SampleKey, SampleTimings, SamplingParams,
};

/// Nothing in a test takes so long; what does is a failure.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where a thread waits until it is let through.
#[derive(Default)]
pub struct Gate {
    is_open: Mutex<bool>,
    opened: Condvar,
    num_waiting: AtomicUsize,
}

impl Gate {
    pub fn pass(&self) {
        self.num_waiting.fetch_add(1, Ordering::SeqCst);
        let is_open = self.is_open.lock().expect("no thread panics here");
        let waited = self.opened.wait_timeout_while(is_open, PATIENCE, |is_open| !*is_open).expect("nor here");
        assert!(!waited.1.timed_out(), "nobody opened the gate");
    }

    pub fn open(&self) {
        *self.is_open.lock().expect("no thread panics here") = true;
        self.opened.notify_all();
    }

    /// A thread waits here, and nobody has let it through.
    pub fn is_holding(&self) -> bool {
        self.is_reached() && !*self.is_open.lock().expect("no thread panics here")
    }

    pub fn is_reached(&self) -> bool {
        self.num_waiting.load(Ordering::SeqCst) > 0
    }
}

/// Look again and again until something is so.
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < PATIENCE, "{what} never came");
        std::thread::yield_now();
    }
}

pub fn version(number: u64) -> PolicyVersion {
    PolicyVersion { number, hash: ContentHash([number as u8 + 1; 16]) }
}

pub fn request(id: u64) -> GroupRequest {
    GroupRequest {
        group_id: GroupId(id),
        prompt_id: PromptId(id / 2),
        epoch: 0,
        prompt_token_ids: vec![1 + id as u32 / 2; 5],
        seeds: (0..3).map(|i| 100 * id + i).collect(),
        sampling: SamplingParams { max_new_tokens: 9, ..SamplingParams::default() },
        ..GroupRequest::default()
    }
}

/// What a worker does beside its work.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// Nothing.
    Good,
    /// Answers the newest group first.
    NewestFirst,
    /// Answers every group twice.
    Twice,
    /// Is gone after so many groups.
    DiesAfter(usize),
    /// Panics after so many groups.
    PanicsAfter(usize),
    /// Waits at the gate before every group.
    Stalls,
    /// Waits at the gate before it proves a version.
    SyncsLate,
    /// Holds other weights than it is asked for.
    HoldsOtherWeights,
    /// Says that it generated with other weights.
    AnswersWithOtherWeights,
    /// Draws its own noise.
    ChangesSeeds,
    /// Forgets what it was given.
    Forgets,
    /// Refuses groups of prompt 1.
    RefusesPromptOne,
}

pub struct FakeRollout {
    pub name: &'static str,
    pub manner: Manner,
    pub gate: Gate,
    pub num_submitted: AtomicUsize,
    num_finished: AtomicUsize,
    held: Mutex<Option<PolicyVersion>>,
    queue: Mutex<VecDeque<GroupRequest>>,
}

impl FakeRollout {
    pub fn new(name: &'static str, manner: Manner) -> std::sync::Arc<Self> {
        std::sync::Arc::new(FakeRollout {
            name,
            manner,
            gate: Gate::default(),
            num_submitted: AtomicUsize::new(0),
            num_finished: AtomicUsize::new(0),
            held: Mutex::new(None),
            queue: Mutex::new(VecDeque::new()),
        })
    }

    fn error(&self, code: ErrorCode, operation: &'static str, message: &str) -> ServiceError {
        ServiceError::new(code, self.name, operation, message)
    }

    fn generate(&self, group: &GroupRequest) -> GroupResult {
        let held = self.held.lock().expect("no panic inside").expect("only what was synced generates");
        let used = if self.manner == Manner::AnswersWithOtherWeights { version(99) } else { held };
        let change = u64::from(self.manner == Manner::ChangesSeeds);
        let sample = |(index, seed): (usize, &u64)| {
            let num_begun = group.begun.get(index).map_or(0, |b| b.token_ids.len() as u32);
            let noise = mix(*seed + change + u64::from(1000 * num_begun), held.number);
            let token_ids: Vec<u32> = (0..1 + noise % 8).map(|i| (mix(noise, i) % 50) as u32).collect();
            GeneratedSample {
                sample_index: SampleIndex(index as u32),
                seed: *seed + change,
                num_begun,
                num_kept: 0,
                reused: Vec::new(),
                log_probs: token_ids.iter().map(|id| -(*id as f32) / 7.0).collect(),
                policy_versions: vec![(used, token_ids.len() as u32)],
                token_ids,
                sampled_log_probs: Vec::new(),
                surviving_mass: Vec::new(),
                finish_reason: FinishReason::Stop,
                num_drafted: 0,
                num_accepted: 0,
                timings: SampleTimings::default(),
            }
        };
        let samples = group.seeds.iter().enumerate().map(sample).collect();
        GroupResult { group_id: group.group_id, prompt_id: group.prompt_id, worker: self.name.to_owned(), samples }
    }
}

impl RolloutService for FakeRollout {
    fn submit(&self, groups: Vec<GroupRequest>) -> ServiceResult<()> {
        if self.manner == Manner::RefusesPromptOne && groups.iter().any(|g| g.prompt_id == PromptId(1)) {
            return Err(self.error(ErrorCode::InvalidArgument, "submit", "prompt 1 is wrong"));
        }
        self.num_submitted.fetch_add(groups.len(), Ordering::SeqCst);
        let copies = if self.manner == Manner::Twice { 2 } else { 1 };
        let mut queue = self.queue.lock().expect("no panic inside");
        for group in groups.iter().filter(|_| self.manner != Manner::Forgets) {
            queue.extend(std::iter::repeat_n(group.clone(), copies));
        }
        Ok(())
    }

    fn next_group(&self, _timeout: Duration) -> ServiceResult<Option<GroupResult>> {
        let taken = {
            let mut queue = self.queue.lock().expect("no panic inside");
            if self.manner == Manner::NewestFirst { queue.pop_back() } else { queue.pop_front() }
        };
        let Some(group) = taken else { return Ok(None) };
        let num_finished = self.num_finished.fetch_add(1, Ordering::SeqCst);
        match self.manner {
            Manner::Stalls => self.gate.pass(),
            Manner::DiesAfter(n) if num_finished >= n => {
                return Err(self.error(ErrorCode::Unavailable, "next_group", "connection reset"));
            }
            Manner::PanicsAfter(n) => assert!(num_finished < n, "a panic on purpose"),
            _ => {}
        }
        Ok(Some(self.generate(&group)))
    }

    fn abort_all(&self) -> ServiceResult<usize> {
        let mut queue = self.queue.lock().expect("no panic inside");
        Ok(std::mem::take(&mut *queue).len())
    }

    fn set_version(&self, version: PolicyVersion) -> ServiceResult<()> {
        match self.manner {
            Manner::SyncsLate => self.gate.pass(),
            Manner::HoldsOtherWeights => {
                return Err(self.error(ErrorCode::VersionMismatch, "set_version", "other weights"));
            }
            _ => {}
        }
        *self.held.lock().expect("no panic inside") = Some(version);
        Ok(())
    }

    fn stats(&self) -> RolloutStats {
        let num_generated_tokens = self.num_finished.load(Ordering::SeqCst) as u64;
        RolloutStats { num_generated_tokens, kv_blocks: 10, ..RolloutStats::default() }
    }
}

pub fn score_request(group: u64, index: u32) -> ScoreRequest {
    ScoreRequest {
        key: SampleKey {
            prompt_id: PromptId(group),
            group_id: GroupId(group),
            sample_index: SampleIndex(index),
            epoch: 0,
        },
        data_source: "fake".to_owned(),
        prompt: PromptContent::TokenIds(vec![1]),
        response: format!("{group} {index}"),
        num_response_tokens: 2,
        prompt_token_ids: vec![1],
        response_token_ids: vec![2, 3],
        finish_reason: FinishReason::Stop,
        ground_truth: None,
        extra_info: None,
    }
}

pub struct FakeReward {
    pub name: &'static str,
    pub manner: Manner,
    /// No worker survives a group of this number.
    pub poison: u64,
    pub gate: Gate,
    num_scored: AtomicUsize,
}

impl FakeReward {
    pub fn new(name: &'static str, manner: Manner) -> std::sync::Arc<Self> {
        Self::poisoned(name, manner, u64::MAX)
    }

    pub fn poisoned(name: &'static str, manner: Manner, poison: u64) -> std::sync::Arc<Self> {
        let (gate, num_scored) = (Gate::default(), AtomicUsize::new(0));
        std::sync::Arc::new(FakeReward { name, manner, poison, gate, num_scored })
    }
}

impl RewardService for FakeReward {
    fn score(&self, requests: &[ScoreRequest]) -> ServiceResult<Vec<RewardOutcome>> {
        let num_scored = self.num_scored.fetch_add(1, Ordering::SeqCst);
        let dies = matches!(self.manner, Manner::DiesAfter(n) if num_scored >= n);
        if dies || requests.iter().any(|r| r.key.group_id.0 == self.poison) {
            return Err(ServiceError::new(ErrorCode::Unavailable, self.name, "score", "connection reset"));
        }
        if self.manner == Manner::Stalls {
            self.gate.pass();
        }
        let reward = |r: &ScoreRequest| mix(r.key.group_id.0, u64::from(r.key.sample_index.0)) as f64 / 1e18;
        let scored = |r: &ScoreRequest| RewardOutcome::Scored { reward: reward(r), components: Vec::new() };
        Ok(requests.iter().map(scored).collect())
    }
}

/// Groups by id, with the name of the worker, which may differ between runs, apart.
pub type Batch = BTreeMap<GroupId, Vec<GeneratedSample>>;
