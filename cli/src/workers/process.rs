//! A worker process: register, load, serve, and live as long as the controller does.

use super::engine_ranks::{EngineRanks, Failure, RankWork};
use super::watchdog::MetRanks;
use super::{LEASE, heartbeat_interval};
use crate::local_text::LocalText;
use crate::recipe::{Placement, Recipe, Source};
use crate::reward_models::RewardModels;
use crate::rollout_ranks::{self, EngineSetting};
use crate::runtime::device;
use crate::tls::transport;
use crate::trainer_ranks;
use anyhow::{Context, bail};
use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use temper_actor::ModelConfig;
use temper_collective::{LinkTls, SocketConfig, connect as connect_ranks};
use temper_proto::grpc::{
    Endpoint, GrpcRuntime, RewardServer, RolloutServer, ServedServices, TlsFiles, TrainerClient, TrainerServer,
    TransportConfig, WeightClient, WeightServer, WorkerRegistryClient, serve,
};
use temper_proto::{
    Assignment, ScalarModelService, ServiceError, ServiceResult, TrainerService, WeightService, WorkerHello,
    WorkerRegistry, WorkerRole,
};
use temper_rollout::{LocalRolloutService, RankGroup, SyncedRolloutService, WeightTransport};
use temper_tensor::Device;
use temper_trainer::{LocalTrainerService, Meeting, ProcessRole, ProcessShare, Ranks, Trainer, TrainerGroup};
use temper_types::{DType, ErrorCode};

/// How long a worker asks to be let in.
const JOIN_TIMEOUT: Duration = Duration::from_secs(300);
/// How long a worker asks for a name that another one has: one that is gone has lost it by then.
const NAME_TIMEOUT: Duration = LEASE.saturating_add(Duration::from_secs(2));
/// How long a rank tries to reach the others where it was told they are.
const MEET_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between two attempts.
const RETRY: Duration = Duration::from_millis(100);

/// What `temper serve` was asked for.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// What it does.
    pub role: WorkerRole,
    /// HOST:PORT of the controller.
    pub join: String,
    /// Its name, or nothing: the controller names it.
    pub name: String,
    /// Where it listens; port 0 takes any.
    pub listen: SocketAddr,
    /// Its certificates, where the run speaks TLS.
    pub tls: Option<TlsFiles>,
    /// What it does when its life is over before the run is.
    pub when_lost: WhenLost,
}

/// What a worker does whose lease ran out, as behind a broken link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenLost {
    /// End: whoever started it starts it again.
    End,
    /// Register again, in a new life.
    JoinAgain,
}

/// Serve until the controller says that the run has ended, or is gone.
///
/// # Errors
/// A controller that cannot be reached or refuses, a model that cannot be loaded, or a lease that was lost.
pub fn serve_worker(options: &ServeOptions) -> anyhow::Result<()> {
    let listener = TcpListener::bind(options.listen).with_context(|| format!("listening at {}", options.listen))?;
    loop {
        match live(options, &listener) {
            Ok(()) => return Ok(()),
            Err(Ended::Lost(error)) if options.when_lost == WhenLost::JoinAgain => {
                tracing::warn!(error = format!("{error:#}"), "joining again");
            }
            Err(Ended::Lost(error) | Ended::Failed(error)) => return Err(error),
        }
    }
}

/// Why a life of a worker is over.
enum Ended {
    /// The controller is gone, or believes that the worker is.
    Lost(anyhow::Error),
    /// It cannot work.
    Failed(anyhow::Error),
}

impl Ended {
    /// How an error after the registration ends the life: the controller may believe that it is over already.
    fn by(error: anyhow::Error) -> Self {
        let is_over = |cause: &ServiceError| cause.code == ErrorCode::Cancelled;
        let is_over = error.chain().any(|cause| cause.downcast_ref().is_some_and(is_over));
        if is_over { Ended::Lost(error) } else { Ended::Failed(error) }
    }
}

