//! N reward workers as one [`RewardService`].

use super::event::{Event, Job, JobKey, Origin, Role, Ticket};
use super::roster::{Desk, Farewell, FleetConfig, Next, Order, Shared, WorkerStatus};
use crate::{Clock, SystemClock};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use temper_proto::{RewardService, ScoreRequest, ServiceError, ServiceResult};
use temper_types::{ErrorCode, RewardFailure, RewardOutcome};

/// Bundles that are open, and outcomes that nobody took yet.
#[derive(Default)]
struct Outcomes {
    requests: BTreeMap<u64, Arc<Vec<ScoreRequest>>>,
    finished: BTreeMap<u64, Vec<RewardOutcome>>,
    next_job: u64,
}

impl Desk for Outcomes {
    /// A response that no worker can score has failed; it is masked out and counted as any other.
    fn give_up(&mut self, key: JobKey, error: ServiceError) {
        let JobKey::Score(job) = key else { return };
        let Some(requests) = self.requests.remove(&job) else { return };
        let failed =
            || RewardOutcome::Failed(RewardFailure { scorer: error.service.clone(), cause: error.to_string() });
        self.finished.insert(job, requests.iter().map(|_| failed()).collect());
    }
}

type RewardShared = Shared<dyn RewardService, Outcomes>;

/// Scores with every worker that has joined, a group of responses at a time. Outcomes stand in the requests' order.
pub struct FleetReward {
    shared: Arc<RewardShared>,
}

impl FleetReward {
    /// A fleet without workers.
    pub fn new(config: FleetConfig) -> Self {
        Self::with_clock(config, Arc::new(SystemClock::default()))
    }

    /// A fleet whose deadlines run by `clock`.
    pub fn with_clock(config: FleetConfig, clock: Arc<dyn Clock>) -> Self {
        FleetReward { shared: Arc::new(Shared::new(Role::Reward, config, clock, Outcomes::default())) }
    }

    /// Take in a worker. A name that is known begins a new life, and what its earlier one had is issued again. Gives
    /// the number of the life.
    ///
    /// # Errors
    /// `ResourceExhausted` where the system refuses a thread.
    pub fn join(&self, name: &str, service: Arc<dyn RewardService>) -> ServiceResult<u64> {
        let shared = Arc::clone(&self.shared);
        self.shared.enlist(name, service, move |origin, service| run(&shared, origin, service.as_ref()))
    }

    /// Let a worker go; what it has is issued again.
    ///
    /// # Errors
    /// `Unavailable` for a name that never joined.
    pub fn leave(&self, name: &str, reason: &str) -> ServiceResult<()> {
        self.shared.dismiss(name, reason)
    }

    /// A worker is alive.
    ///
    /// # Errors
    /// `Unavailable` for a name that never joined, or that is lost and has to join again.
    pub fn heartbeat(&self, name: &str) -> ServiceResult<()> {
        self.shared.heartbeat(name)
    }

    /// Every worker that ever joined, in its last life.
    pub fn workers(&self) -> Vec<WorkerStatus> {
        self.shared.workers()
    }

    /// Let go of all workers. Those that [`FleetReward::unfit`] does not name can go on in another fleet.
    pub fn retire(&self) {
        self.shared.retire();
    }

    /// After [`FleetReward::retire`], workers that cannot go on in another fleet: they were lost, or are in a call
    /// that does not end within `patience`.
    pub fn unfit(&self, patience: Duration) -> BTreeSet<String> {
        self.shared.unfit(patience)
    }

    /// No worker will come beside those that joined, until one does: without any, calls fail at once, with this
    /// `reason`, in place of waiting.
    pub fn expect_nobody(&self, reason: &str) {
        self.shared.expect_nobody(reason);
    }

    /// Messages of workers that changed nothing, by kind.
    pub fn fences(&self) -> BTreeMap<super::Fence, u64> {
        self.shared.lock().plane.fences().clone()
    }
}

impl Drop for FleetReward {
    fn drop(&mut self) {
        self.shared.close();
    }
}

impl RewardService for FleetReward {
    fn score(&self, requests: &[ScoreRequest]) -> ServiceResult<Vec<RewardOutcome>> {
        const OPERATION: &str = "score";
        let mut state = self.shared.lock();
        let mut jobs = Vec::new();
        for bundle in requests.chunk_by(|a, b| a.key.group_id == b.key.group_id) {
            let job = state.desk.next_job;
            state.desk.next_job += 1;
            state.desk.requests.insert(job, Arc::new(bundle.to_vec()));
            self.shared.tell(&mut state, Event::SubmitScore { job, cost: bundle.len() as u64 });
            jobs.push(job);
        }
        while !jobs.iter().all(|job| state.desk.finished.contains_key(job)) {
            self.shared.check_workers(&mut state, OPERATION)?;
            if !jobs.iter().all(|job| state.desk.finished.contains_key(job)) {
                state = self.shared.wait(state);
            }
        }
        Ok(jobs.iter().flat_map(|job| state.desk.finished.remove(job).unwrap_or_default()).collect())
    }
}

/// The thread of one life of a worker.
fn run(shared: &Arc<RewardShared>, origin: Origin, service: &dyn RewardService) {
    let _farewell = Farewell { shared: Arc::clone(shared), origin };
    loop {
        let done = match shared.next(origin, 0) {
            Next::End => return,
            Next::Order(Order::Job(ticket, Job::Score { job, .. })) => score(shared, (origin, ticket), job, service),
            Next::Order(_) | Next::GoOn => Ok(()),
        };
        if let Err(error) = done {
            shared.failed(origin, error);
            return;
        }
    }
}

fn score(
    shared: &RewardShared,
    (origin, ticket): (Origin, Ticket),
    job: u64,
    service: &dyn RewardService,
) -> ServiceResult<()> {
    let Some(requests) = shared.lock().desk.requests.get(&job).cloned() else { return Ok(()) };
    let outcomes = service.score(&requests)?;
    if outcomes.len() != requests.len() {
        let message = format!("expected {} outcomes, got {}", requests.len(), outcomes.len());
        return Err(shared.error(ErrorCode::Internal, "score", message));
    }
    let mut state = shared.lock();
    if shared.tell(&mut state, Event::Answer { origin, ticket, versions: Vec::new(), num_tokens: 0 }) {
        state.desk.requests.remove(&job);
        state.desk.finished.insert(job, outcomes);
    }
    Ok(())
}
