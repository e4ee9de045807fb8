//! N rollout workers as one [`RolloutService`].

use super::event::{Event, Fence, GroupSpec, Job, JobKey, Origin, Role, Settlement, Ticket};
use super::ledger::{DropReason, Ledger};
use super::pool::WorkerPhase;
use super::roster::{Desk, Farewell, FleetConfig, Next, Order, Shared, State, WorkerStatus, describe};
use crate::{Clock, SystemClock};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use temper_proto::{
    Fate, FleetCounts, GeneratedSample, GroupRequest, GroupResult, RolloutService, RolloutStats, ServiceError,
    ServiceResult, Settled,
};
use temper_types::{ErrorCode, GroupId, PolicyVersion};

/// Groups of which a worker's thread remembers the attempt, so that a second answer is known as one.
const MAX_REMEMBERED: usize = 4096;
/// Prompt tokens that have to agree for two groups to profit from one prefix cache.
const PREFIX_TOKENS: usize = 64;

/// Requests that are open and results that nobody took yet.
#[derive(Default)]
struct Results {
    requests: BTreeMap<GroupId, Arc<GroupRequest>>,
    finished: VecDeque<GroupResult>,
    failure: Option<ServiceError>,
    /// Why no worker can pull weights any more.
    lost_source: Option<String>,
}

impl Desk for Results {
    fn give_up(&mut self, key: JobKey, error: ServiceError) {
        let JobKey::Group(group) = key else { return };
        let Some(request) = self.requests.remove(&group) else { return };
        let message = format!("group {group} (prompt {}): {}", request.prompt_id, error.message);
        self.failure.get_or_insert(ServiceError { message, ..error });
    }
}

type RolloutState = State<dyn RolloutService, Results>;
type RolloutShared = Shared<dyn RolloutService, Results>;

/// Generates with every worker that has joined. Which of them answers, and in which order, reaches no token: a group's
/// noise comes with its request, and a worker generates only with the version that was set.
pub struct FleetRollout {
    shared: Arc<RolloutShared>,
    /// Last known counters of every life of a worker.
    stats: Mutex<BTreeMap<Origin, RolloutStats>>,
}

impl FleetRollout {
    /// A fleet without workers.
    pub fn new(config: FleetConfig) -> Self {
        Self::with_clock(config, Arc::new(SystemClock::default()))
    }

    /// A fleet whose deadlines run by `clock`.
    pub fn with_clock(config: FleetConfig, clock: Arc<dyn Clock>) -> Self {
        let shared = Arc::new(Shared::new(Role::Rollout, config, clock, Results::default()));
        FleetRollout { shared, stats: Mutex::new(BTreeMap::new()) }
    }

