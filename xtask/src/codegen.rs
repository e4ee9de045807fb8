//! Code from the `.proto` files, by protox: no protoc. What it gives is committed, and `--check` compares.

use anyhow::{Context, Result, ensure};
use prost::Message;
use std::path::{Path, PathBuf};

/// Where the definitions are, below the root.
const SOURCES: &str = "proto/temper/v1";
/// Where the generated files stand, below the root.
const GENERATED: &str = "proto/src/generated";
/// Messages and services.
const CODE: &str = "temper.v1.rs";
/// Descriptors, for reflection.
const DESCRIPTORS: &str = "temper.v1.bin";

/// Generate both files, or, with `check`, compare them with what is committed.
pub fn run(root: &Path, arguments: &[&str]) -> Result<()> {
    let check = match arguments {
        [] => false,
        ["--check"] => true,
        other => anyhow::bail!("codegen takes `--check` or nothing, not {other:?}"),
    };
    let scratch = root.join("target/codegen");
    std::fs::create_dir_all(&scratch).with_context(|| format!("cannot make {}", scratch.display()))?;
    generate(root, &scratch)?;
    for name in [CODE, DESCRIPTORS] {
        let (made, kept) = (scratch.join(name), root.join(GENERATED).join(name));
        let bytes = std::fs::read(&made).with_context(|| format!("cannot read {}", made.display()))?;
        if check {
            let committed = std::fs::read(&kept).with_context(|| format!("cannot read {}", kept.display()))?;
            ensure!(
                committed == bytes,
                "{GENERATED}/{name} is not what the definitions give: run `cargo xtask codegen`"
            );
        } else {
            std::fs::write(&kept, bytes).with_context(|| format!("cannot write {}", kept.display()))?;
        }
    }
    println!("codegen: ok");
    Ok(())
}

fn generate(root: &Path, out: &Path) -> Result<()> {
    let descriptors =
        protox::compile(sources(root)?, [root.join("proto")]).context("cannot compile the definitions")?;
    std::fs::write(out.join(DESCRIPTORS), descriptors.encode_to_vec()).context("cannot write the descriptors")?;
    tonic_prost_build::configure()
        .out_dir(out)
        .emit_rerun_if_changed(false)
        .compile_fds(descriptors)
        .context("cannot generate code")
}

/// The definitions, in the order of their names.
fn sources(root: &Path) -> Result<Vec<PathBuf>> {
    let dir = root.join(SOURCES);
    let entries = std::fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))?;
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<PathBuf>>>()?;
    files.retain(|path| path.extension().is_some_and(|e| e == "proto"));
    files.sort();
    Ok(files)
}
