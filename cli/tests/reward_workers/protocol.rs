//! Order, restarts, components, the breaker, and endpoints.

use crate::{HONEST, READ, cause, request, score, service, shell};
use std::io::{Read, Write};
use std::net::TcpListener;
use temper_proto::RewardService;
use temper_types::RewardOutcome;

/// Scores each sample by its number, the earlier ones slower than the later.
const BY_NUMBER: &str = r#"while read -r line; do id=${line#*\"id\":}; id=${id%%,*}; n=${id#\"}; n=${n%%-*};
    case $n in [0-3]) sleep 0.1;; esac; printf '{"id":%s,"score":%s}\n' "$id" "$n"; done"#;

#[test]
fn outcomes_stand_in_order_whatever_the_number_of_workers() {
    for workers in [1, 2, 5, 40] {
        let service = service(&shell(BY_NUMBER, "order", &format!("workers = {workers}"))).expect("a service");
        let rewards: Vec<_> = score(&service, &["x"; 23]).iter().map(|o| o.reward()).collect();
        let wanted: Vec<_> = (0..23).map(|n| Some(f64::from(n))).collect();
        assert_eq!(rewards, wanted, "{workers} workers");
        assert_eq!(service.score(&[]).expect("nothing to do"), []);
    }
}

#[test]
fn a_program_may_answer_once_and_leave() {
    let script = format!("{READ} printf '{{\"id\":%s,\"score\":0.5}}\\n' \"$id\"");
    let service = service(&shell(&script, "once", "workers = 2")).expect("a service");
    let rewards: Vec<_> = score(&service, &["x"; 6]).iter().map(|o| o.reward()).collect();
    assert_eq!(rewards, [Some(0.5); 6]);
}

#[test]
fn a_second_answer_never_counts_for_the_next_sample() {
    let script = format!(
        "while {READ} do printf '{{\"id\":%s,\"score\":1}}\\n{{\"id\":%s,\"score\":1}}\\n' \"$id\" \"$id\"; done"
    );
    let service = service(&shell(&script, "twice", "workers = 1, max_error_rate = 1")).expect("a service");
    for outcome in score(&service, &["x"; 6]) {
        match &outcome {
            // Where the second answer comes late, it stands where the next sample's is waited for.
            RewardOutcome::Failed(_) => {
                let cause = cause(&outcome);
                assert!(cause.contains("answered twice") || cause.contains("instead of"), "{outcome:?}");
            }
            RewardOutcome::Scored { reward, .. } => assert_eq!(*reward, 1.0),
        }
    }
}

#[test]
fn components_stand_beside_the_score_under_its_name() {
    let script = format!(
        "while {READ} do printf '{{\"id\":%s,\"score\":0.5,\"components\":{{\"a\":2,\"b\":-1}}}}\\n' \"$id\"; done"
    );
    let components = format!(
        "{}, {{ kind = \"contains\", text = \"x\" }}",
        shell(&script, "parts", "name = \"mine\", weight = 3.0")
    );
    let service = service(&components).expect("a service");
    let RewardOutcome::Scored { reward, components } = &score(&service, &["x"])[0] else { panic!("a score") };
    let values: Vec<(&str, f64)> = components.iter().map(|c| (c.name.as_str(), c.value)).collect();
    assert_eq!((*reward, values), (2.5, vec![("mine", 0.5), ("contains", 1.0), ("mine/a", 2.0), ("mine/b", -1.0)]));
}

#[test]
fn a_program_is_told_what_there_is_to_know() {
    // Scores 1 where every part of the request is there.
    let parts = [
        r#""id":"4-7-4-0""#,
        r#""data_source":"test""#,
        r#""prompt":"a prompt""#,
        r#""response":"two\nlines \"quoted\"""#,
        r#""ground_truth":"truth""#,
        r#""extra_info":{"index":3}"#,
        r#""finish_reason":"stop""#,
        r#""num_response_tokens":18"#,
        r#""prompt_id":4"#,
    ];
    let tests: String = parts.iter().map(|part| format!("case $line in *'{part}'*) n=$((n + 1));; esac; ")).collect();
    let script = format!("while {READ} do n=0; {tests} printf '{{\"id\":%s,\"score\":%s}}\\n' \"$id\" $n; done");
    let service = service(&shell(&script, "told", "")).expect("a service");
    let outcomes = service.score(&[request(4, "two\nlines \"quoted\"")]).expect("a score");
    assert_eq!(outcomes[0].reward(), Some(parts.len() as f64));
}