impl<E: Into<anyhow::Error>> From<E> for Ended {
    fn from(error: E) -> Self {
        Ended::Failed(error.into())
    }
}

/// One life, from its registration to its end.
fn live(options: &ServeOptions, listener: &TcpListener) -> Result<(), Ended> {
    let runtime = transport(options.tls.as_ref())?;
    let registry = connect(&runtime, options)?;
    let ranks = RankSocket::bind(options)?;
    let hello = WorkerHello {
        role: options.role,
        name: options.name.clone(),
        address: listener.local_addr()?.to_string(),
        process_id: std::process::id(),
        build: env!("CARGO_PKG_VERSION").to_owned(),
        collective_address: ranks.address()?,
    };
    let assignment = retrying(|| registry.register(hello.clone()))?;
    let failure = Failure::default();
    let beats = Heartbeats::start(Arc::clone(&registry), &assignment, &failure)?;
    let joined = Joined { runtime: &runtime, registry: &registry, assignment: &assignment, ranks: &ranks };
    let (services, engine_ranks) = joined.build(options.role, &failure).map_err(Ended::by)?;
    let config = TransportConfig::default();
    let services = services.of_life(assignment.id.incarnation);
    let server = serve(&runtime, listener.try_clone()?, services, config).context("serving")?;
    tracing::info!(worker = assignment.id.name, address = %server.address(), "serving");
    registry.ready(&assignment.id).map_err(|error| Ended::by(error.into()))?;
    let ended = beats.wait();
    // Ahead of the engine, which tells them that it is over: from here on it is no loss when they end.
    drop(engine_ranks);
    ended.map_err(Ended::Lost)
}

fn connect(runtime: &GrpcRuntime, options: &ServeOptions) -> anyhow::Result<Arc<WorkerRegistryClient>> {
    let config = TransportConfig::default();
    let endpoint = retrying(|| Endpoint::connect(runtime, "controller", &options.join, config))?;
    Ok(Arc::new(WorkerRegistryClient::new(endpoint)))
}

