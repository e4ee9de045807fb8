//! The way to a server: deadlines, keep-alives, and the one error that comes back.

use super::convert::ConvertError;
use super::tls::{SPEAKS_TLS, refuses_plain_text};
use super::{GrpcRuntime, v1};
use crate::{ServiceError, ServiceResult};
use prost::Message;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use temper_types::ErrorCode;
use tokio::runtime::Handle;
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::{Channel, Endpoint as Target};
use tonic::{Code, Request, Response, Status};

/// Which life of a worker a call is meant for.
pub(crate) const LIFE_HEADER: &str = "temper-life";

/// Which run a call is meant for.
pub(crate) const RUN_HEADER: &str = "temper-run";

/// Waits and sizes of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransportConfig {
    /// Longest wait for a connection.
    pub connect_timeout: Duration,
    /// Longest call that computes nothing.
    pub call_timeout: Duration,
    /// Longest call that computes: an update, a batch of log-probs or scores, a checkpoint.
    pub compute_timeout: Duration,
    /// Pause after which a connection is tried by a ping, also while nothing is said.
    pub keepalive_interval: Duration,
    /// Longest wait for the answer to a ping; the connection is lost then.
    pub keepalive_timeout: Duration,
    /// Largest message in bytes, both ways.
    pub max_message_bytes: usize,
}

impl Default for TransportConfig {
    fn default() -> Self {
        TransportConfig {
            connect_timeout: Duration::from_secs(10),
            call_timeout: Duration::from_secs(30),
            compute_timeout: Duration::from_secs(3600),
            keepalive_interval: Duration::from_secs(5),
            keepalive_timeout: Duration::from_secs(10),
            max_message_bytes: 64 << 20,
        }
    }
}

/// Longest wait for a peer to say that it takes no plain text.
const PLAIN_TEXT_TIMEOUT: Duration = Duration::from_secs(1);

/// A named peer and the connection to it.
#[derive(Debug, Clone)]
pub struct Endpoint {
    runtime: GrpcRuntime,
    name: String,
    channel: Channel,
    config: TransportConfig,
    life: Option<u64>,
    run: Option<AsciiMetadataValue>,
    address: String,
    /// True once the peer has answered a call.
    has_answered: Arc<AtomicBool>,
}

impl Endpoint {
    /// Connect to `address` (HOST:PORT) of the worker `name`, under TLS where the runtime has certificates. The
    /// connection is made anew when it breaks.
    ///
    /// # Errors
    /// `InvalidArgument` for an address that is none, and for a peer whose certificate is not taken or that takes not
    /// ours; `Unavailable` where nobody answers in time.
    pub fn connect(
        runtime: &GrpcRuntime,
        name: impl Into<String>,
        address: &str,
        config: TransportConfig,
    ) -> ServiceResult<Self> {
        const OPERATION: &str = "connect";
        let name = name.into();
        let bad = |error: String| {
            let message = format!("`{address}` is no HOST:PORT: {error}");
            ServiceError::new(ErrorCode::InvalidArgument, name.as_str(), OPERATION, message)
        };
        let target = target(runtime, address, &config).map_err(bad)?;
        let handle = runtime.handle().ok_or_else(|| stopping(&name, OPERATION))?;
        let reach = async {
            if let Some(tls) = runtime.tls() {
                tls.greet(host_and_port(&target)).await?;
            }
            target.connect().await.map_err(|error| (ErrorCode::Unavailable, causes(&error)))
        };
        let connected = handle.block_on(async { tokio::time::timeout(config.connect_timeout, reach).await });
        let late = |_| (ErrorCode::Unavailable, format!("no answer within {:?}", config.connect_timeout));
        let channel = connected.map_err(late).and_then(|reached| reached).map_err(|(code, cause)| {
            ServiceError::new(code, name.as_str(), OPERATION, format!("cannot reach {address}: {cause}"))
        })?;
        let (address, has_answered) = (address.to_owned(), Arc::default());
        Ok(Endpoint { runtime: runtime.clone(), name, channel, config, life: None, run: None, address, has_answered })
    }

    /// Speak to life `incarnation` of the peer alone: a later one at the same address refuses.
    #[must_use]
    pub fn to_life(mut self, incarnation: u64) -> Self {
        self.life = Some(incarnation);
        self
    }

    /// Speak to the run of this id alone: another one at the same address refuses with `VersionMismatch`.
    ///
    /// # Errors
    /// `InvalidArgument` for an id that is not in visible ASCII characters.
    pub fn to_run(mut self, id: &str) -> ServiceResult<Self> {
        let bad = |_| {
            let message = format!("`{id}` is no id of a run: expected visible ASCII characters");
            ServiceError::new(ErrorCode::InvalidArgument, self.name.as_str(), "connect", message)
        };
        self.run = Some(id.parse().map_err(bad)?);
        Ok(self)
    }

    /// Name of the peer.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits and sizes.
    pub fn config(&self) -> &TransportConfig {
        &self.config
    }

