//! `temper plan` and `temper bench calibrate`: with a fixed measurement the output is fixed; broken inputs say what
//! would be right. No test looks at a time.

use crate::support::{fail, run, succeed, write};
use serde_json::Value;
use std::path::{Path, PathBuf};

fn data(name: &str) -> String {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/plan").join(name);
    path.to_str().unwrap().to_owned()
}

fn plan(args: &[&str]) -> Vec<String> {
    let (recipe, cal) = (data("recipe.toml"), data("calibration.json"));
    ["plan", &recipe, "--calibration", &cal].iter().chain(args).map(|s| (*s).to_owned()).collect()
}

fn words(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

fn plan_json(args: &[&str]) -> Value {
    serde_json::from_str(&succeed(&words(&plan(&[args, &["--json"]].concat())))).unwrap()
}

/// The whole output, with the directory of the test's data taken out. `UPDATE_PLAN=1` writes it anew.
#[test]
fn the_output_is_that_of_the_measurement() {
    for (name, args) in [
        ("two-hosts.txt", vec!["--cluster".to_owned(), data("two-hosts.toml")]),
        ("devices.txt", vec!["--cluster".to_owned(), data("devices.toml"), "--limit".to_owned(), "3".to_owned()]),
    ] {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let got = succeed(&words(&plan(&args))).replace(&data(""), "");
        let path = data(name);
        if std::env::var_os("UPDATE_PLAN").is_some() {
            std::fs::write(&path, &got).unwrap();
        }
        let expected = std::fs::read_to_string(&path).unwrap();
        assert_eq!(
            got, expected,
            "{name}: `UPDATE_PLAN=1 cargo test -p temper-cli --test commands plan` writes it anew"
        );
    }
}

#[test]
fn json_says_the_same_as_the_table() {
    let args = ["--cluster", &data("two-hosts.toml"), "--all"];
    let report = plan_json(&args);
    let choices = report["choices"].as_array().unwrap();
    assert_eq!(choices.len() as u64, report["num_feasible"].as_u64().unwrap());
    let steps: Vec<f64> = choices.iter().map(|c| c["step_seconds"].as_f64().unwrap()).collect();
    assert!(steps.is_sorted(), "best first");
    let text = succeed(&words(&plan(&args)));
    assert_eq!(
        text.lines().filter(|line| line.contains("trainer rank") && line.contains('%')).count() - 1,
        steps.len()
    );
}

/// Every row's assignments make a recipe that `temper check` accepts.
#[test]
fn the_flags_of_every_kind_of_row_are_accepted() {
    let report = plan_json(&["--limit", "1000"]);
    let choices = report["choices"].as_array().unwrap();
    assert!(choices.len() >= 3);
    // Where this binary's recipes have no such key, nothing that needs it can be checked.
    let has_staleness = succeed(&["check", &data("recipe.toml"), "--resolved"]).contains("staleness");
    for choice in choices.iter().filter(|choice| has_staleness || choice["staleness"] == 0) {
        let mut args = vec!["check".to_owned(), data("recipe.toml")];
        for set in choice["set"].as_array().unwrap() {
            args.extend(["--set".to_owned(), set.as_str().unwrap().to_owned()]);
        }
        succeed(&words(&args));
    }
}

#[test]
fn broken_cluster_files_say_what_would_be_right() {
    let dir = tempfile::tempdir().unwrap();
    let host = "[[host]]\ncores = 2\nmemory_gib = 4\n";
    let cases = [
        ("", &["host", "at least one [[host]]"][..]),
        ("[host]\ncores = 2\n", &["cluster.toml:1", "[[host]]", "double brackets"]),
        ("[[hosts]]\ncores = 2\n", &["cluster.toml:1", "hosts", "[[host]]"]),
        ("[[host]]\ncores = 2\nmemory = 4\n", &["cluster.toml:3", "host.0.memory", "memory_gib"]),
        ("[[host]]\nmemory_gib = 4\n", &["host.0", "missing field `cores`"]),
        ("[[host]]\ncores = \"two\"\nmemory_gib = 4\n", &["cluster.toml:2", "host.0.cores"]),
        ("[[host]]\ncores = 0\nmemory_gib = 4\n", &["cluster.toml:2", "host.0.cores", "1 to 65536"]),
        ("[[host]]\ncores = 2\nmemory_gib = -4\n", &["cluster.toml:3", "host.0.memory_gib", "more than 0"]),
        ("[[host]]\ncores = 2\nmemory_gib = 4\ncount = 2000\n", &["cluster.toml:4", "host.0.count", "1024"]),
        ("[[host]]\ncores = \n", &["cluster.toml:2"]),
        ("[[host]]\ncores = 2\nmemory_gib = 4\n[host.device]\ntflops = 1\n", &["host.0.device", "memory_gib"]),
    ];
    for (text, parts) in cases {
        let path = write(dir.path(), "cluster.toml", text);
        fail(&words(&plan(&["--cluster", &path])), 2, parts);
    }
    let second = format!("{host}[[host]]\ncores = 2\nmemory_gib = 4\nnetwork_latency_us = -1\n");
    let path = write(dir.path(), "cluster.toml", &second);
    fail(&words(&plan(&["--cluster", &path])), 2, &["cluster.toml:7", "host.1.network_latency_us", "0 or more"]);
    fail(&words(&plan(&["--cluster", "nowhere.toml"])), 2, &["cannot read cluster file nowhere.toml"]);
}

#[test]
fn broken_calibrations_and_flags_say_what_would_be_right() {
    let dir = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(data("calibration.json")).unwrap();
    let cases = [
        ("\"format\": 2", "\"format\": 7", &["`format`", "measure again"][..]),
        ("\"engine_crowding\": 1.2", "\"engine_crowding\": 0", &["`engine_crowding`", "more than 0"]),
        ("\"size\": 256.0", "\"size\": 2.0", &["`start`", "ascending"]),
        ("\"hash_seconds\"", "\"hash_second\"", &["hash_second"]),
    ];
    for (from, to, parts) in cases {
        assert!(text.contains(from), "{from}");
        let path = write(dir.path(), "cal.json", &text.replacen(from, to, 1));
        fail(&["plan", &data("recipe.toml"), "--calibration", &path], 2, parts);
    }
    // Of another format: that is what is said, not that keys are missing.
    let mut older: Value = serde_json::from_str(&text).unwrap();
    older["format"] = 1.into();
    for key in ["tensor_threads", "tensor_sockets", "thread_crowding"] {
        older.as_object_mut().unwrap().remove(key).unwrap();
    }
    let path = write(dir.path(), "older.json", &older.to_string());
    let parts = ["`format`", "1: this binary reads 2; measure again"];
    fail(&["plan", &data("recipe.toml"), "--calibration", &path], 2, &parts);
    fail(&["plan", &data("recipe.toml"), "--calibration", "nowhere.json"], 2, &["cannot read nowhere.json"]);
    fail(&words(&plan(&["--stage", "nope"])), 2, &["nope", "grpo"]);
    fail(&words(&plan(&["--stage", "sft"])), 2, &["sft", "nothing to place"]);
    fail(&words(&plan(&["--response-tokens", "99"])), 2, &["--response-tokens", "max_new_tokens = 6"]);
    fail(&words(&plan(&["--limit", "0"])), 2, &["--limit 0"]);
    fail(&words(&plan(&["--set", "dtype=bf16"])), 2, &["f32", "bf16", "measure again"]);
}

/// A host that is too small: an empty list, and the reason.
#[test]
fn nothing_that_does_not_fit_is_listed() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), "small.toml", "[[host]]\nname = \"tiny\"\ncores = 2\nmemory_gib = 0.001\n");
    let report = plan_json(&["--cluster", &path]);
    assert_eq!(report["choices"].as_array().unwrap().len(), 0);
    let dropped = &report["dropped"][0];
    assert_eq!((&dropped["reason"], &dropped["least"]["place"]), (&"memory".into(), &"tiny".into()));
    let (_, text, _) = run(&words(&plan(&["--cluster", &path])));
    assert!(text.contains("nothing fits") && text.contains("on tiny, which has 1 MiB"), "{text}");
}

/// A measurement of a tiny model is whole, and a plan reads it.
#[test]
fn what_is_measured_can_be_planned_with() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("cal.json");
    let output = output.to_str().unwrap();
    succeed(&["bench", "calibrate", &data("recipe.toml"), "--output", output]);
    let text = succeed(&["plan", &data("recipe.toml"), "--calibration", output]);
    assert!(text.contains("best: ") && text.contains("runner-up: "), "{text}");
}
