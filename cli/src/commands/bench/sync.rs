//! `temper bench sync`: weights from trainer ranks to engines, against a plain copy of as many bytes.

use super::samples::{at_least_one, median, round, spread};
use crate::commands::common::compute::ComputeArgs;
use crate::commands::common::output::print;
use crate::usage;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::fmt::Write;
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};
use temper_actor::{ModelConfig, PackedPolicy, ParamStore};
use temper_collective::reshard::Layout;
use temper_proto::WeightService;
use temper_proto::grpc::{
    Endpoint, GrpcRuntime, ServedServices, ServerHandle, TransportConfig, WeightClient, WeightServer, serve,
};
use temper_rollout::{Sources, WeightBytes, WeightReceiver, WeightTransport};
use temper_tensor::{Buffer, Device};
use temper_trainer::{LocalTrainerService, Sharding, Trainer, load_local_ranks};
use temper_types::{DType, PolicyVersion};

/// How long a rank waits for the others while the model is loaded.
const LOAD_TIMEOUT: Duration = Duration::from_secs(600);

/// Seconds in which engines pull, hash and prove the weights of trainer ranks: by gRPC over loopback, and through
/// shared memory as between processes of one host. Beside each stands a plain copy of as many bytes by as many threads,
/// timed in turn with it.
#[derive(clap::Args)]
pub struct WeightSync {
    /// Hugging Face model directory.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// How the weights lie on the trainer's ranks: replicated:RANKS (zero1, zero2), fsdp:RANKS (zero3), or
    /// hybrid:RANKS/SHARDS.
    #[arg(
        long,
        value_name = "LAYOUT",
        value_delimiter = ',',
        default_value = "replicated:1,replicated:2,fsdp:2,fsdp:4,hybrid:4/2"
    )]
    from: Vec<String>,
    /// Numbers of engines, each of which holds everything.
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,2")]
    to: Vec<usize>,
    /// Timed syncs of each pair, after one that is not.
    #[arg(long, value_name = "R", default_value_t = 5)]
    runs: usize,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Print as JSON, every sample included.
    #[arg(long)]
    json: bool,
}

/// How weights lie on trainer ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    layout: Layout,
    sharding: Sharding,
}

fn parse_layout(text: &str) -> Result<Held> {
    let fail = || usage(format!("--from {text}: expected replicated:RANKS, fsdp:RANKS or hybrid:RANKS/SHARDS"));
    let (kind, ranks) = text.split_once(':').ok_or_else(fail)?;
    let (world, shards) = ranks.split_once('/').unwrap_or((ranks, ""));
    let number = |text: &str| -> Result<usize> { text.parse().ok().filter(|n| (1..=64).contains(n)).ok_or_else(fail) };
    let world: usize = number(world)?;
    match (kind, shards) {
        ("replicated", "") => Ok(Held { layout: Layout::Replicated { world }, sharding: Sharding::Zero2 }),
        ("fsdp", "") => Ok(Held { layout: Layout::Fsdp { world, shards: world }, sharding: Sharding::Zero3 }),
        ("hybrid", shards) => {
            let shard_size = number(shards)?;
            let is_even = world.is_multiple_of(shard_size);
            let from =
                Held { layout: Layout::Fsdp { world, shards: shard_size }, sharding: Sharding::Hybrid { shard_size } };
            is_even.then_some(from).ok_or_else(fail)
        }
        _ => Err(fail()),
    }
}

/// The trainer's side of a pair.
struct Ranks {
    layout: Layout,
    version: PolicyVersion,
    services: Vec<Arc<LocalTrainerService>>,
}

impl Ranks {
    fn here(&self) -> Vec<Arc<dyn WeightService>> {
        self.services.iter().map(|rank| Arc::clone(rank) as Arc<dyn WeightService>).collect()
    }

    /// Put the masters of every rank where other processes can read them.
    fn share(&self) -> Result<()> {
        self.services.iter().try_for_each(|rank| rank.share_masters()).context("sharing the masters")
    }
}

/// How weights come to an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Route {
    /// By gRPC over loopback.
    Grpc,
    /// By gRPC where they are, and from there as another process of the host reads them.
    Shared,
}