    /// Take in a worker; it is given groups as soon as it proved the current version. A name that is known begins a new
    /// life, and what its earlier one had is issued again. Gives the number of the life.
    ///
    /// # Errors
    /// `ResourceExhausted` where the system refuses a thread.
    pub fn join(&self, name: &str, service: Arc<dyn RolloutService>) -> ServiceResult<u64> {
        let shared = Arc::clone(&self.shared);
        self.shared.enlist(name, service, move |origin, service| {
            Server { shared, origin, service, open: BTreeSet::new(), known: BTreeMap::new() }.run();
        })
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

    /// Let go of all workers: they give up what they have. Those that [`FleetRollout::unfit`] does not name can go on
    /// in another fleet, with the weights that they hold.
    pub fn retire(&self) {
        self.shared.retire();
    }

    /// After [`FleetRollout::retire`], workers that cannot go on in another fleet: they were lost, or are in a call
    /// that does not end within `patience`.
    pub fn unfit(&self, patience: Duration) -> BTreeSet<String> {
        self.shared.unfit(patience)
    }

    /// The trainer that workers pull weights from is lost, and with it every version that they do not hold yet: a call
    /// of [`RolloutService::set_version`] that waits for one fails, now or later. The run goes back to a checkpoint
    /// with a fleet of its own.
    pub fn lose_source(&self, reason: &str) {
        self.shared.lock().desk.lost_source.get_or_insert_with(|| reason.to_owned());
        self.shared.notify();
    }

    /// No worker will come beside those that joined, until one does: without any, calls fail at once, with this
    /// `reason`, in place of waiting.
    pub fn expect_nobody(&self, reason: &str) {
        self.shared.expect_nobody(reason);
    }

    /// What became of every issued sample so far. Delivered groups are open until [`FleetRollout::settle`].
    pub fn ledger(&self) -> Ledger {
        self.shared.lock().plane.ledger().clone()
    }

    /// Messages of workers that changed nothing, by kind.
    pub fn fences(&self) -> BTreeMap<Fence, u64> {
        self.shared.lock().plane.fences().clone()
    }

    /// Say what became of delivered groups: these samples were trained on in `step`, the groups' others were not.
    ///
    /// # Errors
    /// `InvalidArgument` where the step is not above the last one, or a group is not delivered or too stale.
    pub fn settle(&self, step: u64, groups: Vec<Settlement>) -> ServiceResult<()> {
        let mut state = self.shared.lock();
        self.shared.tell(&mut state, Event::BeginStep { step, groups });
        if state.plane.training_step() != Some(step) {
            let message = format!(
                "step {step} names a group twice, one that was not delivered or is too stale, or comes after step {}",
                state.plane.last_step()
            );
            return Err(self.shared.error(ErrorCode::InvalidArgument, "settle", message));
        }
        self.shared.tell(&mut state, Event::StepDone { step, version: None });
        Ok(())
    }

    /// Samples of whole groups: those of which none was trained on are let go of.
    fn settle_groups(&self, step: u64, samples: &[Settled]) -> ServiceResult<()> {
        let mut groups: BTreeMap<GroupId, BTreeSet<u32>> = BTreeMap::new();
        for sample in samples {
            let trained = groups.entry(sample.group_id).or_default();
            if sample.fate == Fate::Trained {
                trained.insert(sample.sample_index.0);
            }
        }
        let (trained, unused): (Vec<_>, Vec<_>) = groups.into_iter().partition(|(_, trained)| !trained.is_empty());
        let unused = unused.into_iter().map(|(group, _)| group).collect();
        self.shared.tell(&mut self.shared.lock(), Event::Discard { groups: unused });
        let settlement =
            |(group, trained): (GroupId, BTreeSet<u32>)| Settlement { group, trained: trained.into_iter().collect() };
        if trained.is_empty() {
            return Ok(());
        }
        FleetRollout::settle(self, step, trained.into_iter().map(settlement).collect())
    }

    /// Fail where no worker has held the version for as long as one may take to prove it: those that did are gone, and
    /// the trainer's weights may have moved on.
    fn check_served(&self, state: &RolloutState, since: &mut Option<Duration>) -> ServiceResult<()> {
        if state.plane.workers().any(|w| matches!(w.phase, WorkerPhase::Ready | WorkerPhase::Draining)) {
            *since = None;
            return Ok(());
        }
        let now = self.shared.now();
        if now.saturating_sub(*since.get_or_insert(now)) < self.shared.config.sync_timeout {
            return Ok(());
        }
        let message = format!("no worker holds the version that is to be served: {}", describe(state));
        Err(self.shared.error(ErrorCode::Unavailable, "next_group", message))
    }

    fn is_served(state: &RolloutState, version: PolicyVersion) -> bool {
        let mut alive = state.plane.workers().filter(|w| !matches!(w.phase, WorkerPhase::Lost(_))).peekable();
        alive.peek().is_some() && alive.all(|w| w.phase == WorkerPhase::Ready && w.held == Some(version))
    }
}

impl Drop for FleetRollout {
    fn drop(&mut self) {
        self.shared.close();
    }
}

impl RolloutService for FleetRollout {
    /// A group that a worker refuses as wrong is an error of the next [`RolloutService::next_group`].
    fn submit(&self, groups: Vec<GroupRequest>) -> ServiceResult<()> {
        let mut state = self.shared.lock();
        let mut seen = BTreeSet::new();
        for group in &groups {
            if state.desk.requests.contains_key(&group.group_id) || !seen.insert(group.group_id) {
                let message = format!("group {} is open already", group.group_id);
                return Err(self.shared.error(ErrorCode::InvalidArgument, "submit", message));
            }
        }
        let due = state.plane.version().map_or(0, |version| version.number);
        let specs = groups.iter().map(|group| spec_of(group, due)).collect();
        // An id that is used again is of a group that nobody trained on.
        self.shared.tell(&mut state, Event::Discard { groups: seen.into_iter().collect() });
        state.desk.requests.extend(groups.into_iter().map(|group| (group.group_id, Arc::new(group))));
        self.shared.tell(&mut state, Event::Submit { groups: specs });
        Ok(())
    }

