//! What a stranger gets wrong first.

use crate::support::{fail, run};

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
