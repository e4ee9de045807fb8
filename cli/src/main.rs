//! `temper`: the one binary. Reads flags and the environment, assembles the services, prints results.
//!
//! Exit codes: 0 done, 1 failed with the cause, 2 bad usage or recipe, 130 interrupted after a clean checkpoint.
//! A stdout that is closed is an error as any other: all print by `commands::common::output`, never by `println!`.

#![deny(clippy::print_stdout)]

mod certs;
mod commands;
mod control;
mod draft_model;
mod env;
mod kill;
mod local_text;
mod plan;
mod planned;
mod random;
mod recipe;
mod recovery;
mod resume;
mod reward_models;
mod rollout_ranks;
mod run_dirs;
mod runtime;
mod staleness;
mod tables;
mod teachers;
mod tls;
mod trainer_ranks;
mod workers;

use clap::{Parser, Subcommand};
use std::fmt::Display;
use std::process::ExitCode;

/// RL post-training for language models: a pretrained model, prompts and a reward in, a better model out.
#[derive(Parser)]
#[command(
    name = "temper",
    version,
    propagate_version = true,
    after_help = "Start here:\n  temper recipes                             what there is to run\n  temper check recipes/quickstart.toml       what a recipe would do\n  temper train recipes/quickstart.toml       do it\n  temper inspect runs/quickstart             what happened\n\nExit codes: 0 done, 1 failed, 2 bad usage or recipe, 130 interrupted after a checkpoint."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Train(commands::train::Train),
    Check(commands::check::Check),
    Plan(commands::plan::Plan),
    Recipes(commands::recipes::Recipes),
    Generate(commands::generate::Generate),
    Score(commands::score::Score),
    Export(commands::export::Export),
    Import(commands::import::Import),
    Bench(commands::bench::Bench),
    Algos(commands::algos::Algos),
    Inspect(commands::inspect::Inspect),
    Eval(commands::eval::Eval),
    Serve(commands::serve::Serve),
    #[command(hide = true)]
    EngineRank(commands::engine_rank::EngineRank),
    Certs(commands::certs::Certs),
    Status(commands::control::Status),
    Watch(commands::control::Watch),
    Fetch(commands::fetch::Fetch),
    Workers(commands::control::Workers),
    Pause(commands::control::Pause),
    Drain(commands::control::Drain),
    Resume(commands::control::Resume),
    Snapshot(commands::control::Snapshot),
    Set(commands::control::Set),
    Stop(commands::control::Stop),
}

/// The user asked for something that cannot be: exit code 2.
#[derive(Debug)]
struct Usage(String);

impl Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// The run stopped because it was asked to, after a checkpoint: exit code 130.
#[derive(Debug)]
struct Interrupted;

impl Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// An error of usage.
pub fn usage(message: impl Display) -> anyhow::Error {
    anyhow::Error::new(Usage(message.to_string()))
}

fn main() -> ExitCode {
    // A reward's processes are this binary in another role: they take no flags and read no environment.
    if let Some(code) = temper_reward::role(std::env::args_os().skip(1)) {
        return code;
    }
    let cli = Cli::parse();
    let filter = env::read(env::LOG).unwrap_or_else(|| "warn".to_owned());
    if let Err(error) = temper_telemetry::init_tracing(&filter) {
        eprintln!("error: {}: {error}", env::LOG);
        return ExitCode::from(2);
    }
    match cli.command.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<Interrupted>() => ExitCode::from(130),
        Err(error) => {
            eprintln!("error: {}", message(&error));
            ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
        }
    }
}

/// An error and its causes. Some errors say their cause themselves: it is not said twice.
fn message(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

impl Command {
    fn run(self) -> anyhow::Result<()> {
        match self {
            Command::Train(command) => command.run(),
            Command::Check(command) => command.run(),
            Command::Plan(command) => command.run(),
            Command::Recipes(command) => command.run(),
            Command::Generate(command) => command.run(),
            Command::Score(command) => command.run(),
            Command::Export(command) => command.run(),
            Command::Import(command) => command.run(),
            Command::Bench(command) => command.run(),
            Command::Algos(command) => command.run(),
            Command::Inspect(command) => command.run(),
            Command::Eval(command) => command.run(),
            Command::Serve(command) => command.run(),
            Command::EngineRank(command) => command.run(),
            Command::Certs(command) => command.run(),
            Command::Status(command) => command.run(),
            Command::Watch(command) => command.run(),
            Command::Fetch(command) => command.run(),
            Command::Workers(command) => command.run(),
            Command::Pause(command) => command.run(),
            Command::Drain(command) => command.run(),
            Command::Resume(command) => command.run(),
            Command::Snapshot(command) => command.run(),
            Command::Set(command) => command.run(),
            Command::Stop(command) => command.run(),
        }
    }
}
