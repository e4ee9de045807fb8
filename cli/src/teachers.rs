//! Teachers of distillation: whether they read the policy's ids, and which weights they are.

use crate::recipe::Recipe;
use anyhow::{Context, Result, ensure};
use std::io::Read;
use std::path::{Path, PathBuf};
use temper_actor::tokenizer::TOKENIZER_FILE;
use temper_controller::Stage;

/// A model of another policy's ids has to have its tokenizer.
///
/// # Errors
/// A file that cannot be read, or another tokenizer.
pub fn same_tokenizer(model: &Path, policy: &Path) -> Result<()> {
    let read = |dir: &Path| {
        let path = dir.join(TOKENIZER_FILE);
        std::fs::read(&path).with_context(|| format!("reading {}", path.display()))
    };
    let same = read(model)? == read(policy)?;
    ensure!(
        same,
        "{}: its {TOKENIZER_FILE} is not that of the policy ({}): expected the same tokenizer",
        model.display(),
        policy.display()
    );
    Ok(())
}

/// What the identity of a run says of its teachers: a hash of their configurations and weights; nothing where there
/// are none.
///
/// # Errors
/// A teacher with another tokenizer than the policy in `policy_dir`, or files that cannot be read.
pub fn identity(recipe: &Recipe, policy_dir: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut has_teacher = false;
    for stage in &recipe.stages {
        let Stage::Distill(stage) = stage else { continue };
        has_teacher = true;
        let dir = &stage.teacher.path;
        same_tokenizer(dir, policy_dir).context("teacher")?;
        for path in model_files(dir)? {
            hash_file(&path, &mut hasher).with_context(|| format!("reading {}", path.display()))?;
        }
    }
    Ok(if has_teacher { format!("-{}", &hasher.finalize().to_hex()[..32]) } else { String::new() })
}

/// `config.json` and the weights, in the order of their names.
fn model_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))?;
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.retain(|p| p.file_name().is_some_and(|n| n == "config.json") || p.extension().is_some_and(is_weights));
    paths.sort();
    Ok(paths)
}

fn is_weights(extension: &std::ffi::OsStr) -> bool {
    extension == "safetensors"
}

fn hash_file(path: &Path, hasher: &mut blake3::Hasher) -> std::io::Result<()> {
    let mut file = std::fs::File::open(path)?;
    let mut part = vec![0; 1 << 20];
    loop {
        match file.read(&mut part)? {
            0 => return Ok(()),
            len => hasher.update(&part[..len]),
        };
    }
}