    fn next_group(&self, timeout: Duration) -> ServiceResult<Option<GroupResult>> {
        const OPERATION: &str = "next_group";
        let deadline = self.shared.now().saturating_add(timeout);
        let mut state = self.shared.lock();
        let mut unserved_since = None;
        loop {
            let left = self.shared.check_workers(&mut state, OPERATION);
            if let Some(result) = state.desk.finished.pop_front() {
                return Ok(Some(result));
            }
            if let Some(error) = state.desk.failure.take() {
                return Err(error);
            }
            if state.desk.requests.is_empty() {
                return Ok(None);
            }
            left?;
            self.check_served(&state, &mut unserved_since)?;
            if self.shared.now() >= deadline {
                let open = state.desk.requests.len();
                let message = format!("none of {open} groups finished within {timeout:?}");
                return Err(self.shared.error(ErrorCode::DeadlineExceeded, OPERATION, message));
            }
            state = self.shared.wait(state);
        }
    }

    /// Workers drop what they have when they come to it; what they answer until then is fenced.
    fn abort_all(&self) -> ServiceResult<usize> {
        let mut state = self.shared.lock();
        let num_open = state.desk.requests.len();
        state.desk.requests.clear();
        state.desk.failure = None;
        self.shared.tell(&mut state, Event::AbortAll);
        Ok(num_open)
    }

    /// Returns when every worker has proved the version or is lost.
    fn set_version(&self, version: PolicyVersion) -> ServiceResult<()> {
        const OPERATION: &str = "set_version";
        let mut state = self.shared.lock();
        state.num_failed_syncs = 0;
        self.shared.tell(&mut state, Event::Publish { version });
        if let Some(current) = state.plane.version().filter(|current| *current != version) {
            let message = format!("version {version} does not follow {current}, which the workers serve");
            return Err(self.shared.error(ErrorCode::VersionMismatch, OPERATION, message));
        }
        while !Self::is_served(&state, version) {
            if let Some(reason) = &state.desk.lost_source {
                let message = format!("version {version} cannot be pulled any more: {reason}");
                return Err(self.shared.error(ErrorCode::Unavailable, OPERATION, message));
            }
            self.shared.check_workers(&mut state, OPERATION)?;
            if !Self::is_served(&state, version) {
                state = self.shared.wait(state);
            }
        }
        Ok(())
    }

    fn settle(&self, step: u64, samples: &[Settled]) -> ServiceResult<()> {
        self.settle_groups(step, samples)
    }

    fn fleet_counts(&self) -> Option<FleetCounts> {
        let (ledger, fences) = (self.ledger(), self.fences());
        let fenced = |fence| fences.get(&fence).copied().unwrap_or(0);
        let lost = |reason| ledger.dropped().get(&reason).copied().unwrap_or(0);
        Some(FleetCounts {
            late_answers: fenced(Fence::LateAnswer) + fenced(Fence::StaleIncarnation),
            duplicates: fenced(Fence::DuplicateAnswer),
            reissued: lost(DropReason::WorkerLost) + lost(DropReason::Superseded),
        })
    }

    /// Every worker at once; one that does not answer sleeps when it is lost.
    fn sleep(&self) -> ServiceResult<u64> {
        let mut num_bytes = 0;
        for (origin, service) in self.shared.services() {
            match service.sleep() {
                Ok(freed) => num_bytes += freed,
                Err(error) if error.code == ErrorCode::InvalidArgument => return Err(error),
                Err(error) => tracing::warn!(worker = origin.worker.0, %error, "a worker does not sleep"),
            }
        }
        Ok(num_bytes)
    }

