//! House rules over every tracked file, as `STYLE.md` states them.

mod manifests;
mod rust;
mod source;
mod text;

use crate::tracked_files;
use anyhow::{Context, Result};
use source::Source;
use std::path::Path;

/// Check every tracked file of the repository at `root`; findings are `path:line: what`, in the order of paths.
pub fn run(root: &Path) -> Result<Vec<String>> {
    let mut findings = Vec::new();
    for path in tracked_files(root)? {
        let bytes = std::fs::read(root.join(&path)).with_context(|| format!("cannot read {path}"))?;
        findings.extend(text::check_size(&path, bytes.len()));
        if let Ok(content) = String::from_utf8(bytes) {
            findings.extend(check_file(&path, &content)?);
            let directory = root.join(&path).parent().map(Path::to_owned).unwrap_or_default();
            findings.extend(text::check_links(&path, &content, |link| directory.join(link).exists()));
        }
    }
    let read = |path: &str| std::fs::read_to_string(root.join(path));
    match (read(".ci/run"), read("README.md")) {
        (Ok(ci), Ok(readme)) => findings.extend(text::check_test_command(&ci, &readme)?),
        (ci, readme) => {
            let missing = [(".ci/run", ci.is_err()), ("README.md", readme.is_err())];
            findings
                .extend(missing.iter().filter(|(_, is_missing)| *is_missing).map(|(p, _)| format!("{p}: is missing")));
        }
    }
    Ok(findings)
}

fn check_file(path: &str, content: &str) -> Result<Vec<String>> {
    let mut findings = text::check_lines(path, content);
    if path.ends_with(".rs") && !source::is_generated(content) {
        findings.extend(rust::check(&Source::new(path, content)));
    }
    if path.ends_with("/Cargo.toml") {
        let manifest = toml::from_str(content).with_context(|| format!("{path} is no TOML"))?;
        findings.extend(manifests::check(path, &manifest));
    }
    Ok(findings)
}
