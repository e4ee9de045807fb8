//! What the two fleets have in common: members, their orders, and waiting.
//!
//! Owns: the control plane behind a mutex, and one queue of orders per worker. A worker's thread takes its orders from
//! here, calls the worker without holding the mutex, and tells the control plane what came of it. A thread that hangs
//! in a call is left behind: its worker is lost, and whatever it says later is of an earlier life.

use super::event::{Action, AtBump, Event, Job, JobKey, LossCause, Origin, PlaneConfig, Role, Ticket, Time, WorkerId};
use super::plane::ControlPlane;
use super::pool::WorkerPhase;
use crate::Clock;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use temper_proto::{ServiceError, ServiceResult};
use temper_types::{ErrorCode, PolicyVersion};

/// With no worker left, so many that could not take the weights that are to be served are enough to say that nobody
/// can: the trainer's may have moved on.
const MAX_FAILED_SYNCS: u32 = 3;
/// Longest sleep between two looks at the clock.
const LOOK: Duration = Duration::from_millis(20);

/// Limits of a fleet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FleetConfig {
    /// Most jobs (groups, or bundles of responses) that a worker is given at once. All that it has is lost with it and
    /// counts as an attempt: give workers that do one thing after another, as reward workers do, one at a time.
    pub max_in_flight: u32,
    /// A worker whose heartbeat is not heard for so long is lost; `None`: workers have no heartbeat.
    pub lease: Option<Duration>,
    /// A worker that does not prove a version in so long is lost.
    pub sync_timeout: Duration,
    /// A worker that has jobs and finishes none in so long is lost.
    pub progress_timeout: Duration,
    /// With no worker left, a new one is waited for so long.
    pub worker_wait: Duration,
    /// How long one call for a finished group waits before the worker's other orders are looked at.
    pub poll: Duration,
    /// A job is given up after it was lost with so many workers.
    pub max_attempts: u32,
    /// By how many versions a response may be behind the weights that it trains.
    pub max_staleness: u64,
    /// What becomes of running groups when a new version is set.
    pub at_bump: AtBump,
}

impl Default for FleetConfig {
    fn default() -> Self {
        FleetConfig {
            max_in_flight: 32,
            lease: None,
            sync_timeout: Duration::from_secs(300),
            progress_timeout: Duration::from_secs(600),
            worker_wait: Duration::from_secs(30),
            poll: Duration::from_millis(100),
            max_attempts: 5,
            max_staleness: 0,
            at_bump: AtBump::AbortReissue,
        }
    }
}

impl FleetConfig {
    fn plane(&self) -> PlaneConfig {
        PlaneConfig {
            lease: self.lease.map_or(Time::MAX, ticks),
            sync_timeout: ticks(self.sync_timeout),
            progress_timeout: ticks(self.progress_timeout),
            max_attempts: self.max_attempts,
            max_staleness: self.max_staleness,
            at_bump: self.at_bump,
            ..PlaneConfig::default()
        }
    }
}

/// A worker of a fleet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerStatus {
    /// Its name.
    pub name: String,
    /// Its life, from 1.
    pub incarnation: u64,
    /// Where it stands.
    pub phase: WorkerPhase,
    /// The version that it proved last in this life.
    pub version: Option<PolicyVersion>,
    /// Jobs in its hands.
    pub in_flight: usize,
    /// What went wrong last, over all its lives.
    pub last_error: Option<String>,
}

/// What a worker's thread does next.
pub(super) enum Order {
    /// A job.
    Job(Ticket, Job),
    /// Take and prove a version.
    Sync(PolicyVersion),
    /// Give up all that it has.
    Abort,
}

/// What a worker's thread is to do.
pub(super) enum Next {
    /// An order.
    Order(Order),
    /// There is none: go on with what is in hand.
    GoOn,
    /// This life is over.
    End,
}

/// What a fleet does with results.
pub(super) trait Desk: Send + 'static {
    /// A job is given up.
    fn give_up(&mut self, key: JobKey, error: ServiceError);
}

struct Member<S: ?Sized> {
    name: String,
    origin: Origin,
    service: Arc<S>,
    orders: VecDeque<Order>,
    last_error: Option<String>,
}

/// What the mutex guards.
pub(super) struct State<S: ?Sized, D> {
    pub(super) plane: ControlPlane,
    pub(super) desk: D,
    members: BTreeMap<WorkerId, Member<S>>,
    ids: BTreeMap<String, WorkerId>,
    alone_since: Option<Duration>,
    /// Why no worker will come beside those that there are.
    pub(super) nobody_comes: Option<String>,
    /// Workers that could not take the version to be served, one after another.
    pub(super) num_failed_syncs: u32,
    /// Lives whose threads have not ended.
    served: BTreeSet<Origin>,
    is_closed: bool,
    /// True where the workers go on in another fleet.
    is_retiring: bool,
}

