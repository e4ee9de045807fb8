//! Any implementation of the service traits, on a socket.

mod control;
mod flight;
mod reward;
mod rollout;
mod trainer;
mod weights;
mod worker;

pub use control::ControlServer;
pub use flight::FlightServer;
pub use reward::RewardServer;
pub use rollout::RolloutServer;
pub use trainer::TrainerServer;
pub use weights::WeightServer;
pub use worker::WorkerRegistryServer;

use super::channel::{LIFE_HEADER, RUN_HEADER, TransportConfig, encode_error};
use super::convert::ConvertError;
use super::tls::TlsIncoming;
use super::{FILE_DESCRIPTOR_SET, GrpcRuntime, v1};
use crate::{ServiceError, ServiceResult};
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;
use temper_types::ErrorCode;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::service::{Routes, RoutesBuilder};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Status, Streaming};

type HttpRequest = tonic::codegen::http::Request<tonic::body::Body>;
type HttpResponse = tonic::codegen::http::Response<tonic::body::Body>;

/// The services that a server offers; health and reflection come by themselves.
#[derive(Debug, Default)]
pub struct ServedServices {
    routes: RoutesBuilder,
    names: Vec<&'static str>,
    life: Option<u64>,
    run: Option<ServedRun>,
}

/// The run whose control a server offers.
#[derive(Debug, Clone)]
pub struct ServedRun {
    /// Its id.
    pub id: String,
    /// Its directory.
    pub dir: String,
}

impl ServedServices {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Refuse calls that are meant for another life of this worker.
    #[must_use]
    pub fn of_life(mut self, incarnation: u64) -> Self {
        self.life = Some(incarnation);
        self
    }

    /// Refuse calls that are meant for another run.
    #[must_use]
    pub fn of_run(mut self, run: ServedRun) -> Self {
        self.run = Some(run);
        self
    }

    /// Offer a generated service.
    #[must_use]
    pub fn with<S>(mut self, service: S) -> Self
    where
        S: tower::Service<HttpRequest, Response = HttpResponse, Error = std::convert::Infallible>
            + tonic::server::NamedService
            + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send + 'static,
    {
        self.names.push(S::NAME);
        self.routes.add_service(service);
        self
    }
}

/// A server that runs until this is dropped or stopped.
#[derive(Debug)]
pub struct ServerHandle {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    runtime: GrpcRuntime,
    task: JoinHandle<Result<(), tonic::transport::Error>>,
}

impl ServerHandle {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// True where it no longer serves.
    pub fn is_finished(&self) -> bool {
        self.task.is_finished()
    }
}

/// Takes no more calls, and gives those under way a moment to end.
impl Drop for ServerHandle {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // Nobody listens where the server has ended before.
            let _ = stop.send(());
        }
        let task = &mut self.task;
        let ended = self.runtime.handle().map(|h| h.block_on(async { tokio::time::timeout(STOP_TIMEOUT, task).await }));
        if !matches!(ended, Some(Ok(_))) {
            self.task.abort();
        }
    }
}

/// How long calls that are under way keep a server that is stopped.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// Serve on `listener`, which may be bound to port 0; under TLS where the runtime has certificates.
///
/// # Errors
/// Where the listener cannot be used.
pub fn serve(
    runtime: &GrpcRuntime,
    listener: TcpListener,
    services: ServedServices,
    config: TransportConfig,
) -> std::io::Result<ServerHandle> {
    let handle = runtime.handle().ok_or_else(|| std::io::Error::other("the process is ending"))?;
    let address = listener.local_addr()?;
    listener.set_nonblocking(true)?;
    let (stop, stopped) = oneshot::channel::<()>();
    let _entered = handle.enter();
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let (life, run) = (services.life, services.run.clone());
    let routes = with_common(services)?;
    let fence = move |request: Request<()>| check_run(run.as_ref(), check_life(life, request)?);
    let server = Server::builder()
        .layer(tonic::service::InterceptorLayer::new(fence))
        .http2_keepalive_interval(Some(config.keepalive_interval))
        .http2_keepalive_timeout(Some(config.keepalive_timeout))
        .initial_stream_window_size(8 << 20)
        .initial_connection_window_size(16 << 20)
        .add_routes(routes);
    let stopped = async move {
        // A sender that is gone means the same.
        let _ = stopped.await;
    };
    let task = match runtime.tls() {
        Some(tls) => {
            let incoming = TlsIncoming::new(listener, tls, config.connect_timeout);
            handle.spawn(server.serve_with_incoming_shutdown(incoming, stopped))
        }
        None => {
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            handle.spawn(server.serve_with_incoming_shutdown(incoming, stopped))
        }
    };
    Ok(ServerHandle { address, stop: Some(stop), runtime: runtime.clone(), task })
}

