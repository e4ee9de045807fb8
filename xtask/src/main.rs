//! The project's own checks: `cargo xtask tidy | layers | readme | ci`.
//!
//! Each check is a pure function from texts to a list of findings, tested on planted violations; this file and the
//! `run` functions beside them do the reading.

mod ci;
mod layers;
mod readme;
mod tidy;

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const USAGE: &str = "usage: cargo xtask COMMAND

  tidy      sizes, names, reasons and other house rules over every tracked file
  layers    no crate imports a sibling or a higher layer
  readme    the commands of README.md parse; those marked <!-- ci: run --> are run
  ci        formatting, clippy, docs, tidy, layers, licences, readme: everything but the tests";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["tidy"] => workspace_root().and_then(|root| report("tidy", tidy::run(&root)?)),
        ["layers"] => workspace_root().and_then(|root| report("layers", layers::run(&root)?)),
        ["readme"] => workspace_root().and_then(|root| readme::run(&root)),
        ["ci"] => workspace_root().and_then(|root| ci::run(&root)),
        ["help" | "--help" | "-h"] => {
            println!("{USAGE}");
            Ok(())
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Print findings; any is a failure.
fn report(check: &str, findings: Vec<String>) -> Result<()> {
    for finding in &findings {
        eprintln!("{finding}");
    }
    if findings.is_empty() {
        println!("{check}: ok");
        return Ok(());
    }
    bail!("{check}: {} findings", findings.len())
}

fn workspace_root() -> Result<PathBuf> {
    let parent = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask lies in no workspace")?;
    Ok(parent.to_owned())
}
