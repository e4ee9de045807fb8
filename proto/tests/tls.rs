//! TLS between processes: who belongs is served, and everybody else hears why not, at once.

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};
use temper_proto::grpc::v1::Empty;
use temper_proto::grpc::v1::control_service_client::ControlServiceClient;
use temper_proto::grpc::{
    ControlClient, ControlServer, Endpoint, GrpcRuntime, ServedServices, ServerHandle, Tls, TlsFiles, TransportConfig,
    Verb, serve,
};
use temper_proto::*;
use temper_types::ErrorCode;
use tonic::transport::{Certificate, Channel, ClientTlsConfig};

/// A run that does nothing.
struct Idle;

impl ControlService for Idle {
    fn status(&self) -> RunStatus {
        RunStatus { run: "idle".to_owned(), ..RunStatus::default() }
    }
    fn watch(&self) -> Receiver<RunEvent> {
        sync_channel(1).1
    }
    fn pause(&self, _: Duration) -> ServiceResult<RunStatus> {
        Ok(self.status())
    }
    fn resume(&self) -> RunStatus {
        self.status()
    }
    fn drain(&self) -> RunStatus {
        self.status()
    }
    fn snapshot(&self, _: Duration) -> ServiceResult<Snapshot> {
        Err(ServiceError::new(ErrorCode::Cancelled, "run", "snapshot", "none"))
    }
    fn set(&self, _: &str, _: f64) -> ServiceResult<Changed> {
        Err(ServiceError::new(ErrorCode::InvalidArgument, "run", "set", "none"))
    }
    fn workers(&self) -> Vec<WorkerStatus> {
        Vec::new()
    }
}

/// A CA whose certificates stand in a directory.
struct Authority<'a> {
    dir: &'a Path,
    name: &'static str,
    issuer: Issuer<'static, KeyPair>,
}

impl<'a> Authority<'a> {
    fn new(dir: &'a Path, name: &'static str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        std::fs::write(dir.join(format!("{name}.pem")), certificate.pem()).expect("writable");
        Authority { dir, name, issuer: Issuer::new(params, key) }
    }

    /// Files of `host`, valid to the beginning of `year`.
    fn issue(&self, host: &str, year: i32) -> TlsFiles {
        let mut params = CertificateParams::new(vec![host.to_owned()]).expect("a host");
        params.not_after = date_time_ymd(year, 1, 1);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        let file = |part: &str| self.dir.join(format!("{}-{host}-{year}{part}.pem", self.name));
        std::fs::write(file(""), certificate.pem()).expect("writable");
        std::fs::write(file("-key"), key.serialize_pem()).expect("writable");
        TlsFiles { ca: self.dir.join(format!("{}.pem", self.name)), cert: file(""), key: file("-key") }
    }
}

fn config() -> TransportConfig {
    TransportConfig { connect_timeout: Duration::from_secs(5), ..TransportConfig::default() }
}

fn runtime(files: Option<&TlsFiles>) -> GrpcRuntime {
    let tls = files.map(|files| Tls::load(files).expect("good files"));
    GrpcRuntime::start().expect("threads").with_tls(tls)
}

fn served(files: Option<&TlsFiles>) -> ServerHandle {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let services = ServedServices::new().with(ControlServer::service(Arc::new(Idle)));
    serve(&runtime(files), listener, services, config()).expect("serves")
}

/// What a client with `files` hears from `server`.
fn status(server: &ServerHandle, files: Option<&TlsFiles>) -> ServiceResult<String> {
    let begin = Instant::now();
    let endpoint = Endpoint::connect(&runtime(files), "run", &server.address().to_string(), config());
    let status = endpoint.and_then(|endpoint| ControlClient::new(endpoint).call(Verb::Status));
    assert!(begin.elapsed() < Duration::from_secs(20), "it took {:?}", begin.elapsed());
    status.map(|status| status.run)
}

#[test]
fn who_belongs_is_served() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let ca = Authority::new(dir.path(), "ours");
    let server = served(Some(&ca.issue("127.0.0.1", 4000)));
    assert_eq!(status(&server, Some(&ca.issue("elsewhere", 4000))).as_deref(), Ok("idle"));
}

