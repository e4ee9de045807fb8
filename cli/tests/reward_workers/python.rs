//! verl's `compute_score` in a Python file. Without python3 these tests are skipped, and say so.

use crate::{cause, marked, request, score, service};
use std::process::{Command, Stdio};
use temper_proto::RewardService;
use temper_types::RewardOutcome;

/// The component of a file with `code`, in a directory that lives as long as the test; `None` without python3.
fn python(code: &str, keys: &str) -> Option<(tempfile::TempDir, String)> {
    let found = Command::new("python3").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !found.is_ok_and(|status| status.success()) {
        eprintln!("skipped: there is no python3");
        return None;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("my_reward.py");
    std::fs::write(&path, code).expect("a file");
    Some((dir, format!("{{ kind = \"python\", path = {:?}, {keys} }}", path.to_str().expect("UTF-8"))))
}

const CODE: &str = r#"
import os, sys
print("printed while loading")
def compute_score(data_source, solution_str, ground_truth, extra_info):
    print("printed")
    os.system("echo printed by a child")
    if solution_str == "bad":
        raise ValueError("a bad\nsolution")
    if solution_str == "bool":
        return True
    if solution_str == "int":
        return 2
    if solution_str == "dict":
        return {"score": 0.5, "acc": True, "pred": "text", "len": 3}
    if solution_str == "no score":
        return {"acc": 1}
    if solution_str == "nan":
        return float("nan")
    if solution_str == "nan part":
        return {"score": 1, "part": float("inf")}
    if solution_str == "large":
        return 10 ** 400
    if solution_str == "1e308":
        return 1e308
    if solution_str == "text":
        return "1.0"
    if solution_str == "none":
        return None
    if solution_str == "exit":
        sys.exit(3)
    if solution_str == "crash":
        os._exit(3)
    if solution_str == "input":
        return 4.0 if sys.stdin.read() == "" else 5.0
    return 0.25 if (data_source, ground_truth, extra_info["index"]) == ("test", "truth", 3) else -1
"#;

#[test]
fn scores_dicts_and_errors_as_verl_has_them() {
    let Some((_dir, component)) = python(CODE, "name = \"py\", max_error_rate = 1") else { return };
    let service = service(&component).expect("the file loads");
    let wanted = [("x", 0.25), ("bool", 1.0), ("int", 2.0), ("dict", 0.5), ("input", 4.0), ("x", 0.25)];
    let responses: Vec<&str> = wanted.iter().map(|(response, _)| *response).collect();
    let outcomes = score(&service, &responses);
    for ((response, reward), outcome) in wanted.iter().zip(&outcomes) {
        assert_eq!(outcome.reward(), Some(*reward), "{response}: {outcome:?}");
    }
    let RewardOutcome::Scored { components, .. } = &outcomes[3] else { panic!("a score") };
    let values: Vec<(&str, f64)> = components.iter().map(|c| (c.name.as_str(), c.value)).collect();
    assert_eq!(values, [("py", 0.5), ("py/acc", 1.0), ("py/len", 3.0)]);
    for (response, part) in [
        ("bad", "ValueError: a bad solution (my_reward.py, line 8, in compute_score)"),
        ("no score", "the dict has no 'score': it has ['acc']"),
        ("nan", "the score is nan: expected a finite number"),
        ("nan part", "part is inf: expected a finite number"),
        ("large", "OverflowError"),
        ("1e308", "score 1e308 is out of range"),
        ("text", "the score is '1.0' of type str: expected a number"),
        ("none", "the score is None of type NoneType"),
        ("exit", "SystemExit: 3"),
        ("crash", "ended with exit code 3 before it answered; stderr: printed"),
    ] {
        let outcomes = score(&service, &[response, "x"]);
        assert!(cause(&outcomes[0]).contains(part), "{response}: {outcomes:?}\n  lacks: {part}");
        assert_eq!(outcomes[1].reward(), Some(0.25), "{response}");
    }
}

#[test]
fn a_file_that_cannot_be_loaded_is_an_error_before_anything_is_scored() {
    for (code, keys, part) in [
        ("import no_such_module", "", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def compute_score(:", "", "cannot start: SyntaxError"),
        (
            "def compute(a): pass",
            "",
            "has no function compute_score(data_source, solution_str, ground_truth, extra_info)",
        ),
        ("import os; os._exit(7)", "", "cannot start: ended with exit code 7"),
        ("import time; time.sleep(1000)", "start_seconds = 0.5", "cannot start: no answer within start_seconds = 0.5"),
        ("", "python = \"no-such-python\"", "no program `no-such-python` in PATH"),
    ] {
        let Some((_dir, component)) = python(code, keys) else { return };
        let error = service(&component).expect_err(code);
        assert!(error.contains(part), "{code}\n  says: {error}\n  lacks: {part}");
    }
}

#[test]
fn limits_hold_for_python_and_the_next_sample_gets_a_new_process() {
    const CODE: &str = r#"
import ctypes, os, threading
def spin():
    while True: pass
async def score(data_source, solution_str, ground_truth, extra_info):
    if solution_str == "allocate": return len(bytearray(10 << 30))
    if solution_str == "segfault": ctypes.string_at(0)
    if solution_str == "threads":
        for _ in range(4): threading.Thread(target=spin, daemon=True).start()
        spin()
    if solution_str == "orphan":
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0: spin()
            os._exit(0)
        os._exit(0)
    return 1
"#;
    let keys = "function = \"score\", workers = 1, cpu_seconds = 0.5, memory_mb = 1024, max_error_rate = 1";
    let Some((dir, component)) = python(CODE, keys) else { return };
    let service = service(&component).expect("the file loads");
    for (response, part) in [
        ("allocate", "MemoryError"),
        ("segfault", "(SIGSEGV)"),
        ("threads", "more than cpu_seconds = 0.5"),
        ("orphan", "ended with exit code 0 before it answered"),
    ] {
        let outcomes = service.score(&[request(0, response), request(1, "x")]).expect("a breaker that never opens");
        assert!(cause(&outcomes[0]).contains(part), "{response}: {outcomes:?}\n  lacks: {part}");
        assert_eq!(outcomes[1].reward(), Some(1.0), "{response}");
    }
    drop(service);
    assert_eq!(marked(dir.path().to_str().expect("UTF-8")), Vec::<String>::new());
}
