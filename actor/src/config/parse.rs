//! From JSON to [`ModelConfig`], family by family.

use super::keys::Keys;
use super::{Family, Head, ModelConfig, rope};
use crate::error::Result;
use serde_json::{Map, Value, json};
use std::path::Path;

/// Window of Mistral where its configuration leaves the key out: the default of transformers' `MistralConfig`.
const MISTRAL_DEFAULT_WINDOW: usize = 4096;
/// First windowed layer of Qwen where the key is left out: the default of transformers' `Qwen2Config`.
const QWEN_DEFAULT_MAX_WINDOW_LAYERS: usize = 28;
/// Head width of Qwen3 where the key is left out: the default of transformers' `Qwen3Config`.
const QWEN3_DEFAULT_HEAD_DIM: usize = 128;
/// Rotary base of Llama and Mistral where the classic form leaves it out (Llama 1 and 2).
const DEFAULT_THETA: f64 = 10_000.0;
const MAX_LAYERS: usize = 4096;

pub(super) fn parse(source: Map<String, Value>, file: &Path) -> Result<ModelConfig> {
    let keys = Keys { map: &source, file, prefix: "" };
    let family = family(&keys)?;
    refuse_unsupported(&keys)?;
    let num_hidden_layers = keys.required_size("num_hidden_layers")?;
    if num_hidden_layers > MAX_LAYERS {
        return Err(keys.error("num_hidden_layers", format!("at most {MAX_LAYERS}")));
    }
    let attention = attention(&keys, family)?;
    let biases = biases(&keys, family)?;
    let config = ModelConfig {
        family,
        head: head(&keys, family)?,
        vocab_size: keys.required_size("vocab_size")?,
        hidden_size: keys.required_size("hidden_size")?,
        intermediate_size: keys.required_size("intermediate_size")?,
        num_hidden_layers,
        num_attention_heads: attention.num_heads,
        num_key_value_heads: attention.num_kv_heads,
        head_dim: attention.head_dim,
        max_position_embeddings: keys.required_size("max_position_embeddings")?,
        rms_norm_eps: keys.required_positive("rms_norm_eps")? as f32,
        rope: rope::parse(&keys, default_theta(family))?,
        tie_word_embeddings: keys.flag("tie_word_embeddings")?,
        qkv_bias: biases.qkv,
        o_bias: biases.o,
        mlp_bias: biases.mlp,
        qk_norm: family == Family::Qwen3,
        windows: windows(&keys, family, num_hidden_layers)?,
        bos_token_id: keys.token_id("bos_token_id")?,
        eos_token_ids: keys.token_ids("eos_token_id")?,
        pad_token_id: keys.token_id("pad_token_id")?,
        initializer_range: keys.positive("initializer_range")?.unwrap_or(0.02),
        file: file.to_owned(),
        source: Map::new(),
    };
    Ok(ModelConfig { source, ..config })
}

fn family(keys: &Keys) -> Result<Family> {
    let supported = || Family::ALL.map(Family::model_type).join(", ");
    let given = keys.text("model_type")?;
    Family::ALL
        .into_iter()
        .find(|family| Some(family.model_type()) == given)
        .ok_or_else(|| keys.error("model_type", format!("one of {}", supported())))
}

fn head(keys: &Keys, family: Family) -> Result<Head> {
    let classes = Head::ALL.map(|head| format!("{}{}", family.class_prefix(), head.class_suffix()));
    let expected = || format!("a list of one of {}", classes.join(", "));
    let given = match keys.get("architectures") {
        None => return Ok(Head::CausalLm),
        Some(Value::Array(list)) if list.len() == 1 => list[0].as_str(),
        Some(_) => None,
    };
    let index = classes.iter().position(|class| Some(class.as_str()) == given);
    let head = Head::ALL[index.ok_or_else(|| keys.error("architectures", expected()))?];
    if head != Head::CausalLm {
        keys.require("num_labels", &json!(1))?;
        let labels = keys.get("id2label").and_then(Value::as_object).map_or(1, Map::len);
        if labels != 1 {
            return Err(keys.error("id2label", "one label: the value or the score"));
        }
    }
    Ok(head)
}

/// Refuse keys that change what a model computes in a way this crate does not.
fn refuse_unsupported(keys: &Keys) -> Result<()> {
    if keys.get("quantization_config").is_some() {
        return Err(keys.error("quantization_config", "no such key: weights in float32, bfloat16 or float16"));
    }
    keys.require("hidden_act", &json!("silu"))?;
    keys.require("attention_dropout", &json!(0.0))?;
    keys.require("use_mrope", &json!(false))?;
    keys.require("is_encoder_decoder", &json!(false))?;
    keys.require("add_cross_attention", &json!(false))
}

