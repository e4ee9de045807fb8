//! Bytes on their way: from memory, between trainer ranks, and from a trainer to an engine.

use super::{Bench, median_seconds};
use crate::plan::Link;
use crate::trainer_ranks;
use anyhow::{Context, Result};
use std::net::TcpListener;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use temper_actor::{CheckpointReader, PackedPolicy, ParamStore, UnitShapes};
use temper_collective::{Collective, SocketConfig, connect, connect_threads, shard_ranges};
use temper_proto::TrainerService;
use temper_proto::grpc::{Endpoint, GrpcRuntime, ServedServices, TransportConfig, WeightClient, WeightServer, serve};
use temper_rollout::{Sources, WeightReceiver};
use temper_trainer::LocalTrainerService;
use temper_types::PolicyVersion;

const TIMEOUT: Duration = Duration::from_secs(60);
/// Elements of the smallest message that is timed.
const SMALL: usize = 256;
/// Elements of the largest.
const LARGE: usize = 4 << 20;
/// Operations of one timing.
const OPERATIONS: usize = 16;

/// Between ranks in one process.
pub(super) fn threads(shapes: &UnitShapes) -> Result<Link> {
    link(&connect_threads(2, TIMEOUT), shapes)
}

/// Between ranks in two processes of this machine.
pub(super) fn sockets(shapes: &UnitShapes) -> Result<Link> {
    link(&two_processes()?, shapes)
}

/// Two ranks as they are joined in two processes of this machine.
pub(super) fn two_processes() -> Result<[Collective; 2]> {
    let listen = || TcpListener::bind("127.0.0.1:0").context("listening");
    let listeners = [listen()?, listen()?];
    let addresses = listeners.iter().map(TcpListener::local_addr).collect::<std::io::Result<Vec<_>>>()?;
    let config = |rank| SocketConfig {
        rank,
        addresses: addresses.clone(),
        token: u64::from(std::process::id()),
        tls: None,
        connect_timeout: TIMEOUT,
        timeout: TIMEOUT,
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(|| connect(&config(1), &listeners[1]));
        let first = connect(&config(0), &listeners[0])?;
        let other = other.join().map_err(|_| anyhow::anyhow!("a rank panicked"))??;
        Ok([first, other])
    })
}

/// Latency from small operations, bytes in a second from those of a unit's size.
fn link(world: &[Collective], shapes: &UnitShapes) -> Result<Link> {
    let largest = (0..shapes.num_units()).map(|unit| shapes.unit_len(unit)).max().unwrap_or(SMALL);
    let large = largest.clamp(2 * SMALL, LARGE);
    let time = |len: usize| median_seconds(|| exchange(world, len));
    let (small, big) = (time(SMALL)?, time(large)?);
    let operations = 2.0 * OPERATIONS as f64;
    // A rank sends half of the elements in each of the two operations of a round.
    let bytes = |len: usize| 4.0 * operations * len as f64 / 2.0;
    let rate = (bytes(large) - bytes(SMALL)) / (big - small).max(0.1 * big);
    Ok(Link { bytes_per_second: rate, latency_seconds: (small - bytes(SMALL) / rate).max(0.0) / operations })
}

/// What a unit of a backward and of an update is: gradients reduced, masters gathered.
fn exchange(world: &[Collective], len: usize) -> Result<()> {
    let run = |rank: &Collective| -> Result<()> {
        let (mut values, ranges) = (vec![1.0f32; len], shard_ranges(len, rank.world()));
        for _ in 0..OPERATIONS {
            rank.reduce_scatter(&mut values, &ranges)?;
            rank.all_gather(&mut values, &ranges)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = world[1..].iter().map(|rank| scope.spawn(move || run(rank))).collect();
        run(&world[0])?;
        for other in others {
            other.join().map_err(|_| anyhow::anyhow!("a rank panicked"))??;
        }
        Ok(())
    })
}

/// Seconds of hashing the masters, and of an engine's taking them over: pulled, hashed, packed.
pub(super) fn sync(bench: &Bench<'_>, trainer: &Arc<LocalTrainerService>) -> Result<(f64, f64)> {
    let runtime = GrpcRuntime::start().context("starting the transport")?;
    let config = TransportConfig::default();
    let listener = TcpListener::bind("127.0.0.1:0").context("listening")?;
    let services = ServedServices::new().with(WeightServer::service(Arc::clone(trainer) as _, &config));
    let server = serve(&runtime, listener, services, config).context("serving")?;
    let endpoint = Endpoint::connect(&runtime, "trainer", &server.address().to_string(), config)?;
    let model = &bench.planned.config;
    let params = ParamStore::load(&*bench.device, model, &CheckpointReader::open(bench.model_dir)?)?;
    let policy = Arc::new(RwLock::new(PackedPolicy::new(&bench.device, &params, model, bench.dtype)));
    let placement = &bench.planned.recipe.placement;
    trainer_ranks::share_masters(placement, || trainer.share_masters());
    let sources =
        Sources { transport: placement.weight_transport, ..Sources::one(Arc::new(WeightClient::new(endpoint))) };
    let receiver =
        WeightReceiver::new(Arc::clone(&bench.device), Arc::clone(&policy), params, sources, "engine".to_owned());
    let mut number = 0;
    let hash_seconds = median_seconds(|| {
        number += 1;
        trainer.publish(number)?;
        Ok(())
    })?;
    let pull_seconds = median_seconds(|| {
        // As if it held older weights.
        policy.write().unwrap_or_else(PoisonError::into_inner).version = PolicyVersion::default();
        Ok(receiver.receive(trainer.version())?)
    })?;
    Ok((hash_seconds, pull_seconds))
}
