//! Text to token ids and back, with the chat template of the model.
//!
//! Owns `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` of a model directory. Truncation and
//! padding settings of the file are switched off: a prompt is never cut silently. Knows nothing of models; the engine
//! below knows ids only, and what it needs of the text side (bytes of a token, ids without a token) is given here.

mod chat;
mod token_bytes;

pub use chat::ChatTemplate;
pub(crate) use chat::chat_template_source;

use crate::error::{Error, Result};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use temper_types::{ChatMessage, PromptContent};

/// File name of a tokenizer inside a model directory.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// File name of its settings.
pub const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";

/// Whether special tokens take part: added around a text when encoding, shown when decoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialTokens {
    /// Encoding adds what the tokenizer's post-processor adds (a begin-of-text token for some models); decoding shows
    /// special tokens.
    Include,
    /// Encoding adds nothing; decoding leaves special tokens out.
    Omit,
}

/// The tokenizer of a model directory.
pub struct Tokenizer {
    file: PathBuf,
    inner: tokenizers::Tokenizer,
    /// Bytes of every id, `None` where the id has no token.
    bytes: Vec<Option<Box<[u8]>>>,
    special_ids: BTreeSet<u32>,
    added_ids: BTreeSet<u32>,
    /// True where a character outside the vocabulary would vanish from the encoding.
    drops_unknown: bool,
    settings: Value,
    chat: Option<ChatTemplate>,
}

impl Tokenizer {
    /// Load the tokenizer of a model directory.
    ///
    /// # Errors
    /// `tokenizer.json` is missing or not a tokenizer, or a file beside it is not what it should be; the error names
    /// the file. A chat template is compiled here, so that its errors come at start.
    pub fn load(model_dir: &Path) -> Result<Self> {
        let file = model_dir.join(TOKENIZER_FILE);
        let text = std::fs::read(&file).map_err(Error::io("read the tokenizer", &file))?;
        let settings = chat::read_settings(model_dir)?;
        let chat = ChatTemplate::find(model_dir, &settings)?;
        Self::from_parts(file, &text, (settings, chat))
    }

    /// The tokenizer that `text`, the content of `file`, describes, and what stands beside it.
    pub(crate) fn from_parts(
        file: PathBuf,
        text: &[u8],
        (settings, chat): (Value, Option<ChatTemplate>),
    ) -> Result<Self> {
        let json: Value = serde_json::from_slice(text).map_err(|e| Error::format(&file, format!("not JSON: {e}")))?;
        let invalid = |cause: tokenizers::Error| Error::format(&file, format!("not a tokenizer: {cause}"));
        let mut inner = tokenizers::Tokenizer::from_bytes(text).map_err(invalid)?;
        inner.with_truncation(None).map_err(invalid)?.with_padding(None);
        let added = inner.get_added_tokens_decoder();
        Ok(Tokenizer {
            bytes: token_bytes::table(&inner, &json, &file)?,
            special_ids: added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect(),
            added_ids: added.keys().copied().collect(),
            drops_unknown: token_bytes::drops_unknown(&json),
            settings,
            chat,
            inner,
            file,
        })
    }

    /// Token ids of a text.
    ///
    /// # Errors
    /// The text holds a character that the vocabulary cannot express.
    pub fn encode(&self, text: &str, special: SpecialTokens) -> Result<Vec<u32>> {
        if self.drops_unknown {
            self.check_nothing_dropped(text, &self.encode_unchecked(text, SpecialTokens::Omit)?)?;
        }
        self.encode_unchecked(text, special)
    }

    /// Text of token ids. Bytes that are no UTF-8 become replacement characters.
    ///
    /// # Errors
    /// An id has no token.
    pub fn decode(&self, ids: &[u32], special: SpecialTokens) -> Result<String> {
        if let Some(id) = ids.iter().find(|id| self.token_bytes(**id).is_none()) {
            return Err(self.error("decode", format!("id {id} has no token")));
        }
        let skip = special == SpecialTokens::Omit;
        self.inner.decode(ids, skip).map_err(|cause| self.error("decode", cause.to_string()))
    }

