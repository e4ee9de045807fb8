//! `temper train`: where it runs, what it says of it, and what a run directory holds.

use crate::common::{SMALL, recipe, stderr, temper};
use crate::support::{fail, text, write};
use serde_json::Value;
use std::ffi::{OsStr, OsString};
use std::io::BufRead;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Run with any arguments.
fn run(args: &[&OsStr]) -> Output {
    temper().args(args).output().unwrap()
}

/// JSON that a successful run printed.
fn json(args: &[&OsStr]) -> Value {
    let output = run(args);
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// JSON has no bytes that are no UTF-8: such a path is shown as well as it can be.
#[test]
fn a_path_that_is_no_utf8_is_shown_and_ends_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let bad = |name: &[u8]| -> PathBuf { dir.path().join(OsString::from_vec(name.to_vec())) };
    let (plain, odd, run_dir) = (recipe(dir.path(), SMALL), bad(b"odd\xff.toml"), bad(b"run\xffdir"));
    std::fs::rename(plain, &odd).unwrap();
    let (check, json_flag, run_flag) = (OsStr::new("check"), OsStr::new("--json"), OsStr::new("--run-dir"));
    assert!(json(&[check, odd.as_ref(), json_flag])["recipe"].as_str().unwrap().ends_with("odd\u{fffd}.toml"));
    let report = json(&[OsStr::new("train"), odd.as_ref(), run_flag, run_dir.as_ref(), json_flag]);
    assert_eq!(report["status"], "completed");
    assert!(report["run_dir"].as_str().unwrap().ends_with("run\u{fffd}dir"), "{report}");
    let shown = json(&[OsStr::new("inspect"), run_dir.as_ref(), json_flag]);
    assert!(shown["run"].as_str().unwrap().ends_with("run\u{fffd}dir"));
    assert!(shown["checkpoints"][0]["path"].as_str().unwrap().contains("run\u{fffd}dir"));
    let recipes = json(&[OsStr::new("recipes"), OsStr::new("--dir"), dir.path().as_ref(), json_flag]);
    assert!(recipes[0]["recipe"].as_str().unwrap().ends_with("odd\u{fffd}.toml"));
}

/// Start a run, interrupt it after its first step, and give what it printed.
fn interrupted(args: &[&OsStr]) -> String {
    let mut command = temper();
    let mut child = command.args(args).stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = std::io::BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains("step 1/")), "no step was announced");
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    lines.for_each(drop);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    String::from_utf8(output.stdout).unwrap()
}

/// Run a command that was printed, by a shell that finds the binary as `temper`.
fn pasted(line: &str) -> Output {
    let bin = Path::new(env!("CARGO_BIN_EXE_temper")).parent().unwrap();
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    Command::new("sh").args(["-c", line]).env("PATH", path).output().unwrap()
}

#[test]
fn the_command_that_goes_on_can_be_pasted() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("two words");
    std::fs::create_dir(&place).unwrap();
    let (recipe, run_dir) = (recipe(&place, SMALL), place.join("it's a run"));
    let args = [
        "train".as_ref(),
        recipe.as_os_str(),
        "--set".as_ref(),
        "seed=6".as_ref(),
        "--set".as_ref(),
        "stage.1.sampling={max_new_tokens = 5}".as_ref(),
        "--run-dir".as_ref(),
        run_dir.as_os_str(),
    ];
    let printed = interrupted(&args);
    let line = |name: &str| printed.lines().find_map(|line| line.trim().strip_prefix(name)).map(str::trim).unwrap();
    let look = pasted(line("look"));
    assert!(look.status.success(), "{printed}{}", stderr(&look));
    let output = pasted(line("go on"));
    assert!(output.status.success(), "{printed}{}", stderr(&output));
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("completed"));
}