/// A fleet of workers that are reached through `S`, whose results are kept by `D`.
pub(super) struct Shared<S: ?Sized, D> {
    pub(super) role: Role,
    pub(super) config: FleetConfig,
    clock: Arc<dyn Clock>,
    state: Mutex<State<S, D>>,
    changed: Condvar,
}

fn ticks(duration: Duration) -> Time {
    Time::try_from(duration.as_millis()).unwrap_or(Time::MAX)
}

impl<S: ?Sized + Send + Sync + 'static, D: Desk> Shared<S, D> {
    pub(super) fn new(role: Role, config: FleetConfig, clock: Arc<dyn Clock>, desk: D) -> Self {
        // A fleet keeps no journal: a run resumes from its checkpoint, and workers join anew.
        let (plane, _) = ControlPlane::new(config.plane());
        let state = State {
            plane,
            desk,
            members: BTreeMap::new(),
            ids: BTreeMap::new(),
            alone_since: None,
            nobody_comes: None,
            num_failed_syncs: 0,
            served: BTreeSet::new(),
            is_closed: false,
            is_retiring: false,
        };
        Shared { role, config, clock, state: Mutex::new(state), changed: Condvar::new() }
    }

    pub(super) fn service_name(&self) -> &'static str {
        match self.role {
            Role::Rollout => "rollout fleet",
            Role::Reward => "reward fleet",
        }
    }

    pub(super) fn error(
        &self,
        code: ErrorCode,
        operation: &'static str,
        message: impl std::fmt::Display,
    ) -> ServiceError {
        ServiceError::new(code, self.service_name(), operation, message)
    }

    pub(super) fn now(&self) -> Duration {
        self.clock.elapsed()
    }

    /// A panic in a worker's thread happens outside of the mutex; should one happen inside, the state is still whole,
    /// because the control plane checks before it changes.
    pub(super) fn lock(&self) -> MutexGuard<'_, State<S, D>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Let go of the mutex until something changes, or for a moment.
    pub(super) fn wait<'a>(&self, state: MutexGuard<'a, State<S, D>>) -> MutexGuard<'a, State<S, D>> {
        self.changed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Let everybody look again.
    pub(super) fn notify(&self) {
        self.changed.notify_all();
    }

    /// Tell the control plane; gives true where it accepted an answer.
    pub(super) fn tell(&self, state: &mut State<S, D>, event: Event) -> bool {
        let actions = state.plane.step(event, ticks(self.now()));
        let mut is_accepted = false;
        for action in actions {
            match action {
                Action::Accept { .. } => is_accepted = true,
                Action::GiveUp { key, attempts } => {
                    let message = format!("given up after {attempts} attempts; {}", describe(state));
                    let error = self.error(ErrorCode::Unavailable, "dispatch", message);
                    state.desk.give_up(key, error);
                }
                Action::Lost { origin, cause } => self.note_loss(state, origin, cause),
                Action::Dispatch { to, ticket, job, .. } => state.order(to, Order::Job(ticket, job)),
                Action::Sync { to, version } => state.order(to, Order::Sync(version)),
                Action::Abort { to, .. } => state.order(to, Order::Abort),
                // Heartbeats are answered where they arrive; the trainer is told by the loop; nothing is journalled.
                Action::Rejoin { .. } | Action::Append(_) | Action::Settled { .. } => {}
                Action::Train { .. } | Action::AskTrainer { .. } => {}
            }
        }
        self.changed.notify_all();
        is_accepted
    }

    fn note_loss(&self, state: &mut State<S, D>, origin: Origin, cause: LossCause) {
        state.num_failed_syncs += u32::from(cause == LossCause::SyncFailed);
        let Some(member) = state.members.get_mut(&origin.worker) else { return };
        member.orders.clear();
        if !matches!(cause, LossCause::CallFailed | LossCause::SyncFailed | LossCause::Left) {
            member.last_error = Some(cause.describe().to_owned());
        }
        let error = member.last_error.as_deref().unwrap_or(cause.describe());
        tracing::warn!(worker = member.name, incarnation = origin.incarnation, error, "a worker is lost");
    }

    /// Take in a worker, or a new life of one, with a thread that serves it. Gives the number of the life.
    ///
    /// # Errors
    /// `ResourceExhausted` where the system refuses a thread.
    pub(super) fn enlist(
        &self,
        name: &str,
        service: Arc<S>,
        serve: impl FnOnce(Origin, Arc<S>) + Send + 'static,
    ) -> ServiceResult<u64> {
        let origin = self.admit(name, Arc::clone(&service));
        let thread = std::thread::Builder::new().name(format!("fleet {name}"));
        match thread.spawn(move || serve(origin, service)) {
            Ok(_) => Ok(origin.incarnation),
            Err(error) => {
                self.failed(origin, &error);
                self.lock().served.remove(&origin);
                Err(self.error(ErrorCode::ResourceExhausted, "join", error))
            }
        }
    }

    fn admit(&self, name: &str, service: Arc<S>) -> Origin {
        let mut state = self.lock();
        state.nobody_comes = None;
        let fresh = WorkerId(state.ids.len() as u32);
        let id = *state.ids.entry(name.to_owned()).or_insert(fresh);
        let before = state.members.remove(&id);
        let incarnation = before.as_ref().map_or(1, |member| member.origin.incarnation + 1);
        let origin = Origin { worker: id, incarnation };
        let last_error = before.and_then(|member| member.last_error);
        // Whatever it has was given to it by somebody else.
        let orders = VecDeque::from([Order::Abort]);
        state.members.insert(id, Member { name: name.to_owned(), origin, service, orders, last_error });
        state.served.insert(origin);
        let capacity = self.config.max_in_flight;
        self.tell(&mut state, Event::Register { origin, role: self.role, capacity });
        origin
    }

    pub(super) fn dismiss(&self, name: &str, reason: &str) -> ServiceResult<()> {
        let mut state = self.lock();
        let origin = self.origin(&state, name, "leave")?;
        state.note_error(origin, reason.to_owned());
        self.tell(&mut state, Event::Leave { origin });
        Ok(())
    }

    pub(super) fn heartbeat(&self, name: &str) -> ServiceResult<()> {
        const OPERATION: &str = "heartbeat";
        let mut state = self.lock();
        let origin = self.origin(&state, name, OPERATION)?;
        self.tell(&mut state, Event::Renew { origin });
        match state.phase(origin) {
            Some(WorkerPhase::Lost(cause)) => {
                let message = format!("worker `{name}` is lost ({}): it has to join again", cause.describe());
                Err(self.error(ErrorCode::Unavailable, OPERATION, message))
            }
            _ => Ok(()),
        }
    }

    fn origin(&self, state: &State<S, D>, name: &str, operation: &'static str) -> ServiceResult<Origin> {
        let member = state.ids.get(name).and_then(|id| state.members.get(id));
        let unknown = || self.error(ErrorCode::Unavailable, operation, format!("no worker is called `{name}`"));
        member.map(|member| member.origin).ok_or_else(unknown)
    }

    pub(super) fn workers(&self) -> Vec<WorkerStatus> {
        let state = self.lock();
        let view = |w: super::pool::WorkerView| {
            let member = state.members.get(&w.origin.worker)?;
            Some(WorkerStatus {
                name: member.name.clone(),
                incarnation: w.origin.incarnation,
                phase: w.phase,
                version: w.held,
                in_flight: w.in_flight,
                last_error: member.last_error.clone(),
            })
        };
        state.plane.workers().filter_map(view).collect()
    }

    /// Every worker that is counted on.
    pub(super) fn services(&self) -> Vec<(Origin, Arc<S>)> {
        let state = self.lock();
        let alive = state.plane.workers().filter(|w| !matches!(w.phase, WorkerPhase::Lost(_)));
        alive.filter_map(|w| Some((w.origin, Arc::clone(&state.members.get(&w.origin.worker)?.service)))).collect()
    }

    /// The next order of a worker's thread; waits for one unless there is something `in_hand`.
    pub(super) fn next(&self, origin: Origin, in_hand: usize) -> Next {
        let mut state = self.lock();
        loop {
            if state.is_closed || !state.is_alive(origin) {
                return Next::End;
            }
            let member = state.members.get_mut(&origin.worker);
            if let Some(order) = member.and_then(|member| member.orders.pop_front()) {
                return Next::Order(order);
            }
            if in_hand > 0 {
                return Next::GoOn;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A call to a worker failed.
    pub(super) fn failed(&self, origin: Origin, error: impl std::fmt::Display) {
        let mut state = self.lock();
        if state.is_alive(origin) {
            state.note_error(origin, error.to_string());
        }
        self.tell(&mut state, Event::Failed { origin });
    }

    /// No worker will come: once none is left, nobody waits for one.
    pub(super) fn expect_nobody(&self, reason: &str) {
        self.lock().nobody_comes.get_or_insert_with(|| reason.to_owned());
        self.changed.notify_all();
    }

    /// Let time pass, and fail where no worker is left and none came in time or will come, or all that came could not
    /// serve.
    pub(super) fn check_workers(&self, state: &mut State<S, D>, operation: &'static str) -> ServiceResult<()> {
        self.tell(state, Event::Tick);
        let now = self.now();
        if state.plane.workers().any(|w| !matches!(w.phase, WorkerPhase::Lost(_))) {
            state.alone_since = None;
            return Ok(());
        }
        let since = *state.alone_since.get_or_insert(now);
        let is_hopeless = state.num_failed_syncs >= MAX_FAILED_SYNCS;
        if let Some(reason) = &state.nobody_comes {
            let message = format!("no worker is left, and none will come: {reason}");
            return Err(self.error(ErrorCode::Unavailable, operation, message));
        }
        if !is_hopeless && now.saturating_sub(since) < self.config.worker_wait {
            return Ok(());
        }
        let which =
            if is_hopeless { "no worker can take the weights that are to be served" } else { "no worker is left" };
        let message = format!("{which}: {}", describe(state));
        Err(self.error(ErrorCode::Unavailable, operation, message))
    }

    /// Let go of all workers, which give up what they have, so that another fleet can take them in.
    pub(super) fn retire(&self) {
        let mut state = self.lock();
        (state.is_closed, state.is_retiring) = (true, true);
        self.changed.notify_all();
    }

    /// Wait until nobody calls a worker of a fleet that was told to retire, at most `patience`. Gives those that are
    /// still called, and those that were lost: another fleet would find calls of this one in them. One that could not
    /// take new weights is not among them.
    pub(super) fn unfit(&self, patience: Duration) -> BTreeSet<String> {
        let deadline = self.now().saturating_add(patience);
        let mut state = self.lock();
        while !state.served.is_empty() && self.now() < deadline {
            state = self.wait(state);
        }
        let is_called = |id: &WorkerId| state.served.iter().any(|origin| origin.worker == *id);
        let is_lost = |member: &Member<S>| {
            let phase = state.phase(member.origin);
            matches!(phase, Some(WorkerPhase::Lost(cause)) if cause != LossCause::SyncFailed)
        };
        let unfit = state.members.iter().filter(|(id, member)| is_called(id) || is_lost(member));
        unfit.map(|(_, member)| member.name.clone()).collect()
    }

    /// Whether a thread that ends is to leave its worker with nothing in hand.
    pub(super) fn is_retiring(&self) -> bool {
        self.lock().is_retiring
    }

    /// End every thread that is not in a call.
    pub(super) fn close(&self) {
        self.lock().is_closed = true;
        self.changed.notify_all();
    }
}

impl<S: ?Sized, D> State<S, D> {
    fn order(&mut self, to: Origin, order: Order) {
        if let Some(member) = self.members.get_mut(&to.worker).filter(|member| member.origin == to) {
            member.orders.push_back(order);
        }
    }

    fn phase(&self, origin: Origin) -> Option<WorkerPhase> {
        self.plane.worker(origin.worker).filter(|w| w.origin == origin).map(|w| w.phase)
    }

    fn is_alive(&self, origin: Origin) -> bool {
        self.phase(origin).is_some_and(|phase| !matches!(phase, WorkerPhase::Lost(_)))
    }

    fn note_error(&mut self, origin: Origin, error: String) {
        if let Some(member) = self.members.get_mut(&origin.worker).filter(|member| member.origin == origin) {
            member.last_error = Some(error);
        }
    }
}

/// Every worker and what went wrong with it.
pub(super) fn describe<S: ?Sized, D>(state: &State<S, D>) -> String {
    let one = |member: &Member<S>| {
        let error = member.last_error.as_deref().unwrap_or("nothing went wrong");
        format!("{} (incarnation {}): {error}", member.name, member.origin.incarnation)
    };
    let all: Vec<String> = state.members.values().map(one).collect();
    if all.is_empty() { "no worker ever joined".to_owned() } else { all.join("; ") }
}

/// Says that a worker's thread has ended, and that the worker failed where it did so by a panic.
pub(super) struct Farewell<S: ?Sized + Send + Sync + 'static, D: Desk> {
    pub(super) shared: Arc<Shared<S, D>>,
    pub(super) origin: Origin,
}

impl<S: ?Sized + Send + Sync + 'static, D: Desk> Drop for Farewell<S, D> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.shared.failed(self.origin, "the call panicked");
        }
        self.shared.lock().served.remove(&self.origin);
        self.shared.notify();
    }
}
