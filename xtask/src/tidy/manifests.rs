//! Rules for the manifests of the crates.

use toml::{Table, Value};

const DEPENDENCIES: [&str; 3] = ["dependencies", "dev-dependencies", "build-dependencies"];
const INHERITED: [&str; 5] = ["version", "edition", "rust-version", "license", "publish"];

/// Check one crate's manifest: lints, package facts and versions all come from the workspace.
pub fn check(path: &str, manifest: &Table) -> Vec<String> {
    let mut findings = Vec::new();
    if !is_inherited(manifest.get("lints")) {
        findings.push(format!("{path}: `[lints] workspace = true` is missing"));
    }
    let package = manifest.get("package").and_then(Value::as_table);
    for key in INHERITED {
        if !is_inherited(package.and_then(|package| package.get(key))) {
            findings.push(format!("{path}: `{key}.workspace = true` is missing"));
        }
    }
    let targets = manifest.get("target").and_then(Value::as_table);
    let tables =
        std::iter::once(manifest).chain(targets.into_iter().flat_map(Table::values).filter_map(Value::as_table));
    for table in tables {
        for dependencies in DEPENDENCIES.iter().filter_map(|name| table.get(*name)?.as_table()) {
            let own = dependencies.iter().filter(|(_, value)| !is_inherited(Some(value)));
            findings
                .extend(own.map(|(name, _)| format!("{path}: `{name}` takes its version from the workspace manifest")));
        }
    }
    findings
}

fn is_inherited(value: Option<&Value>) -> bool {
    value.and_then(|value| value.get("workspace")).and_then(Value::as_bool) == Some(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "[package]\nname = \"a\"\nversion.workspace = true\nedition.workspace = true\n\
        rust-version.workspace = true\nlicense.workspace = true\npublish.workspace = true\n\
        [lints]\nworkspace = true\n[dependencies]\nserde.workspace = true\n";

    fn findings(manifest: &str) -> Vec<String> {
        check("a/Cargo.toml", &toml::from_str(manifest).expect("the test's manifest is TOML"))
    }

    #[test]
    fn everything_comes_from_the_workspace() {
        assert_eq!(findings(GOOD), Vec::<String>::new());
        for (from, to, part) in [
            ("[lints]\nworkspace = true\n", "", "[lints]"),
            ("version.workspace", "version = \"1\"\nv.workspace", "`version.workspace = true`"),
            ("serde.workspace = true", "serde = \"1\"", "`serde` takes"),
            ("serde.workspace = true", "serde = { path = \"../serde\" }", "`serde` takes"),
            ("[dependencies]", "[target.'cfg(unix)'.dependencies]\nlibc = \"0.2\"\n[dev-dependencies]", "`libc` takes"),
        ] {
            let found = findings(&GOOD.replacen(from, to, 1));
            assert!(found.len() == 1 && found[0].contains(part), "{from}: {found:?}");
        }
    }
}