/// Try again while the other side is not yet there, or whoever has the worker's name may be gone.
fn retrying<T>(mut call: impl FnMut() -> ServiceResult<T>) -> anyhow::Result<T> {
    let begin = Instant::now();
    let mut is_told = false;
    loop {
        let error = match call() {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let patience = match error.code {
            ErrorCode::Unavailable => JOIN_TIMEOUT,
            ErrorCode::ResourceExhausted => NAME_TIMEOUT,
            _ => return Err(error.into()),
        };
        if begin.elapsed() >= patience {
            return Err(error.into());
        }
        if error.code == ErrorCode::ResourceExhausted && !is_told {
            tracing::warn!(%error, "waiting for {NAME_TIMEOUT:?}, in which the lease of one that is gone ends");
            is_told = true;
        }
        std::thread::sleep(RETRY);
    }
}

/// Keeps the lease from its first moment on.
struct Heartbeats {
    thread: std::thread::JoinHandle<anyhow::Result<()>>,
}

impl Heartbeats {
    /// A failure ends them.
    fn start(registry: Arc<WorkerRegistryClient>, assignment: &Assignment, failure: &Failure) -> anyhow::Result<Self> {
        let (id, lease, failure) = (assignment.id.clone(), assignment.lease, Arc::clone(failure));
        let beat = move || {
            let mut last = Instant::now();
            loop {
                if let Some(cause) = failure.get() {
                    bail!("{}: {cause}", id.name);
                }
                match registry.heartbeat(&id) {
                    Ok(true) => return Ok(()),
                    Ok(false) => last = Instant::now(),
                    Err(error) if error.code.is_retryable() && last.elapsed() < lease => {}
                    Err(error) => return Err(error).context("the controller is gone"),
                }
                std::thread::sleep(heartbeat_interval(lease));
            }
        };
        let thread = std::thread::Builder::new().name("heartbeat".to_owned()).spawn(beat)?;
        Ok(Heartbeats { thread })
    }

    fn wait(self) -> anyhow::Result<()> {
        match self.thread.join() {
            Ok(result) => result,
            Err(_) => bail!("the thread that keeps the lease panicked"),
        }
    }
}

/// What the worker is to compute with.
struct Setting {
    recipe: Recipe,
    model_dir: PathBuf,
    device: Arc<dyn Device>,
    dtype: DType,
}

impl Setting {
    fn of(assignment: &Assignment) -> anyhow::Result<Self> {
        let path = Path::new(&assignment.run_dir).join("recipe.toml");
        let source = Source::from_text(&path, &assignment.recipe)?;
        let recipe = Recipe::from_source(&source)?;
        let device = device(recipe.placement.threads);
        let dtype = recipe.dtype.resolve(device.info().native_bf16);
        Ok(Setting { recipe, model_dir: PathBuf::from(&assignment.model_dir), device, dtype })
    }
}

/// Where a trainer rank meets the others.
struct RankSocket(Option<TcpListener>);

impl RankSocket {
    fn bind(options: &ServeOptions) -> anyhow::Result<Self> {
        let address = SocketAddr::new(options.listen.ip(), 0);
        let is_rank = options.role == WorkerRole::Trainer;
        let listener = is_rank.then(|| TcpListener::bind(address)).transpose();
        Ok(RankSocket(listener.with_context(|| format!("listening at {address} for other ranks"))?))
    }

    fn address(&self) -> anyhow::Result<String> {
        let address = self.0.as_ref().map(TcpListener::local_addr).transpose()?;
        Ok(address.map(|address| address.to_string()).unwrap_or_default())
    }
}

/// A worker that is let in.
struct Joined<'a> {
    runtime: &'a GrpcRuntime,
    registry: &'a Arc<WorkerRegistryClient>,
    assignment: &'a Assignment,
    ranks: &'a RankSocket,
}

