//! The workers of a run, joined into its services.

use super::children::{Children, Killer, Meeting, Prospects, names};
use super::hub::{Change, Hub, Member, Standing, Work};
use super::mirrors::RankHandle;
use super::{LEASE, START_TIMEOUT};
use crate::control::LocalControl;
use crate::tables::RunTables;
use crate::tls::transport;
use anyhow::{Context, bail};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use temper_controller::fleet::{FleetConfig, FleetReward, FleetRollout, LossCause, WorkerPhase, WorkerStatus};
use temper_proto::grpc::{
    ControlServer, Endpoint, FlightServer, GrpcRuntime, RewardClient, RolloutClient, ServedRun, ServedServices,
    ServerHandle, TlsFiles, TrainerClient, TransportConfig, WorkerRegistryServer, serve,
};
use temper_proto::{RewardService, RolloutService, ServiceResult, TrainerService, WorkerRole};
use temper_trainer::TrainerGroup;

/// Which workers a run has.
#[derive(Debug, Clone)]
pub struct ClusterSpec {
    /// What they are told.
    pub work: Work,
    /// Tells the run from others that listen at its address before or after it.
    pub run_id: String,
    /// Where workers join; port 0 takes any.
    pub listen: SocketAddr,
    /// Trainer ranks that share the rows of a micro-batch.
    pub sequence_parallel: usize,
    /// Ranks that hold one copy of the trainer's state together, where they mirror it.
    pub mirrors: Option<usize>,
    /// Number of rollout engines.
    pub rollout_workers: usize,
    /// Number of reward workers.
    pub reward_workers: usize,
    /// By how many versions a response may be behind the weights that it trains.
    pub staleness: u32,
    /// The certificates that processes prove themselves by, where they speak TLS.
    pub tls: Option<TlsFiles>,
    /// True where the workers are started here; false where they are started by hand.
    pub is_local: bool,
}

/// Why a worker is lost that did nothing wrong.
const SENT_AWAY: &str = "the run goes back to its last checkpoint";

/// With no worker left, a new one is waited for so long.
const WORKER_WAIT: Duration = Duration::from_secs(120);

/// How long an engine that could not take new weights is left alone, at first and at most.
const FIRST_WAIT: Duration = Duration::from_millis(500);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// Engines as one, and reward workers as one.
#[derive(Clone)]
pub(super) struct Fleets {
    rollout: Arc<FleetRollout>,
    reward: Arc<FleetReward>,
}

impl Fleets {
    fn new(staleness: u32) -> Self {
        let max_staleness = u64::from(staleness);
        let patient = FleetConfig { worker_wait: WORKER_WAIT, max_staleness, ..FleetConfig::default() };
        let one_by_one = FleetConfig { max_in_flight: 1, ..patient };
        Fleets { rollout: Arc::new(FleetRollout::new(patient)), reward: Arc::new(FleetReward::new(one_by_one)) }
    }

    /// Let go of all workers; what they have is given up.
    pub(super) fn retire(&self) {
        self.rollout.retire();
        self.reward.retire();
    }

    /// Workers that cannot go on in other fleets; a call that is under way has `patience` to end.
    pub(super) fn unfit(&self, patience: Duration) -> BTreeSet<String> {
        let mut unfit = self.rollout.unfit(patience);
        unfit.extend(self.reward.unfit(patience));
        unfit
    }
}

/// The worker processes of a run. They end when this is dropped.
pub struct Cluster {
    address: SocketAddr,
    pub(super) hub: Arc<Hub>,
    fleets: Arc<Mutex<Fleets>>,
    sources: Arc<Mutex<Sources>>,
    /// The ranks that the run speaks with, in their order.
    pub(super) ranks: Mutex<Vec<RankHandle>>,
    /// Ranks that hold one copy of the state together, where they mirror it.
    pub(super) num_shards: Option<usize>,
    /// True while ranks that outlive another one are left as they are: they hold what the run needs to go on.
    spares_ranks: Arc<AtomicBool>,
    runtime: GrpcRuntime,
    is_ending: Arc<AtomicBool>,
    joiner: Option<JoinHandle<()>>,
    children: Option<Children>,
    wanted: [(WorkerRole, usize); 3],
    sequence_parallel: usize,
    staleness: u32,
    tables: Arc<RunTables>,
    // Last: workers are told to end by its answers.
    _server: ServerHandle,
}

