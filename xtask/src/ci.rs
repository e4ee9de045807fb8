//! Everything that must hold besides the tests, in the order in which it fails fastest.

use crate::{codegen, layers, readme, report, tidy};
use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

/// Run all checks; the first that fails ends the run.
pub fn run(root: &Path) -> Result<()> {
    let start = Instant::now();
    cargo(root, &["fmt", "--all", "--check"], &[])?;
    report("tidy", tidy::run(root)?)?;
    report("layers", layers::run(root)?)?;
    codegen::run(root, &["--check"])?;
    deny(root)?;
    cargo(root, &["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"], &[])?;
    cargo(root, &["doc", "--workspace", "--no-deps", "--quiet"], &[("RUSTDOCFLAGS", "-D warnings")])?;
    cargo(root, &["test", "-p", "xtask", "--quiet"], &[])?;
    readme::run(root)?;
    println!("ci: ok in {} s", start.elapsed().as_secs());
    Ok(())
}

fn deny(root: &Path) -> Result<()> {
    let is_there = Command::new("cargo-deny").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if is_there.is_ok_and(|status| status.success()) {
        return cargo(
            root,
            &["deny", "--all-features", "check", "--hide-inclusion-graph", "licenses", "bans", "sources"],
            &[],
        );
    }
    println!("skipped: cargo-deny is not installed (licences, bans and sources are not checked)");
    Ok(())
}

fn cargo(root: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Result<()> {
    let start = Instant::now();
    let command = format!("cargo {}", arguments.join(" "));
    let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(arguments)
        .envs(environment.iter().copied())
        .current_dir(root)
        .status()
        .with_context(|| format!("cannot start `{command}`"))?;
    ensure!(status.success(), "`{command}` failed");
    println!("{command}: ok in {} s", start.elapsed().as_secs());
    Ok(())
}
