//! The control of a run, as its server offers it: the run's own control, and the workers.

use crate::workers::Hub;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use temper_controller::RunControl;
use temper_proto::grpc::TlsFiles;
use temper_proto::{Changed, ControlService, RunEvent, RunStatus, ServiceError, ServiceResult, Snapshot, WorkerStatus};
use temper_types::ErrorCode;

/// Name of the file in a run's directory that says where the run is controlled.
const ADDRESS_FILE: &str = "control";

/// Write where the run is controlled, and, on lines of their own, the certificates that it speaks TLS by: CA,
/// certificate, key.
///
/// # Errors
/// A directory that cannot be written.
pub fn write_address(run_dir: &Path, address: SocketAddr, tls: Option<&TlsFiles>) -> io::Result<()> {
    let mut text = format!("{address}\n");
    for path in tls.iter().flat_map(|tls| [&tls.ca, &tls.cert, &tls.key]) {
        text = format!("{text}{}\n", std::path::absolute(path)?.display());
    }
    std::fs::write(run_dir.join(ADDRESS_FILE), text)
}

/// Where the run in `run_dir` is controlled, and by which certificates.
///
/// # Errors
/// A run that is not controlled over the network.
pub fn read_address(run_dir: &Path) -> io::Result<(String, Option<TlsFiles>)> {
    let text = std::fs::read_to_string(run_dir.join(ADDRESS_FILE))?;
    let mut lines = text.lines();
    let address = lines.next().unwrap_or_default().trim().to_owned();
    let mut path = || lines.next().map(PathBuf::from);
    let files = path().and_then(|ca| Some(TlsFiles { ca, cert: path()?, key: path()? }));
    Ok((address, files))
}

/// The control of whichever controller drives the run now.
#[derive(Default)]
pub struct LocalControl {
    run: Mutex<Option<Arc<RunControl>>>,
    hub: Mutex<Option<Arc<Hub>>>,
}

impl LocalControl {
    /// From now on `control` answers.
    pub fn drive(&self, control: Arc<RunControl>) {
        *self.run.lock().unwrap_or_else(PoisonError::into_inner) = Some(control);
    }

    /// The workers are those of `hub`.
    pub fn know(&self, hub: Arc<Hub>) {
        *self.hub.lock().unwrap_or_else(PoisonError::into_inner) = Some(hub);
    }

    fn run(&self) -> Option<Arc<RunControl>> {
        self.run.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn begun(&self, operation: &'static str) -> ServiceResult<Arc<RunControl>> {
        let early = || ServiceError::new(ErrorCode::Unavailable, "controller", operation, "the run has not begun yet");
        self.run().ok_or_else(early)
    }
}

impl ControlService for LocalControl {
    fn status(&self) -> RunStatus {
        self.run().map(|run| run.status()).unwrap_or_default()
    }

    fn watch(&self) -> Receiver<RunEvent> {
        // Before the run begins there is nothing to follow: the stream ends at once.
        self.run().map_or_else(|| sync_channel(1).1, |run| run.watch())
    }

    fn pause(&self, timeout: Duration) -> ServiceResult<RunStatus> {
        self.begun("pause")?.pause(timeout)
    }

    fn resume(&self) -> RunStatus {
        self.run().map(|run| run.resume()).unwrap_or_default()
    }

    fn drain(&self) -> RunStatus {
        self.run().map(|run| run.drain()).unwrap_or_default()
    }

    fn snapshot(&self, timeout: Duration) -> ServiceResult<Snapshot> {
        self.begun("snapshot")?.snapshot(timeout)
    }

    fn set(&self, key: &str, value: f64) -> ServiceResult<Changed> {
        self.begun("set")?.set(key, value)
    }

    fn workers(&self) -> Vec<WorkerStatus> {
        let hub = self.hub.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let status = |member: crate::workers::Member| WorkerStatus {
            name: member.id.name,
            role: member.hello.role.name().to_owned(),
            address: member.hello.address,
            incarnation: member.id.incarnation,
            state: member.standing.name().to_owned(),
            process_id: member.hello.process_id,
            last_error: member.cause,
        };
        hub.map(|hub| hub.members().into_iter().map(status).collect()).unwrap_or_default()
    }
}