    /// Token ids of a prompt: a text as it stands, chat messages through the chat template with the opening of an
    /// answer, ids unchanged.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`] and [`Tokenizer::render_chat`]; an id without a token.
    pub fn encode_prompt(&self, prompt: &PromptContent) -> Result<Vec<u32>> {
        match prompt {
            PromptContent::Text(text) => self.encode(text, SpecialTokens::Include),
            PromptContent::Messages(messages) => {
                self.encode(&self.render_chat(messages, GenerationPrompt::Open)?, SpecialTokens::Omit)
            }
            PromptContent::TokenIds(ids) => match ids.iter().find(|id| self.token_bytes(**id).is_none()) {
                Some(id) => Err(self.error("encode", format!("id {id} has no token"))),
                None => Ok(ids.clone()),
            },
        }
    }

    /// Text of chat messages by the model's chat template.
    ///
    /// # Errors
    /// The directory has no chat template, or the template refuses the messages.
    pub fn render_chat(&self, messages: &[ChatMessage], generation_prompt: GenerationPrompt) -> Result<String> {
        let Some(chat) = &self.chat else {
            let looked = format!("no chat template: looked for `chat_template` here and for {}", chat::TEMPLATE_FILE);
            let file = self.file.with_file_name(TOKENIZER_CONFIG_FILE);
            return Err(Error::Tokenizer { operation: "render chat messages", file, problem: looked });
        };
        chat.render(messages, generation_prompt, &self.settings)
    }

    /// True where the directory has a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.chat.is_some()
    }

    /// The bytes a token stands for in decoded text, special tokens included; `None` where the id has no token.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.bytes.get(id as usize)?.as_deref()
    }

    /// One more than the largest id that has a token.
    pub fn vocab_size(&self) -> usize {
        self.bytes.len()
    }

    /// Ids under `vocab_size` (a model's number of logits) that have no token, ascending: to be masked.
    pub fn missing_ids(&self, vocab_size: usize) -> Vec<u32> {
        (0..vocab_size as u32).filter(|id| self.token_bytes(*id).is_none()).collect()
    }

    /// Ids of special tokens, ascending.
    pub fn special_ids(&self) -> impl Iterator<Item = u32> {
        self.special_ids.iter().copied()
    }

    /// Ids of all added tokens, special or not, ascending.
    pub fn added_ids(&self) -> impl Iterator<Item = u32> {
        self.added_ids.iter().copied()
    }

    /// Id of a token by its text in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Id of the `eos_token` of `tokenizer_config.json`.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.token_id(chat::special_token(&self.settings, "eos_token")?)
    }

    /// Id of the `bos_token` of `tokenizer_config.json`.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.token_id(chat::special_token(&self.settings, "bos_token")?)
    }

    /// Id of the `pad_token` of `tokenizer_config.json`.
    pub fn pad_token_id(&self) -> Option<u32> {
        self.token_id(chat::special_token(&self.settings, "pad_token")?)
    }

    /// The file this tokenizer was read from.
    pub fn file(&self) -> &Path {
        &self.file
    }

    fn encode_unchecked(&self, text: &str, special: SpecialTokens) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, special == SpecialTokens::Include);
        Ok(encoding.map_err(|cause| self.error("encode", cause.to_string()))?.get_ids().to_vec())
    }

    fn check_nothing_dropped(&self, text: &str, ids: &[u32]) -> Result<()> {
        let num_bytes = |ids: &[u32]| ids.iter().filter_map(|id| self.token_bytes(*id)).map(<[u8]>::len).sum::<usize>();
        if num_bytes(ids) >= text.len() {
            return Ok(());
        }
        let vanishes = |c: &char| {
            let ids = self.encode_unchecked(c.encode_utf8(&mut [0; 4]), SpecialTokens::Omit);
            ids.is_ok_and(|ids| num_bytes(&ids) < c.len_utf8())
        };
        let unknown = text.char_indices().find(|(_, c)| vanishes(c));
        let problem = match unknown {
            Some((at, c)) => format!("character {c:?} at byte {at} is not in the vocabulary"),
            None => "a character is not in the vocabulary".to_owned(),
        };
        Err(self.error("encode", problem))
    }

    fn error(&self, operation: &'static str, problem: String) -> Error {
        Error::Tokenizer { operation, file: self.file.clone(), problem }
    }
}

/// Whether a rendered chat ends with the opening of an assistant's message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GenerationPrompt {
    /// It does: the model is to answer.
    Open,
    /// It does not: the chat is complete, as in demonstrations.
    None,
}

#[cfg(test)]
mod tests;