    pub(crate) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// A call within a deadline, which the server is told; the bodies of streams are part of it. `operation` names it
    /// in errors.
    pub(crate) fn call<M, T, F>(
        &self,
        (operation, deadline): (&'static str, Duration),
        message: M,
        send: impl FnOnce(Request<M>) -> F,
    ) -> ServiceResult<T>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let handle = self.runtime.handle().ok_or_else(|| stopping(&self.name, operation))?;
        let mut request = Request::new(message);
        request.set_timeout(deadline);
        if let Some(life) = self.life {
            request.metadata_mut().insert(LIFE_HEADER, life.into());
        }
        if let Some(run) = &self.run {
            request.metadata_mut().insert(RUN_HEADER, run.clone());
        }
        let answer = handle.block_on(async { tokio::time::timeout(deadline, send(request)).await });
        match answer {
            Ok(Ok(value)) => {
                self.has_answered.store(true, Ordering::Relaxed);
                Ok(value)
            }
            Ok(Err(status)) if self.wants_tls(handle, &status) => {
                let message = format!("cannot reach {}: {SPEAKS_TLS}", self.address);
                Err(ServiceError::new(ErrorCode::InvalidArgument, self.name.as_str(), operation, message))
            }
            Ok(Err(status)) => Err(decode_error(&status, &self.name, operation)),
            Err(_) => {
                let message = format!("no answer within {deadline:?}");
                Err(ServiceError::new(ErrorCode::DeadlineExceeded, self.name.as_str(), operation, message))
            }
        }
    }

    /// True where a first call failed because the peer takes no plain text, which a connection that ends says in no
    /// error that is the same each time.
    fn wants_tls(&self, handle: &Handle, status: &Status) -> bool {
        let is_first = !self.has_answered.load(Ordering::Relaxed) && status.details().is_empty();
        if self.runtime.tls().is_some() || !is_first {
            return false;
        }
        let refuses = async { tokio::time::timeout(PLAIN_TEXT_TIMEOUT, refuses_plain_text(&self.address)).await };
        handle.block_on(refuses).unwrap_or(false)
    }

    /// What a message that cannot be read is to the caller.
    pub(crate) fn unreadable(&self, operation: &'static str) -> impl Fn(ConvertError) -> ServiceError + '_ {
        move |error| ServiceError::new(ErrorCode::Internal, self.name.as_str(), operation, error)
    }
}

/// What a channel to `address` is made of, or why it is no address.
fn target(runtime: &GrpcRuntime, address: &str, config: &TransportConfig) -> Result<Target, String> {
    let scheme = if runtime.tls().is_some() { "https" } else { "http" };
    let target = Channel::from_shared(format!("{scheme}://{address}"))
        .map_err(|e| e.to_string())?
        .connect_timeout(config.connect_timeout)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(config.keepalive_interval)
        .keep_alive_timeout(config.keepalive_timeout)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(8 << 20)
        .initial_connection_window_size(16 << 20);
    match runtime.tls() {
        Some(tls) => {
            let config = tls.channel(host_and_port(&target).0);
            target.tls_config(config).map_err(|e| causes(&e))
        }
        None => Ok(target),
    }
}

/// Host (an IPv6 address without its brackets) and port.
fn host_and_port(target: &Target) -> (&str, u16) {
    let uri = target.uri();
    let host = uri.host().unwrap_or_default();
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    (host, uri.port_u16().unwrap_or_default())
}

fn stopping(name: &str, operation: &'static str) -> ServiceError {
    ServiceError::new(ErrorCode::Cancelled, name, operation, "the process is ending")
}

/// All messages of a stream.
pub(crate) async fn collect<T>(response: Response<tonic::Streaming<T>>) -> Result<Vec<T>, Status> {
    let mut stream = response.into_inner();
    let mut all = Vec::new();
    while let Some(message) = stream.message().await? {
        all.push(message);
    }
    Ok(all)
}

/// An error and all its causes in one line.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// The status that carries `error`: code, text, and the error itself in the details.
pub fn encode_error(error: ServiceError) -> Status {
    let code = match error.code {
        ErrorCode::InvalidArgument => Code::InvalidArgument,
        ErrorCode::ResourceExhausted => Code::ResourceExhausted,
        ErrorCode::DeadlineExceeded => Code::DeadlineExceeded,
        ErrorCode::Unavailable => Code::Unavailable,
        ErrorCode::VersionMismatch => Code::FailedPrecondition,
        ErrorCode::NonFinite => Code::OutOfRange,
        ErrorCode::DataLoss => Code::DataLoss,
        ErrorCode::Cancelled => Code::Cancelled,
        ErrorCode::Internal => Code::Internal,
    };
    let text = error.to_string();
    let detail = v1::ErrorDetail {
        code: v1::ErrorCode::from(error.code).into(),
        service: error.service,
        operation: error.operation.into_owned(),
        message: error.message,
        sample: error.sample.map(Into::into),
    };
    Status::with_details(code, text, detail.encode_to_vec().into())
}

/// The error that a status carries. A status of the transport itself becomes an error of the peer `name`.
pub fn decode_error(status: &Status, name: &str, operation: &'static str) -> ServiceError {
    let detail = (!status.details().is_empty()).then(|| v1::ErrorDetail::decode(status.details()));
    if let Some(Ok(detail)) = detail {
        let code = v1::ErrorCode::try_from(detail.code).unwrap_or_default();
        let mut error = ServiceError::new(code.into(), detail.service, detail.operation, detail.message);
        error.sample = detail.sample.map(Into::into);
        return error;
    }
    let code = match status.code() {
        Code::InvalidArgument | Code::Unimplemented => ErrorCode::InvalidArgument,
        Code::ResourceExhausted | Code::OutOfRange => ErrorCode::ResourceExhausted,
        Code::DeadlineExceeded => ErrorCode::DeadlineExceeded,
        // A server that keeps the deadline it was told answers with `Cancelled`, and so does a connection that closes.
        Code::Cancelled if status.message().contains("Timeout") => ErrorCode::DeadlineExceeded,
        Code::DataLoss => ErrorCode::DataLoss,
        // An internal error of a service has details: without them it is the connection's.
        _ => ErrorCode::Unavailable,
    };
    let cause = std::error::Error::source(status).map_or_else(String::new, |source| format!(": {}", causes(source)));
    ServiceError::new(code, name, operation, format!("{}{cause}", status.message()))
}