    /// Sums over all workers; one that is lost counts as it was when it was last asked.
    fn stats(&self) -> RolloutStats {
        let fresh: Vec<(Origin, RolloutStats)> =
            self.shared.services().into_iter().map(|(origin, service)| (origin, service.stats())).collect();
        let mut known = self.stats.lock().unwrap_or_else(PoisonError::into_inner);
        let alive: BTreeSet<Origin> = fresh.iter().map(|(origin, _)| *origin).collect();
        known.extend(fresh);
        known
            .iter()
            .map(|(origin, stats)| if alive.contains(origin) { *stats } else { at_rest(*stats) })
            .fold(RolloutStats::default(), sum)
    }
}

/// Counters of a worker that does nothing any more.
fn at_rest(stats: RolloutStats) -> RolloutStats {
    RolloutStats {
        peak_kv_blocks: 0,
        kv_blocks: 0,
        kv_blocks_in_use: 0,
        num_requests_running: 0,
        num_requests_waiting: 0,
        ..stats
    }
}

fn sum(a: RolloutStats, b: RolloutStats) -> RolloutStats {
    let mut speculation = a.speculation;
    let theirs = b.speculation.suffix.iter().chain(&b.speculation.replay).chain(&b.speculation.model);
    let ours = speculation.suffix.iter_mut().chain(&mut speculation.replay).chain(&mut speculation.model);
    speculation.num_drafts += b.speculation.num_drafts;
    for (ours, theirs) in ours.zip(theirs) {
        ours.num_draft_tokens += theirs.num_draft_tokens;
        ours.num_accepted_tokens += theirs.num_accepted_tokens;
    }
    RolloutStats {
        num_steps: a.num_steps + b.num_steps,
        num_prefill_tokens: a.num_prefill_tokens + b.num_prefill_tokens,
        num_generated_tokens: a.num_generated_tokens + b.num_generated_tokens,
        num_preemptions: a.num_preemptions + b.num_preemptions,
        peak_kv_blocks: a.peak_kv_blocks + b.peak_kv_blocks,
        kv_blocks_in_use: a.kv_blocks_in_use + b.kv_blocks_in_use,
        num_rows: a.num_rows + b.num_rows,
        kv_blocks: a.kv_blocks + b.kv_blocks,
        num_requests_running: a.num_requests_running + b.num_requests_running,
        num_requests_waiting: a.num_requests_waiting + b.num_requests_waiting,
        prompt_tokens: a.prompt_tokens + b.prompt_tokens,
        prefix_cache_queries: a.prefix_cache_queries + b.prefix_cache_queries,
        prefix_cache_hits: a.prefix_cache_hits + b.prefix_cache_hits,
        step_micros: a.step_micros + b.step_micros,
        tail_micros: a.tail_micros + b.tail_micros,
        num_reused_tokens: a.num_reused_tokens + b.num_reused_tokens,
        weight_version: a.weight_version.max(b.weight_version),
        num_refits: a.num_refits + b.num_refits,
        refit_micros: a.refit_micros + b.refit_micros,
        pause_micros: a.pause_micros + b.pause_micros,
        shared_weight_bytes: a.shared_weight_bytes + b.shared_weight_bytes,
        streamed_weight_bytes: a.streamed_weight_bytes + b.streamed_weight_bytes,
        speculation,
    }
}

fn spec_of(request: &GroupRequest, due: u64) -> GroupSpec {
    let head = &request.prompt_token_ids[..request.prompt_token_ids.len().min(PREFIX_TOKENS)];
    let bytes: Vec<u8> = head.iter().flat_map(|id| id.to_le_bytes()).collect();
    let hash = blake3::hash(&bytes);
    let prefix = hash.as_bytes().iter().take(8).fold(0, |key, byte| (key << 8) | u64::from(*byte));
    GroupSpec {
        group: request.group_id,
        prompt: request.prompt_id,
        seeds: request.seeds.clone(),
        due,
        prompt_tokens: request.prompt_token_ids.len() as u64,
        max_new_tokens: request.sampling.max_new_tokens as u64,
        prefix,
        is_bound: request.keep_kv,
    }
}

/// The thread of one life of a worker.
struct Server {
    shared: Arc<RolloutShared>,
    origin: Origin,
    service: Arc<dyn RolloutService>,
    /// Groups in the worker's hands.
    open: BTreeSet<GroupId>,
    /// The last attempt at every group that it was given.
    known: BTreeMap<GroupId, Ticket>,
}

impl Server {
    fn run(mut self) {
        let _farewell = Farewell { shared: Arc::clone(&self.shared), origin: self.origin };
        loop {
            let done = match self.shared.next(self.origin, self.open.len()) {
                Next::End if self.shared.is_retiring() => {
                    // Whoever takes the worker in next finds nothing in its hands.
                    if let Err(error) = self.abort() {
                        self.shared.failed(self.origin, error);
                    }
                    return;
                }
                Next::End => return,
                Next::Order(Order::Job(ticket, Job::Group(spec))) => self.submit(ticket, spec.group),
                Next::Order(Order::Job(_, Job::Score { .. })) => Ok(()),
                Next::Order(Order::Sync(version)) => self.sync(version),
                Next::Order(Order::Abort) => self.abort(),
                Next::GoOn => self.poll(self.shared.config.poll).map(|_| ()),
            };
            if let Err(error) = done {
                self.shared.failed(self.origin, error);
                return;
            }
        }
    }

