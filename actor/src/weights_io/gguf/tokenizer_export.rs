//! Byte-level BPE tokenizers: from `tokenizer.json` to GGUF metadata.

use super::export::MetaWriter;
use super::tokenizer::{PreTokenizer, TYPE_CONTROL, TYPE_NORMAL, TYPE_UNUSED, TYPE_USER_DEFINED};
use crate::error::{Error, Result};
use crate::tokenizer::{TOKENIZER_FILE, chat_template_source};
use serde_json::Value;
use std::path::Path;

/// Write vocabulary, merges, token types, pre-tokenizer and chat template of a model directory.
pub(super) fn metadata(meta: &mut MetaWriter, model_dir: &Path, vocab_size: usize) -> Result<()> {
    let file = model_dir.join(TOKENIZER_FILE);
    let text = std::fs::read(&file).map_err(Error::io("read the tokenizer", &file))?;
    let json: Value = serde_json::from_slice(&text).map_err(|e| Error::format(&file, format!("not JSON: {e}")))?;
    let model = &json["model"];
    if model["type"] != "BPE" {
        return Err(Error::config(&file, "model.type", &model["type"], "\"BPE\" for GGUF"));
    }
    let pre = PreTokenizer::ALL.into_iter().find(|pre| same_rule(&pre.json(), &json["pre_tokenizer"]));
    let expected = "a byte-level rule that GGUF names: that of GPT-2, SmolLM, Llama 3 or Qwen2";
    let pre = pre.ok_or_else(|| Error::config(&file, "pre_tokenizer", &json["pre_tokenizer"], expected))?;
    let ignore_merges = model["ignore_merges"].as_bool().unwrap_or(false);
    if ignore_merges != pre.ignore_merges() {
        let expected = format!("{} under this pre-tokenizer", pre.ignore_merges());
        return Err(Error::config(&file, "model.ignore_merges", ignore_merges, expected));
    }
    let (tokens, types) = vocabulary(&json, vocab_size, &file)?;
    meta.text("tokenizer.ggml.model", "gpt2");
    meta.text("tokenizer.ggml.pre", pre.gguf_name());
    meta.texts("tokenizer.ggml.tokens", &tokens);
    meta.i32s("tokenizer.ggml.token_type", &types);
    meta.texts("tokenizer.ggml.merges", &merges(model, &file)?);
    meta.flag("tokenizer.ggml.add_bos_token", json["post_processor"]["single"][0]["SpecialToken"].is_object());
    if let Some(template) = chat_template_source(model_dir)? {
        meta.text("tokenizer.chat_template", &template);
    }
    Ok(())
}

/// Equality of pre-tokenizers but for `trim_offsets`, which moves offsets and no token.
fn same_rule(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            let covered = |x: &serde_json::Map<String, Value>, y: &serde_json::Map<String, Value>| {
                x.iter().all(|(key, v)| key == "trim_offsets" || y.get(key).is_some_and(|other| same_rule(v, other)))
            };
            covered(a, b) && covered(b, a)
        }
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same_rule(a, b)),
        _ => a == b,
    }
}

/// Tokens and their types for every id under `vocab_size`; ids without a token become unused ones.
fn vocabulary(json: &Value, vocab_size: usize, file: &Path) -> Result<(Vec<String>, Vec<i32>)> {
    let mut tokens: Vec<String> = (0..vocab_size).map(|id| format!("[PAD{id}]")).collect();
    let mut types = vec![TYPE_UNUSED as i32; vocab_size];
    let mut put = |token: &str, id: &Value, kind: i128| {
        let expected = format!("an id under {vocab_size}, the rows of the embedding");
        let index = id.as_u64().and_then(|id| usize::try_from(id).ok()).filter(|id| *id < vocab_size);
        let index = index.ok_or_else(|| Error::config(file, &format!("token {token:?}"), id, expected))?;
        token.clone_into(&mut tokens[index]);
        types[index] = kind as i32;
        Ok(())
    };
    for (token, id) in json["model"]["vocab"].as_object().into_iter().flatten() {
        put(token, id, TYPE_NORMAL)?;
    }
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let kind = if added["special"] == true { TYPE_CONTROL } else { TYPE_USER_DEFINED };
        put(added["content"].as_str().unwrap_or_default(), &added["id"], kind)?;
    }
    Ok((tokens, types))
}

/// Merges as `left right`, from either form of `tokenizer.json`.
fn merges(model: &Value, file: &Path) -> Result<Vec<String>> {
    let merge = |entry: &Value| match entry {
        Value::String(text) => Some(text.clone()),
        Value::Array(pair) => match pair.as_slice() {
            [Value::String(left), Value::String(right)] => Some(format!("{left} {right}")),
            _ => None,
        },
        _ => None,
    };
    let list = model["merges"].as_array().map_or(&[][..], Vec::as_slice);
    let merges: Option<Vec<String>> = list.iter().map(merge).collect();
    merges.ok_or_else(|| Error::format(file, "`model.merges` is no list of pairs"))
}