struct Attention {
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
}

fn attention(keys: &Keys, family: Family) -> Result<Attention> {
    let num_heads = keys.required_size("num_attention_heads")?;
    let hidden_size = keys.required_size("hidden_size")?;
    let num_kv_heads = match (family, keys.size("num_key_value_heads")?) {
        (_, Some(n)) => n,
        (Family::Llama, None) => num_heads,
        (Family::Qwen2 | Family::Qwen3 | Family::Mistral, None) => keys.required_size("num_key_value_heads")?,
    };
    if !num_heads.is_multiple_of(num_kv_heads) {
        return Err(keys.error("num_key_value_heads", format!("a divisor of num_attention_heads = {num_heads}")));
    }
    let head_dim = match (family, keys.size("head_dim")?) {
        (_, Some(n)) => n,
        (Family::Qwen3, None) => QWEN3_DEFAULT_HEAD_DIM,
        (Family::Llama | Family::Qwen2 | Family::Mistral, None) if hidden_size.is_multiple_of(num_heads) => {
            hidden_size / num_heads
        }
        (Family::Llama | Family::Qwen2 | Family::Mistral, None) => {
            return Err(keys.error("num_attention_heads", format!("a divisor of hidden_size = {hidden_size}")));
        }
    };
    if !head_dim.is_multiple_of(2) {
        return Err(keys.error("head_dim", format!("an even number (here {head_dim}): dimensions rotate in pairs")));
    }
    Ok(Attention { num_heads, num_kv_heads, head_dim })
}

struct Biases {
    qkv: bool,
    o: bool,
    mlp: bool,
}

fn biases(keys: &Keys, family: Family) -> Result<Biases> {
    let attention = keys.flag("attention_bias")?;
    let mlp = keys.flag("mlp_bias")?;
    match family {
        Family::Llama => Ok(Biases { qkv: attention, o: attention, mlp }),
        Family::Qwen3 => {
            keys.require("mlp_bias", &json!(false))?;
            Ok(Biases { qkv: attention, o: attention, mlp: false })
        }
        Family::Qwen2 => {
            keys.require("mlp_bias", &json!(false))?;
            Ok(Biases { qkv: true, o: false, mlp: false })
        }
        Family::Mistral => {
            keys.require("attention_bias", &json!(false))?;
            keys.require("mlp_bias", &json!(false))?;
            Ok(Biases { qkv: false, o: false, mlp: false })
        }
    }
}

fn default_theta(family: Family) -> Option<f64> {
    match family {
        Family::Llama | Family::Mistral => Some(DEFAULT_THETA),
        Family::Qwen2 | Family::Qwen3 => None,
    }
}

fn windows(keys: &Keys, family: Family, num_layers: usize) -> Result<Vec<Option<usize>>> {
    match family {
        Family::Llama => {
            keys.require("sliding_window", &Value::Null)?;
            Ok(vec![None; num_layers])
        }
        Family::Mistral => {
            let window = match keys.map.contains_key("sliding_window") {
                true => keys.size("sliding_window")?,
                false => Some(MISTRAL_DEFAULT_WINDOW),
            };
            Ok(vec![window; num_layers])
        }
        Family::Qwen2 | Family::Qwen3 => qwen_windows(keys, num_layers),
    }
}

/// Qwen has a window only under `use_sliding_window`, then in the layers that `layer_types` names, or, without that
/// list, from layer `max_window_layers` on.
fn qwen_windows(keys: &Keys, num_layers: usize) -> Result<Vec<Option<usize>>> {
    let window = if keys.flag("use_sliding_window")? { keys.size("sliding_window")? } else { None };
    let Some(types) = keys.get("layer_types") else {
        let first = match keys.get("max_window_layers").and_then(Value::as_u64) {
            Some(n) => n as usize,
            None if keys.get("max_window_layers").is_none() => QWEN_DEFAULT_MAX_WINDOW_LAYERS,
            None => return Err(keys.error("max_window_layers", "a layer number")),
        };
        return Ok((0..num_layers).map(|layer| window.filter(|_| layer >= first)).collect());
    };
    let expected = || format!("a list of {num_layers} of full_attention, sliding_attention");
    let list = types.as_array().filter(|list| list.len() == num_layers);
    let list = list.ok_or_else(|| keys.error("layer_types", expected()))?;
    let layer_window = |value: &Value| match value.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") => Ok(window),
        _ => Err(keys.error("layer_types", expected())),
    };
    list.iter().map(layer_window).collect()
}