impl Route {
    fn name(self) -> &'static str {
        match self {
            Route::Grpc => "grpc",
            Route::Shared => "shared",
        }
    }

    fn sources(self, ranks: &Ranks, wire: &Wire) -> Sources {
        let transport = if self == Route::Shared { WeightTransport::Auto } else { WeightTransport::Grpc };
        Sources { ranks: wire.clients.clone(), layout: ranks.layout, transport }
    }

    /// What moved, all of it by this route.
    fn moved(self, bytes: WeightBytes) -> Result<u64> {
        let (moved, otherwise) = match self {
            Route::Shared => (bytes.shared, bytes.streamed),
            Route::Grpc => (bytes.streamed, bytes.shared),
        };
        ensure!(otherwise == 0, "{otherwise} bytes came by another route than {}", self.name());
        Ok(moved)
    }
}

/// The ranks behind loopback, for as long as this lives.
struct Wire {
    clients: Vec<Arc<dyn WeightService>>,
    _servers: Vec<ServerHandle>,
    _runtime: GrpcRuntime,
}

impl Wire {
    fn start(ranks: &[Arc<dyn WeightService>]) -> Result<Self> {
        let (runtime, config) = (GrpcRuntime::start().context("starting the transport")?, TransportConfig::default());
        let (mut clients, mut servers) = (Vec::new(), Vec::new());
        for (rank, service) in ranks.iter().enumerate() {
            let listener = TcpListener::bind("127.0.0.1:0").context("listening on loopback")?;
            let services = ServedServices::new().with(WeightServer::service(Arc::clone(service), &config));
            let server = serve(&runtime, listener, services, config).context("serving weights")?;
            let endpoint =
                Endpoint::connect(&runtime, format!("trainer-{rank}"), &server.address().to_string(), config)?;
            clients.push(Arc::new(WeightClient::new(endpoint)) as Arc<dyn WeightService>);
            servers.push(server);
        }
        Ok(Wire { clients, _servers: servers, _runtime: runtime })
    }
}

/// One measured pair over one path.
struct Row {
    from: String,
    to: usize,
    route: Route,
    moved_bytes: u64,
    lower_bound_bytes: u64,
    seconds: Vec<f64>,
    copy_seconds: Vec<f64>,
}

impl Row {
    /// The median of what each sync took of the copy behind it: a machine that changes its pace takes both along.
    fn ratio(&self) -> f64 {
        let ratios: Vec<f64> = self.seconds.iter().zip(&self.copy_seconds).map(|(sync, copy)| sync / copy).collect();
        median(&ratios)
    }

    fn to_json(&self) -> Value {
        json!({
            "from": self.from, "to": self.to, "path": self.route.name(), "moved_bytes": self.moved_bytes,
            "lower_bound_bytes": self.lower_bound_bytes, "sync_s": median(&self.seconds),
            "copy_s": median(&self.copy_seconds), "ratio": round(self.ratio()),
            "spread": round(spread(&self.seconds)), "samples_s": self.seconds, "copy_samples_s": self.copy_seconds,
        })
    }
}

/// Memory of the device that is copied for comparison, warm: pages of the size that weights lie in.
struct PlainCopy {
    device: Arc<dyn Device>,
    from: Buffer,
    to: Buffer,
}

impl PlainCopy {
    fn new(device: &Arc<dyn Device>, len: usize) -> Self {
        let mut from = device.zeros(len);
        device.fill(from.all_mut(), 1.0);
        PlainCopy { device: Arc::clone(device), from, to: device.zeros(len) }
    }

    /// Seconds of `times` copies, one after the other.
    fn seconds(&mut self, times: usize) -> f64 {
        let (device, from) = (&*self.device, self.from.all());
        let part = from.len().div_ceil(device.info().num_threads).max(1);
        let begin = Instant::now();
        for _ in 0..times {
            std::thread::scope(|scope| {
                let mut to = self.to.all_mut();
                for start in (0..from.len()).step_by(part) {
                    let from = from.slice(start..from.len().min(start + part));
                    let (now, later) = to.split_at(from.len());
                    scope.spawn(move || device.copy(from, now));
                    to = later;
                }
            });
        }
        begin.elapsed().as_secs_f64()
    }
}

/// An engine's receiver that holds nothing but zeros.
fn receiver((device, config, dtype): (&Arc<dyn Device>, &ModelConfig, DType), sources: Sources) -> WeightReceiver {
    let params = ParamStore::zeros(&**device, config);
    let policy = Arc::new(RwLock::new(PackedPolicy::new(device, &params, config, dtype)));
    WeightReceiver::new(Arc::clone(device), policy, params, sources, "engine".to_owned())
}

