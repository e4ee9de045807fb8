//! The layer check: a crate imports only lower layers, and siblings never import each other.
//!
//! The table below is the design's: L0 types, telemetry · L1 tensor, collective, data, proto, algos · L2 actor ·
//! L3 rollout, reward, trainer · L4 controller · L5 cli, tests, benches, xtask. testkit is a dev-dependency only.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::path::Path;
use std::process::Command;

/// What a crate of the workspace may import of the others.
const ALLOWED: &[(&str, &[&str])] = &[
    ("temper-types", &[]),
    ("temper-telemetry", &[]),
    ("temper-tensor", &["temper-types", "temper-telemetry"]),
    ("temper-collective", &["temper-types", "temper-telemetry"]),
    ("temper-data", &["temper-types", "temper-telemetry"]),
    ("temper-proto", &["temper-types", "temper-telemetry"]),
    ("temper-algos", &["temper-types"]),
    ("temper-testkit", &["temper-types"]),
    ("temper-actor", &["temper-types", "temper-telemetry", "temper-tensor"]),
    (
        "temper-rollout",
        &[
            "temper-types",
            "temper-telemetry",
            "temper-tensor",
            "temper-data",
            "temper-proto",
            "temper-actor",
            "temper-collective",
        ],
    ),
    (
        "temper-reward",
        &["temper-types", "temper-telemetry", "temper-tensor", "temper-data", "temper-proto", "temper-actor"],
    ),
    (
        "temper-trainer",
        &[
            "temper-types",
            "temper-telemetry",
            "temper-tensor",
            "temper-data",
            "temper-proto",
            "temper-actor",
            "temper-collective",
            "temper-algos",
        ],
    ),
    ("temper-controller", &["temper-types", "temper-telemetry", "temper-proto", "temper-data", "temper-algos"]),
    ("xtask", &[]),
];

/// Programs of the top layer: they import what they like, but not each other.
const TOP: &[&str] = &["temper-cli", "temper-tests", "temper-benches"];
const TESTKIT: &str = "temper-testkit";

/// A dependency between two crates of the workspace.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Edge {
    from: String,
    to: String,
    is_dev: bool,
}

/// Check the workspace at `root`; findings are one line each.
pub fn run(root: &Path) -> Result<Vec<String>> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .current_dir(root)
        .output()
        .context("cannot start `cargo metadata`")?;
    ensure!(output.status.success(), "`cargo metadata` failed: {}", String::from_utf8_lossy(&output.stderr));
    check_metadata(&serde_json::from_slice(&output.stdout).context("`cargo metadata` wrote no JSON")?)
}

fn check_metadata(metadata: &Value) -> Result<Vec<String>> {
    let packages = metadata["packages"].as_array().context("metadata has no `packages`")?;
    let names: Vec<&str> = packages.iter().filter_map(|package| package["name"].as_str()).collect();
    let mut findings: Vec<String> = names
        .iter()
        .filter(|name| !has_layer(name))
        .map(|name| format!("{name}: has no layer; add it to the table"))
        .collect();
    for package in packages {
        let from = package["name"].as_str().context("a package has no name")?;
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let to = dependency["name"].as_str().context("a dependency has no name")?;
            if !names.contains(&to) {
                continue;
            }
            let edge = Edge { from: from.to_owned(), to: to.to_owned(), is_dev: dependency["kind"] == "dev" };
            findings.extend(forbidden(&edge));
        }
    }
    Ok(findings)
}

fn has_layer(name: &str) -> bool {
    TOP.contains(&name) || ALLOWED.iter().any(|(known, _)| *known == name)
}

/// Why an edge must not be, if so.
fn forbidden(edge: &Edge) -> Option<String> {
    let Edge { from, to, is_dev } = edge;
    if to == TESTKIT {
        let fine = *is_dev || from == "temper-tests";
        return (!fine).then(|| format!("{from} -> {to}: testkit is a dev-dependency only"));
    }
    if TOP.contains(&from.as_str()) {
        let is_sibling = TOP.contains(&to.as_str()) || to == "xtask";
        // A program's tests may start another program; its code may not import one.
        return (is_sibling && !is_dev)
            .then(|| format!("{from} -> {to}: programs of the top layer do not import each other"));
    }
    let allowed = ALLOWED.iter().find(|(name, _)| name == from).map_or(&[][..], |(_, allowed)| allowed);
    let may_be = if allowed.is_empty() { "no crate of the workspace".to_owned() } else { allowed.join(", ") };
    (!allowed.contains(&to.as_str())).then(|| format!("{from} -> {to}: forbidden edge; {from} may import {may_be}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn graph(edges: &[(&str, &str, Option<&str>)]) -> Value {
        let mut names: Vec<&str> = edges.iter().flat_map(|(from, to, _)| [*from, *to]).collect();
        names.sort_unstable();
        names.dedup();
        let package = |name: &&str| {
            let own = edges.iter().filter(|(from, ..)| from == name);
            let dependencies: Vec<Value> = own.map(|(_, to, kind)| json!({ "name": to, "kind": kind })).collect();
            json!({ "name": name, "dependencies": dependencies })
        };
        json!({ "packages": names.iter().map(package).collect::<Vec<_>>() })
    }

    fn findings(edges: &[(&str, &str, Option<&str>)]) -> Vec<String> {
        check_metadata(&graph(edges)).expect("the fabricated graph is metadata")
    }

    #[test]
    fn the_design_s_edges_pass() {
        let edges = [
            ("temper-actor", "temper-tensor", None),
            ("temper-trainer", "temper-algos", None),
            ("temper-rollout", "temper-actor", None),
            ("temper-controller", "temper-data", None),
            ("temper-cli", "temper-trainer", None),
            ("temper-trainer", "temper-testkit", Some("dev")),
            ("temper-tests", "temper-cli", Some("dev")),
        ];
        assert_eq!(findings(&edges), Vec::<String>::new());
    }

    #[test]
    fn every_planted_forbidden_edge_is_found() {
        for (from, to, kind) in [
            ("temper-rollout", "temper-trainer", None),
            ("temper-reward", "temper-rollout", None),
            ("temper-trainer", "temper-rollout", Some("dev")),
            ("temper-controller", "temper-actor", None),
            ("temper-controller", "temper-tensor", None),
            ("temper-algos", "temper-tensor", None),
            ("temper-algos", "temper-data", None),
            ("temper-tensor", "temper-data", None),
            ("temper-types", "temper-telemetry", None),
            ("temper-tensor", "temper-actor", Some("build")),
            ("temper-actor", "temper-controller", None),
            ("temper-actor", "temper-testkit", None),
            ("temper-cli", "xtask", None),
            ("xtask", "temper-types", None),
        ] {
            let found = findings(&[(from, to, kind)]);
            assert_eq!(found.len(), 1, "{from} -> {to}: {found:?}");
            assert!(found[0].starts_with(&format!("{from} -> {to}: ")), "{found:?}");
        }
    }

    #[test]
    fn a_crate_without_a_layer_is_found() {
        let found = findings(&[("temper-magic", "temper-types", None)]);
        assert!(found[0].starts_with("temper-magic: has no layer"), "{found:?}");
    }
}
