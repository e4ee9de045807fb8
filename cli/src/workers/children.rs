//! Worker processes of this machine: started, watched, started again.

use super::hub::{Hub, Member, Standing, worker_name};
use crate::tls::arguments;
use anyhow::Context;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use temper_proto::WorkerRole;
use temper_proto::grpc::TlsFiles;

/// A worker that dies more often than this is not started again.
const MAX_STARTS: u32 = 1000;
/// So many failed starts in a row end the attempts.
const MAX_FAILED_STARTS: u32 = 5;
/// How often children are looked at.
const TICK: Duration = Duration::from_millis(50);
/// How long children have to end by themselves.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// The children of the controller. They end with it: each holds a pipe that closes when the controller is gone.
pub struct Children {
    hub: Arc<Hub>,
    table: Arc<Mutex<Table>>,
    watcher: Option<JoinHandle<()>>,
}

/// Where workers join, and by which certificates.
#[derive(Debug, Clone)]
pub struct Meeting {
    /// Address of the controller.
    pub address: SocketAddr,
    /// The controller's own certificates, which its children share.
    pub tls: Option<TlsFiles>,
}

/// Kills workers of this machine.
#[derive(Clone)]
pub struct Killer(Arc<Mutex<Table>>);

impl Killer {
    /// Call `act` with the process of a worker, where it runs: nobody waits for it meanwhile, so that the number stays
    /// its own.
    pub fn with_process(&self, name: &str, act: impl FnOnce(u32)) {
        let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(running) = table.running.get(name) {
            act(running.child.id());
        }
    }

    /// Kill a worker; it is started again.
    pub fn kill(&self, name: &str) {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(running) = table.running.get_mut(name) else { return };
        running.is_killed = true;
        if let Err(error) = running.child.kill() {
            tracing::warn!(worker = name, %error, "cannot be killed");
        }
    }
}

/// Which workers of this machine can still come.
#[derive(Clone)]
pub struct Prospects(Arc<Mutex<Table>>);

impl Prospects {
    /// Why no worker of this role will be started any more; nothing where one runs or may be started again.
    pub fn end(&self, role: WorkerRole) -> Option<String> {
        let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if table.running.values().any(|running| running.role == role) {
            return None;
        }
        let (name, given_up) = table.given_up.iter().find(|(_, given_up)| given_up.role == role)?;
        Some(format!("worker {name} is not started again: {}", given_up.cause))
    }
}

#[derive(Default)]
struct Table {
    running: BTreeMap<String, Running>,
    given_up: BTreeMap<String, GivenUp>,
    is_ending: bool,
}

struct GivenUp {
    role: WorkerRole,
    cause: String,
}

struct Running {
    role: WorkerRole,
    child: Child,
    /// Where it listened last, in this life or an earlier one.
    listen: Option<String>,
    starts: u32,
    failed_starts: u32,
    /// True where the controller itself ended it.
    is_killed: bool,
}

impl Children {
    /// Start the workers that `wanted` counts, joined to the controller where `meeting` says, and watch them.
    ///
    /// # Errors
    /// Where a process cannot be started.
    pub fn start(hub: &Arc<Hub>, meeting: Meeting, wanted: &[(WorkerRole, usize)]) -> anyhow::Result<Self> {
        let mut table = Table::default();
        for (role, name) in names(wanted) {
            let child = spawn(role, &name, &meeting, None)?;
            hub.reserve(&name, Some(child.id()));
            let running = Running { role, child, listen: None, starts: 1, failed_starts: 0, is_killed: false };
            table.running.insert(name, running);
        }
        let table = Arc::new(Mutex::new(table));
        let (hub_of_watcher, table_of_watcher) = (Arc::clone(hub), Arc::clone(&table));
        let watch = move || watch(&hub_of_watcher, &table_of_watcher, &meeting);
        let watcher = std::thread::Builder::new().name("children".to_owned()).spawn(watch)?;
        Ok(Children { hub: Arc::clone(hub), table, watcher: Some(watcher) })
    }

    /// What kills workers, for whoever decides that they have to go.
    pub fn killer(&self) -> Killer {
        Killer(Arc::clone(&self.table))
    }

    /// What knows which workers can still come.
    pub fn prospects(&self) -> Prospects {
        Prospects(Arc::clone(&self.table))
    }

