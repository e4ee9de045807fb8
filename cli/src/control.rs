//! The control of a run, as its server offers it: the run's own control, and the workers.

use crate::random;
use crate::run_dirs;
use crate::workers::Hub;
use anyhow::bail;
use std::io;
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

/// An id that no other run has, nor the same one when it is started again.
///
/// # Errors
/// A system that gives no random bytes.
pub fn run_id() -> io::Result<String> {
    Ok(format!("{:032x}", u128::from_le_bytes(random::bytes()?)))
}

/// How a run under way is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunAddress {
    /// HOST:PORT.
    pub address: String,
    /// The run's id, by which it is told from another run that listens there later.
    pub run_id: String,
    /// The certificates that it speaks TLS by.
    pub tls: Option<TlsFiles>,
}

/// Where the run is controlled, as its directory says for as long as this value lives.
#[derive(Debug)]
pub struct AddressFile(PathBuf);

impl RunAddress {
    /// Write this into `run_dir`: address, id, and, where the run speaks TLS, CA, certificate and key, a line each.
    ///
    /// # Errors
    /// A directory that cannot be written.
    pub fn write(&self, run_dir: &Path) -> io::Result<AddressFile> {
        let mut text = format!("{}\n{}\n", self.address, self.run_id);
        for path in self.tls.iter().flat_map(|tls| [&tls.ca, &tls.cert, &tls.key]) {
            text = format!("{text}{}\n", std::path::absolute(path)?.display());
        }
        let path = run_dir.join(ADDRESS_FILE);
        // Whoever reads meanwhile finds all of it or nothing.
        let temporary = path.with_extension("tmp");
        std::fs::write(&temporary, text)?;
        std::fs::rename(&temporary, &path)?;
        Ok(AddressFile(path))
    }

    /// How the run in `run_dir` is reached.
    ///
    /// # Errors
    /// A run that is not controlled over the network, has ended, or whose file is damaged.
    pub fn read(run_dir: &Path) -> anyhow::Result<Self> {
        let shown = run_dir.display();
        let path = run_dir.join(ADDRESS_FILE);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) => match how_it_ended(run_dir) {
                Some(end) => bail!("the run in {shown} has ended ({end}): nothing is left to control"),
                None => {
                    let what = format!("{shown} is not a run that is controlled over the network");
                    return Err(anyhow::Error::new(error).context(what));
                }
            },
        };
        let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let (Some(address), Some(run_id)) = (lines.next(), lines.next()) else {
            bail!("{}: expected a line with HOST:PORT and one with the run's id, got `{text}`", path.display());
        };
        let (address, run_id) = (address.to_owned(), run_id.to_owned());
        let mut path = || lines.next().map(PathBuf::from);
        let tls = path().and_then(|ca| Some(TlsFiles { ca, cert: path()?, key: path()? }));
        Ok(RunAddress { address, run_id, tls })
    }
}

impl Drop for AddressFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "cannot be removed");
        }
    }
}

/// Remove what a run that was killed has left in `run_dir` of where it was controlled.
///
/// # Errors
/// A directory that cannot be written.
pub fn forget_address(run_dir: &Path) -> io::Result<()> {
    match std::fs::remove_file(run_dir.join(ADDRESS_FILE)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The last event of the run in `run_dir`, where that is an end.
fn how_it_ended(run_dir: &Path) -> Option<String> {
    let last = run_dirs::last_event(run_dir, |_| true)?;
    let event = last["event"].as_str()?;
    ["completed", "interrupted", "failed"].contains(&event).then(|| event.to_owned())
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
