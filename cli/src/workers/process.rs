//! A worker process: register, load, serve, and live as long as the controller does.

use crate::recipe::{Recipe, Source};
use crate::reward_models::RewardModels;
use crate::runtime::{LocalText, device};
use anyhow::{Context, bail};
use std::io::Read;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};
use temper_actor::{CheckpointReader, ModelConfig, PackedPolicy, ParamStore};
use temper_proto::grpc::{
    Endpoint, GrpcRuntime, RewardServer, RolloutServer, ServedServices, TrainerClient, TrainerServer, TransportConfig,
    WeightClient, WeightServer, WorkerRegistryClient, serve,
};
use temper_proto::{Assignment, ServiceResult, WorkerHello, WorkerRegistry, WorkerRole};
use temper_rollout::{LocalRolloutService, SyncedRolloutService, WeightReceiver};
use temper_tensor::Device;
use temper_trainer::{LocalTrainerService, Trainer};
use temper_types::{DType, ErrorCode, PolicyVersion};

/// How long a worker asks to be let in.
const JOIN_TIMEOUT: Duration = Duration::from_secs(300);
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

impl<E: Into<anyhow::Error>> From<E> for Ended {
    fn from(error: E) -> Self {
        Ended::Failed(error.into())
    }
}

/// One life, from its registration to its end.
fn live(options: &ServeOptions, listener: &TcpListener) -> Result<(), Ended> {
    let runtime = GrpcRuntime::start().context("starting the transport")?;
    let registry = connect(&runtime, options)?;
    let hello = WorkerHello {
        role: options.role,
        name: options.name.clone(),
        address: listener.local_addr()?.to_string(),
        process_id: std::process::id(),
        build: env!("CARGO_PKG_VERSION").to_owned(),
        collective_address: String::new(),
    };
    let assignment = retrying(|| registry.register(hello.clone()))?;
    let beats = Heartbeats::start(Arc::clone(&registry), &assignment)?;
    let (services, version) = build(options.role, &runtime, &assignment)?;
    let config = TransportConfig::default();
    let services = services.of_life(assignment.id.incarnation);
    let server = serve(&runtime, listener.try_clone()?, services, config).context("serving")?;
    tracing::info!(worker = assignment.id.name, address = %server.address(), "serving");
    registry.ready(&assignment.id, version)?;
    beats.wait().map_err(Ended::Lost)
}

fn connect(runtime: &GrpcRuntime, options: &ServeOptions) -> anyhow::Result<Arc<WorkerRegistryClient>> {
    let config = TransportConfig::default();
    let endpoint = retrying(|| Endpoint::connect(runtime, "controller", &options.join, config))?;
    Ok(Arc::new(WorkerRegistryClient::new(endpoint)))
}

/// Try again while the other side is not yet there.
fn retrying<T>(mut call: impl FnMut() -> ServiceResult<T>) -> anyhow::Result<T> {
    let deadline = Instant::now() + JOIN_TIMEOUT;
    loop {
        match call() {
            Ok(value) => return Ok(value),
            Err(error) if error.code == ErrorCode::Unavailable && Instant::now() < deadline => {
                std::thread::sleep(RETRY);
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Keeps the lease from its first moment on.
struct Heartbeats {
    thread: std::thread::JoinHandle<anyhow::Result<()>>,
}

impl Heartbeats {
    fn start(registry: Arc<WorkerRegistryClient>, assignment: &Assignment) -> anyhow::Result<Self> {
        let (id, lease) = (assignment.id.clone(), assignment.lease);
        let beat = move || {
            let mut last = Instant::now();
            loop {
                match registry.heartbeat(&id) {
                    Ok(true) => return Ok(()),
                    Ok(false) => last = Instant::now(),
                    Err(error) if error.code.is_retryable() && last.elapsed() < lease => {}
                    Err(error) => return Err(error).context("the controller is gone"),
                }
                std::thread::sleep(lease / 10);
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

fn build(
    role: WorkerRole,
    runtime: &GrpcRuntime,
    assignment: &Assignment,
) -> anyhow::Result<(ServedServices, PolicyVersion)> {
    let setting = Setting::of(assignment)?;
    let config = TransportConfig::default();
    match role {
        WorkerRole::Rollout => {
            let engine = rollout(&setting, runtime, assignment)?;
            let version = engine.version();
            Ok((ServedServices::new().with(RolloutServer::service(Arc::new(engine), &config)), version))
        }
        WorkerRole::Reward => {
            let trainer = Arc::new(TrainerClient::new(source(runtime, assignment)?));
            let Setting { recipe, model_dir, device, dtype } = &setting;
            let models = RewardModels { trainer, device, policy_dir: model_dir, dtype: *dtype };
            let service = Arc::new(models.reward_service(recipe)?);
            let services = ServedServices::new().with(RewardServer::service(service, &config));
            Ok((services, PolicyVersion::default()))
        }
        WorkerRole::Trainer => {
            let trainer = trainer(&setting, assignment)?;
            let version = trainer.version();
            let service = Arc::new(LocalTrainerService::new(trainer));
            let services = ServedServices::new()
                .with(TrainerServer::service(service.clone(), &config))
                .with(WeightServer::service(service, &config));
            Ok((services, version))
        }
    }
}

/// The holder of weights that this worker asks.
fn source(runtime: &GrpcRuntime, assignment: &Assignment) -> anyhow::Result<Endpoint> {
    let address = assignment.weight_sources.first().context("the controller named no holder of weights")?;
    Ok(Endpoint::connect(runtime, "trainer-0", address, TransportConfig::default())?)
}

fn rollout(
    setting: &Setting,
    runtime: &GrpcRuntime,
    assignment: &Assignment,
) -> anyhow::Result<SyncedRolloutService<LocalRolloutService>> {
    let Setting { recipe, model_dir, device, dtype } = setting;
    let config = ModelConfig::load(model_dir)?;
    let reader = CheckpointReader::open(model_dir)?;
    reader.validate(&config)?;
    let params = ParamStore::load(&**device, &config, &reader)?;
    let text = LocalText::load(model_dir)?;
    let mut policy = PackedPolicy::new(device, &params, &config, *dtype);
    policy.set_masked_ids(text.tokenizer().missing_ids(config.vocab_size));
    policy.version = PolicyVersion { number: 0, hash: params.content_hash(&**device) };
    let policy = Arc::new(RwLock::new(policy));
    let bytes = Arc::new(text.token_byte_table(config.vocab_size));
    let engine = LocalRolloutService::new(Arc::clone(device), Arc::clone(&policy), recipe.engine.clone(), bytes)?
        .named(&assignment.id.name);
    let source = Arc::new(WeightClient::new(source(runtime, assignment)?));
    let receiver = WeightReceiver::new(Arc::clone(device), policy, params, source, assignment.id.name.clone());
    Ok(SyncedRolloutService::new(engine, receiver))
}

fn trainer(setting: &Setting, assignment: &Assignment) -> anyhow::Result<Trainer> {
    let Setting { model_dir, device, dtype, .. } = setting;
    let text = LocalText::load(model_dir)?;
    let vocab_size = ModelConfig::load(model_dir)?.vocab_size;
    let masked = text.tokenizer().missing_ids(vocab_size);
    let mut trainer = Trainer::load(Arc::clone(device), model_dir, *dtype, masked)?;
    trainer.save_non_finite_to(Path::new(&assignment.run_dir).join("non_finite"));
    Ok(trainer)
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
