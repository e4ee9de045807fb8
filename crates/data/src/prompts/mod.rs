//! Prompt files: JSONL, Parquet and Arrow in verl's or TRL's columns, as typed rows.
//!
//! Every format is first brought to JSON objects of the known columns; one function (`row`) turns those into rows, so
//! that a column means the same in every format. Columns that are not known here are ignored.
//!
//! | column | gives |
//! |---|---|
//! | `prompt` (text or chat messages), `prompt_token_ids` | `prompt`; ids win where a row has both |
//! | `data_source` | the same; the file's name without extension where the row has none |
//! | `reward_model.ground_truth`, else `ground_truth`, else `answer` | `ground_truth`; JSON text unless a string |
//! | `extra_info` | JSON text |
//! | `ability`, `completion`, `chosen`, `rejected`, `margin` (a number) | the same |
//! | `label` | the same, where it is true or false |
//!
//! Where `prompt` is missing and `chosen` and `rejected` are conversations, the messages that both begin with are the
//! prompt (TRL's implicit prompt).

mod cell;
mod row;

use crate::arrow_io::{Table, read_ipc, read_parquet};
use crate::{Error, Place};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};
use temper_types::{PromptId, PromptRow};

/// Columns that are read; all others are ignored.
const COLUMNS: [&str; 13] = [
    "prompt",
    "prompt_token_ids",
    "data_source",
    "ability",
    "reward_model",
    "ground_truth",
    "answer",
    "extra_info",
    "completion",
    "chosen",
    "rejected",
    "label",
    "margin",
];

/// Columns of which a dataset must have at least one set to hold prompts.
const PROMPT_COLUMNS: &str = "`prompt`, `prompt_token_ids`, or `chosen` and `rejected` conversations";

/// Read prompt files in the given order; `prompt_id` is the row number over all of them.
///
/// The extension tells the format: `.parquet`; `.arrow`, `.feather` or `.ipc`; `.jsonl`, `.ndjson` or `.json` (one
/// object a line). Any other name is read by what the file begins with. A directory that `datasets.save_to_disk` wrote
/// is read by its `state.json`.
///
/// # Errors
/// The file, the line or row, the column, and what would be right.
pub fn read_prompts<P: AsRef<Path>>(paths: &[P]) -> Result<Vec<PromptRow>, Error> {
    let mut rows = Vec::new();
    for path in paths {
        for file in files_of(path.as_ref())? {
            read_file(&file, &mut rows)?;
        }
    }
    Ok(rows)
}

/// The data files of `path`: itself, or the shards of a saved dataset.
fn files_of(path: &Path) -> Result<Vec<PathBuf>, Error> {
    if path.is_dir() {
        return Ok(crate::arrow_io::data_files(path)?.iter().map(|name| path.join(name)).collect());
    }
    Ok(vec![path.to_owned()])
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Jsonl,
    Parquet,
    Ipc,
}

fn format_of(path: &Path) -> Result<Format, Error> {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
    match extension.as_str() {
        "parquet" => Ok(Format::Parquet),
        "arrow" | "feather" | "ipc" => Ok(Format::Ipc),
        "jsonl" | "ndjson" | "json" => Ok(Format::Jsonl),
        _ => sniff(path),
    }
}

/// The format by the first bytes of a file whose name does not tell.
fn sniff(path: &Path) -> Result<Format, Error> {
    use std::io::Read;
    let mut head = Vec::new();
    let file = std::fs::File::open(path).map_err(Error::io("open", path))?;
    file.take(6).read_to_end(&mut head).map_err(Error::io("read", path))?;
    if head.starts_with(b"PAR1") {
        Ok(Format::Parquet)
    } else if head.starts_with(b"ARROW1") || head.starts_with(&[0xff; 4]) {
        Ok(Format::Ipc)
    } else {
        Ok(Format::Jsonl)
    }
}

fn read_file(path: &Path, rows: &mut Vec<PromptRow>) -> Result<(), Error> {
    let before = rows.len();
    match format_of(path)? {
        Format::Jsonl => read_jsonl(path, rows)?,
        Format::Parquet => read_table(path, &read_parquet(path)?, rows)?,
        Format::Ipc => read_table(path, &read_ipc(path)?, rows)?,
    }
    if rows.len() == before {
        return Err(Error::file(path, "the file holds no prompt: expected at least one row"));
    }
    Ok(())
}

fn read_jsonl(path: &Path, rows: &mut Vec<PromptRow>) -> Result<(), Error> {
    let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    for (index, line) in text.split(|byte| *byte == b'\n').enumerate() {
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let problem = |problem| Error::Line { path: path.to_owned(), line: index + 1, problem };
        let fields = match serde_json::from_slice(line) {
            Ok(Value::Object(fields)) => fields,
            Ok(other) => return Err(problem(format!("{}: expected one JSON object a line", row::kind(&other)))),
            Err(e) => return Err(problem(describe_json_error(&e))),
        };
        push_row(path, Place::Line(index + 1), &fields, rows)?;
    }
    Ok(())
}

/// A parse error without serde_json's own line number, which counts within the one line it was given.
fn describe_json_error(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let cause = text.rsplit_once(" at line ").map_or(text.as_str(), |(cause, _)| cause);
    format!("bad JSON at character {}: {cause}; expected one JSON object a line", error.column())
}

fn read_table(path: &Path, table: &Table, rows: &mut Vec<PromptRow>) -> Result<(), Error> {
    let has = |name| table.schema.column_with_name(name).is_some();
    if !(has("prompt") || has("prompt_token_ids") || (has("chosen") && has("rejected"))) {
        let names: Vec<_> = table.schema.fields().iter().map(|field| field.name().as_str()).collect();
        let found = names.join(", ");
        return Err(Error::file(path, format!("no prompt column among [{found}]: expected {PROMPT_COLUMNS}")));
    }
    let mut number = 0;
    for batch in &table.batches {
        for row in 0..batch.num_rows() {
            let place = Place::Row(number);
            let mut fields = Map::new();
            for name in COLUMNS {
                let Some(column) = batch.column_by_name(name) else { continue };
                let value = cell::json_value(column, row).map_err(|problem| row_error(path, place, name, problem))?;
                fields.insert(name.to_owned(), value);
            }
            push_row(path, place, &fields, rows)?;
            number += 1;
        }
    }
    Ok(())
}

fn push_row(path: &Path, place: Place, fields: &Map<String, Value>, rows: &mut Vec<PromptRow>) -> Result<(), Error> {
    let prompt_id = PromptId(rows.len() as u64);
    let default_source = path.file_stem().map_or_else(|| "prompts".into(), |stem| stem.to_string_lossy());
    let parsed = row::parse(fields, prompt_id, &default_source);
    rows.push(parsed.map_err(|problem| row_error(path, place, &problem.column, problem.problem))?);
    Ok(())
}

fn row_error(path: &Path, place: Place, column: &str, problem: String) -> Error {
    Error::Row { path: path.to_owned(), place, column: column.to_owned(), problem }
}

#[cfg(test)]
mod tests;
