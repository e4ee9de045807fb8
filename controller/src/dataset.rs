//! Datasets of a recipe as rows in memory.

use crate::{DatasetConfig, Error};
use std::path::PathBuf;
use temper_data::prompts::read_prompts;
use temper_types::{ChatMessage, PromptContent, PromptRow};

/// Read or generate the rows of one dataset; `key` is its place in the recipe.
///
/// # Errors
/// Neither files nor a generator, or both; no rows; a file that cannot be read.
pub fn load_dataset(key: &str, config: &DatasetConfig) -> Result<Vec<PromptRow>, Error> {
    let mut rows = match (&config.files[..], &config.generate) {
        ([], None) => return Err(Error::config(key, "has no rows: expected `files` or `generate`")),
        ([], Some(task)) => task.rows()?,
        (files, None) => read_prompts::<PathBuf>(files)?,
        (_, Some(_)) => return Err(Error::config(key, "has both `files` and `generate`: expected one of them")),
    };
    if let Some(max_rows) = config.max_rows {
        rows.truncate(usize::try_from(max_rows).unwrap_or(usize::MAX));
    }
    if rows.is_empty() {
        return Err(Error::config(key, "has no rows: expected at least one"));
    }
    if let Some(system_prompt) = &config.system_prompt {
        rows.iter_mut().for_each(|row| prepend_system(row, system_prompt));
    }
    Ok(rows)
}

fn prepend_system(row: &mut PromptRow, system_prompt: &str) {
    if let PromptContent::Messages(messages) = &mut row.prompt {
        messages.insert(0, ChatMessage { role: "system".to_owned(), content: system_prompt.to_owned() });
    }
}
