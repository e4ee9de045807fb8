//! Rules for every text file, and the agreement of `.ci/run` with the README.

use crate::readme;
use anyhow::{Context, Result};
use regex::Regex;
use std::sync::LazyLock;

/// Largest tracked file in bytes.
const MAX_FILE_BYTES: usize = 2 << 20;
/// Extensions of files that people write, as opposed to data.
const WRITTEN: [&str; 5] = [".rs", ".toml", ".md", ".sh", ".ci/run"];
/// How `.ci/run` names the test command.
const TEST_COMMAND: &str = "TEST_COMMAND=";

/// Marks of unfinished work, spelt in two halves so that this file does not carry them.
const UNFINISHED: [&str; 4] = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X"), concat!("HA", "CK")];

static MACHINE_PATH: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r#"(?:^|[\s"'`(=:>])(?:/(?:home|root|Users|work|mnt|tmp/t)/\w|[A-Z]:\\Users\\)"#)
        .expect("the pattern is a constant")
});
static LINK: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\]\(([^)\s]+)\)").expect("the pattern is a constant"));
static WORD: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"\b[A-Z]+\b").expect("the pattern is a constant"));

/// A tracked file that is too large to be source.
pub fn check_size(path: &str, bytes: usize) -> Option<String> {
    (bytes > MAX_FILE_BYTES).then(|| format!("{path}: {bytes} bytes; at most {MAX_FILE_BYTES} in the repository"))
}

/// Check every line of a text file.
pub fn check_lines(path: &str, content: &str) -> Vec<String> {
    let mut findings = Vec::new();
    if !WRITTEN.iter().any(|extension| path.ends_with(extension)) {
        return findings;
    }
    for (number, line) in content.lines().enumerate() {
        let mut find = |what: &str| findings.push(format!("{path}:{}: {what}", number + 1));
        if line.ends_with([' ', '\t', '\r']) {
            find("white space at the end of the line");
        }
        if line.contains('\t') {
            find("a tab");
        }
        if MACHINE_PATH.is_match(line) {
            find("a path of one machine");
        }
        if let Some(word) = WORD.find_iter(line).find(|word| UNFINISHED.contains(&word.as_str())) {
            find(&format!("unfinished work: {}", word.as_str()));
        }
    }
    if !content.is_empty() && !content.ends_with('\n') {
        findings.push(format!("{path}: no line break at the end"));
    }
    findings
}

/// Links of a Markdown file to files of the repository lead somewhere. `exists` is asked from the file's directory.
pub fn check_links(path: &str, content: &str, exists: impl Fn(&str) -> bool) -> Vec<String> {
    if !path.ends_with(".md") {
        return Vec::new();
    }
    let links = LINK.captures_iter(content).map(|found| found.extract::<1>().1[0]);
    let local =
        links.filter(|link| !link.contains("://") && !link.starts_with(['#', '<']) && !link.starts_with("mailto:"));
    let missing = local.filter(|link| !exists(link.split('#').next().unwrap_or(link)));
    missing.map(|link| format!("{path}: the link to `{link}` leads nowhere")).collect()
}

/// `.ci/run` runs the test command that the README tells a newcomer to run.
pub fn check_test_command(ci: &str, readme: &str) -> Result<Vec<String>> {
    let line = ci.lines().find_map(|line| line.strip_prefix(TEST_COMMAND));
    let command = line.with_context(|| format!(".ci/run has no line `{TEST_COMMAND}...`"))?.trim_matches('"');
    let blocks = readme::blocks(readme)?;
    let is_told = blocks.iter().any(|block| block.script.lines().any(|line| line.trim() == command));
    let finding =
        format!("README.md: no `sh` block has the line `{command}`, which .ci/run takes for the test command");
    Ok(if is_told { Vec::new() } else { vec![finding] })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planted_violations_are_found() {
        let user_path = format!("see /{}/me/x", "home");
        for (line, part) in [
            ("let x = 1; ", "white space"),
            ("\tlet x = 1;", "a tab"),
            (user_path.as_str(), "a path of one machine"),
            (concat!("// TO", "DO: finish"), "unfinished work"),
        ] {
            let found = check_lines("a/src/x.rs", &format!("fine\n{line}\n"));
            assert!(found.len() == 1 && found[0].contains(part), "{line:?}: {found:?}");
            assert!(found[0].starts_with("a/src/x.rs:2: "), "{found:?}");
            assert_eq!(check_lines("a/data/x.jsonl", line), Vec::<String>::new());
        }
        assert_eq!(check_lines("a.md", "no line break").len(), 1);
        assert_eq!(
            check_lines("a.md", concat!("https://x.org/ho", "me/page and a/wo", "rk/b\n")),
            Vec::<String>::new()
        );
        assert!(check_size("a.bin", MAX_FILE_BYTES + 1).is_some() && check_size("a.bin", 10).is_none());
    }

    #[test]
    fn links_lead_to_files() {
        let content = "[a](A.md) [b](docs/b.md#part) [c](https://x.org) [d](#here) [e](gone.md)\n";
        let found = check_links("README.md", content, |link| ["A.md", "docs/b.md"].contains(&link));
        assert_eq!(found, ["README.md: the link to `gone.md` leads nowhere"]);
        assert_eq!(check_links("x.rs", content, |_| false), Vec::<String>::new());
    }

    #[test]
    fn the_readme_tells_the_command_that_ci_runs() {
        let ci = "#!/usr/bin/env bash\nTEST_COMMAND=\"cargo test\"\n";
        assert_eq!(check_test_command(ci, "```sh\ncargo test\n```\n").unwrap(), Vec::<String>::new());
        assert_eq!(check_test_command(ci, "```sh\ncargo test --all\n```\n").unwrap().len(), 1);
        assert!(check_test_command("cargo test\n", "").is_err());
    }
}
