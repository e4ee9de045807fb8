//! Runs over worker processes, their control, and the processes themselves.

use crate::common::{stderr, temper};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

/// A run over worker processes with these settings.
pub fn over_processes(recipe: &Path, run_dir: &Path, sets: &[&str]) -> Command {
    let mut command = temper();
    command.arg("train").arg(recipe).arg("--run-dir").arg(run_dir).args(["--set", "placement.mode=processes"]);
    sets.iter().for_each(|set| {
        command.args(["--set", set]);
    });
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Such a run under way, which says how weights come.
pub fn start(recipe: &Path, run_dir: &Path, sets: &[&str]) -> Child {
    let mut command = over_processes(recipe, run_dir, sets);
    command.env("TEMPER_LOG", "warn,temper_rollout=info").spawn().expect("the binary starts")
}

/// A control command on the run in `run_dir`.
pub fn control(run_dir: &Path, args: &[&str]) -> Output {
    temper().args(args).arg("--run-dir").arg(run_dir).arg("--json").output().expect("the binary starts")
}

/// What such a command says; nothing where it fails.
pub fn control_json(run_dir: &Path, args: &[&str]) -> Option<serde_json::Value> {
    let output = control(run_dir, args);
    output.status.success().then(|| serde_json::from_slice(&output.stdout).expect("JSON"))
}

/// Process of the worker `name`, once it serves in a life other than `before`.
pub fn worker(run_dir: &Path, name: &str, before: u64) -> Option<(u64, u64)> {
    life_in(run_dir, name, |state| state == "ready").filter(|(_, life)| *life != before)
}

/// Process and life of the worker `name`, while it is in such a state.
pub fn life_in(run_dir: &Path, name: &str, is_such: impl Fn(&str) -> bool) -> Option<(u64, u64)> {
    let workers = control_json(run_dir, &["workers"])?;
    let found = workers.as_array()?.iter().find(|w| w["name"] == name && w["state"].as_str().is_some_and(&is_such))?;
    Some((found["process_id"].as_u64()?, found["incarnation"].as_u64()?))
}

/// Send the process `pid` a signal by its name.
pub fn signal(pid: u64, name: &str) {
    let status = Command::new("sh").args(["-c", &format!("kill -{name} {pid}")]).status().expect("a shell");
    assert!(status.success() || name == "KILL", "kill -{name} {pid}");
}

/// The run ends, and well.
pub fn finish(child: Child) -> Output {
    let output = child.wait_with_output().expect("the process ends");
    assert!(output.status.success(), "{}", stderr(&output));
    output
}

/// A process that ended and was not waited for is not there either.
pub fn is_there(pid: u64) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

/// A process that ends with the test.
pub struct Joined(pub Child);

impl Joined {
    /// A worker of the run at `address`, started by hand.
    pub fn join(address: &str, role: &str) -> Self {
        Self::join_as(address, role, "")
    }

    /// The same under a name of its own.
    pub fn join_as(address: &str, role: &str, name: &str) -> Self {
        let mut command = temper();
        command.args(["serve", role, "--join", address, "--name", name]);
        Joined(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the binary starts"))
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// An address that nobody listened at a moment ago.
pub fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("bound").to_string()
}
