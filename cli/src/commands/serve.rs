//! `temper serve`: a worker of a run, in a process of its own.

use crate::commands::common::address::host_port;
use crate::tls::TlsFlags;
use crate::workers::{ServeOptions, WhenLost, end_with_stdin, serve_worker};
use std::net::SocketAddr;
use temper_proto::WorkerRole;

/// Serve as a worker of a run: generate, score or train for the controller that it joins.
///
/// The worker learns everything else (recipe, model, rank) from the controller, pulls new weights from the trainer,
/// proves them by their hash, and ends when the run does. It needs no files but the model's directory.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  temper train recipes/quickstart.toml --set placement.mode=processes --set placement.spawn_workers=false --set placement.listen=127.0.0.1:7070\n  temper serve trainer --join 127.0.0.1:7070\n  temper serve rollout --join 127.0.0.1:7070\n  temper serve reward --join 127.0.0.1:7070"
)]
pub struct Serve {
    /// What it does.
    role: Role,
    /// HOST:PORT of the controller.
    #[arg(long, value_name = "HOST:PORT", value_parser = host_port)]
    join: String,
    /// Name of the worker; default: the controller names it.
    #[arg(long, default_value = "")]
    name: String,
    /// Where it listens; port 0 takes any.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    #[command(flatten)]
    tls: TlsFlags,
    /// End when standard input ends: for workers that the controller starts.
    #[arg(long, hide = true)]
    end_with_stdin: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Role {
    /// Generate.
    Rollout,
    /// Score.
    Reward,
    /// Train.
    Trainer,
}

impl Serve {
    /// Serve until the run ends.
    ///
    /// # Errors
    /// A controller that cannot be reached or refuses, a model that cannot be loaded, or a lease that was lost.
    pub fn run(self) -> anyhow::Result<()> {
        if self.end_with_stdin {
            end_with_stdin()?;
        }
        let role = match self.role {
            Role::Rollout => WorkerRole::Rollout,
            Role::Reward => WorkerRole::Reward,
            Role::Trainer => WorkerRole::Trainer,
        };
        let when_lost = if self.end_with_stdin { WhenLost::End } else { WhenLost::JoinAgain };
        let tls = self.tls.files();
        serve_worker(&ServeOptions { role, join: self.join, name: self.name, listen: self.listen, tls, when_lost })
    }
}
