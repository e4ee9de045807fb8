//! `temper status`, `watch`, `workers`, `pause`, `drain`, `resume`, `snapshot`, `set`, `stop`: a run under way.

use crate::commands::common::address::host_port;
use crate::commands::common::output::{print, print_json};
use crate::control::RunAddress;
use crate::tls::{TlsFlags, transport};
use crate::usage;
use serde_json::json;
use std::path::PathBuf;
use temper_proto::grpc::{ControlClient, Endpoint, TlsFiles, TransportConfig, Verb};
use temper_proto::{RunStatus, ServiceError, ServiceResult};
use temper_types::ErrorCode;

/// Which run.
#[derive(clap::Args)]
pub struct Target {
    /// HOST:PORT of the run, as it prints when it starts.
    #[arg(long, value_name = "HOST:PORT", value_parser = host_port)]
    controller: Option<String>,
    /// Directory of the run, which knows its address and its certificates.
    #[arg(long, value_name = "DIR", conflicts_with = "controller")]
    run_dir: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    tls: TlsFlags,
}

impl Target {
    /// The control of the run, for `call`.
    fn control<T>(&self, call: impl FnOnce(&ControlClient) -> ServiceResult<T>) -> anyhow::Result<T> {
        self.reach(|endpoint| call(&ControlClient::new(endpoint)))
    }

    /// Connect to the run, for `call`.
    ///
    /// # Errors
    /// No run that is named, one that has ended or does not answer, and what `call` fails with.
    pub fn reach<T>(&self, call: impl FnOnce(Endpoint) -> ServiceResult<T>) -> anyhow::Result<T> {
        let dir = match (&self.controller, &self.run_dir) {
            (Some(address), _) => return Ok(call(self.connect(address, None)?)?),
            (None, Some(dir)) => dir,
            (None, None) => return Err(usage("which run? give --controller HOST:PORT or --run-dir DIR")),
        };
        let RunAddress { address, run_id, tls } = RunAddress::read(dir)?;
        let ended = |error: ServiceError| match error.code {
            ErrorCode::VersionMismatch => {
                let what = format!("the run in {} has ended, and another one listens at {address}", dir.display());
                anyhow::Error::new(error).context(what)
            }
            _ => error.into(),
        };
        let endpoint = self.connect(&address, tls).map_err(|error| match error.downcast_ref::<ServiceError>() {
            Some(cause) if cause.code == ErrorCode::Unavailable => {
                let what = "has ended without a word, or cannot be reached from here";
                error.context(format!("the run in {} {what}: nobody answers at {address}", dir.display()))
            }
            _ => error,
        })?;
        call(endpoint.to_run(&run_id)?).map_err(ended)
    }

    fn connect(&self, address: &str, known: Option<TlsFiles>) -> anyhow::Result<Endpoint> {
        let runtime = transport(self.tls.files().or(known).as_ref())?;
        Ok(Endpoint::connect(&runtime, "run", address, TransportConfig::default())?)
    }

    fn status(&self, verb: Verb) -> anyhow::Result<()> {
        let status = self.control(|run| run.call(verb))?;
        print_status(&status, self.json)
    }
}

/// Where a run stands: stage, step, phase, version, last metrics.
#[derive(clap::Args)]
pub struct Status {
    #[command(flatten)]
    target: Target,
}

/// Follow a run: one line of JSON per event or row of metrics, until it ends.
#[derive(clap::Args)]
pub struct Watch {
    #[command(flatten)]
    target: Target,
}

/// The worker processes of a run and how they stand.
#[derive(clap::Args)]
pub struct Workers {
    #[command(flatten)]
    target: Target,
}

/// Let a run wait before its next step; returns when the step under way is done.
#[derive(clap::Args)]
pub struct Pause {
    #[command(flatten)]
    target: Target,
}

/// End a run after the step under way, with a checkpoint: `temper train --resume` goes on.
#[derive(clap::Args)]
pub struct Drain {
    #[command(flatten)]
    target: Target,
}

/// Let a paused run go on.
#[derive(clap::Args)]
pub struct Resume {
    #[command(flatten)]
    target: Target,
}

/// Write a checkpoint after the step under way, or now where the run is paused.
#[derive(clap::Args)]
pub struct Snapshot {
    #[command(flatten)]
    target: Target,
}

