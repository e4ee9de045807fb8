//! What a model is: `config.json` as Hugging Face writes it, checked and made explicit.
//!
//! Owns the reading of `config.json` in its classic form (`rope_theta`, `rope_scaling`) and in that of transformers 5
//! (`rope_parameters`), the refusal of everything this crate does not compute, and the way back. Knows nothing of
//! weights or devices.
//!
//! Invariant: a [`ModelConfig`] is a view of the JSON it was read from. It is changed only by changing that JSON
//! ([`ModelConfig::with_head`]), so keys this crate has no use for survive from one checkpoint to the next. (What a
//! tensor-parallel rank computes with has other sizes, and is never written.)

mod keys;
mod parse;
mod rope;

pub use rope::{RopeConfig, RopeScaling};

use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use temper_types::DType;

/// File name of a configuration inside a model directory.
pub const CONFIG_FILE: &str = "config.json";

/// Model families this crate computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Llama, and what shares its architecture (SmolLM2, TinyLlama, ...).
    Llama,
    /// Qwen2 and Qwen2.5: biases on the query, key and value projections.
    Qwen2,
    /// Qwen3: queries and keys are normalised per head.
    Qwen3,
    /// Mistral: a sliding attention window.
    Mistral,
}

impl Family {
    /// All families.
    pub const ALL: [Family; 4] = [Family::Llama, Family::Qwen2, Family::Qwen3, Family::Mistral];

    /// The `model_type` of `config.json`.
    pub const fn model_type(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::Mistral => "mistral",
        }
    }

    /// Prefix of the class names in `architectures`.
    pub const fn class_prefix(self) -> &'static str {
        match self {
            Family::Llama => "Llama",
            Family::Qwen2 => "Qwen2",
            Family::Qwen3 => "Qwen3",
            Family::Mistral => "Mistral",
        }
    }
}

/// What stands on top of the last hidden state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Head {
    /// `ForCausalLM`: `lm_head.weight` [V, D], or the embedding where tied.
    CausalLm,
    /// `ForTokenClassification` with one label: a value per token, `score.weight` `[1, D]` and `score.bias` `[1]`.
    TokenValue,
    /// `ForSequenceClassification` with one label: a score at the last token, `score.weight` [1, D].
    SequenceScore,
}

impl Head {
    /// All heads.
    pub const ALL: [Head; 3] = [Head::CausalLm, Head::TokenValue, Head::SequenceScore];

    /// Suffix of the class names in `architectures`.
    pub const fn class_suffix(self) -> &'static str {
        match self {
            Head::CausalLm => "ForCausalLM",
            Head::TokenValue => "ForTokenClassification",
            Head::SequenceScore => "ForSequenceClassification",
        }
    }
}

/// Shape and options of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The family.
    pub family: Family,
    /// What stands on the last hidden state.
    pub head: Head,
    /// V: number of rows of the embedding.
    pub vocab_size: usize,
    /// D: width of the residual stream.
    pub hidden_size: usize,
    /// F: width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// H: number of query heads.
    pub num_attention_heads: usize,
    /// Number of key and value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// K: width of a head; even.
    pub head_dim: usize,
    /// Number of positions the model was made for.
    pub max_position_embeddings: usize,
    /// Added to the mean square in every RMS norm.
    pub rms_norm_eps: f32,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// True where the LM head is the embedding.
    pub tie_word_embeddings: bool,
    /// True where the query, key and value projections have biases.
    pub qkv_bias: bool,
    /// True where the output projection of attention has a bias.
    pub o_bias: bool,
    /// True where the three feed-forward projections have biases.
    pub mlp_bias: bool,
    /// True where queries and keys are RMS-normalised per head before rotation (weights of length `head_dim`).
    pub qk_norm: bool,
    /// Per layer: `Some(w)` where the query at position `t` sees keys at `t - w < j <= t`, `None` where it sees all.
    pub windows: Vec<Option<usize>>,
    /// Id that begins a text, where there is one.
    pub bos_token_id: Option<u32>,
    /// Ids that end a text.
    pub eos_token_ids: Vec<u32>,
    /// Id of padding, where there is one.
    pub pad_token_id: Option<u32>,
    /// Standard deviation of fresh weights.
    pub initializer_range: f64,
    source: Map<String, Value>,
    file: PathBuf,
}

impl ModelConfig {
    /// Read `config.json` of a model directory.
    ///
    /// # Errors
    /// The file cannot be read, is no JSON object, or asks for something this crate does not compute: the error names
    /// file, key, value and what is supported.
    pub fn load(model_dir: &Path) -> Result<Self> {
        let file = model_dir.join(CONFIG_FILE);
        let text = std::fs::read_to_string(&file).map_err(Error::io("read", &file))?;
        let value: Value =
            serde_json::from_str(&text).map_err(|cause| Error::format(&file, format!("not JSON: {cause}")))?;
        match value {
            Value::Object(map) => Self::from_json(map, &file),
            _ => Err(Error::format(&file, "the top level is not a JSON object")),
        }
    }

    /// Read a configuration from JSON; `file` names its origin in errors.
    ///
    /// # Errors
    /// As [`ModelConfig::load`].
    pub fn from_json(source: Map<String, Value>, file: &Path) -> Result<Self> {
        parse::parse(source, file)
    }

    /// The same body under another head, as the value or reward model made from a policy.
    ///
    /// # Errors
    /// None that a configuration read before can cause; the JSON is checked again.
    pub fn with_head(&self, head: Head) -> Result<Self> {
        let mut source = self.source.clone();
        let class = format!("{}{}", self.family.class_prefix(), head.class_suffix());
        source.insert("architectures".into(), json!([class]));
        match head {
            Head::CausalLm => {
                source.shift_remove("id2label");
                source.shift_remove("label2id");
            }
            Head::TokenValue | Head::SequenceScore => {
                source.insert("id2label".into(), json!({"0": "LABEL_0"}));
                source.insert("label2id".into(), json!({"LABEL_0": 0}));
            }
        }
        Self::from_json(source, &self.file)
    }

    /// The JSON to write beside weights stored as `dtype`: every key of the source, with the number format replaced.
    pub fn to_json(&self, dtype: DType) -> Value {
        let name = match dtype {
            DType::F32 => "float32",
            DType::Bf16 => "bfloat16",
        };
        let mut json = self.source.clone();
        json.insert("model_type".into(), json!(self.family.model_type()));
        let class = format!("{}{}", self.family.class_prefix(), self.head.class_suffix());
        json.insert("architectures".into(), json!([class]));
        let key = if json.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        json.insert(key.into(), json!(name));
        if key == "dtype" {
            json.shift_remove("torch_dtype");
        }
        Value::Object(json)
    }

    /// The file this configuration came from, for error messages.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Width of all query heads together: `num_attention_heads * head_dim`.
    pub fn q_size(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of all key heads (or value heads) together: `num_key_value_heads * head_dim`.
    pub fn kv_size(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// True where the checkpoint holds an LM head of its own.
    pub fn has_lm_head_tensor(&self) -> bool {
        match self.head {
            Head::CausalLm => !self.tie_word_embeddings,
            Head::TokenValue | Head::SequenceScore => false,
        }
    }

    /// Rotary frequencies, one for each pair of dimensions: [`head_dim / 2`], in radians per position.
    pub fn inv_frequencies(&self) -> Vec<f32> {
        self.rope.inv_frequencies(self.head_dim)
    }
}

#[cfg(test)]
mod tests;
