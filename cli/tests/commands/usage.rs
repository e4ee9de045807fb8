//! What a stranger gets wrong first.

use crate::common::{SMALL, recipe, stderr, temper};
use crate::support::{fail, run, text, write};
use std::process::Stdio;

/// An address that is none is refused at once: nothing waits for it to answer.
#[test]
fn an_address_needs_a_port() {
    for args in [
        &["serve", "rollout", "--join", "nohost"][..],
        &["status", "--controller", "nohost"],
        &["watch", "--controller", "http://node:80"],
    ] {
        fail(args, 2, &["HOST:PORT", args[args.len() - 1]]);
    }
}

/// An error that says its cause is not followed by the same words.
#[test]
fn a_cause_is_said_once() {
    let (code, _, stderr) = run(&["bench", "rollout", "--model", "nowhere"]);
    assert_eq!((code, stderr.matches("os error 2").count()), (1, 1), "{stderr}");
}

/// A place that takes no result is named before the model is read, let alone asked: here it is not even there.
#[test]
fn a_result_has_a_place_before_anything_is_computed() {
    let dir = tempfile::tempdir().unwrap();
    let kept = write(dir.path(), "kept", "something");
    let data = write(dir.path(), "d.jsonl", "{\"prompt\": \"ab\", \"input_ids\": [1]}\n");
    let (full, below) = (text(dir.path()).to_owned(), format!("{kept}/out"));
    let missing = text(&dir.path().join("none/out")).to_owned();
    let generate = ["generate", "--model", "nowhere", "--prompt", "a", "--max-new-tokens", "4", "--output"];
    let eval = ["eval", "--model", "nowhere", "--data", &data, "--reward", "number", "--output"];
    let score = ["score", "--model", "nowhere", "--input", &data, "--output"];
    let arrow = &["--format", "arrow"][..];
    let norms = &["--grad-norms", &below][..];
    for (args, output, more, code) in [
        (&generate[..], &full, arrow, 2),
        (&generate, &below, arrow, 1),
        (&generate, &below, &[], 1),
        (&generate, &missing, &[], 1),
        (&eval, &full, &[], 2),
        (&eval, &below, &[], 1),
        (&score, &missing, &[], 1),
        (&score, &kept, norms, 1),
    ] {
        let named = if more == norms { &below } else { output };
        fail(&[args, &[output], more].concat(), code, &[named]);
    }
    assert_eq!(std::fs::read_to_string(&kept).unwrap(), "something");
    assert_eq!(dir.path().read_dir().unwrap().count(), 2, "an unfinished file was left behind");
}

/// Run with a stdout that nobody reads.
fn unheard(args: &[&str]) -> (Option<i32>, String) {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = temper().args(args).stdout(Stdio::from(writer)).output().unwrap();
    (output.status.code(), stderr(&output))
}

#[test]
fn a_closed_stdout_is_an_error_and_no_panic() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), SMALL);
    let (recipe, run_dir) = (text(&recipe), dir.path().join("run"));
    let check = ["check", recipe];
    for args in [
        &check[..],
        &[&check[..], &["--json"]].concat(),
        &[&check[..], &["--resolved"]].concat(),
        &["recipes", "--dir", text(dir.path())],
        &["recipes", "--dir", text(dir.path()), "--json"],
        &["certs", text(&dir.path().join("tls")), "localhost"],
    ] {
        let (code, stderr) = unheard(args);
        assert!(code == Some(1) && stderr.starts_with("error: writing stdout"), "{args:?}: {code:?}, {stderr}");
    }
    // What was trained is there whether or not its report is read.
    for more in [&[][..], &["--resume", "--json"]] {
        let (code, stderr) = unheard(&[&["train", recipe, "--run-dir", text(&run_dir)], more].concat());
        assert!(code == Some(0) && stderr.contains("writing stdout"), "{more:?}: {code:?}, {stderr}");
    }
}
