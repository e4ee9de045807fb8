//! Differences from the peers' code that the reference vectors do not show: one case each, numbers from the peers'.

use serde_json::{Value, json};

fn compare(at: &str, expected: &Value, got: &Value) {
    match (expected, got) {
        (Value::Array(a), Value::Array(b)) => {
            assert_eq!(a.len(), b.len(), "{at}");
            a.iter().zip(b).enumerate().for_each(|(i, (x, y))| compare(&format!("{at}[{i}]"), x, y));
        }
        (Value::Object(a), Value::Object(_)) => {
            a.iter().for_each(|(key, x)| compare(&format!("{at}.{key}"), x, &got[key]));
        }
        _ => {
            let numbers = expected.as_f64().zip(got.as_f64());
            let close = numbers.is_some_and(|(x, y)| (x - y).abs() <= 1e-6 * (x.abs() + 1.0));
            assert!(close, "{at}: expected {expected}, got {got}");
        }
    }
}

#[test]
fn cases_beyond_the_vectors_agree_with_the_peers() {
    let documents: Vec<Value> = serde_json::from_str(include_str!("beyond_vectors.json")).expect("JSON");
    for document in &documents {
        let results = temper_algos::eval::eval_file(document).expect("a known function");
        for (i, case) in document["cases"].as_array().expect("cases").iter().enumerate() {
            let (at, got) = (case["name"].as_str().expect("a name"), &results["cases"][i]);
            if case["outputs"].get("error").is_some() {
                assert!(got["outputs"].get("error").is_some(), "{at}: {got}");
                continue;
            }
            compare(at, &case["outputs"], &got["outputs"]);
            compare(at, &case["grads"], &got["grads"]);
        }
    }
}

#[test]
fn a_parameter_that_the_function_does_not_read_is_named() {
    let inputs = json!({"loss_mat": [[1.0]], "loss_mask": [[1]]});
    let case = |params: Value| json!({"name": "typo", "inputs": inputs, "params": params});
    let cases = [case(json!({"loss_agg_mod": "token-sum"})), case(json!({"loss_agg_mode": "token-sum"}))];
    let document = json!({"source": "verl", "function": "agg_loss", "cases": cases});
    let results = temper_algos::eval::eval_file(&document).expect("a known function");
    assert_eq!(results["cases"][0]["unread_params"], json!(["loss_agg_mod"]));
    assert_eq!(results["cases"][1].get("unread_params"), None);
}

#[test]
fn settings_may_be_written_as_text() {
    let inputs = json!({"p0": [0.5, -0.5], "g": [[0.1, 0.2]]});
    let adam = |betas: Value, amsgrad: Value| {
        let params = json!({"optimizer": "AdamW", "lr": 0.1, "betas": betas, "eps": 1e-8, "weight_decay": 0.01, "amsgrad": amsgrad});
        json!({"name": "AdamW", "inputs": inputs, "params": params})
    };
    let cases = [adam(json!([0.9, 0.99]), json!(true)), adam(json!(["0.9", "0.99"]), json!("True"))];
    let document = json!({"source": "torch", "function": "torch.optim.AdamW", "cases": cases});
    let results = temper_algos::eval::eval_file(&document).expect("a known function");
    assert!(results["cases"][0]["outputs"].get("error").is_none(), "{results}");
    assert_eq!(results["cases"][0]["outputs"], results["cases"][1]["outputs"]);
    let none =
        json!({"source": "torch", "function": "torch.optim.AdamW", "cases": [adam(json!(["a", 1]), json!(false))]});
    let results = temper_algos::eval::eval_file(&none).expect("a known function");
    assert!(results["cases"][0]["outputs"]["error"]["message"].as_str().is_some_and(|m| m.contains("betas")));
}

#[test]
fn a_parameter_of_a_nested_table_that_the_function_does_not_read_is_named() {
    let inputs = json!({"loss_mat": [[1.0]], "loss_mask": [[1]]});
    let info = json!({"dp_size": 2, "batch_num_tokens": 4, "batch_num_token": 4});
    let case = json!({"name": "typo", "inputs": inputs, "params": {"global_batch_info": info}});
    let unknown = json!({"name": "table", "inputs": inputs, "params": {"batch_info": {"dp_size": 2}}});
    let document = json!({"source": "verl", "function": "agg_loss", "cases": [case, unknown]});
    let results = temper_algos::eval::eval_file(&document).expect("a known function");
    assert_eq!(results["cases"][0]["unread_params"], json!(["global_batch_info.batch_num_token"]));
    assert_eq!(results["cases"][1]["unread_params"], json!(["batch_info"]));
}