impl Joined<'_> {
    /// The services, and the other ranks of a divided engine.
    fn build(&self, role: WorkerRole, failure: &Failure) -> anyhow::Result<(ServedServices, Option<EngineRanks>)> {
        let setting = Setting::of(self.assignment)?;
        let config = TransportConfig::default();
        match role {
            WorkerRole::Rollout => {
                let (engine, ranks) = self.rollout(&setting, failure)?;
                Ok((ServedServices::new().with(RolloutServer::service(Arc::new(engine), &config)), ranks))
            }
            WorkerRole::Reward => {
                // Every rank holds the reward model that a stage trains; scores are a call to all of them.
                let ranks =
                    self.sources(|endpoint| Arc::new(TrainerClient::new(endpoint)) as Arc<dyn TrainerService>)?;
                let trainer: Arc<dyn ScalarModelService> = Arc::new(TrainerGroup::new(ranks)?);
                let Setting { recipe, model_dir, device, dtype } = &setting;
                let models = RewardModels { trainer, device, policy_dir: model_dir, dtype: *dtype };
                let service = Arc::new(models.reward_service(recipe)?);
                Ok((ServedServices::new().with(RewardServer::service(service, &config)), None))
            }
            WorkerRole::Trainer => {
                let service = Arc::new(self.trainer(&setting)?);
                let services = ServedServices::new()
                    .with(TrainerServer::service(service.clone(), &config))
                    .with(WeightServer::service(service, &config));
                Ok((services, None))
            }
        }
    }

    /// The trainer ranks, in their order.
    fn sources<T>(&self, client: impl Fn(Endpoint) -> T) -> anyhow::Result<Vec<T>> {
        let connect = |(rank, address): (usize, &String)| {
            let name = format!("trainer-{rank}");
            Ok(client(Endpoint::connect(self.runtime, name, address, TransportConfig::default())?))
        };
        self.assignment.weight_sources.iter().enumerate().map(connect).collect()
    }

    fn rollout(
        &self,
        setting: &Setting,
        failure: &Failure,
    ) -> anyhow::Result<(SyncedRolloutService<LocalRolloutService>, Option<EngineRanks>)> {
        let Setting { recipe, model_dir, device, dtype } = setting;
        let (placement, dtype) = (&recipe.placement, *dtype);
        let num_ranks = placement.rollout_tensor_parallel;
        let (group, engine_ranks) = match num_ranks {
            1 => (None, None),
            _ => {
                let threads = match placement.threads {
                    0 => (device.info().num_threads / num_ranks).max(1),
                    threads => threads,
                };
                let work = RankWork { model_dir, dtype, threads, timeout: rollout_ranks::timeout(placement) };
                let (ranks, mut processes) = EngineRanks::start(num_ranks, &work)?;
                let group = Arc::new(RankGroup::lead(&ModelConfig::load(model_dir)?, ranks)?);
                processes.watch(&group, failure)?;
                (Some(group), Some(processes))
            }
        };
        let name = &self.assignment.id.name;
        let run_dir = Path::new(&self.assignment.run_dir);
        let engine = EngineSetting { recipe, device, dtype, model_dir, run_dir, name };
        let holders = self.sources(|endpoint| Arc::new(WeightClient::new(endpoint)) as Arc<dyn WeightService>)?;
        Ok((engine.start(0, (holders, placement.weight_transport), group)?, engine_ranks))
    }

    fn trainer(&self, setting: &Setting) -> anyhow::Result<LocalTrainerService> {
        let Setting { recipe, model_dir, device, dtype } = setting;
        let text = LocalText::load(model_dir)?;
        let vocab_size = ModelConfig::load(model_dir)?.vocab_size;
        let masked = text.tokenizer().missing_ids(vocab_size);
        let place = if self.assignment.world > 1 { Some(self.place(&recipe.placement)?) } else { None };
        let ranks = place.as_ref().map(RankPlace::meet).transpose()?;
        let mut trainer = Trainer::load_rank(Arc::clone(device), (model_dir, *dtype), masked, ranks)?;
        trainer.save_non_finite_to(Path::new(&self.assignment.run_dir).join("non_finite"));
        trainer_ranks::share_masters(&recipe.placement, || trainer.share_masters());
        if recipe.placement.weight_transport == WeightTransport::Delta {
            trainer.keep_published();
        }
        let Some(place) = place.filter(|_| recipe.placement.mirror_shards) else {
            return Ok(LocalTrainerService::new(trainer));
        };
        trainer.keep_mirrors()?;
        let Assignment { id, lease, .. } = self.assignment;
        place
            .met
            .watch(self.registry.clone(), id.clone(), heartbeat_interval(*lease))
            .context("watching the other ranks")?;
        let rank = self.assignment.rank as usize;
        let failed = move |e: anyhow::Error| {
            let (peer, problem) = ("the other ranks".to_owned(), format!("{e:#}"));
            temper_trainer::Error::from(temper_collective::Error::Connect { rank, peer, problem })
        };
        Ok(LocalTrainerService::new(trainer).with_meeting(Meeting::new(move || place.meet().map_err(&failed))))
    }

    fn place(&self, placement: &Placement) -> anyhow::Result<RankPlace> {
        let listener = self.ranks.0.as_ref().context("a trainer rank listens for the others")?;
        let tls = self.runtime.tls().map(|tls| {
            let (client, server) = tls.configs();
            LinkTls::new(client, server)
        });
        Ok(RankPlace {
            tls,
            registry: Arc::clone(self.registry),
            assignment: self.assignment.clone(),
            listener: listener.try_clone().context("listening for other ranks")?,
            placement: placement.clone(),
            met: MetRanks::default(),
        })
    }
}

/// All that a trainer rank needs to meet the others, whenever that is.
struct RankPlace {
    tls: Option<LinkTls>,
    registry: Arc<WorkerRegistryClient>,
    assignment: Assignment,
    listener: TcpListener,
    placement: Placement,
    met: MetRanks,
}