impl WeightSync {
    pub(super) fn run(self) -> Result<()> {
        at_least_one(&[("--runs", self.runs)])?;
        self.to.iter().try_for_each(|to| at_least_one(&[("--to", *to)]))?;
        let layouts = self.from.iter().map(|text| parse_layout(text)).collect::<Result<Vec<_>>>()?;
        let (device, dtype) = self.compute.resolve();
        let config = ModelConfig::load(&self.model)?;
        let len = ParamStore::zeros(&*device, &config).units().iter().map(|unit| unit.buffer().len()).sum();
        let mut copy = PlainCopy::new(&device, len);
        let mut rows = Vec::new();
        for (name, from) in self.from.iter().zip(layouts) {
            let ranks = self.load((&device, dtype), from).with_context(|| format!("loading {name}"))?;
            let wire = Wire::start(&ranks.here())?;
            for route in [Route::Grpc, Route::Shared] {
                if route == Route::Shared {
                    ranks.share()?;
                }
                for to in &self.to {
                    let mut row = Row {
                        from: name.clone(),
                        to: *to,
                        route,
                        moved_bytes: 0,
                        lower_bound_bytes: (to * len * size_of::<f32>()) as u64,
                        seconds: Vec::new(),
                        copy_seconds: Vec::new(),
                    };
                    let engine = |_| receiver((&device, &config, dtype), route.sources(&ranks, &wire));
                    let engines: Vec<WeightReceiver> = (0..*to).map(engine).collect();
                    self.measure(&mut row, (ranks.version, &engines), &mut copy)?;
                    rows.push(row);
                }
            }
        }
        self.report(&*device, len, &rows)
    }

    fn load(&self, (device, dtype): (&Arc<dyn Device>, DType), from: Held) -> Result<Ranks> {
        let load = |ranks| Trainer::load_rank(Arc::clone(device), (&self.model, dtype), Vec::new(), ranks);
        let trainers = match from.layout.world() {
            1 => vec![load(None)?],
            world => load_local_ranks(world, from.sharding, LOAD_TIMEOUT, |rank| load(Some(rank)))?,
        };
        let version = trainers[0].version();
        let services = trainers.into_iter().map(|trainer| Arc::new(LocalTrainerService::new(trainer))).collect();
        Ok(Ranks { layout: from.layout, version, services })
    }

    /// Syncs and plain copies in turn.
    fn measure(
        &self,
        row: &mut Row,
        (version, engines): (PolicyVersion, &[WeightReceiver]),
        copy: &mut PlainCopy,
    ) -> Result<()> {
        for run in 0..=self.runs {
            let begin = Instant::now();
            for engine in engines {
                engine.check(version, engine.fetch(version)?)?;
            }
            let seconds = begin.elapsed().as_secs_f64();
            let copy_seconds = copy.seconds(row.to);
            if run > 0 {
                row.seconds.push(seconds);
                row.copy_seconds.push(copy_seconds);
            }
        }
        let moved = engines.iter().map(|engine| row.route.moved(engine.bytes())).collect::<Result<Vec<_>>>()?;
        row.moved_bytes = moved.iter().sum::<u64>() / (self.runs as u64 + 1);
        Ok(())
    }

    fn report(&self, device: &dyn Device, len: usize, rows: &[Row]) -> Result<()> {
        let (info, bytes) = (device.info(), len * size_of::<f32>());
        if self.json {
            let rows: Vec<Value> = rows.iter().map(Row::to_json).collect();
            let object = json!({"bench": "sync", "device": info, "weight_bytes": bytes, "rows": rows});
            return print(&format!("{object}\n"));
        }
        let mut text = format!("{} MB of weights, {} threads\n", bytes / 1_000_000, info.num_threads);
        writeln!(
            text,
            "{:>14} {:>7} {:>6} {:>9} {:>6} {:>8} {:>8} {:>6} {:>7}",
            "from", "engines", "path", "moved MB", "bound", "sync s", "copy s", "ratio", "GB/s"
        )?;
        for row in rows {
            let (seconds, copied) = (median(&row.seconds), median(&row.copy_seconds));
            let (moved, bound) = (row.moved_bytes as f64, row.moved_bytes as f64 / row.lower_bound_bytes as f64);
            writeln!(
                text,
                "{:>14} {:>7} {:>6} {:>9.1} {bound:>5.2}x {seconds:>8.4} {copied:>8.4} {:>5.2}x {:>7.2}",
                row.from,
                row.to,
                row.route.name(),
                moved / 1e6,
                row.ratio(),
                moved / seconds / 1e9
            )?;
        }
        print(&text)
    }
}