impl Cluster {
    /// Listen, start the workers where they are local, and wait until all of them serve.
    ///
    /// # Errors
    /// A worker that does not start, by name and cause.
    pub fn start(spec: &ClusterSpec, control: &Arc<LocalControl>) -> anyhow::Result<Self> {
        let runtime = transport(spec.tls.as_ref())?;
        let hub = Arc::new(Hub::new(spec.work.clone(), LEASE));
        let listener = TcpListener::bind(spec.listen).with_context(|| format!("listening at {}", spec.listen))?;
        let tables = Arc::new(RunTables::new(Path::new(&spec.work.run_dir)));
        let run = ServedRun { id: spec.run_id.clone(), dir: spec.work.run_dir.clone() };
        let services = ServedServices::new()
            .of_run(run)
            .with(WorkerRegistryServer::service(hub.clone()))
            .with(ControlServer::service(control.clone()))
            .with(FlightServer::service(tables.clone(), &TransportConfig::default()));
        control.know(Arc::clone(&hub));
        let wanted = [
            (WorkerRole::Trainer, spec.work.world as usize),
            (WorkerRole::Rollout, spec.rollout_workers),
            (WorkerRole::Reward, spec.reward_workers),
        ];
        if spec.is_local {
            // Before anybody else can come by the names.
            names(&wanted).for_each(|(_, name)| hub.reserve(&name, None));
        }
        let server = serve(&runtime, listener, services, TransportConfig::default()).context("serving workers")?;
        let meeting = Meeting { address: server.address(), tls: spec.tls.clone() };
        let children = if spec.is_local { Some(Children::start(&hub, meeting, &wanted)?) } else { None };
        let mut cluster = Cluster {
            address: server.address(),
            hub,
            fleets: Arc::new(Mutex::new(Fleets::new(spec.staleness))),
            sources: Arc::default(),
            ranks: Mutex::default(),
            num_shards: spec.mirrors,
            spares_ranks: Arc::default(),
            runtime,
            is_ending: Arc::default(),
            joiner: None,
            children,
            wanted,
            sequence_parallel: spec.sequence_parallel,
            staleness: spec.staleness,
            tables,
            _server: server,
        };
        cluster.joiner = Some(cluster.start_joiner()?);
        cluster.wait()?;
        Ok(cluster)
    }

    /// Where workers join.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// All engines as one.
    pub fn rollout(&self) -> Arc<dyn RolloutService> {
        self.fleets().rollout
    }

    /// All reward workers as one.
    pub fn reward(&self) -> Arc<dyn RewardService> {
        self.fleets().reward
    }

    /// The trainer, all its ranks as one.
    ///
    /// # Errors
    /// A rank that cannot be reached.
    pub fn trainer(&self) -> anyhow::Result<Arc<dyn TrainerService>> {
        let mut ranks: Vec<Member> = self.hub.members();
        ranks.retain(|m| m.hello.role == WorkerRole::Trainer && m.standing == Standing::Ready);
        ranks.sort_by_key(|m| m.rank);
        let connect = |m: &Member| {
            let config = TransportConfig::default();
            let endpoint = Endpoint::connect(&self.runtime, m.id.name.as_str(), &m.hello.address, config)?;
            let endpoint = endpoint.to_life(m.id.incarnation);
            let service = Arc::new(TrainerClient::new(endpoint)) as Arc<dyn TrainerService>;
            anyhow::Ok(RankHandle { member: m.clone(), service })
        };
        let handles = ranks.iter().map(connect).collect::<anyhow::Result<Vec<_>>>()?;
        let mut services: Vec<_> = handles.iter().map(|rank| Arc::clone(&rank.service)).collect();
        if services.len() != self.num_ranks() {
            bail!("{} trainer ranks serve: expected {}", services.len(), self.num_ranks());
        }
        let trainer = match services.len() {
            1 => services.remove(0),
            _ => Arc::new(TrainerGroup::new(services)?.with_sequence_parallel(self.sequence_parallel)?),
        };
        let sources = ranks.into_iter().map(|m| (m.id.name, m.id.incarnation)).collect();
        *self.sources.lock().unwrap_or_else(PoisonError::into_inner) = sources;
        *self.ranks.lock().unwrap_or_else(PoisonError::into_inner) = handles;
        self.spares_ranks.store(self.num_shards.is_some(), Ordering::SeqCst);
        Ok(trainer)
    }

    /// Number of trainer ranks.
    pub(super) fn num_ranks(&self) -> usize {
        self.wanted[0].1
    }

    /// Trainer ranks that serve.
    pub(super) fn num_serving_ranks(&self) -> usize {
        let is_serving = |m: &&Member| m.hello.role == WorkerRole::Trainer && m.standing == Standing::Ready;
        self.hub.members().iter().filter(is_serving).count()
    }

    /// What kills workers of this machine, where they were started here.
    pub fn killer(&self) -> Option<Killer> {
        self.children.as_ref().map(Children::killer)
    }

    /// Whether trainer ranks hold each other's state.
    pub fn keeps_mirrors(&self) -> bool {
        self.num_shards.is_some()
    }

    /// Workers that will not be started again, and why.
    pub(super) fn given_up(&self) -> BTreeMap<String, String> {
        self.children.as_ref().map(Children::given_up).unwrap_or_default()
    }