impl RankPlace {
    /// Where all trainer ranks are, once they are.
    fn addresses(&self) -> ServiceResult<Vec<String>> {
        let addresses = self.registry.ranks(&self.assignment.id)?;
        let num_missing = addresses.iter().filter(|address| address.is_empty()).count();
        if num_missing == 0 {
            return Ok(addresses);
        }
        let message = format!("{num_missing} of {} trainer ranks have not registered", addresses.len());
        Err(ServiceError::new(ErrorCode::Unavailable, "controller", "ranks", message))
    }

    /// The world of ranks at these addresses.
    fn world(&self, addresses: &[String]) -> anyhow::Result<SocketConfig> {
        let token = blake3::hash(addresses.join(" ").as_bytes());
        let parse = |address: &String| address.parse().with_context(|| format!("`{address}` is no HOST:PORT"));
        Ok(SocketConfig {
            tls: self.tls.clone(),
            rank: self.assignment.rank as usize,
            addresses: addresses.iter().map(parse).collect::<anyhow::Result<_>>()?,
            token: u64::from_le_bytes(*token.as_bytes().first_chunk().context("a hash has 32 bytes")?),
            connect_timeout: MEET_TIMEOUT,
            timeout: Duration::from_secs(self.placement.collective_timeout_seconds),
        })
    }

    /// Wait for all trainer ranks, and connect to them.
    fn meet(&self) -> anyhow::Result<Ranks> {
        let deadline = Instant::now() + JOIN_TIMEOUT;
        let world = loop {
            let addresses = retrying(|| self.addresses())?;
            let connected = connect_ranks(&self.world(&addresses)?, &self.listener);
            let met = connected.and_then(|world| {
                self.met.set(addresses, world.abort_handle());
                // A rank that tried before this one listened may have given up since, with its greeting on the way.
                world.barrier().map(|()| world)
            });
            match met {
                Ok(world) => break world,
                Err(error) if Instant::now() > deadline => return Err(error.into()),
                // A rank that began a new life listens elsewhere.
                Err(error) => tracing::info!(%error, "asking again where the other ranks are"),
            }
        };
        let own = (ProcessRole::Leader, ProcessShare::default());
        let ranks = Ranks::new(world, trainer_ranks::sharding(&self.placement), own)?;
        Ok(ranks.with_sequence_parallel(self.placement.sequence_parallel)?)
    }
}

/// End the process when standard input does: whoever started it is gone.
///
/// # Errors
/// Where the thread that waits cannot be started.
pub fn end_with_stdin() -> anyhow::Result<()> {
    let wait = || {
        let mut stdin = std::io::stdin().lock();
        let mut buffer = [0u8; 64];
        while matches!(stdin.read(&mut buffer), Ok(n) if n > 0) {}
        std::process::exit(0);
    };
    std::thread::Builder::new().name("stdin".to_owned()).spawn(wait)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_is_told_that_its_life_is_over_registers_again_and_whoever_cannot_work_ends() {
        let refusal = |code| ServiceError::new(code, "controller", "ready", "trainer-0 has another life");
        for code in [ErrorCode::Cancelled, ErrorCode::InvalidArgument, ErrorCode::Unavailable, ErrorCode::Internal] {
            let bare = Ended::by(refusal(code).into());
            let within = Ended::by(anyhow::Error::from(refusal(code)).context("linking the ranks"));
            for ended in [bare, within] {
                assert_eq!(matches!(ended, Ended::Lost(_)), code == ErrorCode::Cancelled, "{code:?}");
            }
        }
        assert!(matches!(Ended::by(anyhow::anyhow!("no such model")), Ended::Failed(_)));
        // Before a worker is registered there is no life that could be over.
        assert!(matches!(Ended::from(refusal(ErrorCode::Cancelled)), Ended::Failed(_)));
    }
}
