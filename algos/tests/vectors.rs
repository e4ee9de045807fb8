//! Every algorithm against numbers that the peers' own code produced, through the path of `temper algos eval`.

use serde_json::Value;
use std::path::{Path, PathBuf};

/// Relative and absolute tolerance.
#[derive(Clone, Copy)]
struct Tolerance {
    relative: f64,
    absolute: f64,
}

const F64: Tolerance = Tolerance { relative: 1e-6, absolute: 1e-9 };
const F32: Tolerance = Tolerance { relative: 1e-5, absolute: 1e-6 };
/// Whitening of near-constant rows divides rounding errors of f32 by a tiny deviation.
const WHITENED: Tolerance = Tolerance { relative: 1e-5, absolute: 1e-4 };

/// Why a key of a vector is not compared, where it is not.
const NOT_COMPARED: &[(&str, &str, &str, &str)] = &[];

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors")
}

fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(n) => n.as_f64(),
        Value::Bool(flag) => Some(f64::from(u8::from(*flag))),
        Value::String(text) => match text.as_str() {
            "NaN" => Some(f64::NAN),
            "Infinity" => Some(f64::INFINITY),
            "-Infinity" => Some(f64::NEG_INFINITY),
            _ => None,
        },
        _ => None,
    }
}

/// Compare two values; masked positions are skipped where `mask` is given. Failures are described in `failures`.
fn compare(
    at: &str,
    expected: &Value,
    got: &Value,
    mask: Option<&Value>,
    tolerance: Tolerance,
    failures: &mut Vec<String>,
) {
    match (expected, got) {
        (Value::Array(a), Value::Array(b)) => {
            if a.len() != b.len() {
                failures.push(format!("{at}: expected {} entries, got {}", a.len(), b.len()));
                return;
            }
            for (i, (x, y)) in a.iter().zip(b).enumerate() {
                let mask = mask.and_then(|m| m.as_array()).map(|m| &m[i]);
                compare(&format!("{at}[{i}]"), x, y, mask, tolerance, failures);
            }
        }
        (Value::Object(a), Value::Object(b)) if a.contains_key("error") && b.contains_key("error") => {}
        (Value::Object(a), Value::Object(b)) => {
            for (key, x) in a {
                match b.get(key) {
                    Some(y) => compare(&format!("{at}.{key}"), x, y, None, F32, failures),
                    None => failures.push(format!("{at}.{key}: missing")),
                }
            }
        }
        _ => {
            if mask.and_then(number) == Some(0.0) {
                return;
            }
            let equal = match (number(expected), number(got)) {
                (Some(x), Some(y)) if x.is_nan() || y.is_nan() => x.is_nan() && y.is_nan(),
                (Some(x), Some(y)) => x == y || (x - y).abs() <= tolerance.absolute + tolerance.relative * x.abs(),
                _ => expected == got,
            };
            if !equal {
                failures.push(format!("{at}: expected {expected}, got {got}"));
            }
        }
    }
}

/// The mask that says which entries of an output are defined, where the peer leaves others as they fall.
fn mask_of<'a>(file: &str, key: &str, case: &'a Value) -> Option<&'a Value> {
    match (file, key) {
        ("verl_adv_gae", "advantages" | "returns") => case["inputs"].get("response_mask"),
        ("verl_masked_ops", "masked_whiten" | "masked_whiten_no_shift") => case["inputs"].get("mask"),
        _ => None,
    }
}

fn tolerance_of(file: &str, key: &str, case: &Value) -> Tolerance {
    if file == "verl_adv_gdpo" || file == "verl_adv_reinforce_plus_plus_baseline" && key == "advantages" {
        return WHITENED;
    }
    if case["dtype"] == "float32" || key.contains("frac") || key == "accuracy" { F32 } else { F64 }
}

/// All differences of one file, and the number of its cases.
fn check_file(path: &Path) -> (usize, Vec<String>) {
    let file = path.file_stem().expect("a file name").to_string_lossy().into_owned();
    let document: Value = serde_json::from_str(&std::fs::read_to_string(path).expect("readable")).expect("JSON");
    let results = match temper_algos::eval::eval_file(&document) {
        Ok(results) => results,
        Err(error) => return (0, vec![format!("{file}: {error}")]),
    };
    let cases = document["cases"].as_array().expect("cases");
    let mut failures = Vec::new();
    for (i, case) in cases.iter().enumerate() {
        let result = &results["cases"][i];
        let name = case["name"].as_str().expect("a name");
        assert_eq!(result["name"], case["name"], "{file}: order of cases");
        let at = format!("{file}, case {i} `{name}`");
        if case["outputs"].get("error").is_some() {
            check_error(&file, &at, result, &mut failures);
            continue;
        }
        if let Some(error) = result["outputs"].get("error") {
            failures.push(format!("{at}: {error}"));
            continue;
        }
        for part in ["outputs", "grads"] {
            let Some(expected) = case.get(part).and_then(Value::as_object) else { continue };
            for (key, value) in expected {
                if NOT_COMPARED.iter().any(|(f, n, k, _)| *f == file && name.starts_with(n) && k == key) {
                    continue;
                }
                let at = format!("{at}, {part}.{key}");
                let Some(got) = result[part].get(key) else {
                    failures.push(format!("{at}: missing"));
                    continue;
                };
                compare(&at, value, got, mask_of(&file, key, case), tolerance_of(&file, key, case), &mut failures);
            }
        }
    }
    (cases.len(), failures)
}

/// Where the peer raises, so do we; but for one bug of a peer's metric.
fn check_error(file: &str, at: &str, result: &Value, failures: &mut Vec<String>) {
    let refused = result["outputs"].get("error").is_some();
    if refused == (file == "verl_rollout_is_weights") {
        failures.push(format!("{at}: refused = {refused}, got {}", result["outputs"]));
    }
}

#[test]
fn all_vectors_agree_with_the_peers() {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(directory()).expect("vectors").map(|entry| entry.expect("entry").path()).collect();
    files.sort();
    let (mut num_cases, mut failures, mut failing) = (0, Vec::new(), Vec::new());
    for path in &files {
        let (cases, wrong) = check_file(path);
        num_cases += cases;
        if !wrong.is_empty() {
            failing.push(format!("{} ({})", path.file_stem().expect("a name").to_string_lossy(), wrong.len()));
        }
        failures.extend(wrong.into_iter().take(4));
    }
    assert!(
        failures.is_empty(),
        "{} of {} files differ: {}\n{}",
        failing.len(),
        files.len(),
        failing.join(", "),
        failures.join("\n")
    );
    assert_eq!((files.len(), num_cases), (72, 958));
}
