//! Datasets of a recipe as rows in memory.

use crate::{DatasetConfig, Error};
use std::path::PathBuf;
use temper_data::prompts::read_prompts;
use temper_proto::TextService;
use temper_types::{ChatMessage, PromptContent, PromptRow};

/// A dataset as the recipe wants it.
#[derive(Debug)]
pub struct LoadedDataset {
    /// Its rows; a row's id is its number over all files, so there are gaps where rows were left out.
    pub rows: Vec<PromptRow>,
    /// Rows left out because their prompts have more than `max_prompt_tokens` tokens.
    pub num_left_out: usize,
}

/// Read or generate the rows of one dataset; `key` is its place in the recipe, `text` the tokenizer of its model.
///
/// # Errors
/// Neither files nor a generator, or both; no rows; a file that cannot be read; a prompt that cannot take the system
/// prompt or cannot be encoded where its length counts.
pub fn load_dataset(key: &str, config: &DatasetConfig, text: &dyn TextService) -> Result<LoadedDataset, Error> {
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
        rows.iter_mut().try_for_each(|row| prepend_system(key, row, system_prompt))?;
    }
    let num_rows = rows.len();
    if let Some(max_tokens) = config.max_prompt_tokens {
        rows = short_prompts(key, rows, max_tokens as usize, text)?;
    }
    Ok(LoadedDataset { num_left_out: num_rows - rows.len(), rows })
}

fn prepend_system(key: &str, row: &mut PromptRow, system_prompt: &str) -> Result<(), Error> {
    let PromptContent::Messages(messages) = &mut row.prompt else {
        let problem =
            format!("row {} has no messages: expected chat prompts, which a system prompt begins", row.prompt_id);
        return Err(Error::config(format!("{key}.system_prompt"), problem));
    };
    messages.insert(0, ChatMessage { role: "system".to_owned(), content: system_prompt.to_owned() });
    Ok(())
}

fn short_prompts(
    key: &str,
    rows: Vec<PromptRow>,
    max_tokens: usize,
    text: &dyn TextService,
) -> Result<Vec<PromptRow>, Error> {
    let key = format!("{key}.max_prompt_tokens");
    let mut short = Vec::with_capacity(rows.len());
    for row in rows {
        let ids = text.encode_prompt(&row.prompt);
        let ids = ids.map_err(|error| Error::config(&key, format!("row {}: {}", row.prompt_id, error.message)))?;
        if ids.len() <= max_tokens {
            short.push(row);
        }
    }
    if short.is_empty() {
        return Err(Error::config(key, format!("every prompt has more than {max_tokens} tokens: no row is left")));
    }
    Ok(short)
}
