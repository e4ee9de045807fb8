//! Chat templates: the Jinja template of a model directory, rendered as transformers renders it.
//!
//! What a template may call is what transformers offers (`raise_exception`, `tojson`, Python's string methods), except
//! `strftime_now`: the text of a prompt must not depend on the day. Templates that test whether it is defined take
//! their fixed date; others fail with its name.

use super::{GenerationPrompt, TOKENIZER_CONFIG_FILE};
use crate::error::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, ErrorKind};
use serde::Serialize;
use serde_json::ser::Formatter;
use serde_json::{Map, Value, json};
use std::io;
use std::path::{Path, PathBuf};
use temper_types::ChatMessage;

/// File name of a chat template outside `tokenizer_config.json`; it takes precedence.
pub(super) const TEMPLATE_FILE: &str = "chat_template.jinja";
/// Special tokens that a template may name.
const TOKEN_VARIABLES: [&str; 4] = ["bos_token", "eos_token", "pad_token", "unk_token"];
const NAME: &str = "chat";

/// A compiled chat template.
pub struct ChatTemplate {
    file: PathBuf,
    environment: Environment<'static>,
}

/// Read `tokenizer_config.json`, an empty object where there is none.
pub(super) fn read_settings(model_dir: &Path) -> Result<Value> {
    let file = model_dir.join(TOKENIZER_CONFIG_FILE);
    let text = match std::fs::read_to_string(&file) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(Value::Object(Map::new())),
        text => text.map_err(Error::io("read", &file))?,
    };
    let value: Value = serde_json::from_str(&text).map_err(|e| Error::format(&file, format!("not JSON: {e}")))?;
    if value.is_object() { Ok(value) } else { Err(Error::format(&file, "the top level is not a JSON object")) }
}

/// Text of a special token, given as a text or as an object with `content`.
pub(super) fn special_token<'a>(settings: &'a Value, key: &str) -> Option<&'a str> {
    let value = settings.get(key)?;
    value.as_str().or_else(|| value.get("content")?.as_str())
}

impl ChatTemplate {
    /// The template of a model directory, where it has one.
    pub(super) fn find(model_dir: &Path, settings: &Value) -> Result<Option<Self>> {
        match find_source(model_dir, settings)? {
            Some((source, file)) => Self::compile(&source, &file).map(Some),
            None => Ok(None),
        }
    }

    /// Compile a template; `file` names its origin in errors.
    ///
    /// # Errors
    /// The template is not valid Jinja.
    pub fn compile(source: &str, file: &Path) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|cause| template_error(file, &cause))?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_filter("tojson", to_json);
        environment
            .add_template_owned(NAME, plain_generation_blocks(source))
            .map_err(|cause| template_error(file, &cause))?;
        Ok(ChatTemplate { file: file.to_owned(), environment })
    }

    /// Render messages. Special tokens are taken from `settings`, the content of `tokenizer_config.json`.
    ///
    /// # Errors
    /// The template refuses the messages (`raise_exception`) or uses what it is not offered.
    pub fn render(&self, messages: &[ChatMessage], prompt: GenerationPrompt, settings: &Value) -> Result<String> {
        let mut context = json!({
            "messages": messages,
            "add_generation_prompt": prompt == GenerationPrompt::Open,
            "tools": null,
            "documents": null,
        });
        for key in TOKEN_VARIABLES {
            if let Some(token) = special_token(settings, key) {
                context[key] = token.into();
            }
        }
        let template = self.environment.get_template(NAME).map_err(|cause| template_error(&self.file, &cause))?;
        template.render(minijinja::value::Serde(context)).map_err(|cause| template_error(&self.file, &cause))
    }
}

/// Text of a model directory's chat template, where it has one.
///
/// # Errors
/// `tokenizer_config.json` is damaged, or its `chat_template` is neither a text nor a list with a default.
pub(crate) fn chat_template_source(model_dir: &Path) -> Result<Option<String>> {
    let settings = read_settings(model_dir)?;
    Ok(find_source(model_dir, &settings)?.map(|(source, _)| source))
}

/// The text and the file it stands in.
fn find_source(model_dir: &Path, settings: &Value) -> Result<Option<(String, PathBuf)>> {
    let file = model_dir.join(TEMPLATE_FILE);
    if file.is_file() {
        let source = std::fs::read_to_string(&file).map_err(Error::io("read", &file))?;
        return Ok(Some((source, file)));
    }
    let file = model_dir.join(TOKENIZER_CONFIG_FILE);
    match settings.get("chat_template") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(source)) => Ok(Some((source.clone(), file))),
        Some(Value::Array(list)) => {
            let default = list.iter().find(|entry| entry["name"] == "default").or(match list.as_slice() {
                [only] => Some(only),
                _ => None,
            });
            let source = default.and_then(|entry| entry["template"].as_str());
            let expected = "a text, or a list of {name, template} with one named default";
            let source = source.ok_or_else(|| Error::config(&file, "chat_template", "another list", expected))?;
            Ok(Some((source.to_owned(), file)))
        }
        Some(other) => Err(Error::config(&file, "chat_template", other, "a text or a list of {name, template}")),
    }
}

fn template_error(file: &Path, cause: &minijinja::Error) -> Error {
    Error::Tokenizer { operation: "apply the chat template", file: file.to_owned(), problem: format!("{cause:#}") }
}

/// transformers' `{% generation %}` blocks mark the assistant's tokens and print what they hold.
fn plain_generation_blocks(source: &str) -> String {
    let mut text = source.to_owned();
    for (open, close) in [("{%", "%}"), ("{%-", "%}"), ("{%", "-%}"), ("{%-", "-%}")] {
        text = text.replace(&format!("{open} generation {close}"), &format!("{open} if true {close}"));
        text = text.replace(&format!("{open} endgeneration {close}"), &format!("{open} endif {close}"));
    }
    text
}

/// Jinja's `tojson` as transformers defines it: Python's `json.dumps` without ASCII or HTML escapes.
fn to_json(value: minijinja::Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    options.get::<Option<bool>>("ensure_ascii")?;
    options.assert_all_used()?;
    let mut out = Vec::new();
    let written = match indent {
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonFormatter)),
        Some(width) => {
            let spaces = " ".repeat(width.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
        }
    };
    let failed = |cause: String| minijinja::Error::new(ErrorKind::BadSerialization, cause);
    written.map_err(|cause| failed(cause.to_string()))?;
    String::from_utf8(out).map_err(|cause| failed(cause.to_string()))
}

/// Separators `", "` and `": "`.
struct PythonFormatter;

impl Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}
