//! The tensor-parallel ranks of an engine that are processes: rank 0 is the worker, which starts the others.
//!
//! A rank says on its standard output where it listens, is told on its standard input whom to meet, and ends when that
//! input does: no rank outlives its worker. A rank that ends, or is late, ends the worker's life; it starts anew with
//! new ranks.

use super::process::end_with_stdin;
use crate::commands::common::output::print;
use crate::random;
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use temper_actor::ModelConfig;
use temper_collective::{Collective, SocketConfig, connect};
use temper_rollout::{RankGroup, follow};
use temper_types::DType;

/// How long a rank has to start, and to meet the others.
const MEET_TIMEOUT: Duration = Duration::from_secs(60);
/// How long ranks have to end by themselves.
const END_TIMEOUT: Duration = Duration::from_secs(5);
/// How often ranks are looked at.
const TICK: Duration = Duration::from_millis(50);

/// What a rank computes.
#[derive(Debug, Clone)]
pub struct RankWork<'a> {
    /// The model's directory.
    pub model_dir: &'a Path,
    /// Number format.
    pub dtype: DType,
    /// Compute threads of each rank.
    pub threads: usize,
    /// Longest wait for each other.
    pub timeout: Duration,
}

/// What a rank is told.
#[derive(Debug, Serialize, Deserialize)]
struct Told {
    rank: usize,
    addresses: Vec<SocketAddr>,
    token: u64,
    model_dir: PathBuf,
    dtype: DType,
    threads: usize,
    timeout_seconds: u64,
}

/// Why a worker cannot go on, once it cannot.
pub type Failure = Arc<OnceLock<String>>;

/// The processes of ranks 1 and up. They end with it.
pub struct EngineRanks {
    children: Arc<Mutex<Vec<Child>>>,
    is_ending: Arc<AtomicBool>,
    watcher: Option<JoinHandle<()>>,
}

impl EngineRanks {
    /// Start the other ranks of `num_ranks`, and connect to them.
    ///
    /// # Errors
    /// A rank that does not start, by number.
    pub fn start(num_ranks: usize, work: &RankWork<'_>) -> Result<(Collective, EngineRanks)> {
        let is_ending = Arc::new(AtomicBool::new(false));
        let ranks = EngineRanks { children: Arc::default(), is_ending, watcher: None };
        let listener = TcpListener::bind(("127.0.0.1", 0)).context("listening for tensor-parallel ranks")?;
        let mut addresses = vec![listener.local_addr().context("listening for tensor-parallel ranks")?];
        for rank in 1..num_ranks {
            ranks.lock().push(spawn(rank)?);
        }
        let deadline = Instant::now() + MEET_TIMEOUT;
        for rank in 1..num_ranks {
            let stdout = ranks.lock()[rank - 1].stdout.take().context("a pipe")?;
            addresses.push(said(stdout, deadline).with_context(|| format!("tensor-parallel rank {rank}"))?);
        }
        let token = token()?;
        for rank in 1..num_ranks {
            let told = work.told(rank, (&addresses, token));
            let mut line = serde_json::to_string(&told).context("telling a rank")?;
            line.push('\n');
            let mut children = ranks.lock();
            let stdin = children[rank - 1].stdin.as_mut().context("a pipe")?;
            stdin.write_all(line.as_bytes()).with_context(|| format!("telling tensor-parallel rank {rank}"))?;
        }
        let (connect_timeout, timeout) = (MEET_TIMEOUT, work.timeout);
        let config = SocketConfig { rank: 0, addresses, token, tls: None, connect_timeout, timeout };
        let collective = connect(&config, &listener).context("meeting the tensor-parallel ranks")?;
        Ok((collective, ranks))
    }

