//! Rewards that misbehave: the sample in flight is an error within its limit, the others are scored as ever, and no
//! process is left.

use crate::{HONEST, READ, cause, marked, score, service, shell};
use std::time::{Duration, Instant};

struct Case {
    name: &'static str,
    /// What happens to a response that is `bad`.
    deed: &'static str,
    keys: &'static str,
    says: &'static str,
    /// Seconds that the whole batch may take, far above the limits: the machine may be busy.
    seconds: u64,
}

const fn case(name: &'static str, deed: &'static str, keys: &'static str, says: &'static str) -> Case {
    Case { name, deed, keys, says, seconds: 20 }
}

/// Long enough for an honest sample on a busy machine.
const SHORT: &str = "timeout_seconds = 3";

const CASES: &[Case] = &[
    case("sleeps", "sleep 100000", SHORT, "no answer within timeout_seconds = 3: killed"),
    case("sleeps_deaf", "trap '' TERM INT HUP; sleep 100000", SHORT, "no answer within timeout_seconds"),
    case("stops_itself", "kill -STOP $$", SHORT, "no answer within timeout_seconds"),
    case("spins", "while :; do :; done", "cpu_seconds = 0.3", "of CPU time: more than cpu_seconds = 0.3: killed"),
    case("spins_until_the_clock", "while :; do :; done", SHORT, "no answer within timeout_seconds"),
    case("forks", "while :; do sleep 100000 & done", "max_processes = 16", "more than max_processes = 16: killed"),
    case("forks_twice", "( ( sleep 100000 & sleep 100000 ) & ) & sleep 100000", SHORT, "no answer within"),
    case("forks_and_leaves", "( ( sleep 100000 & ) & ); exit 4", "", "ended with exit code 4 before it answered"),
    case("new_sessions", "for i in 1 2 3; do setsid sleep 100000 & done; sleep 100000", SHORT, "no answer within"),
    case(
        "allocates",
        "head -c 20G /dev/zero | tail -c 10G || exit 5",
        "memory_mb = 128",
        "ended with exit code 5 before it answered; stderr: tail: memory exhausted",
    ),
    case(
        "allocates_in_many_processes",
        "for i in 1 2 3 4 5 6 7 8; do head -c 100000000 /dev/zero | tail -c 90000000 | sleep 100000 & done; wait",
        "memory_mb = 256",
        "more than memory_mb = 256: killed",
    ),
    case("segfaults", "kill -SEGV $$", "", "ended by signal 11 (SIGSEGV) before it answered"),
    case("aborts", "echo oh no >&2; kill -ABRT $$", "", "(SIGABRT) before it answered; stderr: oh no"),
    case(
        "exits",
        "echo first >&2; echo second >&2; exit 3",
        "",
        "exit code 3 before it answered; stderr: first | second",
    ),
    case("leaves", "exit 0", "", "ended with exit code 0 before it answered"),
    case("closes_its_stdout", "exec >&-; sleep 100000", "", "closed its stdout, was killed before it answered"),
    case("kills_its_watcher", "kill -9 $PPID; sleep 100000", "", "watches over the reward was killed"),
    case("writes_without_end", "head -c 3000000 /dev/zero; sleep 100000", "", "bytes without an end of line: killed"),
    case("writes_text", "echo hello", "", "the answer is no JSON (expected value at line 1 column 1): `hello`: killed"),
    case("says_nan", "printf '{\"id\":%s,\"score\":NaN}\\n' \"$id\"", "", "NaN}`: killed"),
    case("says_inf", "printf '{\"id\":%s,\"score\":1e999}\\n' \"$id\"", "", "number out of range"),
    case("says_too_much", "printf '{\"id\":%s,\"score\":1e308}\\n' \"$id\"", "", "score 1e308 is out of range"),
    case(
        "says_a_word",
        "printf '{\"id\":%s,\"score\":\"high\"}\\n' \"$id\"",
        "",
        "score is `\"high\"`: expected a number",
    ),
    case("says_nothing", "printf '{\"id\":%s}\\n' \"$id\"", "", "the answer has no `score`"),
    case("no_id", "printf '{\"score\":1}\\n'", "", "the answer has no `id`"),
    case("another_id", "printf '{\"id\":\"x\",\"score\":1}\\n'", "", "the id \"x\" instead of \"1-7-1-0\""),
    case(
        "reports_an_error",
        "printf '{\"id\":%s,\"error\":\"no compiler\"}\\n' \"$id\"",
        "",
        "failed: no compiler (prompt 1",
    ),
];

