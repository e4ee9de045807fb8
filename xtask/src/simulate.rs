//! The control plane in its simulator, for longer than the tests run it.

use anyhow::{Context, Result, bail, ensure};
use std::path::Path;
use std::process::Command;

/// What the command understands.
pub const USAGE: &str = "usage: cargo xtask simulate [--minutes M] [--seed S]

  --minutes M  run seeds from 0 on for M minutes and say how many; without it, the seeds of the tests
  --seed S     run one seed again and print how it went";

const TEST: &str = "fleet::tests::simulation::every_seed_keeps_every_invariant";

/// Run the simulator's test with what was asked for.
pub fn run(root: &Path, arguments: &[&str]) -> Result<()> {
    let settings = parse(arguments)?;
    let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["test", "-p", "temper-controller", "--lib", "--quiet", "--", "--exact", TEST, "--nocapture"])
        .envs(settings)
        .current_dir(root)
        .status()
        .context("cannot start cargo")?;
    ensure!(status.success(), "the simulation failed");
    Ok(())
}

fn parse(arguments: &[&str]) -> Result<Vec<(&'static str, String)>> {
    let setting = |pair: &[&str]| match pair {
        ["--minutes", value] => Ok(("TEMPER_SIMULATE_MINUTES", whole(value)?)),
        ["--seed", value] => Ok(("TEMPER_SIMULATE_SEED", whole(value)?)),
        other => bail!("`{}` is not understood\n{USAGE}", other.join(" ")),
    };
    arguments.chunks(2).map(setting).collect()
}

fn whole(text: &str) -> Result<String> {
    let number: u64 = text.parse().with_context(|| format!("expected a whole number, got `{text}`"))?;
    Ok(number.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_become_settings_of_the_test() {
        let settings = parse(&["--minutes", "30", "--seed", "7"]).expect("both are known");
        assert_eq!(settings, [("TEMPER_SIMULATE_MINUTES", "30".to_owned()), ("TEMPER_SIMULATE_SEED", "7".to_owned())]);
        for wrong in [&["--seed"][..], &["--minutes", "soon"], &["--hours", "1"]] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