    /// The services after a trainer rank was lost: the run goes back to its last checkpoint, so every other worker
    /// begins a new life without what it had, and all wait until every rank serves again.
    ///
    /// # Errors
    /// As [`Cluster::wait`].
    pub fn recover(&self) -> anyhow::Result<Arc<dyn TrainerService>> {
        self.spares_ranks.store(false, Ordering::SeqCst);
        self.renew_fleets();
        let killer = self.killer();
        // Ranks that lost one of them cannot go on together.
        let stays = |member: &Member| member.hello.role == WorkerRole::Trainer && self.num_ranks() == 1;
        send_away(&self.hub, (killer.as_ref(), SENT_AWAY), |member| !stays(member));
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            self.wait()?;
            // A rank may be gone before the registry knows.
            match self.trainer() {
                Ok(trainer) => return Ok(trainer),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    /// Fleets without workers, in place of those that there were, which are given. No fleet hears of the end of a rank
    /// whose weights it was never to pull.
    pub(super) fn renew_fleets(&self) -> Fleets {
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        sources.clear();
        let mut fleets = self.fleets.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut fleets, Fleets::new(self.staleness))
    }

    fn fleets(&self) -> Fleets {
        self.fleets.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn start_joiner(&self) -> anyhow::Result<JoinHandle<()>> {
        let joiner = Joiner {
            hub: Arc::clone(&self.hub),
            runtime: self.runtime.clone(),
            fleets: Arc::clone(&self.fleets),
            sources: Arc::clone(&self.sources),
            killer: self.killer(),
            prospects: self.children.as_ref().map(Children::prospects),
            spares_ranks: Arc::clone(&self.spares_ranks),
            is_ending: Arc::clone(&self.is_ending),
        };
        Ok(std::thread::Builder::new().name("joiner".to_owned()).spawn(move || joiner.run())?)
    }

    /// Wait until every worker serves.
    ///
    /// # Errors
    /// A worker that does not start or join, by name and cause.
    pub fn wait(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            let missing = self.missing();
            if missing.is_empty() {
                return Ok(());
            }
            if let Some((name, cause)) = self.given_up().into_iter().next() {
                bail!("worker {name} does not start: {cause}; its own words are above");
            }
            if Instant::now() > deadline {
                let list: Vec<String> = missing.iter().map(|(role, n)| format!("{n} {role}")).collect();
                bail!("{} did not join {} within {START_TIMEOUT:?}", list.join(", "), self.address);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// How many workers of each role do not serve yet.
    fn missing(&self) -> BTreeMap<&'static str, usize> {
        let (members, fleets) = (self.hub.members(), self.fleets());
        let served = |role| match role {
            WorkerRole::Rollout => live(&fleets.rollout.workers()),
            WorkerRole::Reward => live(&fleets.reward.workers()),
            WorkerRole::Trainer => {
                members.iter().filter(|m| m.hello.role == role && m.standing == Standing::Ready).count()
            }
        };
        let lacks = |(role, count): &(WorkerRole, usize)| (role.name(), count.saturating_sub(served(*role)));
        self.wanted.iter().map(lacks).filter(|(_, n)| *n > 0).collect()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Whoever follows the run is still served here.
        self.tables.end();
        self.is_ending.store(true, Ordering::SeqCst);
        match self.children.take() {
            Some(children) => drop(children),
            None => self.hub.see_off(),
        }
        if let Some(joiner) = self.joiner.take() {
            // A joiner that panicked has said so.
            let _ = joiner.join();
        }
    }
}

fn live(workers: &[WorkerStatus]) -> usize {
    workers.iter().filter(|w| !matches!(w.phase, WorkerPhase::Lost(_))).count()
}

/// Let workers go that did nothing wrong; those that were started here are killed, and started again.
pub(super) fn send_away(hub: &Hub, (killer, cause): (Option<&Killer>, &str), is_meant: impl Fn(&Member) -> bool) {
    for member in hub.members().iter().filter(|m| m.standing != Standing::Lost && is_meant(m)) {
        hub.lose(&member.id.name, cause);
        killer.into_iter().for_each(|killer| killer.kill(&member.id.name));
    }
}

/// The trainer ranks that the engines pull weights from, each in the life that the run speaks with.
type Sources = BTreeMap<String, u64>;

/// Connects to workers as they come, and lets them go as they end.
struct Joiner {
    hub: Arc<Hub>,
    runtime: GrpcRuntime,
    fleets: Arc<Mutex<Fleets>>,
    sources: Arc<Mutex<Sources>>,
    killer: Option<Killer>,
    prospects: Option<Prospects>,
    spares_ranks: Arc<AtomicBool>,
    is_ending: Arc<AtomicBool>,
}

/// When engines that could not take new weights are asked again, by name.
type Patience = BTreeMap<String, (Instant, Duration)>;

impl Joiner {
    fn run(self) {
        let mut patience = Patience::new();
        while !self.is_ending.load(Ordering::SeqCst) {
            self.ask_again(&mut patience);
            for change in self.hub.wait(Duration::from_millis(500)) {
                match change {
                    Change::Ready(member) => {
                        if let Err(error) = self.join(&member) {
                            tracing::warn!(worker = member.id.name, error = format!("{error:#}"), "cannot join");
                            self.hub.lose(&member.id.name, &format!("{error:#}"));
                        }
                    }
                    Change::Lost(member) => self.leave(&member),
                }
            }
            self.expect_nobody();
        }
    }

    /// Nobody waits for a worker of a role of which the last was given up on, unless one that was started by hand is
    /// there.
    fn expect_nobody(&self) {
        let Some(prospects) = &self.prospects else { return };
        for role in [WorkerRole::Rollout, WorkerRole::Reward] {
            let Some(reason) = prospects.end(role) else { continue };
            let is_there = |m: &Member| m.hello.role == role && m.standing != Standing::Lost;
            if self.hub.members().iter().any(is_there) {
                continue;
            }
            let fleets = self.fleets.lock().unwrap_or_else(PoisonError::into_inner).clone();
            match role {
                WorkerRole::Rollout => fleets.rollout.expect_nobody(&reason),
                _ => fleets.reward.expect_nobody(&reason),
            }
        }
    }

    /// Engines that live and could not take new weights are taken in again, after a while that grows: the trainer may
    /// have been at work on its next ones.
    fn ask_again(&self, patience: &mut Patience) {
        let fleets = self.fleets.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for worker in fleets.rollout.workers() {
            if worker.phase != WorkerPhase::Lost(LossCause::SyncFailed) {
                if worker.version.is_some() {
                    patience.remove(&worker.name);
                }
                continue;
            }
            let (due, wait) = patience.entry(worker.name.clone()).or_insert((Instant::now() + FIRST_WAIT, FIRST_WAIT));
            if Instant::now() < *due {
                continue;
            }
            *wait = (*wait * 2).min(LONGEST_WAIT);
            *due = Instant::now() + *wait;
            let is_it = |m: &Member| m.id.name == worker.name && m.standing == Standing::Ready;
            let Some(member) = self.hub.members().into_iter().find(is_it) else { continue };
            if let Err(error) = self.join(&member) {
                tracing::warn!(worker = worker.name, error = format!("{error:#}"), "cannot join again");
            }
        }
    }

    fn join(&self, member: &Member) -> anyhow::Result<()> {
        let name = member.id.name.as_str();
        let connect = || {
            let endpoint = Endpoint::connect(&self.runtime, name, &member.hello.address, TransportConfig::default())?;
            ServiceResult::Ok(endpoint.to_life(member.id.incarnation))
        };
        let fleets = self.fleets.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match member.hello.role {
            WorkerRole::Rollout => fleets.rollout.join(name, Arc::new(RolloutClient::new(connect()?)))?,
            WorkerRole::Reward => fleets.reward.join(name, Arc::new(RewardClient::new(connect()?)))?,
            WorkerRole::Trainer => 0,
        };
        Ok(())
    }

    /// Ranks that lost one of them cannot go on together: all begin anew, unless the run goes on from what they hold.
    fn send_away_ranks(&self, lost: &Member) {
        if lost.cause == SENT_AWAY || self.spares_ranks.load(Ordering::SeqCst) {
            return;
        }
        let is_other_rank = |m: &Member| m.hello.role == WorkerRole::Trainer && m.id.name != lost.id.name;
        send_away(&self.hub, (self.killer.as_ref(), SENT_AWAY), is_other_rank);
    }

    /// The engines wait for no weights of a rank that is gone.
    fn lose_source(&self, rank: &Member) {
        let sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        if sources.get(&rank.id.name) == Some(&rank.id.incarnation) {
            let fleets = self.fleets.lock().unwrap_or_else(PoisonError::into_inner).clone();
            fleets.rollout.lose_source(&format!("{} is lost: {}", rank.id.name, rank.cause));
        }
    }

    fn leave(&self, member: &Member) {
        tracing::warn!(worker = member.id.name, cause = member.cause, "a worker is lost");
        let fleets = self.fleets.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let left = match member.hello.role {
            WorkerRole::Rollout => fleets.rollout.leave(&member.id.name, &member.cause),
            WorkerRole::Reward => fleets.reward.leave(&member.id.name, &member.cause),
            WorkerRole::Trainer => {
                self.lose_source(member);
                self.send_away_ranks(member);
                Ok(())
            }
        };
        if let Err(error) = left {
            tracing::debug!(%error, "a worker that never joined");
        }
    }
}