/// Five samples, the second of which does the deed; the process goes on where it can.
fn run(case: &Case) {
    let token = format!("hostile-{}-{}", case.name, std::process::id());
    let script = format!(
        "while {READ} do case $line in *'\"response\":\"bad\"'*) {} ;; \
         *) printf '{{\"id\":%s,\"score\":1}}\\n' \"$id\" ;; esac; done",
        case.deed
    );
    let service = service(&shell(&script, &token, case.keys)).expect("a service");
    let begin = Instant::now();
    let outcomes = score(&service, &["good", "bad", "good", "good", "good"]);
    let took = begin.elapsed();
    let cause = cause(&outcomes[1]);
    assert!(cause.contains(case.says), "{}\n  says: {cause}\n  lacks: {}", case.name, case.says);
    assert!(cause.contains("(prompt 1, group 7, sample 1, epoch 0)"), "{}: {cause}", case.name);
    let others: Vec<_> = [0, 2, 3, 4].iter().map(|index| outcomes[*index].reward()).collect();
    assert_eq!(others, [Some(1.0); 4], "{}: {outcomes:?}", case.name);
    assert!(took < Duration::from_secs(case.seconds), "{}: {took:?}", case.name);
    drop(service);
    assert_eq!(marked(&token), Vec::<String>::new(), "{} left processes", case.name);
}

#[test]
fn only_the_guilty_sample_fails_and_nothing_is_left() {
    std::thread::scope(|scope| {
        let runs: Vec<_> = CASES.iter().map(|case| (case.name, scope.spawn(|| run(case)))).collect();
        let failed: Vec<&str> = runs.into_iter().filter_map(|(name, run)| run.join().err().map(|_| name)).collect();
        assert!(failed.is_empty(), "{failed:?}");
    });
}

/// A kill is over when its outcome is there: nothing of the killed process runs beside the next sample.
#[test]
fn a_killed_tree_is_gone_when_the_sample_fails() {
    let token = format!("gone-{}", std::process::id());
    let script = format!("{READ} for i in 1 2 3 4 5 6; do ( ( sleep 100000 & ) & ); done; sleep 100000");
    let service = service(&shell(&script, &token, "timeout_seconds = 0.3, workers = 1")).expect("a service");
    assert!(cause(&score(&service, &["x"])[0]).contains("no answer within"));
    let left: Vec<String> = marked(&token).into_iter().filter(|stat| !stat.contains("temper")).collect();
    assert_eq!(left, Vec::<String>::new());
}

/// A process that forks as fast as it can, each child in a session of its own.
#[test]
fn a_swarm_of_sessions_is_contained() {
    let token = format!("swarm-{}", std::process::id());
    let script =
        format!("{READ} i=0; while [ $i -lt 3000 ]; do setsid sleep 100000 & i=$((i + 1)); done; sleep 100000");
    let service = service(&shell(&script, &token, "max_processes = 32, workers = 1")).expect("a service");
    assert!(cause(&score(&service, &["x"])[0]).contains("more than max_processes = 32: killed"));
    drop(service);
    assert_eq!(marked(&token), Vec::<String>::new());
}

/// What a process does after its answer is watched too.
#[test]
fn a_process_that_misbehaves_between_samples_is_restarted() {
    let token = format!("between-{}", std::process::id());
    let script =
        format!("while {READ} do printf '{{\"id\":%s,\"score\":1}}\\n' \"$id\"; sleep 100000 & sleep 100000 & done");
    let service = service(&shell(&script, &token, "max_processes = 2, workers = 1")).expect("a service");
    assert_eq!(score(&service, &["x"])[0].reward(), Some(1.0));
    crate::wait_until("the end of the surplus processes", || marked(&token).is_empty());
    let outcome = &score(&service, &["x"])[0];
    assert_eq!(outcome.reward(), Some(1.0), "{outcome:?}");
}

#[test]
fn dropping_the_service_ends_what_runs() {
    let token = format!("dropped-{}", std::process::id());
    let service = service(&shell(HONEST, &token, "workers = 3")).expect("a service");
    assert_eq!(score(&service, &["good", "bad", "good"]).iter().filter_map(|o| o.reward()).sum::<f64>(), 2.0);
    assert!(!marked(&token).is_empty(), "processes stay between batches");
    drop(service);
    assert_eq!(marked(&token), Vec::<String>::new());
}
