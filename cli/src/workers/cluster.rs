//! The workers of a run, joined into its services.

use super::children::Children;
use super::hub::{Change, Hub, Member, Standing, Work};
use super::{LEASE, START_TIMEOUT};
use anyhow::{Context, bail};
use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use temper_controller::fleet::{FleetReward, FleetRollout};
use temper_proto::grpc::{
    Endpoint, GrpcRuntime, RewardClient, RolloutClient, ServedServices, ServerHandle, TrainerClient, TransportConfig,
    WorkerRegistryServer, serve,
};
use temper_proto::{RewardService, RolloutService, TrainerService, WorkerRole};

/// Which workers a run has.
#[derive(Debug, Clone)]
pub struct ClusterSpec {
    /// What they are told.
    pub work: Work,
    /// Where workers join; port 0 takes any.
    pub listen: SocketAddr,
    /// Number of rollout engines.
    pub rollout_workers: usize,
    /// Number of reward workers.
    pub reward_workers: usize,
    /// True where the workers are started here; false where they are started by hand.
    pub is_local: bool,
}

/// The worker processes of a run. They end when this is dropped.
pub struct Cluster {
    address: SocketAddr,
    hub: Arc<Hub>,
    rollout: Arc<FleetRollout>,
    reward: Arc<FleetReward>,
    runtime: GrpcRuntime,
    is_ending: Arc<AtomicBool>,
    joiner: Option<JoinHandle<()>>,
    children: Option<Children>,
    // Last: workers are told to end by its answers.
    _server: ServerHandle,
}

impl Cluster {
    /// Listen, start the workers where they are local, and wait until all of them serve.
    ///
    /// # Errors
    /// A worker that does not start, by name and cause.
    pub fn start(spec: &ClusterSpec) -> anyhow::Result<Self> {
        let runtime = GrpcRuntime::start().context("starting the transport")?;
        let hub = Arc::new(Hub::new(spec.work.clone(), LEASE));
        let listener = TcpListener::bind(spec.listen).with_context(|| format!("listening at {}", spec.listen))?;
        let services = ServedServices::new().with(WorkerRegistryServer::service(hub.clone()));
        let server = serve(&runtime, listener, services, TransportConfig::default()).context("serving workers")?;
        let wanted = [
            (WorkerRole::Trainer, spec.work.world as usize),
            (WorkerRole::Rollout, spec.rollout_workers),
            (WorkerRole::Reward, spec.reward_workers),
        ];
        let children = if spec.is_local { Some(Children::start(&hub, server.address(), &wanted)?) } else { None };
        let mut cluster = Cluster {
            address: server.address(),
            hub,
            rollout: Arc::new(FleetRollout::new(Default::default())),
            reward: Arc::new(FleetReward::new(Default::default())),
            runtime,
            is_ending: Arc::default(),
            joiner: None,
            children,
            _server: server,
        };
        cluster.joiner = Some(cluster.start_joiner()?);
        cluster.wait_for(&wanted)?;
        Ok(cluster)
    }

    /// Where workers join.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// All engines as one.
    pub fn rollout(&self) -> Arc<dyn RolloutService> {
        self.rollout.clone()
    }

    /// All reward workers as one.
    pub fn reward(&self) -> Arc<dyn RewardService> {
        self.reward.clone()
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
            anyhow::Ok(Arc::new(TrainerClient::new(endpoint)) as Arc<dyn TrainerService>)
        };
        let mut ranks = ranks.iter().map(connect).collect::<anyhow::Result<Vec<_>>>()?;
        match (ranks.pop(), ranks.len()) {
            (Some(only), 0) => Ok(only),
            (_, others) => bail!("{} trainer ranks serve: expected one", others + 1),
        }
    }

    fn start_joiner(&self) -> anyhow::Result<JoinHandle<()>> {
        let joiner = Joiner {
            hub: Arc::clone(&self.hub),
            runtime: self.runtime.clone(),
            rollout: Arc::clone(&self.rollout),
            reward: Arc::clone(&self.reward),
            is_ending: Arc::clone(&self.is_ending),
        };
        Ok(std::thread::Builder::new().name("joiner".to_owned()).spawn(move || joiner.run())?)
    }

    fn wait_for(&self, wanted: &[(WorkerRole, usize)]) -> anyhow::Result<()> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            let missing = self.missing(wanted);
            if missing.is_empty() {
                return Ok(());
            }
            let given_up = self.children.as_ref().map(Children::given_up).unwrap_or_default();
            if let Some((name, cause)) = given_up.iter().next() {
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
    fn missing(&self, wanted: &[(WorkerRole, usize)]) -> BTreeMap<&'static str, usize> {
        let members = self.hub.members();
        let served = |role| match role {
            WorkerRole::Rollout => self.rollout.num_workers(),
            WorkerRole::Reward => self.reward.num_workers(),
            WorkerRole::Trainer => {
                members.iter().filter(|m| m.hello.role == role && m.standing == Standing::Ready).count()
            }
        };
        let lacks = |(role, count): &(WorkerRole, usize)| (role.name(), count.saturating_sub(served(*role)));
        wanted.iter().map(lacks).filter(|(_, n)| *n > 0).collect()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.is_ending.store(true, Ordering::SeqCst);
        self.hub.end();
        self.children = None;
        if let Some(joiner) = self.joiner.take() {
            // A joiner that panicked has said so.
            let _ = joiner.join();
        }
    }
}

/// Connects to workers as they come, and lets them go as they end.
struct Joiner {
    hub: Arc<Hub>,
    runtime: GrpcRuntime,
    rollout: Arc<FleetRollout>,
    reward: Arc<FleetReward>,
    is_ending: Arc<AtomicBool>,
}

impl Joiner {
    fn run(self) {
        while !self.is_ending.load(Ordering::SeqCst) {
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
        }
    }

    fn join(&self, member: &Member) -> anyhow::Result<()> {
        let name = member.id.name.as_str();
        let connect = || Endpoint::connect(&self.runtime, name, &member.hello.address, TransportConfig::default());
        match member.hello.role {
            WorkerRole::Rollout => self.rollout.join(name, Arc::new(RolloutClient::new(connect()?))),
            WorkerRole::Reward => self.reward.join(name, Arc::new(RewardClient::new(connect()?))),
            WorkerRole::Trainer => {}
        }
        Ok(())
    }

    fn leave(&self, member: &Member) {
        tracing::warn!(worker = member.id.name, cause = member.cause, "a worker is lost");
        match member.hello.role {
            WorkerRole::Rollout => self.rollout.leave(&member.id.name, &member.cause),
            WorkerRole::Reward => self.reward.leave(&member.id.name, &member.cause),
            WorkerRole::Trainer => {}
        }
    }
}
