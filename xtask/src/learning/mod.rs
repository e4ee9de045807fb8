//! Learning, not just running: recipes are trained one after another; what they reached goes into a table and a plot.
//!
//! A run that is complete already is read, not repeated, so that an interrupted table goes on where it stopped.

mod curve;
mod plot;
mod table;

use anyhow::{Context, Result, bail, ensure};
use curve::Curve;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// Usage of the command.
pub const USAGE: &str = "usage: cargo xtask learning [--recipes a,b] [--seeds 1,2,3] [--out DIR] [--runs DIR]

  --recipes  names below recipes/, without .toml; default: every recipe of the plan
  --seeds    the same seeds for all of them; default: 1,2,3 for quickstart, ppo and dpo, 1 for the others
  --out      where learning.md and learning.svg go; default: docs
  --runs     where the runs are kept; a complete one is read, not repeated; default: runs/learning";

/// Recipes by default, in the table's order, with their number of seeds.
const PLAN: [(&str, u64); 14] = [
    ("quickstart", 3),
    ("ppo", 3),
    ("rloo", 1),
    ("reinforce_plus_plus", 1),
    ("dapo", 1),
    ("gspo", 1),
    ("dr_grpo", 1),
    ("remax", 1),
    ("reward_model_ppo", 1),
    ("dpo", 3),
    ("kto", 1),
    ("simpo", 1),
    ("orpo", 1),
    ("online_dpo", 1),
];

/// What to run and where to put it.
#[derive(Debug, PartialEq)]
struct Options {
    /// Recipes, each with its seeds.
    plan: Vec<(String, Vec<u64>)>,
    out: PathBuf,
    runs: PathBuf,
}

/// A run that was to be made.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// Name of the recipe.
    pub(crate) recipe: String,
    /// Its seed.
    pub(crate) seed: u64,
    /// What it did, or why it could not.
    pub(crate) result: Result<Curve, String>,
}

/// Train, read, write.
///
/// # Errors
/// Bad arguments, a build or a file that fails, or any recipe that could not be run; the table is written all the same.
pub fn run(root: &Path, arguments: &[&str]) -> Result<()> {
    let options = parse(arguments)?;
    let binary = build(root)?;
    let mut outcomes = Vec::new();
    let mut absent = Vec::new();
    for (recipe, seeds) in &options.plan {
        let path = root.join("recipes").join(format!("{recipe}.toml"));
        if !path.is_file() {
            println!("{recipe}: there is no recipes/{recipe}.toml");
            absent.push(recipe.clone());
            continue;
        }
        for seed in seeds {
            let dir = root.join(&options.runs).join(format!("{recipe}-{seed}"));
            let result = train((root, &binary), &path, *seed, &dir).map_err(|e| format!("{e:#}"));
            outcomes.push(Outcome { recipe: recipe.clone(), seed: *seed, result });
            write(root, &options, &outcomes)?;
        }
    }
    let failed = outcomes.iter().filter(|o| o.result.is_err()).count();
    ensure!(!outcomes.is_empty(), "nothing was run: {} recipes are not there", absent.len());
    ensure!(failed == 0, "{failed} of {} runs failed", outcomes.len());
    Ok(())
}

fn parse(arguments: &[&str]) -> Result<Options> {
    let (mut recipes, mut seeds) = (None, None);
    let (mut out, mut runs) = (PathBuf::from("docs"), PathBuf::from("runs/learning"));
    let mut rest = arguments.iter();
    while let Some(flag) = rest.next() {
        let value = rest.next().with_context(|| format!("`{flag}` needs a value\n{USAGE}"))?;
        match *flag {
            "--recipes" => recipes = Some(value.split(',').map(str::to_owned).collect::<Vec<_>>()),
            "--seeds" => seeds = Some(parse_seeds(value)?),
            "--out" => out = PathBuf::from(value),
            "--runs" => runs = PathBuf::from(value),
            _ => bail!("unknown argument `{flag}`\n{USAGE}"),
        }
    }
    let names = recipes.unwrap_or_else(|| PLAN.iter().map(|(name, _)| (*name).to_owned()).collect());
    let planned = |name: &str| PLAN.iter().find(|(known, _)| *known == name).map_or(1, |(_, count)| *count);
    let with_seeds = |name: String| {
        let seeds = seeds.clone().unwrap_or_else(|| (1..=planned(&name)).collect());
        (name, seeds)
    };
    Ok(Options { plan: names.into_iter().map(with_seeds).collect(), out, runs })
}

fn parse_seeds(text: &str) -> Result<Vec<u64>> {
    let seed = |part: &str| part.trim().parse().with_context(|| format!("--seeds: `{part}` is no seed"));
    text.split(',').map(seed).collect()
}

/// Build the release binary; gives its path.
fn build(root: &Path) -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo).args(["build", "--release", "--package", "temper-cli"]).current_dir(root).status();
    ensure!(built.context("cannot start cargo")?.success(), "the release binary cannot be built");
    let target = root.join(std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()));
    Ok(target.join("release").join("temper"))
}

/// Run a recipe to its end, or read the run that is there; an unfinished one is gone on with.
fn train((root, binary): (&Path, &Path), recipe: &Path, seed: u64, dir: &Path) -> Result<Curve> {
    let name = dir.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    if !curve::is_complete(dir)? {
        println!("{name}: training");
        std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        let log = dir.join("log.txt");
        let file = File::create(&log).with_context(|| format!("making {}", log.display()))?;
        let mut command = Command::new(binary);
        command.current_dir(root).arg("train").arg(recipe).arg("--run-dir").arg(dir).args([
            "--resume",
            "--set",
            &format!("seed={seed}"),
        ]);
        let is_new = !dir.join("metrics.jsonl").exists();
        let start = Instant::now();
        let status = command.stdout(file.try_clone()?).stderr(file).status();
        if !status.with_context(|| format!("cannot start {}", binary.display()))?.success() {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            bail!("{}", text.lines().rfind(|l| !l.trim().is_empty()).unwrap_or("no message"));
        }
        if is_new {
            curve::keep_wall_seconds(dir, start.elapsed().as_secs_f64())?;
        }
    }
    let curve = Curve::read(dir)?;
    println!("{name}: {}", table::in_words(&curve));
    Ok(curve)
}

fn write(root: &Path, options: &Options, outcomes: &[Outcome]) -> Result<()> {
    let out = root.join(&options.out);
    std::fs::create_dir_all(&out).with_context(|| format!("making {}", out.display()))?;
    for (file, text) in [("learning.md", table::render(outcomes)), ("learning.svg", plot::render(outcomes))] {
        let path = out.join(file);
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_choose_recipes_and_seeds() {
        let options = parse(&["--recipes", "rloo,dpo", "--out", "there"]).unwrap();
        assert_eq!(options.plan, [("rloo".to_owned(), vec![1]), ("dpo".to_owned(), vec![1, 2, 3])]);
        assert_eq!(options.out, Path::new("there"));
        let options = parse(&["--seeds", "4, 5"]).unwrap();
        assert_eq!((options.plan.len(), &options.plan[2].1), (PLAN.len(), &vec![4, 5]));
        for bad in [&["--seeds", "x"][..], &["--recipes"], &["--what", "1"]] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