/// Change a setting of the stage under way from its next step on: learning_rate, temperature or kl_coef.
///
/// Checkpoints hold the change, so that a resumed run goes on with it.
#[derive(clap::Args)]
pub struct Set {
    /// The setting and its new value, such as learning_rate=1e-5.
    #[arg(value_name = "KEY=VALUE")]
    assignment: String,
    #[command(flatten)]
    target: Target,
}

/// As `drain`: end a run and its workers after the step under way, with a checkpoint.
#[derive(clap::Args)]
pub struct Stop {
    #[command(flatten)]
    target: Target,
}

macro_rules! status_verbs {
    ($($command:ident => $verb:expr),+ $(,)?) => {$(
        impl $command {
            /// Call the run and print where it stands.
            ///
            /// # Errors
            /// A run that does not answer.
            pub fn run(self) -> anyhow::Result<()> {
                self.target.status($verb)
            }
        }
    )+};
}

status_verbs! {
    Status => Verb::Status,
    Pause => Verb::Pause,
    Resume => Verb::Resume,
    Drain => Verb::Drain,
    Stop => Verb::Drain,
}

impl Watch {
    /// Print events until the run ends.
    ///
    /// # Errors
    /// A run that does not answer, or a connection that breaks.
    pub fn run(self) -> anyhow::Result<()> {
        let show = |event: temper_proto::RunEvent| {
            // A reader that is gone ends the watch.
            print(&format!("{{\"event\":{},\"data\":{}}}\n", json!(event.name), event.json)).is_ok()
        };
        self.target.control(|run| run.watch(show))
    }
}

impl Workers {
    /// Print one line a worker.
    ///
    /// # Errors
    /// A run that does not answer.
    pub fn run(self) -> anyhow::Result<()> {
        let workers = self.target.control(ControlClient::workers)?;
        if self.target.json {
            return print_json(&workers);
        }
        if workers.is_empty() {
            print("no workers: the run is in one process\n")?;
        }
        for w in workers {
            let cause = if w.last_error.is_empty() { String::new() } else { format!("  {}", w.last_error) };
            print(&format!(
                "{:<12} {:<8} {:<9} life {} pid {} at {}{cause}\n",
                w.name, w.role, w.state, w.incarnation, w.process_id, w.address
            ))?;
        }
        Ok(())
    }
}

impl Snapshot {
    /// Print where the checkpoint is.
    ///
    /// # Errors
    /// A run that does not answer, or has ended.
    pub fn run(self) -> anyhow::Result<()> {
        let snapshot = self.target.control(ControlClient::snapshot)?;
        if self.target.json {
            print(&format!("{}\n", json!({"path": snapshot.path, "step": snapshot.step})))
        } else {
            print(&format!("step {}: {}\n", snapshot.step, snapshot.path))
        }
    }
}

impl Set {
    /// Print what it was and from which step the new value counts.
    ///
    /// # Errors
    /// A key that cannot be changed, a value out of range, or a run that does not answer.
    pub fn run(self) -> anyhow::Result<()> {
        let expected = || usage(format!("`{}`: expected KEY=VALUE, such as learning_rate=1e-5", self.assignment));
        let (key, value) = self.assignment.split_once('=').ok_or_else(expected)?;
        let value: f64 = value.trim().parse().map_err(|_| expected())?;
        let changed = self.target.control(|run| run.set(key.trim(), value))?;
        let (previous, from_step) = (changed.previous, changed.from_step);
        if self.target.json {
            let object = json!({"key": key, "value": value, "previous": previous, "from_step": from_step});
            print(&format!("{object}\n"))
        } else {
            print(&format!("{key}: {previous} -> {value} from step {from_step}\n"))
        }
    }
}

fn print_status(status: &RunStatus, as_json: bool) -> anyhow::Result<()> {
    if as_json {
        return print_json(status);
    }
    let RunStatus { run, stage, step, num_steps, phase, version, error, metrics_json, .. } = status;
    let mut text = format!("{run} is {}\n", status.state.name());
    text += &format!("  stage    {stage}, step {step} of {num_steps}, phase {phase}\n  version  {version}\n");
    if !error.is_empty() {
        text += &format!("  error    {error}\n");
    }
    if !metrics_json.is_empty() {
        text += &format!("  metrics  {metrics_json}\n");
    }
    print(&text)
}
