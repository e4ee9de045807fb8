//! Byte-level BPE tokenizers: from metadata to `tokenizer.json` and `tokenizer_config.json`.

use super::metadata::Metadata;
use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Codes of `tokenizer.ggml.token_type`.
pub(super) const TYPE_NORMAL: i128 = 1;
const TYPE_UNKNOWN: i128 = 2;
pub(super) const TYPE_CONTROL: i128 = 3;
pub(super) const TYPE_USER_DEFINED: i128 = 4;
pub(super) const TYPE_UNUSED: i128 = 5;

/// How Llama 3 cuts text into words: the regular expression of its `tokenizer.json`.
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same for Qwen2: single digits.
const QWEN2_SPLIT: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The two files of a tokenizer.
pub(super) struct TokenizerFiles {
    pub(super) tokenizer: Value,
    pub(super) settings: Value,
}

/// How text is cut before merging.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PreTokenizer {
    Gpt2,
    /// GPT-2 with every digit apart.
    SmolLm,
    Llama3,
    Qwen2,
}

impl PreTokenizer {
    pub(super) const ALL: [PreTokenizer; 4] =
        [PreTokenizer::Gpt2, PreTokenizer::SmolLm, PreTokenizer::Llama3, PreTokenizer::Qwen2];

    /// The value of `tokenizer.ggml.pre`.
    pub(super) fn gguf_name(self) -> &'static str {
        match self {
            PreTokenizer::Gpt2 => "gpt-2",
            PreTokenizer::SmolLm => "smollm",
            PreTokenizer::Llama3 => "llama-bpe",
            PreTokenizer::Qwen2 => "qwen2",
        }
    }

    /// True where a word that is a token as a whole is never built from merges.
    pub(super) fn ignore_merges(self) -> bool {
        match self {
            PreTokenizer::Llama3 => true,
            PreTokenizer::Gpt2 | PreTokenizer::SmolLm | PreTokenizer::Qwen2 => false,
        }
    }

    fn from_metadata(meta: &Metadata) -> Result<Self> {
        let key = "tokenizer.ggml.pre";
        match meta.text(key)? {
            None | Some("default" | "gpt2" | "gpt-2") => Ok(PreTokenizer::Gpt2),
            Some("smollm") => Ok(PreTokenizer::SmolLm),
            Some("llama-bpe" | "llama3" | "llama-v3") => Ok(PreTokenizer::Llama3),
            Some("qwen2") => Ok(PreTokenizer::Qwen2),
            Some(_) => Err(meta.error(key, "one of default, gpt2, smollm, llama-bpe, qwen2")),
        }
    }

    /// `pre_tokenizer` of `tokenizer.json`.
    pub(super) fn json(self) -> Value {
        let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let first = match self {
            PreTokenizer::Gpt2 => return byte_level(true),
            PreTokenizer::SmolLm => json!({"type": "Digits", "individual_digits": true}),
            PreTokenizer::Llama3 => split(LLAMA3_SPLIT),
            PreTokenizer::Qwen2 => split(QWEN2_SPLIT),
        };
        json!({"type": "Sequence", "pretokenizers": [first, byte_level(self == PreTokenizer::SmolLm)]})
    }

    fn normalizer(self) -> Value {
        match self {
            PreTokenizer::Qwen2 => json!({"type": "NFC"}),
            PreTokenizer::Gpt2 | PreTokenizer::SmolLm | PreTokenizer::Llama3 => Value::Null,
        }
    }
}

/// Make both files for a model with `vocab_size` rows in its embedding.
pub(super) fn files(meta: &Metadata, vocab_size: usize, max_length: usize) -> Result<TokenizerFiles> {
    if meta.text("tokenizer.ggml.model")? != Some("gpt2") {
        return Err(meta.error("tokenizer.ggml.model", "\"gpt2\" (byte-level BPE)"));
    }
    let pre = PreTokenizer::from_metadata(meta)?;
    let tokens = meta.texts("tokenizer.ggml.tokens")?;
    let key = "tokenizer.ggml.token_type";
    let types = if meta.contains(key) { meta.integers(key)? } else { vec![TYPE_NORMAL; tokens.len()] };
    if types.len() != tokens.len() {
        return Err(meta.error(key, &format!("a list of {}, one for each token", tokens.len())));
    }
    if tokens.len() > vocab_size {
        let expected = format!("at most {vocab_size} tokens, the rows of the embedding");
        return Err(meta.error("tokenizer.ggml.tokens", &expected));
    }
    let added = added_tokens(&tokens, &types);
    let special = SpecialTokens::from_metadata(meta, &tokens)?;
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": pre.normalizer(),
        "pre_tokenizer": pre.json(),
        "post_processor": post_processor(meta, pre, &special)?,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": pre.ignore_merges(),
            "vocab": vocabulary(meta, &tokens, &types)?,
            "merges": meta.texts("tokenizer.ggml.merges")?,
        },
    });
    check(meta, &tokenizer)?;
    Ok(TokenizerFiles { tokenizer, settings: settings(meta, &added, &special, max_length)? })
}

