//! A run whose processes speak TLS is the run that speaks plain text, and lets nobody in who does not belong.

mod common;
mod run;

use common::{SMALL, recipe, stderr, temper};
use run::{outcome, train};
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

/// Longest wait for anything that a test waits for.
const PATIENCE: Duration = Duration::from_secs(120);

fn certs(dir: &Path, hosts: &[&str]) -> Output {
    temper().arg("certs").arg(dir).args(hosts).output().expect("the binary starts")
}

fn path(dir: &Path, file: &str) -> String {
    dir.join(file).to_str().expect("UTF-8").to_owned()
}

/// `temper status` of the run at `address`, with the certificates of `dir` where there is one.
fn status(address: &str, dir: Option<&Path>) -> Output {
    let mut command = temper();
    command.args(["status", "--controller", address]);
    if let Some(dir) = dir {
        command.args(["--tls-ca", &path(dir, "ca.pem"), "--tls-cert", &path(dir, "client.pem")]);
        command.args(["--tls-key", &path(dir, "client-key.pem")]);
    }
    command.output().expect("the binary starts")
}

/// Wait until a verb is answered by the run in `run_dir`, whose certificates it knows.
fn until_answered(run_dir: &Path, verb: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let output = temper().arg(verb).arg("--run-dir").arg(run_dir).output().expect("the binary starts");
        if output.status.success() {
            return;
        }
        assert!(Instant::now() < deadline, "{verb}: {}", stderr(&output));
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_run_under_tls_gives_the_same_weights_and_takes_only_who_belongs() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), SMALL);
    let (reference, run_dir) = (dir.path().join("reference"), dir.path().join("tls-run"));
    let two_ranks = "placement.trainer_ranks=2";
    assert!(train(&recipe, &reference, &["--set", two_ranks], None).status.success());

    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    let made = certs(&ours, &["client", "127.0.0.1"]);
    assert!(made.status.success(), "{}", stderr(&made));
    assert!(certs(&theirs, &["client"]).status.success());
    let mut command = temper();
    command.arg("train").arg(&recipe).arg("--run-dir").arg(&run_dir).args([
        "--set",
        "placement.mode=processes",
        "--set",
        two_ranks,
    ]);
    for (key, file) in [("ca", "ca.pem"), ("cert", "127.0.0.1.pem"), ("key", "127.0.0.1-key.pem")] {
        command.args(["--set", &format!("placement.tls.{key}={}", path(&ours, file))]);
    }
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary starts");
    until_answered(&run_dir, "pause");

    let control = std::fs::read_to_string(run_dir.join("control")).expect("it was found");
    let address = control.lines().next().expect("an address");
    let taken = status(address, Some(&ours));
    assert!(taken.status.success(), "{}", stderr(&taken));
    for (certificates, complaint) in [(None, "this server speaks TLS"), (Some(&*theirs), "is not signed by")] {
        let refused = status(address, certificates);
        assert_eq!(refused.status.code(), Some(1));
        assert!(stderr(&refused).contains(complaint), "{complaint}: {}", stderr(&refused));
    }
    // A worker in plain text is refused as well, and does not try on.
    let worker = temper().args(["serve", "rollout", "--join", address]).output().expect("the binary starts");
    assert_eq!(worker.status.code(), Some(1));
    assert!(stderr(&worker).contains("this server speaks TLS"), "{}", stderr(&worker));

    until_answered(&run_dir, "resume");
    let output = child.wait_with_output().expect("it ends");
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(outcome(&run_dir), outcome(&reference));
}

#[test]
fn certificates_that_do_not_fit_are_refused_before_the_run() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let recipe = recipe(dir.path(), SMALL);
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    for dir in [&ours, &theirs] {
        let made = certs(dir, &["node-1"]);
        assert!(made.status.success(), "{}", stderr(&made));
    }
    let again = certs(&ours, &["node-1"]);
    assert_eq!(again.status.code(), Some(1));
    assert!(stderr(&again).contains("node-1-key.pem"), "{}", stderr(&again));
    let check = |ca: &str, key: &str, sets: &[&str]| {
        let mut command = temper();
        command.arg("check").arg(&recipe).args(["--set", &format!("placement.tls.ca={ca}")]);
        command.args(["--set", &format!("placement.tls.cert={}", path(&ours, "node-1.pem"))]);
        command.args(["--set", &format!("placement.tls.key={key}")]);
        sets.iter().for_each(|set| {
            command.args(["--set", set]);
        });
        command.output().expect("the binary starts")
    };
    let (ca, key) = (path(&ours, "ca.pem"), path(&ours, "node-1-key.pem"));
    let processes = "placement.mode=processes";
    let by_hand = [processes, "placement.spawn_workers=false", "placement.listen=127.0.0.1:7070"];
    let two_ranks = [&by_hand[..], &["placement.trainer_ranks=2"]].concat();
    for (output, complaint) in [
        (check(&ca, &key, &[processes]), None),
        (check(&ca, &key, &two_ranks), None),
        (check(&ca, &key, &[]), Some("in one process nothing is sent")),
        (check(&path(&theirs, "ca.pem"), &key, &[processes]), Some("node-1.pem: not signed by")),
        (check(&ca, &path(&theirs, "node-1-key.pem"), &[processes]), Some("node-1-key.pem: not the key of")),
        (check("nowhere.pem", &key, &[processes]), Some("nowhere.pem: cannot be read")),
    ] {
        assert_eq!(output.status.code(), Some(if complaint.is_some() { 2 } else { 0 }), "{}", stderr(&output));
        assert!(stderr(&output).contains(complaint.unwrap_or_default()), "{complaint:?}: {}", stderr(&output));
    }
    let half = temper().args(["status", "--run-dir", "x", "--tls-ca", &ca]).output().expect("the binary starts");
    assert_eq!(half.status.code(), Some(2));
}
