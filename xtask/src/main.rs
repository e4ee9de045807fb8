//! The project's own checks: `cargo xtask tidy | layers | codegen | readme | ci`, and the table of what recipes learn.
//!
//! Each check is a pure function from texts to a list of findings, tested on planted violations; this file and the
//! `run` functions beside them do the reading.

mod ci;
mod codegen;
mod layers;
mod learning;
mod readme;
mod simulate;
mod tidy;

use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const USAGE: &str = "usage: cargo xtask COMMAND

  tidy      sizes, names, reasons and other house rules over every tracked file
  layers    no crate imports a sibling or a higher layer
  readme    the commands of README.md parse; those marked <!-- ci: run --> are run
  learning  train the recipes and write docs/learning.md and docs/learning.svg (--help: its arguments)
  codegen   Rust from the .proto files, committed (--check: compare only)
  simulate  the control plane in its simulator, for minutes or for one seed (--help: its arguments)
  ci        formatting, clippy, docs, tidy, layers, codegen, licences, readme: everything but the tests";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["tidy"] => workspace_root().and_then(|root| report("tidy", tidy::run(&root)?)),
        ["layers"] => workspace_root().and_then(|root| report("layers", layers::run(&root)?)),
        ["readme"] => workspace_root().and_then(|root| readme::run(&root)),
        ["learning", "--help" | "-h"] => {
            println!("{}", learning::USAGE);
            Ok(())
        }
        ["learning", rest @ ..] => workspace_root().and_then(|root| learning::run(&root, rest)),
        ["codegen", rest @ ..] => workspace_root().and_then(|root| codegen::run(&root, rest)),
        ["simulate", "--help" | "-h"] => {
            println!("{}", simulate::USAGE);
            Ok(())
        }
        ["simulate", rest @ ..] => workspace_root().and_then(|root| simulate::run(&root, rest)),
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

/// Paths of all tracked files that are there, from the root of the repository.
fn tracked_files(root: &Path) -> Result<Vec<String>> {
    let output = Command::new("git").args(["ls-files", "-z"]).current_dir(root).output().context("cannot start git")?;
    ensure!(output.status.success(), "`git ls-files` failed: {}", String::from_utf8_lossy(&output.stderr));
    let listing = String::from_utf8(output.stdout).context("a tracked path is not UTF-8")?;
    Ok(listing.split_terminator('\0').filter(|path| root.join(path).is_file()).map(str::to_owned).collect())
}

fn workspace_root() -> Result<PathBuf> {
    // `cargo run` says where the checkout is; one that shares its target directory may have built this program.
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let parent = Path::new(&manifest).parent().context("xtask lies in no workspace")?;
    Ok(parent.to_owned())
}
