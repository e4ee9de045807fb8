//! Workers that the run does not start: they join it, and join it again when it has given them up.

mod common;
mod ranks;
mod run;
mod wait;

use common::{SMALL, recipe, stderr, temper};
use ranks::without_communication;
use run::{train, whole_outcome};
use serde_json::Value;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use wait::until;

/// A process that ends with the test.
struct Worker(Child);

impl Worker {
    fn join(address: &str, role: &str) -> Self {
        let mut command = temper();
        command.args(["serve", role, "--join", address]).stdout(Stdio::null()).stderr(Stdio::null());
        Worker(command.spawn().expect("the binary starts"))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It may have ended by itself.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// An address that nobody listened at a moment ago.
fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("bound").to_string()
}

fn signal(process_id: u64, name: &str) {
    let status = Command::new("sh").args(["-c", &format!("kill -{name} {process_id}")]).status().expect("a shell");
    assert!(status.success(), "kill -{name} {process_id}");
}

fn asked(run_dir: &Path, verb: &str) -> Option<Value> {
    let output = temper().arg(verb).arg("--run-dir").arg(run_dir).arg("--json").output().expect("the binary starts");
    output.status.success().then(|| serde_json::from_slice(&output.stdout).expect("JSON"))
}

/// Process and life of the worker `name`, while `is_held` says whether the run holds on to it.
fn life_of(run_dir: &Path, name: &str, is_held: bool) -> Option<(u64, u64)> {
    let workers = asked(run_dir, "workers")?;
    let found = workers.as_array()?.iter().find(|worker| worker["name"] == name)?;
    let life = (found["process_id"].as_u64()?, found["incarnation"].as_u64()?);
    ((found["state"] != "lost") == is_held).then_some(life)
}

/// One rank stands still for longer than its lease; so does the other, once it is there again and waits for the first.
/// Both are told that their life is over, the second while it gets ready for the next, and the run goes on with them.
#[test]
fn ranks_that_were_given_up_one_after_the_other_join_again() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let text = SMALL.replace("steps = 6", "steps = 40").replace("every_steps = 2", "every_steps = 4");
    let recipe = recipe(dir.path(), &text);
    let (reference, run_dir) = (dir.path().join("reference"), dir.path().join("joined"));
    assert!(train(&recipe, &reference, &["--set", "placement.trainer_ranks=2"], None).status.success());

    let address = free_address();
    let mut command = temper();
    command.arg("train").arg(&recipe).arg("--run-dir").arg(&run_dir);
    command.args(["--set", "placement.mode=processes", "--set", "placement.spawn_workers=false"]);
    command.args(["--set", "placement.trainer_ranks=2", "--set", &format!("placement.listen={address}")]);
    let run = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary starts");
    let _workers = ["trainer", "trainer", "rollout", "reward"].map(|role| Worker::join(&address, role));

    until("steps", || (asked(&run_dir, "status")?["step"].as_u64()? > 5).then_some(()));
    let [(first, life), (second, _)] =
        ["trainer-0", "trainer-1"].map(|name| until(name, || life_of(&run_dir, name, true)));
    signal(second, "STOP");
    let next = until("the first rank again", || {
        life_of(&run_dir, "trainer-0", true).filter(|next| next.0 == first && next.1 != life)
    });
    signal(first, "STOP");
    until("the first rank given up again", || life_of(&run_dir, "trainer-0", false).filter(|lost| *lost == next));
    signal(first, "CONT");
    signal(second, "CONT");

    let output = run.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(without_communication(whole_outcome(&run_dir)), without_communication(whole_outcome(&reference)));
}
