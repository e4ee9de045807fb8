//! The tokenizer of an alphabet: one token a character.
//!
//! It is a BPE model without merges, so `tokenizers` cuts a text into characters by itself, with a decoder that joins
//! them again. A character outside the alphabet is an error of [`crate::Tokenizer::encode`].

use crate::error::{Error, Result};
use serde_json::{Map, Value, json};

/// Id of padding.
pub(super) const PAD_ID: u32 = 0;
/// Id that begins a text, where a recipe wants one; the tokenizer adds none by itself.
pub(super) const BOS_ID: u32 = 1;
/// Id that ends a text.
pub(super) const EOS_ID: u32 = 2;
const SPECIAL_TOKENS: [&str; 3] = ["<pad>", "<bos>", "<eos>"];
const MAX_CHARACTERS: usize = 65_536;

/// The characters of a new model, in the order of their ids.
pub(super) struct Alphabet(Vec<char>);

impl Alphabet {
    /// Check an alphabet: one character or more, each once.
    pub(super) fn new(text: &str) -> Result<Self> {
        let characters: Vec<char> = text.chars().collect();
        let fail = |got: String, expected: &str| Error::Init { key: "alphabet", got, expected: expected.to_owned() };
        if !(1..=MAX_CHARACTERS).contains(&characters.len()) {
            return Err(fail(format!("{} characters", characters.len()), "from 1 to 65536"));
        }
        let mut sorted = characters.clone();
        sorted.sort_unstable();
        match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(fail(format!("{text:?}"), &format!("each character once, {:?} stands twice", pair[0]))),
            None => Ok(Alphabet(characters)),
        }
    }

    /// Number of tokens.
    pub(super) fn vocab_size(&self) -> usize {
        SPECIAL_TOKENS.len() + self.0.len()
    }

    /// `tokenizer.json`.
    pub(super) fn tokenizer_json(&self) -> Value {
        let characters = self.0.iter().map(char::to_string);
        let tokens = SPECIAL_TOKENS.into_iter().map(str::to_owned).chain(characters);
        let vocabulary: Map<String, Value> = tokens.zip(0u32..).map(|(token, id)| (token, id.into())).collect();
        let added: Vec<Value> = SPECIAL_TOKENS.iter().zip(0u32..).map(|(token, id)| special(token, Some(id))).collect();
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": null,
            "pre_tokenizer": null,
            "post_processor": null,
            "decoder": {"type": "Fuse"},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                "vocab": vocabulary, "merges": [],
            },
        })
    }

    /// `tokenizer_config.json`.
    pub(super) fn settings_json(&self, max_length: usize) -> Value {
        let decoder: Map<String, Value> =
            SPECIAL_TOKENS.iter().zip(0u32..).map(|(token, id)| (id.to_string(), special(token, None))).collect();
        json!({
            "added_tokens_decoder": decoder,
            "bos_token": SPECIAL_TOKENS[BOS_ID as usize],
            "clean_up_tokenization_spaces": false,
            "eos_token": SPECIAL_TOKENS[EOS_ID as usize],
            "model_max_length": max_length,
            "pad_token": SPECIAL_TOKENS[PAD_ID as usize],
            "tokenizer_class": "PreTrainedTokenizerFast",
        })
    }

    /// `generation_config.json`.
    pub(super) fn generation_json(&self) -> Value {
        json!({
            "_from_model_config": true, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID,
        })
    }
}

fn special(token: &str, id: Option<u32>) -> Value {
    let mut entry = Map::new();
    if let Some(id) = id {
        entry.insert("id".into(), id.into());
    }
    entry.insert("content".into(), token.into());
    for key in ["single_word", "lstrip", "rstrip", "normalized"] {
        entry.insert(key.into(), false.into());
    }
    entry.insert("special".into(), true.into());
    Value::Object(entry)
}
