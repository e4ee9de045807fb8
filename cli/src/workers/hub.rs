//! Where workers register: names, lives, leases.

use super::heartbeat_interval;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use temper_proto::{Assignment, ServiceError, ServiceResult, WorkerHello, WorkerId, WorkerRegistry, WorkerRole};
use temper_types::ErrorCode;

/// What every worker of a run is told.
#[derive(Debug, Clone)]
pub struct Work {
    /// The resolved recipe.
    pub recipe: String,
    /// The model that the run starts from.
    pub model_dir: String,
    /// Directory of the run.
    pub run_dir: String,
    /// Number of trainer ranks.
    pub world: u32,
}

/// How a worker stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Registered; it loads.
    Starting,
    /// It serves.
    Ready,
    /// It ended, or its lease did.
    Lost,
}

impl Standing {
    /// Name in commands.
    pub const fn name(self) -> &'static str {
        match self {
            Standing::Starting => "starting",
            Standing::Ready => "ready",
            Standing::Lost => "lost",
        }
    }
}

/// One worker, in its last life.
#[derive(Debug, Clone)]
pub struct Member {
    /// Name and life.
    pub id: WorkerId,
    /// What it said of itself.
    pub hello: WorkerHello,
    /// Its rank, of a trainer.
    pub rank: u32,
    /// HOST:PORT of the trainer ranks that it was told to take weights from, of another worker.
    pub weight_sources: Vec<String>,
    /// How it stands.
    pub standing: Standing,
    /// True where it has served in this life.
    pub has_served: bool,
    /// Why it was lost, or its life before this one.
    pub cause: String,
    seen: Instant,
}

/// What the hub tells whoever uses the workers.
#[derive(Debug, Clone)]
pub enum Change {
    /// It serves from now on.
    Ready(Member),
    /// It is gone; the member says why.
    Lost(Member),
}

/// The registry of a run.
pub struct Hub {
    work: Work,
    lease: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    members: BTreeMap<String, Member>,
    changes: Vec<Change>,
    /// Names of workers that the run starts itself, each with its process, once that is there.
    reserved: BTreeMap<String, Option<u32>>,
    is_ending: bool,
    /// Workers that know it.
    told: BTreeSet<WorkerId>,
}