    /// Tell `failure` when one of them ends, or `group` says that one is lost.
    ///
    /// # Errors
    /// A thread that cannot be started.
    pub fn watch(&mut self, group: &Arc<RankGroup>, failure: &Failure) -> Result<()> {
        let (children, is_ending) = (Arc::clone(&self.children), Arc::clone(&self.is_ending));
        let (group, failure) = (Arc::downgrade(group), Arc::clone(failure));
        let look = move || {
            while !is_ending.load(Ordering::Acquire) && failure.get().is_none() {
                let mut children = children.lock().unwrap_or_else(PoisonError::into_inner);
                let ended = children.iter_mut().zip(1..).find_map(|(child, rank)| {
                    let status = child.try_wait().ok()??;
                    Some(format!("tensor-parallel rank {rank} is lost: {}", super::children::describe(status)))
                });
                drop(children);
                let ended = ended.or_else(|| Some(group.upgrade()?.lost()?.to_string()));
                if let Some(cause) = ended.filter(|_| !is_ending.load(Ordering::Acquire)) {
                    failure.get_or_init(|| cause);
                }
                std::thread::sleep(TICK);
            }
        };
        let watcher = std::thread::Builder::new().name("engine-ranks".to_owned()).spawn(look);
        self.watcher = Some(watcher.context("starting a thread")?);
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Child>> {
        self.children.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for EngineRanks {
    fn drop(&mut self) {
        self.is_ending.store(true, Ordering::Release);
        if let Some(watcher) = self.watcher.take() {
            // A watcher that panicked has said so.
            let _panicked = watcher.join();
        }
        let mut children = std::mem::take(&mut *self.lock());
        // The end of the pipe tells a rank to end.
        children.iter_mut().for_each(|child| drop(child.stdin.take()));
        let deadline = Instant::now() + END_TIMEOUT;
        while !children.is_empty() && Instant::now() < deadline {
            children.retain_mut(|child| !matches!(child.try_wait(), Ok(Some(_)) | Err(_)));
            std::thread::sleep(TICK.min(deadline.saturating_duration_since(Instant::now())));
        }
        for child in &mut children {
            if child.kill().is_ok() {
                // A killed child is reaped at once.
                let _reaped = child.wait();
            }
        }
    }
}

impl RankWork<'_> {
    fn told(&self, rank: usize, (addresses, token): (&[SocketAddr], u64)) -> Told {
        Told {
            rank,
            addresses: addresses.to_vec(),
            token,
            model_dir: self.model_dir.to_owned(),
            dtype: self.dtype,
            threads: self.threads,
            timeout_seconds: self.timeout.as_secs().max(1),
        }
    }
}

fn spawn(rank: usize) -> Result<Child> {
    let program = std::env::current_exe().context("finding the own program")?;
    // A group of its own: Ctrl-C at the terminal is for the controller, which ends its workers in order.
    let mut command = Command::new(program);
    command.arg("engine-rank").stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
    command.spawn().with_context(|| format!("starting tensor-parallel rank {rank}"))
}

/// Where a rank says that it listens.
fn said(stdout: std::process::ChildStdout, deadline: Instant) -> Result<SocketAddr> {
    let (to, from) = channel();
    let read = move || {
        let mut line = String::new();
        let read = BufReader::new(stdout).read_line(&mut line).map(|_| line);
        // Nobody listens any more where it came too late.
        let _late = to.send(read);
    };
    std::thread::Builder::new().name("rank-address".to_owned()).spawn(read).context("starting a thread")?;
    match from.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        Ok(line) => {
            let line = line.context("reading where it listens")?;
            line.trim().parse().with_context(|| format!("it said `{}`: expected HOST:PORT", line.trim()))
        }
        Err(RecvTimeoutError::Timeout) => bail!("it did not say where it listens within {MEET_TIMEOUT:?}"),
        Err(RecvTimeoutError::Disconnected) => bail!("it ended before it said where it listens"),
    }
}

/// A number that others on the host cannot guess.
fn token() -> Result<u64> {
    Ok(u64::from_le_bytes(random::bytes().context("reading /dev/urandom")?))
}

/// Be one of these ranks, until rank 0 says that it is over or standard input ends.
///
/// # Errors
/// What was told makes no sense, the others cannot be met, or one of them is lost.
pub fn serve_rank() -> Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("listening for other ranks")?;
    print(&format!("{}\n", listener.local_addr().context("listening for other ranks")?))?;
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).context("reading whom to meet")?;
    ensure!(!line.is_empty(), "standard input ended: a rollout worker starts this process");
    end_with_stdin()?;
    let told: Told = serde_json::from_str(&line).context("reading whom to meet")?;
    let Told { rank, addresses, token, .. } = told;
    let (connect_timeout, timeout) = (MEET_TIMEOUT, Duration::from_secs(told.timeout_seconds));
    let config = SocketConfig { rank, addresses, token, tls: None, connect_timeout, timeout };
    let ranks = connect(&config, &listener)?;
    let model = ModelConfig::load(&told.model_dir)?;
    let device = crate::runtime::device(told.threads);
    let followed = follow(&device, &model, told.dtype, ranks);
    if followed.is_err() {
        // Where the worker is gone standard input ends as well, and this process with it: there is nothing to report.
        std::thread::sleep(END_TIMEOUT / 5);
    }
    followed.with_context(|| format!("tensor-parallel rank {rank}"))
}