    fn submit(&mut self, ticket: Ticket, group: GroupId) -> ServiceResult<()> {
        let Some(request) = self.shared.lock().desk.requests.get(&group).cloned() else { return Ok(()) };
        match self.service.submit(vec![GroupRequest::clone(&request)]) {
            Ok(()) => {
                self.remember(group, ticket);
                Ok(())
            }
            Err(error) if matches!(error.code, ErrorCode::InvalidArgument | ErrorCode::ResourceExhausted) => {
                let mut state = self.shared.lock();
                state.desk.failure.get_or_insert(error);
                self.shared.tell(&mut state, Event::Refuse { origin: self.origin, ticket });
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn remember(&mut self, group: GroupId, ticket: Ticket) {
        self.open.insert(group);
        self.known.insert(group, ticket);
        if self.known.len() > MAX_REMEMBERED {
            self.known.retain(|group, _| self.open.contains(group));
        }
    }

    fn sync(&mut self, version: PolicyVersion) -> ServiceResult<()> {
        self.service.set_version(version)?;
        let mut state = self.shared.lock();
        state.num_failed_syncs = 0;
        self.shared.tell(&mut state, Event::Attest { origin: self.origin, version });
        Ok(())
    }

    /// Give up all groups, and take what finished meanwhile so that it is not mistaken for a later attempt's.
    fn abort(&mut self) -> ServiceResult<()> {
        self.service.abort_all()?;
        while self.poll(Duration::ZERO)? {}
        self.open.clear();
        Ok(())
    }

    /// Take a finished group; false where there was none in time.
    fn poll(&mut self, timeout: Duration) -> ServiceResult<bool> {
        match self.service.next_group(timeout) {
            Ok(Some(result)) => self.answer(result).map(|()| true),
            Ok(None) if timeout > Duration::ZERO && !self.open.is_empty() => {
                let message = format!("it knows nothing of {} groups that it was given", self.open.len());
                Err(self.shared.error(ErrorCode::Internal, "next_group", message))
            }
            Ok(None) => Ok(false),
            Err(error) if error.code == ErrorCode::DeadlineExceeded => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn answer(&mut self, result: GroupResult) -> ServiceResult<()> {
        let group = result.group_id;
        let mut state = self.shared.lock();
        // A second answer to an earlier round of the group is about an attempt that has ended.
        let is_of_round = state.desk.requests.get(&group).is_none_or(|request| answers_round(request, &result));
        let ticket = self.known.get(&group).copied().filter(|_| is_of_round).unwrap_or(Ticket(u64::MAX));
        let is_open = is_of_round && self.open.remove(&group);
        if let (true, Some(request)) = (is_open, state.desk.requests.get(&group)) {
            check_answer(request, &result)
                .map_err(|problem| self.shared.error(ErrorCode::Internal, "next_group", problem))?;
        }
        let mut versions: Vec<PolicyVersion> = result.samples.iter().flat_map(drawn_versions).collect();
        versions.sort_unstable();
        versions.dedup();
        let num_tokens = result.samples.iter().map(|s| s.token_ids.len() as u64).sum();
        if self.shared.tell(&mut state, Event::Answer { origin: self.origin, ticket, versions, num_tokens }) {
            state.desk.requests.remove(&group);
            state.desk.finished.push_back(result);
        }
        Ok(())
    }
}

/// Versions of the tokens that the worker drew itself; a reused token has that of whoever drew it first.
fn drawn_versions(sample: &GeneratedSample) -> impl Iterator<Item = PolicyVersion> {
    let versions = sample.policy_versions.iter().flat_map(|(version, n)| std::iter::repeat_n(*version, *n as usize));
    let is_drawn = |index: usize| sample.reused.get(index) != Some(&1);
    versions.enumerate().filter(move |(index, _)| is_drawn(*index)).map(|(_, version)| version)
}

/// True where `result` goes on where the responses of `request` stand.
fn answers_round(request: &GroupRequest, result: &GroupResult) -> bool {
    let num_begun = |index: usize| request.begun.get(index).map_or(0, |response| response.token_ids.len());
    result.samples.iter().enumerate().all(|(index, sample)| sample.num_begun as usize == num_begun(index))
}

/// An answer that is not one to its request comes from a broken worker.
fn check_answer(request: &GroupRequest, result: &GroupResult) -> Result<(), String> {
    let seeds: Vec<u64> = result.samples.iter().map(|s| s.seed).collect();
    let is_ordered = result.samples.iter().enumerate().all(|(index, s)| s.sample_index.0 as usize == index);
    if result.prompt_id != request.prompt_id || seeds != request.seeds || !is_ordered {
        return Err(format!(
            "its answer to group {} is of prompt {} with seeds {seeds:?}; asked were prompt {} and seeds {:?}",
            request.group_id, result.prompt_id, request.prompt_id, request.seeds
        ));
    }
    Ok(())
}