/// Refuse merges of tokens that are not there and the like, before anything is written.
fn check(meta: &Metadata, tokenizer: &Value) -> Result<()> {
    match tokenizers::Tokenizer::from_bytes(tokenizer.to_string()) {
        Ok(_) => Ok(()),
        Err(cause) => Err(Error::format(meta.file(), format!("the tokenizer in the metadata is not valid: {cause}"))),
    }
}

fn vocabulary(meta: &Metadata, tokens: &[&str], types: &[i128]) -> Result<Map<String, Value>> {
    let mut vocabulary = Map::new();
    for (id, (token, kind)) in tokens.iter().zip(types).enumerate() {
        if *kind == TYPE_UNUSED {
            continue;
        }
        if vocabulary.insert((*token).to_owned(), id.into()).is_some() {
            let problem = format!("token {token:?} stands twice in `tokenizer.ggml.tokens`, again at id {id}");
            return Err(Error::format(meta.file(), problem));
        }
    }
    Ok(vocabulary)
}

fn added_tokens(tokens: &[&str], types: &[i128]) -> Vec<Value> {
    let special = |kind: i128| matches!(kind, TYPE_CONTROL | TYPE_UNKNOWN);
    let added = |(_, (_, kind)): &(usize, (&&str, &i128))| special(**kind) || **kind == TYPE_USER_DEFINED;
    let entry = |(id, (token, kind)): (usize, (&&str, &i128))| {
        json!({
            "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": special(*kind),
        })
    };
    tokens.iter().zip(types).enumerate().filter(added).map(entry).collect()
}

/// Texts of the special tokens by their names in `tokenizer_config.json`.
struct SpecialTokens<'a>(BTreeMap<&'static str, &'a str>);

impl<'a> SpecialTokens<'a> {
    fn from_metadata(meta: &Metadata, tokens: &[&'a str]) -> Result<Self> {
        let keys = [
            ("bos_token", "tokenizer.ggml.bos_token_id"),
            ("eos_token", "tokenizer.ggml.eos_token_id"),
            ("pad_token", "tokenizer.ggml.padding_token_id"),
            ("unk_token", "tokenizer.ggml.unknown_token_id"),
        ];
        let mut texts = BTreeMap::new();
        for (name, key) in keys {
            if let Some(id) = meta.integer(key)? {
                let text = usize::try_from(id).ok().and_then(|id| tokens.get(id));
                texts.insert(name, *text.ok_or_else(|| meta.error(key, &format!("an id under {}", tokens.len())))?);
            }
        }
        Ok(SpecialTokens(texts))
    }
}

/// A begin-of-text token in front, where the metadata asks for it (Llama 3 does by default).
fn post_processor(meta: &Metadata, pre: PreTokenizer, special: &SpecialTokens) -> Result<Value> {
    let wanted = meta.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(pre == PreTokenizer::Llama3);
    let id = meta.integer("tokenizer.ggml.bos_token_id")?;
    let (true, Some(id), Some(bos)) = (wanted, id, special.0.get("bos_token")) else { return Ok(Value::Null) };
    let begin = json!({"SpecialToken": {"id": bos, "type_id": 0}});
    let text = |name: &str| json!({"Sequence": {"id": name, "type_id": 0}});
    let token = json!({"id": bos, "ids": [id], "tokens": [bos]});
    Ok(json!({
        "type": "TemplateProcessing",
        "single": [begin, text("A")],
        "pair": [begin, text("A"), begin, text("B")],
        "special_tokens": Map::from_iter([((*bos).to_owned(), token)]),
    }))
}

fn settings(meta: &Metadata, added: &[Value], special: &SpecialTokens, max_length: usize) -> Result<Value> {
    let decoder = added.iter().cloned().map(|mut token| {
        let id = token["id"].to_string();
        if let Value::Object(fields) = &mut token {
            fields.shift_remove("id");
        }
        (id, token)
    });
    let mut settings = json!({
        "add_prefix_space": false,
        "added_tokens_decoder": decoder.collect::<Map<_, _>>(),
        "clean_up_tokenization_spaces": false,
        "model_max_length": max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    });
    for (name, text) in &special.0 {
        settings[*name] = (*text).into();
    }
    if let Some(template) = meta.text("tokenizer.chat_template")? {
        settings["chat_template"] = template.into();
    }
    Ok(settings)
}
