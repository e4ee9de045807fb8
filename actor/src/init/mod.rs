//! New models from nothing: a model directory with a character-level tokenizer and seeded weights.
//!
//! Owns [`InitConfig`], the tokenizer of an alphabet and the law of fresh weights. What it writes is an ordinary model
//! directory, which this crate and transformers load alike. Weights are a function of (seed, tensor name, element):
//! the same on every machine, and for a tensor the same whatever else the model holds.

mod alphabet;
mod weights;

pub use weights::fill_tensor;

use crate::config::{Family, ModelConfig};
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use crate::weights_io::writer::write_json;
use crate::weights_io::{TensorData, WriteOptions, write_checkpoint};
use alphabet::Alphabet;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::path::Path;
use temper_types::DType;

/// Added to the mean square in RMS norms of new models.
const RMS_NORM_EPS: f64 = 1e-5;
/// Largest width or length of a new model.
const MAX_SIZE: usize = 1 << 20;

/// Shape and alphabet of a new model. The width of a head is `hidden_size / num_attention_heads`; the vocabulary is the
/// alphabet and three special tokens, without padding.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InitConfig {
    /// Model family.
    #[serde(default = "default_family")]
    pub family: Family,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Number of query heads; divides `hidden_size` into an even width.
    pub num_attention_heads: usize,
    /// Number of key and value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Longest text in tokens.
    pub max_position_embeddings: usize,
    /// Base of the rotary frequencies.
    #[serde(default = "default_rope_theta")]
    pub rope_theta: f64,
    /// True where the LM head is the embedding.
    #[serde(default = "default_tie")]
    pub tie_word_embeddings: bool,
    /// Standard deviation of fresh matrices and embeddings.
    #[serde(default = "default_initializer_range")]
    pub initializer_range: f64,
    /// The characters the model knows, each once.
    pub alphabet: String,
}

fn default_family() -> Family {
    Family::Llama
}

fn default_rope_theta() -> f64 {
    10_000.0
}

fn default_tie() -> bool {
    true
}

fn default_initializer_range() -> f64 {
    0.02
}

impl InitConfig {
    /// The configuration of the model to be made.
    ///
    /// # Errors
    /// The first setting out of range, with what would be right.
    pub fn model_config(&self) -> Result<ModelConfig> {
        self.check_sizes()?;
        let alphabet = Alphabet::new(&self.alphabet)?;
        ModelConfig::from_json(self.json(&alphabet), Path::new("init"))
    }

    fn check_sizes(&self) -> Result<()> {
        let sizes = [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        if let Some((key, size)) = sizes.into_iter().find(|(_, size)| !(1..=MAX_SIZE).contains(size)) {
            return Err(fail(key, size, "from 1 to 1048576"));
        }
        let heads = self.num_attention_heads;
        if !self.hidden_size.is_multiple_of(2 * heads) {
            let expected = format!("a multiple of twice num_attention_heads = {heads}, for an even head width");
            return Err(fail("hidden_size", self.hidden_size, &expected));
        }
        if !heads.is_multiple_of(self.num_key_value_heads) {
            let expected = format!("a divisor of num_attention_heads = {heads}");
            return Err(fail("num_key_value_heads", self.num_key_value_heads, &expected));
        }
        if !(self.rope_theta > 1.0 && self.rope_theta <= 1e12) {
            return Err(fail("rope_theta", self.rope_theta, "more than 1, at most 1e12"));
        }
        if !(self.initializer_range > 0.0 && self.initializer_range <= 10.0) {
            return Err(fail("initializer_range", self.initializer_range, "more than 0, at most 10"));
        }
        Ok(())
    }

    fn json(&self, alphabet: &Alphabet) -> Map<String, Value> {
        let fields = [
            ("architectures", json!([format!("{}ForCausalLM", self.family.class_prefix())])),
            ("attention_dropout", json!(0.0)),
            ("bos_token_id", json!(alphabet::BOS_ID)),
            ("eos_token_id", json!(alphabet::EOS_ID)),
            ("head_dim", json!(self.hidden_size / self.num_attention_heads)),
            ("hidden_act", json!("silu")),
            ("hidden_size", json!(self.hidden_size)),
            ("initializer_range", json!(self.initializer_range)),
            ("intermediate_size", json!(self.intermediate_size)),
            ("max_position_embeddings", json!(self.max_position_embeddings)),
            ("model_type", json!(self.family.model_type())),
            ("num_attention_heads", json!(self.num_attention_heads)),
            ("num_hidden_layers", json!(self.num_hidden_layers)),
            ("num_key_value_heads", json!(self.num_key_value_heads)),
            ("pad_token_id", json!(alphabet::PAD_ID)),
            ("rms_norm_eps", json!(RMS_NORM_EPS)),
            ("rope_scaling", Value::Null),
            ("rope_theta", json!(self.rope_theta)),
            ("sliding_window", Value::Null),
            ("tie_word_embeddings", json!(self.tie_word_embeddings)),
            ("torch_dtype", json!("float32")),
            ("use_cache", json!(true)),
            ("vocab_size", json!(alphabet.vocab_size())),
        ];
        fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
    }
}

/// Make a model directory: `config.json`, tokenizer and f32 weights drawn with `seed`.
///
/// Matrices and embeddings are normal with standard deviation `initializer_range`, norms are 1, biases 0, as
/// transformers initialises these families.
///
/// # Errors
/// A setting is out of range, or a file cannot be written.
pub fn init_model(dir: &Path, init: &InitConfig, seed: u64) -> Result<ModelConfig> {
    let config = init.model_config()?;
    let alphabet = Alphabet::new(&init.alphabet)?;
    std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    write_json(&dir.join("tokenizer.json"), &alphabet.tokenizer_json())?;
    write_json(&dir.join("tokenizer_config.json"), &alphabet.settings_json(init.max_position_embeddings))?;
    write_json(&dir.join("generation_config.json"), &alphabet.generation_json())?;
    let options = WriteOptions { dtype: DType::F32, ..WriteOptions::default() };
    write_checkpoint(dir, &config, &options, |spec| {
        let mut data = vec![0.0; spec.num_elements()];
        fill_tensor(spec, config.initializer_range, seed, &mut data);
        Ok(TensorData::F32(data.into()))
    })?;
    Ok(config)
}

/// The tokenizer of the model that [`init_model`] would make.
///
/// # Errors
/// A setting is out of range.
pub fn init_tokenizer(init: &InitConfig) -> Result<Tokenizer> {
    let alphabet = Alphabet::new(&init.alphabet)?;
    let text = alphabet.tokenizer_json().to_string();
    let settings = alphabet.settings_json(init.max_position_embeddings);
    Tokenizer::from_parts("tokenizer.json".into(), text.as_bytes(), (settings, None))
}

fn fail(key: &'static str, got: impl ToString, expected: &str) -> Error {
    Error::Init { key, got: got.to_string(), expected: expected.to_owned() }
}

#[cfg(test)]
mod tests;