#[test]
fn a_broken_reward_stops_the_run_early_and_says_why() {
    let script = format!("{READ} echo {READ_ERROR} >&2; exit 9");
    let component = shell(&script, "broken", "name = \"mine\", max_error_rate = 0.25, error_window = 8, workers = 2");
    let service = service(&component).expect("a service");
    let requests: Vec<_> = (0..1000).map(|index| request(index, "x")).collect();
    let error = service.score(&requests).expect_err("every sample fails").to_string();
    for part in
        ["reward `mine` is broken", "3 of the last 3 samples failed (100 %)", "max_error_rate = 0.25", READ_ERROR]
    {
        assert!(error.contains(part), "{error}\n  lacks: {part}");
    }
}

const READ_ERROR: &str = "no such table";

#[test]
fn samples_that_fail_now_and_then_stop_nothing() {
    let script = HONEST.replace("case $line", "case $line in *bad*) exit 1;; esac; case $line");
    let service =
        service(&shell(&script, "now-and-then", "max_error_rate = 0.5, error_window = 4")).expect("a service");
    let responses: Vec<&str> = (0..20).map(|i| if i % 2 == 0 { "good" } else { "bad" }).collect();
    let scored = score(&service, &responses).iter().filter(|o| o.reward().is_some()).count();
    assert_eq!(scored, 10);
}

#[test]
fn a_program_that_cannot_run_is_an_error_before_anything_is_scored() {
    for (component, part) in [
        (
            "{ kind = \"command\", command = [\"/nowhere/score\"] }",
            "reward component `command`: cannot run /nowhere/score",
        ),
        ("{ kind = \"command\", command = [\"no-such-program\"] }", "no program `no-such-program` in PATH"),
        ("{ kind = \"python\", path = \"nowhere.py\" }", "cannot read the Python file nowhere.py"),
    ] {
        let error = service(component).expect_err(component);
        assert!(error.contains(part), "{error}");
    }
}

/// Reads a request up to its end and gives its body.
fn read_body(stream: &mut impl Read) -> Option<String> {
    let mut bytes = Vec::new();
    loop {
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        bytes.push(byte[0]);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let len: usize = head.lines().find_map(|l| l.strip_prefix("Content-Length: "))?.parse().ok()?;
        if body.len() == len {
            return Some(body.to_owned());
        }
    }
}

#[test]
fn an_endpoint_scores_and_its_failures_are_named() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let body = read_body(&mut stream).unwrap_or_default();
            let (status, answer) = match () {
                () if body.contains("\"response\":\"good\"") => {
                    ("200 OK", "{\"score\": 1, \"components\": {\"a\": 2}}")
                }
                () if body.contains("\"response\":\"text\"") => ("200 OK", "fine"),
                () => ("503 Busy", "come back later"),
            };
            let length = answer.len();
            let _gone = write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n{answer}");
        }
    });
    let component = format!("{{ kind = \"http\", url = \"http://127.0.0.1:{port}/score\", workers = 3 }}");
    let service = service(&component).expect("a service");
    let outcomes = score(&service, &["good", "text", "good", "bad", "good"]);
    let rewards: Vec<_> = outcomes.iter().map(RewardOutcome::reward).collect();
    assert_eq!(rewards, [Some(1.0), None, Some(1.0), None, Some(1.0)]);
    assert!(cause(&outcomes[1]).contains("no JSON") && cause(&outcomes[3]).contains("status 503: `come back later`"));
    let nobody = crate::service("{ kind = \"http\", url = \"http://127.0.0.1:1/\" }").expect("a service");
    assert!(cause(&score(&nobody, &["x"])[0]).contains("refused"));
}
