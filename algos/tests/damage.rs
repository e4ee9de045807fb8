//! Damaged documents: whatever is missing, cut short or of another kind, `eval` answers and does not panic.

use serde_json::{Value, json};
use std::path::Path;

fn documents() -> Vec<(String, Value)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors");
    let read = |path: std::path::PathBuf| {
        let text = std::fs::read_to_string(&path).expect("readable");
        (path.file_stem().expect("a name").to_string_lossy().into_owned(), serde_json::from_str(&text).expect("JSON"))
    };
    let mut files: Vec<_> =
        std::fs::read_dir(directory).expect("vectors").map(|entry| entry.expect("entry").path()).collect();
    files.sort();
    files.into_iter().map(read).collect()
}

/// Every array cut by its last entry, at every depth on the way down the first entries.
fn shortened(value: &Value) -> Vec<Value> {
    let Value::Array(items) = value else { return Vec::new() };
    let mut out = vec![json!(items[..items.len().saturating_sub(1)]), json!([])];
    if let Some(first) = items.first() {
        for inner in shortened(first) {
            let mut copy = items.clone();
            copy[0] = inner;
            out.push(Value::Array(copy));
        }
    }
    out
}

fn damaged(case: &Value) -> Vec<Value> {
    let mut out = Vec::new();
    for part in ["inputs", "params"] {
        let Some(table) = case[part].as_object() else { continue };
        for (key, value) in table {
            let mut replacements = vec![Value::Null, json!("x"), json!(-1.0), json!(1e30), json!([[1.0]]), json!({})];
            replacements.extend(shortened(value));
            for replacement in replacements {
                let mut copy = case.clone();
                copy[part][key] = replacement;
                out.push(copy);
            }
            let mut copy = case.clone();
            copy[part].as_object_mut().expect("a table").remove(key);
            out.push(copy);
        }
    }
    out
}

#[test]
fn damaged_cases_are_answered() {
    let mut panics = std::collections::BTreeMap::new();
    for (file, document) in documents() {
        // The first case of every kind is enough to reach every line.
        let mut seen = std::collections::HashSet::new();
        for case in document["cases"].as_array().expect("cases") {
            let kind = case["name"].as_str().expect("a name").split('/').next().unwrap_or("").to_owned();
            if !seen.insert(kind.clone()) {
                continue;
            }
            for damaged in damaged(case) {
                let copy = json!({
                    "source": document["source"], "function": document["function"], "cases": [damaged.clone()]
                });
                let answered = std::panic::catch_unwind(|| temper_algos::eval::eval_file(&copy).map(|_| ()));
                match answered {
                    Ok(result) => assert!(result.is_ok(), "{file} {kind}: {result:?}"),
                    Err(_) => {
                        panics.entry(format!("{file} {kind}")).or_insert(damaged.to_string());
                    }
                }
            }
        }
    }
    assert!(panics.is_empty(), "these panic: {:#?}", panics.keys());
}

#[test]
fn damaged_documents_are_refused_by_name() {
    let good = json!({"source": "verl 0.9.1 core_algos", "function": "agg_loss", "cases": []});
    assert!(temper_algos::eval::eval_file(&good).is_ok());
    for key in ["source", "function", "cases"] {
        let mut bad = good.clone();
        bad[key] = json!(3);
        let error = temper_algos::eval::eval_file(&bad).expect_err("damaged").to_string();
        assert!(error.contains(key), "{error}");
    }
    let unknown = json!({"source": "verl", "function": "no_such_function", "cases": []});
    let error = temper_algos::eval::eval_file(&unknown).expect_err("unknown").to_string();
    assert!(error.contains("no_such_function"), "{error}");
}
