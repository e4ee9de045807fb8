//! The bytes behind each token id, so that stop strings can be matched without decoding.

use crate::error::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// Ids above this are refused: a table over them would only hold emptiness.
const MAX_VOCAB: usize = 1 << 22;

/// How token texts of a vocabulary encode bytes.
#[derive(Clone, Copy)]
enum Encoding {
    /// GPT-2: each byte is a printable character.
    ByteLevel,
    /// SentencePiece: `▁` is a space, `<0x0A>` a byte.
    SentencePiece,
    /// The text itself.
    Plain,
}

/// Bytes of every id from 0 to the largest one.
pub(super) fn table(tokenizer: &tokenizers::Tokenizer, json: &Value, file: &Path) -> Result<Vec<Option<Box<[u8]>>>> {
    let encoding = encoding(json);
    let vocab = tokenizer.get_vocab(true);
    let length = vocab.values().max().map_or(0, |id| *id as usize + 1);
    if length > MAX_VOCAB {
        return Err(Error::format(file, format!("token id {} is over the limit of {MAX_VOCAB}", length - 1)));
    }
    let added = tokenizer.get_added_tokens_decoder();
    let mut table = vec![None; length];
    for (token, id) in vocab {
        let bytes = if added.contains_key(&id) { token.into_bytes() } else { decode(&token, encoding) };
        table[id as usize] = Some(bytes.into_boxed_slice());
    }
    Ok(table)
}

/// True for a BPE vocabulary that has no way to express some text (no unknown token, no byte fallback, no complete
/// byte-level alphabet): `tokenizers` leaves out what it does not know.
pub(super) fn drops_unknown(json: &Value) -> bool {
    let model = &json["model"];
    let byte_fallback = model["byte_fallback"].as_bool().unwrap_or(false);
    let expressible = match encoding(json) {
        Encoding::ByteLevel => has_every_byte(&model["vocab"]),
        Encoding::SentencePiece | Encoding::Plain => false,
    };
    let may_drop = model["type"] == "BPE" && model["unk_token"].is_null() && !byte_fallback && !expressible;
    may_drop && json["normalizer"].is_null()
}

fn has_every_byte(vocab: &Value) -> bool {
    let single = |token: &String| {
        let mut characters = token.chars();
        characters.next().filter(|_| characters.next().is_none()).and_then(byte_of_char)
    };
    vocab.as_object().is_some_and(|map| map.keys().filter_map(single).count() == 256)
}

fn encoding(json: &Value) -> Encoding {
    let decoder = &json["decoder"];
    if mentions(decoder, "ByteLevel") || mentions(&json["pre_tokenizer"], "ByteLevel") {
        Encoding::ByteLevel
    } else if ["ByteFallback", "Metaspace", "▁"].iter().any(|mark| mentions(decoder, mark)) {
        Encoding::SentencePiece
    } else {
        Encoding::Plain
    }
}

/// True where a text equal to `word` stands anywhere in the value.
fn mentions(value: &Value, word: &str) -> bool {
    match value {
        Value::String(text) => text == word,
        Value::Array(list) => list.iter().any(|value| mentions(value, word)),
        Value::Object(map) => map.values().any(|value| mentions(value, word)),
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

fn decode(token: &str, encoding: Encoding) -> Vec<u8> {
    match encoding {
        Encoding::Plain => token.as_bytes().to_vec(),
        Encoding::SentencePiece => match byte_token(token) {
            Some(byte) => vec![byte],
            None => token.replace('▁', " ").into_bytes(),
        },
        Encoding::ByteLevel => {
            let bytes: Option<Vec<u8>> = token.chars().map(byte_of_char).collect();
            bytes.unwrap_or_else(|| token.as_bytes().to_vec())
        }
    }
}

fn byte_token(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok()).flatten()
}

/// The byte a character of the GPT-2 alphabet stands for: printable Latin-1 characters stand for themselves, the 68
/// others are `U+0100` on, in ascending order of their bytes.
fn byte_of_char(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::byte_of_char;
    use std::collections::BTreeSet;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    #[test]
    fn the_alphabet_is_that_of_gpt2() {
        let bytes: BTreeSet<u8> = ByteLevel::alphabet().into_iter().map(|c| byte_of_char(c).unwrap()).collect();
        assert_eq!(bytes.len(), 256);
        for (c, byte) in [('Ġ', b' '), ('Ċ', b'\n'), ('!', b'!'), ('ł', 0xa0), ('Ń', 0xad), ('ġ', 0x7f), ('Ģ', 0x80)]
        {
            assert_eq!(byte_of_char(c), Some(byte), "{c}");
        }
    }
}