    /// Workers that will not be started again, and why.
    pub fn given_up(&self) -> BTreeMap<String, String> {
        let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.given_up.iter().map(|(name, given_up)| (name.clone(), given_up.cause.clone())).collect()
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        self.hub.end();
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.is_ending = true;
        for running in table.running.values_mut() {
            // The end of the pipe tells the child to end.
            drop(running.child.stdin.take());
        }
        let deadline = Instant::now() + END_TIMEOUT;
        let mut running = std::mem::take(&mut table.running);
        drop(table);
        while !running.is_empty() && Instant::now() < deadline {
            running.retain(|_, r| !matches!(r.child.try_wait(), Ok(Some(_)) | Err(_)));
            std::thread::sleep(TICK.min(deadline.saturating_duration_since(Instant::now())));
        }
        for (name, running) in &mut running {
            tracing::warn!(worker = name, "did not end in time: killed");
            if running.child.kill().is_ok() {
                // A killed child is reaped at once.
                let _ = running.child.wait();
            }
        }
        if let Some(watcher) = self.watcher.take() {
            // A watcher that panicked has said so.
            let _ = watcher.join();
        }
    }
}

/// Role and name of every worker that `wanted` counts.
pub(super) fn names(wanted: &[(WorkerRole, usize)]) -> impl Iterator<Item = (WorkerRole, String)> + '_ {
    let of_role = |(role, count): &(WorkerRole, usize)| {
        let role = *role;
        (0..*count).map(move |index| (role, worker_name(role, index)))
    };
    wanted.iter().flat_map(of_role)
}

/// `listen` is where the worker's former life listened: whoever knows it finds the new one there.
fn spawn(role: WorkerRole, name: &str, meeting: &Meeting, listen: Option<&str>) -> anyhow::Result<Child> {
    let program = std::env::current_exe().context("finding the own program")?;
    // A group of its own: Ctrl-C at the terminal is for the controller, which ends its workers in order.
    Command::new(program)
        .args(["serve", role.name(), "--join", &meeting.address.to_string(), "--name", name, "--end-with-stdin"])
        .args(meeting.tls.iter().flat_map(arguments))
        .args(listen.iter().flat_map(|listen| ["--listen", listen]))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .process_group(0)
        .spawn()
        .with_context(|| format!("starting worker {name}"))
}

fn watch(hub: &Hub, table: &Mutex<Table>, meeting: &Meeting) {
    loop {
        let mut table = table.lock().unwrap_or_else(PoisonError::into_inner);
        if table.is_ending {
            return;
        }
        table.kill_lost(hub);
        let ended: Vec<(String, String)> = table
            .running
            .iter_mut()
            .filter_map(|(name, running)| Some((name.clone(), describe(running.child.try_wait().ok()??))))
            .collect();
        for (name, cause) in ended {
            tracing::warn!(worker = name, cause, "a worker ended");
            hub.lose(&name, &cause);
            table.restart((&name, &cause), meeting, hub);
        }
        drop(table);
        std::thread::sleep(TICK);
    }
}

impl Table {
    /// A process whose lease ran out, as one that is stopped, makes room for its successor.
    fn kill_lost(&mut self, hub: &Hub) {
        for member in hub.members() {
            let Some(running) = self.running.get_mut(&member.id.name) else { continue };
            let is_the_process = running.child.id() == member.hello.process_id;
            if member.standing == Standing::Lost && is_the_process && !running.is_killed {
                running.is_killed = running.child.kill().is_ok();
            }
        }
    }

    /// A process that ends before it served has failed to start; too many of those in a row end the attempts.
    fn restart(&mut self, (name, cause): (&str, &str), meeting: &Meeting, hub: &Hub) {
        let Some(running) = self.running.get_mut(name) else { return };
        let is_the_process = |m: &Member| m.id.name == name && m.hello.process_id == running.child.id();
        let member = hub.members().into_iter().find(is_the_process);
        let served = member.as_ref().is_some_and(|m| m.has_served);
        running.failed_starts = if served || running.is_killed { 0 } else { running.failed_starts + 1 };
        running.listen = member.map(|m| m.hello.address).or(running.listen.take());
        let listen = running.listen.as_deref();
        let is_hopeless = running.failed_starts >= MAX_FAILED_STARTS || running.starts >= MAX_STARTS;
        hub.reserve(name, None);
        let started = if is_hopeless { None } else { spawn(running.role, name, meeting, listen).ok() };
        match started {
            Some(child) => {
                hub.reserve(name, Some(child.id()));
                running.child = child;
                running.starts += 1;
                running.is_killed = false;
            }
            None => {
                let text = format!("{cause}, after {} starts", running.starts);
                tracing::error!(worker = name, cause = text, "a worker is not started again");
                let role = running.role;
                self.running.remove(name);
                hub.release(name);
                self.given_up.insert(name.to_owned(), GivenUp { role, cause: text });
            }
        }
    }
}

/// How a process ended, in words.
pub(super) fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("it exited with code {code}"),
        (None, Some(signal)) => format!("it was killed by signal {signal}"),
        (None, None) => "it ended".to_owned(),
    }
}