/// A call that names another life comes from somebody who does not know yet that it is over.
fn check_life(life: Option<u64>, request: Request<()>) -> Result<Request<()>, Status> {
    let meant = request.metadata().get(LIFE_HEADER).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    match (life, meant) {
        (Some(life), Some(meant)) if life != meant => {
            let message = format!("the call is for life {meant} of this worker, which is in life {life}");
            Err(encode_error(ServiceError::new(ErrorCode::Unavailable, "worker", "call", message)))
        }
        _ => Ok(request),
    }
}

/// A call that names another run is for one that listened here before.
fn check_run(run: Option<&ServedRun>, request: Request<()>) -> Result<Request<()>, Status> {
    match (run, request.metadata().get(RUN_HEADER)) {
        (Some(run), Some(meant)) if meant.as_bytes() != run.id.as_bytes() => {
            let message = format!("the run in {} listens here, and the call is for another one", run.dir);
            Err(encode_error(ServiceError::new(ErrorCode::VersionMismatch, "controller", "call", message)))
        }
        _ => Ok(request),
    }
}

/// The services, their health, and reflection.
fn with_common(services: ServedServices) -> std::io::Result<Routes> {
    let (reporter, health) = tonic_health::server::health_reporter();
    let names = services.names;
    tokio::spawn(async move {
        for name in names {
            reporter.set_service_status(name, tonic_health::ServingStatus::Serving).await;
        }
    });
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(std::io::Error::other)?;
    let mut routes = services.routes;
    routes.add_service(health).add_service(reflection);
    Ok(routes.routes())
}

/// Run a blocking call of a service off the runtime's threads.
async fn blocking<T: Send + 'static>(call: impl FnOnce() -> ServiceResult<T> + Send + 'static) -> Result<T, Status> {
    match tokio::task::spawn_blocking(call).await {
        Ok(result) => result.map_err(encode_error),
        Err(panicked) => {
            let error =
                ServiceError::new(ErrorCode::Internal, "worker", "call", format!("the call panicked: {panicked}"));
            Err(encode_error(error))
        }
    }
}

/// A request that cannot be read.
fn refused(error: ConvertError) -> Status {
    encode_error(ServiceError::new(ErrorCode::InvalidArgument, "worker", "read the request", error))
}

/// Longest wait for the rest of a streamed request; the sender's own deadline ends it sooner.
const STREAM_TIMEOUT: Duration = Duration::from_secs(600);

/// All messages of a streamed request.
async fn read_all<T>(request: Request<Streaming<T>>) -> Result<Vec<T>, Status> {
    let mut stream = request.into_inner();
    let collect = async {
        let mut all = Vec::new();
        while let Some(message) = stream.message().await? {
            all.push(message);
        }
        Ok(all)
    };
    match tokio::time::timeout(STREAM_TIMEOUT, collect).await {
        Ok(result) => result,
        Err(_) => Err(Status::deadline_exceeded(format!("the request was not complete within {STREAM_TIMEOUT:?}"))),
    }
}

/// A stream of messages that are there already.
type Ready<T> = tokio_stream::Iter<std::vec::IntoIter<Result<T, Status>>>;

fn ready<T>(messages: impl IntoIterator<Item = T>) -> tonic::Response<Ready<T>> {
    let messages: Vec<Result<T, Status>> = messages.into_iter().map(Ok).collect();
    tonic::Response::new(tokio_stream::iter(messages))
}

fn empty() -> tonic::Response<v1::Empty> {
    tonic::Response::new(v1::Empty {})
}
