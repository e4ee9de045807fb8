//! `temper import`: a GGUF file as a Hugging Face model directory.

use super::common::compute::FileDTypeArg;
use super::common::output::{print, print_json};
use crate::usage;
use anyhow::Result;
use serde_json::json;
use std::path::PathBuf;
use temper_actor::weights_io::gguf::import_gguf;

/// Turn a GGUF file into a model directory that temper and transformers load, tokenizer and chat template included.
///
/// Reads tensors in F32, F16, BF16, Q8_0, Q4_0 and Q4_1; quantised ones are expanded.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  temper import SmolLM2-135M-Instruct.Q4_1.gguf --output models/smollm2-135m")]
pub struct Import {
    /// The GGUF file.
    model: PathBuf,
    /// Directory to write.
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Number format of the weights on disk.
    #[arg(long, value_enum, default_value_t = FileDTypeArg::F32)]
    dtype: FileDTypeArg,
    /// Print the summary as JSON.
    #[arg(long)]
    json: bool,
}

impl Import {
    /// Import the file.
    ///
    /// # Errors
    /// What is wrong with the file, by key or tensor.
    pub fn run(self) -> Result<()> {
        if !self.model.is_file() {
            return Err(usage(format!("{} is no file: expected a GGUF file", self.model.display())));
        }
        let summary = import_gguf(&self.model, &self.output, self.dtype.into())?;
        let model_type = summary.config.family.model_type();
        if self.json {
            let object = json!({
                "output": self.output.display().to_string(), "model_type": model_type,
                "num_parameters": summary.num_parameters, "tensor_types": summary.tensor_types, "has_chat_template": summary.has_chat_template,
            });
            return print_json(&object);
        }
        let types: Vec<String> = summary.tensor_types.iter().map(|(name, count)| format!("{count} {name}")).collect();
        let chat = if summary.has_chat_template { "with" } else { "without" };
        print(&format!(
            "{}: {model_type}, {} parameters, {chat} chat template, from {} tensors\n",
            self.output.display(),
            summary.num_parameters,
            types.join(" and ")
        ))
    }
}