/// The run that is meant is the last one that was started, whatever its number.
#[test]
fn a_resume_takes_the_run_that_was_started_last() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), SMALL);
    let resume = || {
        let output =
            temper().current_dir(&dir).args([OsStr::new("train"), recipe.as_ref(), "--resume".as_ref()]).output();
        let output = output.unwrap();
        (output.status.code(), stderr(&output))
    };
    let first = temper().current_dir(&dir).arg("train").arg(&recipe).output().unwrap();
    assert!(first.status.success(), "{}", stderr(&first));
    let mut second = temper();
    second.current_dir(&dir).arg("train").arg(&recipe).env("TEMPER_KILL_AT", "5:rollout");
    assert_eq!(second.output().unwrap().status.code(), None);
    // A number that never began comes behind those that did.
    std::fs::create_dir(dir.path().join("runs/small-3")).unwrap();
    let (code, says) = resume();
    assert!(code == Some(0) && says.contains("--resume: runs/small-2 is the run that was started last"), "{says}");
    assert!(says.contains("run directory: runs/small-2\n") && says.contains("step 10/10"), "{says}");
    // The first name is taken again, later than the second.
    let runs = |name: &str| dir.path().join("runs").join(name);
    std::fs::remove_dir_all(runs("small")).unwrap();
    let again = temper().current_dir(&dir).arg("train").arg(&recipe).output().unwrap();
    assert!(again.status.success() && runs("small").is_dir(), "{}", stderr(&again));
    assert!(resume().1.contains("run directory: runs/small\n"));
}

/// A run of the small recipe that was killed in its step 5.
fn killed(dir: &Path, args: &[&str]) -> (PathBuf, PathBuf) {
    let (recipe, run_dir) = (recipe(dir, SMALL), dir.join("run"));
    let mut command = temper();
    command.arg("train").arg(&recipe).arg("--run-dir").arg(&run_dir).args(args).env("TEMPER_KILL_AT", "5:rollout");
    assert_eq!(command.output().unwrap().status.code(), None);
    (recipe, run_dir)
}

#[test]
fn a_refused_resume_names_what_differs() {
    let dir = tempfile::tempdir().unwrap();
    let rows: String = (0..4).map(|i| format!("{{\"prompt\": \"{i}=\", \"ground_truth\": \"{i}\"}}\n")).collect();
    let data = write(dir.path(), "rows.jsonl", &rows);
    let set = format!("data.train={{files=[\"{data}\"]}}");
    let (recipe, run_dir) = killed(dir.path(), &["--set", &set]);
    let kept = || std::fs::read_to_string(run_dir.join("recipe.toml")).unwrap();
    let before = kept();
    let refused = |more: &[&str], parts: &[&str]| {
        let args = ["train", text(&recipe), "--run-dir", text(&run_dir), "--resume", "--set", &set];
        fail(&[&args[..], more].concat(), 1, &[&["another recipe"], parts].concat());
        assert_eq!(kept(), before, "{more:?} was refused and written");
    };
    refused(&["--set", "seed=6"], &["`seed` is 5 there and 6 here"]);
    refused(
        &["--set", "stage.1.sampling.max_new_tokens=5"],
        &["`stage.1.sampling.max_new_tokens` is 6 there and 5 here"],
    );
    refused(&["--set", "dtype=bf16"], &["`dtype` is \"f32\" there and \"bf16\" here"]);
    refused(&["--set", "placement.staleness=1"], &["`placement.staleness` is 0 there and 1 here"]);
    refused(&["--set", "engine.replay=coupled"], &["`engine.replay` is \"exact\" there and \"coupled\" here"]);
    write(dir.path(), "rows.jsonl", &rows.replace("3=", "4="));
    refused(&[], &["no key differs, so its data files had other rows"]);
}

#[test]
fn the_recipe_of_the_run_directory_is_that_of_the_last_start() {
    let dir = tempfile::tempdir().unwrap();
    let (recipe, run_dir) = killed(dir.path(), &["--set", "checkpoint.keep_last=3"]);
    let keep = || {
        let written: toml::Table = std::fs::read_to_string(run_dir.join("recipe.toml")).unwrap().parse().unwrap();
        written["checkpoint"]["keep_last"].as_integer()
    };
    assert_eq!(keep(), Some(3));
    let args = ["train", text(&recipe), "--run-dir", text(&run_dir), "--resume", "--set", "checkpoint.keep_last=4"];
    assert!(temper().args(args).output().unwrap().status.success());
    assert_eq!(keep(), Some(4));
    assert!(!run_dir.join("recipe.toml.tmp").exists());
}
