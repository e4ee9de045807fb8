//! The commands of README.md are commands: every `sh` block parses, and those marked are run as written.
//!
//! A block is run where the line before its fence is `<!-- ci: run -->`. Each marked block is a script of its own, run
//! by `bash -euo pipefail -c` from the root of a copy of the tracked files: what a newcomer has after cloning, without
//! the runs and models that lie in a working copy. The copy shares the build directory but does not lie in it: cargo
//! would take what it built from files in there for what it builds from the working copy, whatever is changed in that.

use crate::tracked_files;
use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tempfile::TempDir;

/// The line before a block that is run.
const RUN_MARK: &str = "<!-- ci: run -->";
/// The longest that one block may take, in seconds.
const BLOCK_TIMEOUT_SECONDS: &str = "1200";

/// A fenced `sh` block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Line of its first command, from 1.
    pub line: usize,
    /// Its text.
    pub script: String,
    /// Whether it is marked to run.
    pub is_run: bool,
}

/// Parse every block and run the marked ones.
pub fn run(root: &Path) -> Result<()> {
    let text = std::fs::read_to_string(root.join("README.md")).context("cannot read README.md")?;
    let blocks = blocks(&text)?;
    let target = target_directory(root);
    for block in &blocks {
        parse(block).with_context(|| format!("README.md:{}: does not parse", block.line))?;
    }
    let num_run = blocks.iter().filter(|block| block.is_run).count();
    let copy = copy_tracked_files(root)?;
    for block in blocks.iter().filter(|block| block.is_run) {
        println!("README.md:{}: running\n{}", block.line, block.script.trim_end());
        execute(block, copy.path(), &target).with_context(|| format!("README.md:{}: failed", block.line))?;
    }
    println!("readme: ok ({} blocks parsed, {num_run} run)", blocks.len());
    Ok(())
}

/// A fresh copy of the tracked files, as they stand in the working copy.
fn copy_tracked_files(root: &Path) -> Result<TempDir> {
    let copy = TempDir::with_prefix("temper-readme-").context("cannot create a temporary directory")?;
    for path in tracked_files(root)? {
        let to = copy.path().join(&path);
        std::fs::create_dir_all(to.parent().context("a tracked path has no parent")?)?;
        std::fs::copy(root.join(&path), &to).with_context(|| format!("cannot copy {path}"))?;
    }
    Ok(copy)
}

fn target_directory(root: &Path) -> PathBuf {
    root.join(std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}

/// Check that bash can read a block, without running it.
fn parse(block: &Block) -> Result<()> {
    let output = Command::new("bash").args(["-n", "-c", &block.script]).output().context("cannot start bash")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim_end());
    Ok(())
}

/// Run a block in `directory`, building into `target`.
fn execute(block: &Block, directory: &Path, target: &Path) -> Result<()> {
    let status = Command::new("timeout")
        .args(["--foreground", BLOCK_TIMEOUT_SECONDS, "bash", "-euo", "pipefail", "-c", &block.script])
        .current_dir(directory)
        .env("CARGO_TARGET_DIR", target)
        .stdin(Stdio::null())
        .status()
        .context("cannot start `timeout bash`")?;
    ensure!(status.code() != Some(124), "still running after {BLOCK_TIMEOUT_SECONDS} s");
    ensure!(status.success(), "bash ended with {status}");
    Ok(())
}

/// The `sh` blocks of a Markdown text.
///
/// # Errors
/// A fence that is not closed, or a mark that no block follows.
pub fn blocks(text: &str) -> Result<Vec<Block>> {
    let mut blocks = Vec::new();
    let mut lines = text.lines().enumerate();
    let mut is_marked = false;
    while let Some((number, line)) = lines.next() {
        let line = line.trim();
        if line.starts_with("```") {
            let mut script = String::new();
            loop {
                match lines.next() {
                    Some((_, inside)) if inside.trim_end() == "```" => break,
                    Some((_, inside)) => script.extend([inside, "\n"]),
                    None => bail!("README.md:{}: the block is not closed", number + 1),
                }
            }
            let is_shell = matches!(line, "```sh" | "```bash");
            ensure!(is_shell || !is_marked, "README.md:{}: the block marked to run is no `sh` block", number + 1);
            if is_shell {
                blocks.push(Block { line: number + 2, script, is_run: is_marked });
            }
            is_marked = false;
        } else if line == RUN_MARK {
            is_marked = true;
        } else {
            ensure!(!is_marked, "README.md:{}: `{RUN_MARK}` is not followed by a block", number);
        }
    }
    ensure!(!is_marked, "README.md: the last `{RUN_MARK}` is not followed by a block");
    Ok(blocks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shell_blocks_are_found_and_marked() {
        let text = "a\n```sh\necho 1\n```\n```toml\nx = 1\n```\n<!-- ci: run -->\n```sh\necho 2\necho 3\n```\n";
        let found = blocks(text).unwrap();
        assert_eq!(
            found,
            [
                Block { line: 3, script: "echo 1\n".to_owned(), is_run: false },
                Block { line: 10, script: "echo 2\necho 3\n".to_owned(), is_run: true },
            ]
        );
    }

    #[test]
    fn a_mark_without_a_block_and_an_open_fence_are_errors() {
        for text in
            ["<!-- ci: run -->\ntext\n", "<!-- ci: run -->", "```sh\necho 1\n", "<!-- ci: run -->\n```toml\n```\n"]
        {
            assert!(blocks(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_failing_block_is_an_error_and_a_passing_one_is_not() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let block = |script: &str| Block { line: 1, script: script.to_owned(), is_run: true };
        assert!(execute(&block("test -f Cargo.toml\n"), root, root).is_ok());
        assert!(execute(&block("false\ntrue\n"), root, root).is_err());
        assert!(execute(&block("false | true\n"), root, root).is_err());
        assert!(parse(&block("if then\n")).is_err());
        assert!(parse(&block("exit 3\n")).is_ok());
    }
}
