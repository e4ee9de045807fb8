//! `temper export`: a checkpoint as a model that other programs load.

use super::common::compute::open_model;
use super::common::output::{print, require_empty};
use crate::usage;
use anyhow::{Context, Result};
use clap::ValueEnum;
use serde_json::json;
use std::path::{Component, Path, PathBuf};
use temper_actor::weights_io::gguf::{GgufType, export_gguf};
use temper_actor::weights_io::{TensorData, WriteOptions, write_checkpoint};
use temper_controller::verify_checkpoint;
use temper_types::DType;

/// Layout of an exported model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// A directory that transformers loads.
    Hf,
    /// A file that llama.cpp loads.
    Gguf,
}

/// Number format of an exported model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ExportDType {
    /// IEEE 754 binary32: exactly what was trained.
    F32,
    /// IEEE 754 binary16; gguf only.
    F16,
    /// bfloat16.
    Bf16,
}

/// Write the model of a checkpoint for other programs, tokenizer and chat template included.
///
/// The checkpoint is `checkpoints/step-N` of a run or any model directory. Files of a run's checkpoint are checked
/// against its manifest before anything is written.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  temper export --checkpoint runs/quickstart/checkpoints/step-190 --output models/sorter\n  temper export --checkpoint models/smollm2-135m --output smollm2.gguf --format gguf --dtype bf16"
)]
pub struct Export {
    /// Checkpoint or model directory.
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// Directory to write, new or empty and outside the checkpoint; with gguf, a file where it ends in .gguf, else
    /// DIR/model.gguf.
    #[arg(long, value_name = "PATH")]
    output: PathBuf,
    /// Layout.
    #[arg(long, value_enum, default_value_t = Format::Hf)]
    format: Format,
    /// Number format of the weights.
    #[arg(long, value_enum, default_value_t = ExportDType::F32)]
    dtype: ExportDType,
    /// Print what was written as JSON.
    #[arg(long)]
    json: bool,
}

impl Export {
    /// Export the model.
    ///
    /// # Errors
    /// A pair of format and dtype that does not exist, or a directory that would lose what it holds (exit code 2); a
    /// damaged checkpoint; a file that cannot be written.
    pub fn run(self) -> Result<()> {
        let model = self.model_dir()?;
        let written = match (self.format, self.dtype) {
            (Format::Hf, ExportDType::F32) => self.hf(&model, DType::F32)?,
            (Format::Hf, ExportDType::Bf16) => self.hf(&model, DType::Bf16)?,
            (Format::Hf, ExportDType::F16) => {
                return Err(usage("--format hf --dtype f16: expected f32 or bf16 (f16 is for gguf)"));
            }
            (Format::Gguf, dtype) => self.gguf(&model, dtype)?,
        };
        if self.json {
            let name = |value: &dyn ToString| value.to_string();
            let dtype = self.dtype.to_possible_value().map(|v| name(&v.get_name()));
            let format = self.format.to_possible_value().map(|v| name(&v.get_name()));
            let (model, output) = (model.display().to_string(), written.display().to_string());
            return print(&format!(
                "{}\n",
                json!({"model": model, "output": output, "format": format, "dtype": dtype})
            ));
        }
        print(&format!("{}\n", written.display()))
    }

    /// The model directory of the checkpoint, verified where it has a manifest.
    fn model_dir(&self) -> Result<PathBuf> {
        let dir = &self.checkpoint;
        let is_model = |dir: &Path| dir.join(temper_actor::config::CONFIG_FILE).is_file();
        let nested = dir.join("model");
        let checkpoint = if dir.ends_with("model") { dir.parent() } else { Some(dir.as_path()) };
        if let Some(checkpoint) = checkpoint.filter(|c| c.join("MANIFEST").is_file()) {
            verify_checkpoint(checkpoint)?;
        }
        match (is_model(dir), is_model(&nested)) {
            (true, _) => Ok(dir.clone()),
            (false, true) => Ok(nested),
            (false, false) => Err(usage(format!(
                "{} holds no model: expected config.json there or in {}",
                dir.display(),
                nested.display()
            ))),
        }
    }

    /// Refuse a directory that is the source, lies inside it or holds something already.
    fn check_output(&self, model: &Path) -> Result<()> {
        let output = real_path(&self.output)?;
        let parent = model.parent().filter(|parent| parent.join("MANIFEST").is_file());
        for source in [Some(model), parent].into_iter().flatten() {
            if output.starts_with(real_path(source)?) {
                return Err(usage(format!(
                    "--output {}: it is part of the checkpoint {}: expected a directory outside of it",
                    self.output.display(),
                    source.display()
                )));
            }
        }
        require_empty(&self.output)
    }

    fn hf(&self, model: &Path, dtype: DType) -> Result<PathBuf> {
        self.check_output(model)?;
        let (config, reader) = open_model(model)?;
        let options = WriteOptions { dtype, side_files_from: Some(model), ..WriteOptions::default() };
        write_checkpoint(&self.output, &config, &options, |spec| {
            Ok(TensorData::F32(reader.read_f32(&spec.name)?.into()))
        })?;
        Ok(self.output.clone())
    }

    fn gguf(&self, model: &Path, dtype: ExportDType) -> Result<PathBuf> {
        let kind = match dtype {
            ExportDType::F32 => GgufType::F32,
            ExportDType::F16 => GgufType::F16,
            ExportDType::Bf16 => GgufType::Bf16,
        };
        let is_file = self.output.extension().is_some_and(|e| e == "gguf");
        let path = if is_file { self.output.clone() } else { self.output.join("model.gguf") };
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        export_gguf(model, &path, kind)?;
        Ok(path)
    }
}

/// The path without links, `.` and `..`, whether or not it exists to its end.
fn real_path(path: &Path) -> Result<PathBuf> {
    let mut real = std::env::current_dir().context("finding the working directory")?;
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => {
                real.pop();
            }
            part => real.push(part),
        }
        real = real.canonicalize().unwrap_or(real);
    }
    Ok(real)
}