#[test]
fn who_does_not_belong_hears_why() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (ours, theirs) = (Authority::new(dir.path(), "ours"), Authority::new(dir.path(), "theirs"));
    let own = ours.issue("127.0.0.1", 4000);
    let foreign = theirs.issue("127.0.0.1", 4000);
    let server = served(Some(&own));
    let plain = served(None);
    let elsewhere = served(Some(&ours.issue("elsewhere", 4000)));
    for (server, files, complaint) in [
        (&server, Some(&foreign), "its certificate is not signed by"),
        (&server, None, "this server speaks TLS"),
        (&plain, Some(&own), "it does not speak TLS"),
        (&elsewhere, Some(&own), "its certificate is not for `127.0.0.1`"),
    ] {
        let error = status(server, files).expect_err(complaint);
        assert!(error.message.contains(complaint), "{complaint}: {error}");
    }
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let ca = Authority::new(dir.path(), "ours");
    let own = ca.issue("127.0.0.1", 4000);
    let server = served(Some(&own));
    let client = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    client.block_on(status_without_certificate(&server, &own.ca)).expect_err("no certificate");
}

async fn status_without_certificate(server: &ServerHandle, ca: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(std::fs::read(ca)?));
    let channel = Channel::from_shared(format!("https://{}", server.address()))?.tls_config(tls)?.connect().await?;
    ControlServiceClient::new(channel).status(Empty {}).await?;
    Ok(())
}

#[test]
fn files_that_do_not_fit_are_named() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (ours, theirs) = (Authority::new(dir.path(), "ours"), Authority::new(dir.path(), "theirs"));
    let (own, foreign) = (ours.issue("host", 4000), theirs.issue("host", 4000));
    let expired = ours.issue("host", 2020);
    let text = dir.path().join("text.pem");
    std::fs::write(&text, "no PEM").expect("writable");
    let missing = PathBuf::from("no/such.pem");
    for (files, complaints) in [
        (TlsFiles { ca: foreign.ca.clone(), ..own.clone() }, ["ours-host-4000.pem: not signed by", "theirs.pem"]),
        (expired, ["ours-host-2020.pem", "has expired"]),
        (
            TlsFiles { key: foreign.key.clone(), ..own.clone() },
            ["theirs-host-4000-key.pem: not the key of", "ours-host-4000.pem"],
        ),
        (TlsFiles { ca: text.clone(), ..own.clone() }, ["text.pem", "no certificate"]),
        (TlsFiles { cert: text.clone(), ..own.clone() }, ["text.pem", "no certificate"]),
        (TlsFiles { key: text, ..own.clone() }, ["text.pem", "no key"]),
        (TlsFiles { cert: missing, ..own.clone() }, ["no/such.pem", "cannot be read"]),
    ] {
        let error = Tls::load(&files).expect_err(complaints[0]);
        assert_eq!(error.code, ErrorCode::InvalidArgument);
        assert!(complaints.iter().all(|complaint| error.message.contains(complaint)), "{complaints:?}: {error}");
    }
}

/// Somebody who connects and says nothing holds up nobody.
#[test]
fn who_says_nothing_holds_up_nobody() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let ca = Authority::new(dir.path(), "ours");
    let own = ca.issue("127.0.0.1", 4000);
    let server = served(Some(&own));
    let silent: Vec<_> = (0..8).map(|_| std::net::TcpStream::connect(server.address()).expect("it listens")).collect();
    assert_eq!(status(&server, Some(&own)).as_deref(), Ok("idle"));
    drop(silent);
}

/// A server that takes connections and says nothing: the connect deadline ends the wait.
#[test]
fn a_peer_that_says_nothing_is_waited_for_no_longer_than_the_deadline() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let own = Authority::new(dir.path(), "ours").issue("127.0.0.1", 4000);
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = silent.local_addr().expect("an address").to_string();
    let config = TransportConfig { connect_timeout: Duration::from_millis(200), ..config() };
    let error = Endpoint::connect(&runtime(Some(&own)), "run", &address, config).expect_err("nobody answers");
    assert_eq!(error.code, ErrorCode::Unavailable);
    assert!(error.message.contains("no answer within 200ms"), "{error}");
}