impl Hub {
    /// A hub without workers.
    pub fn new(work: Work, lease: Duration) -> Self {
        Hub { work, lease, state: Mutex::default(), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All workers, by name.
    pub fn members(&self) -> Vec<Member> {
        self.lock().members.values().cloned().collect()
    }

    /// From now on `name` is that of a worker that the run starts itself, and so is the rank of a trainer's name: it is
    /// for this process alone; for nobody yet where that is not there.
    pub fn reserve(&self, name: &str, process_id: Option<u32>) {
        self.lock().reserved.insert(name.to_owned(), process_id);
    }

    /// The run starts no worker of this name any more: it is anybody's.
    pub fn release(&self, name: &str) {
        self.lock().reserved.remove(name);
    }

    /// Tell all workers to end with their next heartbeat.
    pub fn end(&self) {
        self.lock().is_ending = true;
        self.changed.notify_all();
    }

    /// Tell all workers that live to end, by the answers to their heartbeats; takes at most the time of two heartbeats,
    /// as one that stands still hears nothing.
    pub fn see_off(&self) {
        self.end();
        let deadline = Instant::now() + 2 * heartbeat_interval(self.lease);
        let mut state = self.lock();
        while !state.all_are_told() && Instant::now() < deadline {
            let rest = deadline.saturating_duration_since(Instant::now());
            state = self.changed.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The worker `name` is gone, in whichever life it was.
    pub fn lose(&self, name: &str, cause: &str) {
        let mut state = self.lock();
        let id = state.members.get(name).map(|member| member.id.clone());
        if let Some(id) = id {
            state.lose(&id, cause);
            self.changed.notify_all();
        }
    }

    /// Addresses of the trainer ranks that serve, in the order of the ranks.
    pub fn weight_sources(&self) -> Vec<String> {
        self.lock().sources()
    }

    /// Say again that this worker serves, if it still does in this life: whoever uses the workers has let go of it.
    pub fn present_again(&self, id: &WorkerId) {
        let mut state = self.lock();
        let member = state.members.get(&id.name).filter(|m| m.id == *id && m.standing == Standing::Ready).cloned();
        state.changes.extend(member.map(Change::Ready));
        self.changed.notify_all();
    }

    /// Wait for changes, at most `timeout`; leases that ran out are among them.
    pub fn wait(&self, timeout: Duration) -> Vec<Change> {
        let deadline = Instant::now() + timeout;
        let mut state = self.lock();
        loop {
            state.expire(self.lease);
            let rest = deadline.saturating_duration_since(Instant::now());
            if !state.changes.is_empty() || rest.is_zero() || state.is_ending {
                return std::mem::take(&mut state.changes);
            }
            let waited = self.changed.wait_timeout(state, rest.min(self.lease / 4));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl State {
    fn lose(&mut self, id: &WorkerId, cause: &str) {
        let Some(member) = self.members.get_mut(&id.name) else { return };
        if member.id == *id && member.standing != Standing::Lost {
            member.standing = Standing::Lost;
            cause.clone_into(&mut member.cause);
            self.changes.push(Change::Lost(member.clone()));
        }
    }

    fn all_are_told(&self) -> bool {
        self.members.values().all(|member| member.standing == Standing::Lost || self.told.contains(&member.id))
    }

    fn expire(&mut self, lease: Duration) {
        let late = |m: &&Member| m.standing != Standing::Lost && m.seen.elapsed() > lease;
        let ids: Vec<WorkerId> = self.members.values().filter(late).map(|m| m.id.clone()).collect();
        for id in ids {
            self.lose(&id, &format!("no heartbeat for {lease:?}"));
        }
    }

    /// The member of this life, or that the life is over.
    fn live(&mut self, id: &WorkerId, operation: &'static str) -> ServiceResult<&mut Member> {
        let fenced = || {
            let message = format!("life {} of worker {} is over: register again", id.incarnation, id.name);
            ServiceError::new(ErrorCode::Cancelled, "controller", operation, message)
        };
        let member = self.members.get_mut(&id.name).filter(|m| m.id == *id && m.standing != Standing::Lost);
        let member = member.ok_or_else(fenced)?;
        member.seen = Instant::now();
        Ok(member)
    }

    /// Whether `hello` may have the name that it asks for, of nobody or of its own former life.
    ///
    /// # Errors
    /// `InvalidArgument` where the name is another worker's, `ResourceExhausted` where it is until the other's lease
    /// ends, `Unavailable` where the run has not started the worker of this name yet.
    fn check_name(&self, hello: &WorkerHello) -> ServiceResult<()> {
        let WorkerHello { name, role, address, process_id, .. } = hello;
        match self.reserved.get(name) {
            Some(None) => return Err(refuse(ErrorCode::Unavailable, format!("worker {name} is about to be started"))),
            Some(Some(own)) if own != process_id => {
                let message = format!("{name} is a worker that the run starts itself, as process {own}: {OTHER_NAME}");
                return Err(refuse(ErrorCode::InvalidArgument, message));
            }
            _ => {}
        }
        let Some(other) = self.members.get(name).filter(|m| m.standing != Standing::Lost) else { return Ok(()) };
        let has_same_role = other.hello.role == *role;
        // Nobody listens where another process does: whoever was there is gone, or asks itself.
        if has_same_role && other.hello.address == *address {
            return Ok(());
        }
        let WorkerHello { role, address, process_id, .. } = &other.hello;
        let heard = other.seen.elapsed().as_secs_f32();
        let message = format!(
            "worker {name} lives: role {}, process {process_id} at {address}, heard {heard:.1} s ago: {OTHER_NAME}",
            role.name()
        );
        let code = if has_same_role { ErrorCode::ResourceExhausted } else { ErrorCode::InvalidArgument };
        Err(refuse(code, message))
    }

    fn trainers(&self) -> impl Iterator<Item = &Member> {
        self.members.values().filter(|m| m.hello.role == WorkerRole::Trainer && m.standing != Standing::Lost)
    }

    fn free_name(&self, role: WorkerRole) -> String {
        let name = |n: usize| worker_name(role, n);
        let is_lost = |name: &String| self.members.get(name).is_none_or(|m| m.standing == Standing::Lost);
        let is_free = |name: &String| is_lost(name) && !self.reserved.contains_key(name);
        let most = self.members.len() + self.reserved.len();
        (0..=most).map(name).find(is_free).unwrap_or_else(|| name(most))
    }

    /// The rank that the name ends on, or else the first that nobody else has.
    fn free_rank(&self, name: &str, world: u32) -> Option<u32> {
        let is_reserved = |rank: u32| {
            let owner = worker_name(WorkerRole::Trainer, rank as usize);
            owner != name && self.reserved.contains_key(&owner)
        };
        let is_others = |rank: u32| self.trainers().any(|m| m.rank == rank && m.id.name != name);
        let is_free = |rank: &u32| !is_others(*rank) && !is_reserved(*rank);
        let named = name.rsplit('-').next().and_then(|text| text.parse().ok()).filter(|rank| *rank < world);
        named.filter(is_free).or_else(|| (0..world).find(is_free))
    }

    /// Addresses of the trainers that serve, in the order of their ranks.
    fn sources(&self) -> Vec<String> {
        let mut ready: Vec<&Member> = self.trainers().filter(|m| m.standing == Standing::Ready).collect();
        ready.sort_by_key(|m| m.rank);
        ready.iter().map(|m| m.hello.address.clone()).collect()
    }
}

/// Name of a worker that is given none of its own.
pub(super) fn worker_name(role: WorkerRole, index: usize) -> String {
    format!("{}-{index}", role.name())
}

/// What a worker is told whose name is another one's.
const OTHER_NAME: &str = "join under another --name, or under none";

fn refuse(code: ErrorCode, message: impl std::fmt::Display) -> ServiceError {
    ServiceError::new(code, "controller", "register", message)
}

impl WorkerRegistry for Hub {
    fn register(&self, hello: WorkerHello) -> ServiceResult<Assignment> {
        let build = env!("CARGO_PKG_VERSION");
        if hello.build != build {
            let message = format!("the worker is temper {}, the controller is {build}: use one build", hello.build);
            return Err(refuse(ErrorCode::InvalidArgument, message));
        }
        let mut state = self.lock();
        state.expire(self.lease);
        state.check_name(&hello)?;
        let (mut rank, mut weight_sources) = (0, Vec::new());
        if hello.role == WorkerRole::Trainer {
            let full =
                || refuse(ErrorCode::InvalidArgument, format!("all {} trainer ranks are taken", self.work.world));
            rank = state.free_rank(&hello.name, self.work.world).ok_or_else(full)?;
        } else {
            weight_sources = state.sources();
            if weight_sources.len() < self.work.world as usize {
                return Err(refuse(ErrorCode::Unavailable, "the trainer does not serve yet: ask again"));
            }
        }
        let name = if hello.name.is_empty() { state.free_name(hello.role) } else { hello.name.clone() };
        let incarnation = state.members.get(&name).map_or(1, |m| m.id.incarnation + 1);
        state.lose_name(&name);
        let cause = state.members.get(&name).map(|m| m.cause.clone()).unwrap_or_default();
        let id = WorkerId { name: name.clone(), incarnation };
        let seen = Instant::now();
        let member = Member {
            id: id.clone(),
            hello,
            rank,
            weight_sources: weight_sources.clone(),
            standing: Standing::Starting,
            has_served: false,
            cause,
            seen,
        };
        state.members.insert(name, member);
        self.changed.notify_all();
        let Work { recipe, model_dir, run_dir, world } = self.work.clone();
        Ok(Assignment { id, lease: self.lease, recipe, model_dir, run_dir, rank, world, weight_sources })
    }

    fn ready(&self, id: &WorkerId) -> ServiceResult<()> {
        let mut state = self.lock();
        let member = state.live(id, "ready")?;
        member.standing = Standing::Ready;
        member.has_served = true;
        let change = Change::Ready(member.clone());
        state.changes.push(change);
        self.changed.notify_all();
        Ok(())
    }

    fn ranks(&self, id: &WorkerId) -> ServiceResult<Vec<String>> {
        let mut state = self.lock();
        state.live(id, "ranks")?;
        let address = |rank: u32| {
            let member = state.trainers().find(|member| member.rank == rank);
            member.map(|member| member.hello.collective_address.clone()).unwrap_or_default()
        };
        Ok((0..self.work.world).map(address).collect())
    }

    fn heartbeat(&self, id: &WorkerId) -> ServiceResult<bool> {
        let mut state = self.lock();
        if state.is_ending {
            state.told.insert(id.clone());
            self.changed.notify_all();
            return Ok(true);
        }
        state.live(id, "heartbeat").map(|_| false)
    }
}

impl State {
    /// A worker that comes again under its name is in a new life.
    fn lose_name(&mut self, name: &str) {
        let id = self.members.get(name).map(|member| member.id.clone());
        if let Some(id) = id {
            self.lose(&id, "it registered again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub() -> Hub {
        let text = |s: &str| s.to_owned();
        Hub::new(Work { recipe: text("r"), model_dir: text("m"), run_dir: text("d"), world: 2 }, Duration::from_secs(9))
    }

    fn hello(role: WorkerRole, name: &str) -> WorkerHello {
        WorkerHello {
            role,
            name: name.to_owned(),
            address: format!("{name}:1"),
            process_id: 1,
            build: env!("CARGO_PKG_VERSION").to_owned(),
            collective_address: format!("{name}:2"),
        }
    }

    fn trainers(hub: &Hub) -> Vec<WorkerId> {
        let join = |name| hub.register(hello(WorkerRole::Trainer, name)).unwrap().id;
        let ids = vec![join("trainer-0"), join("trainer-1")];
        ids.iter().for_each(|id| hub.ready(id).unwrap());
        ids
    }

    #[test]
    fn engines_wait_for_the_trainers_whose_weights_they_serve() {
        let hub = hub();
        let early = hub.register(hello(WorkerRole::Rollout, "")).unwrap_err();
        assert_eq!(early.code, ErrorCode::Unavailable);
        trainers(&hub);
        let first = hub.register(hello(WorkerRole::Rollout, "")).unwrap();
        let second = hub.register(hello(WorkerRole::Rollout, "")).unwrap();
        assert_eq!((first.id.name.as_str(), second.id.name.as_str()), ("rollout-0", "rollout-1"));
        assert_eq!(first.weight_sources, ["trainer-0:1", "trainer-1:1"]);
    }

    #[test]
    fn a_worker_that_comes_again_fences_its_former_life() {
        let hub = hub();
        let ids = trainers(&hub);
        assert_eq!(hub.heartbeat(&ids[1]), Ok(false));
        let again = hub.register(hello(WorkerRole::Trainer, "trainer-1")).unwrap();
        assert_eq!((again.id.incarnation, again.rank), (2, 1));
        let fenced = hub.heartbeat(&ids[1]).unwrap_err();
        assert!(fenced.message.contains("life 1 of worker trainer-1 is over"), "{fenced}");
        let changes = hub.wait(Duration::ZERO);
        let lost = changes.iter().filter(|c| matches!(c, Change::Lost(m) if m.id == ids[1])).count();
        assert_eq!((changes.len(), lost), (3, 1));
        // A process that was started again where the one before it listened.
        let successor = WorkerHello { process_id: 2, ..hello(WorkerRole::Trainer, "trainer-1") };
        assert_eq!(hub.register(successor).unwrap().id.incarnation, 3);
    }

    #[test]
    fn a_worker_that_lives_is_displaced_by_nobody() {
        let hub = hub();
        let ids = trainers(&hub);
        let engine = hub.register(hello(WorkerRole::Rollout, "engine")).unwrap().id;
        hub.wait(Duration::ZERO);
        let elsewhere = |role, name| WorkerHello { address: "elsewhere:1".to_owned(), ..hello(role, name) };
        for (hello, code) in [
            (hello(WorkerRole::Reward, "trainer-1"), ErrorCode::InvalidArgument),
            (hello(WorkerRole::Trainer, "engine"), ErrorCode::InvalidArgument),
            (elsewhere(WorkerRole::Rollout, "trainer-0"), ErrorCode::InvalidArgument),
            (elsewhere(WorkerRole::Trainer, "trainer-1"), ErrorCode::ResourceExhausted),
            (elsewhere(WorkerRole::Rollout, "engine"), ErrorCode::ResourceExhausted),
        ] {
            let error = hub.register(hello.clone()).unwrap_err();
            assert_eq!(error.code, code, "{error}");
            assert!(error.message.contains(&format!("worker {} lives: role ", hello.name)), "{error}");
        }
        assert_eq!(hub.register(hello(WorkerRole::Trainer, "late-1")).unwrap_err().code, ErrorCode::InvalidArgument);
        assert!(hub.wait(Duration::ZERO).is_empty(), "nobody is lost");
        [&ids[0], &ids[1], &engine].into_iter().for_each(|id| assert_eq!(hub.heartbeat(id), Ok(false)));
        hub.lose("engine", "it ended");
        assert_eq!(hub.register(elsewhere(WorkerRole::Rollout, "engine")).unwrap().id.incarnation, 2);
        let hub = Hub { lease: Duration::ZERO, ..hub };
        assert_eq!(hub.register(elsewhere(WorkerRole::Trainer, "trainer-1")).unwrap().rank, 1);
    }

    #[test]
    fn what_the_run_starts_itself_is_kept_for_it() {
        let hub = hub();
        let own = ["trainer-0", "trainer-1", "rollout-0"];
        own.iter().for_each(|name| hub.reserve(name, None));
        let early = hub.register(hello(WorkerRole::Trainer, "trainer-0")).unwrap_err();
        assert_eq!(early.code, ErrorCode::Unavailable, "{early}");
        own.iter().for_each(|name| hub.reserve(name, Some(1)));
        let other = WorkerHello { process_id: 2, ..hello(WorkerRole::Trainer, "trainer-0") };
        let error = hub.register(other.clone()).unwrap_err();
        assert!(error.message.contains("the run starts itself, as process 1"), "{error}");
        for name in ["", "other", "other-0"] {
            let error = hub.register(WorkerHello { name: name.to_owned(), ..other.clone() }).unwrap_err();
            assert!(error.message.contains("all 2 trainer ranks are taken"), "{error}");
        }
        let ids = trainers(&hub);
        assert_eq!(hub.register(hello(WorkerRole::Rollout, "")).unwrap().id.name, "rollout-1");
        assert_eq!(hub.register(hello(WorkerRole::Rollout, "rollout-0")).unwrap().id.name, "rollout-0");
        hub.lose("trainer-0", "it ended");
        assert_eq!(hub.register(other.clone()).unwrap_err().code, ErrorCode::InvalidArgument, "it is started again");
        hub.release("trainer-0");
        let now = hub.register(other).unwrap();
        assert_eq!((now.rank, now.id.incarnation), (0, ids[0].incarnation + 1));
    }

    #[test]
    fn ranks_are_told_who_is_there_and_a_third_is_refused() {
        let hub = hub();
        let first = hub.register(hello(WorkerRole::Trainer, "a")).unwrap();
        assert_eq!(hub.ranks(&first.id).unwrap(), ["a:2", ""]);
        hub.register(hello(WorkerRole::Trainer, "b")).unwrap();
        assert_eq!(hub.ranks(&first.id).unwrap(), ["a:2", "b:2"]);
        let third = hub.register(hello(WorkerRole::Trainer, "c")).unwrap_err();
        assert!(third.message.contains("all 2 trainer ranks are taken"), "{third}");
    }

    #[test]
    fn a_lease_that_runs_out_is_a_loss_with_its_cause() {
        let hub = Hub { lease: Duration::ZERO, ..hub() };
        let id = hub.register(hello(WorkerRole::Trainer, "a")).unwrap().id;
        let changes = hub.wait(Duration::from_secs(1));
        assert!(matches!(&changes[..], [Change::Lost(m)] if m.id == id && m.cause.contains("no heartbeat")));
        assert!(hub.heartbeat(&id).is_err());
    }

    #[test]
    fn another_build_is_refused_by_name() {
        let other = WorkerHello { build: "0.0.9".to_owned(), ..hello(WorkerRole::Reward, "r") };
        let error = hub().register(other).unwrap_err();
        assert!(error.message.contains("the worker is temper 0.0.9"), "{error}");
    }

    #[test]
    fn when_the_run_ends_heartbeats_say_so() {
        let hub = hub();
        let ids = trainers(&hub);
        hub.end();
        assert_eq!(hub.heartbeat(&ids[0]), Ok(true));
        let begin = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| hub.heartbeat(&ids[1]));
            hub.see_off();
        });
        assert!(begin.elapsed() < heartbeat_interval(hub.lease), "nobody is left who could be told");
    }
}
