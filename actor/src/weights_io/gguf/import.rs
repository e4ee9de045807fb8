//! From a GGUF file to a Hugging Face model directory.

use super::metadata::Metadata;
use super::names::{RowOrder, gguf_name, interleaved_heads, reorder_rows};
use super::parse::{GgufFile, TensorInfo};
use super::tokenizer;
use crate::config::{Family, ModelConfig};
use crate::error::{Error, Result};
use crate::weights_io::writer::write_json;
use crate::weights_io::{TensorData, TensorSpec, WriteOptions, tensor_specs, write_checkpoint};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use temper_types::DType;

/// What an import made.
#[derive(Debug, Clone)]
pub struct ImportSummary {
    /// The configuration that was written.
    pub config: ModelConfig,
    /// Number of tensors by format in the source, as `Q4_1`.
    pub tensor_types: BTreeMap<String, usize>,
    /// Number of parameters.
    pub num_parameters: usize,
    /// True where the source has a chat template.
    pub has_chat_template: bool,
}

/// Import a GGUF file into `out_dir` as a model directory with weights in `dtype`.
///
/// # Errors
/// The file is damaged; its architecture, a tensor format or its tokenizer is not supported; a tensor is missing, has
/// another shape than the metadata says, or has no place in the model. The error names file and key or tensor.
pub fn import_gguf(path: &Path, out_dir: &Path, dtype: DType) -> Result<ImportSummary> {
    let file = GgufFile::open(path)?;
    let config = ModelConfig::from_json(config_json(&file)?, path)?;
    let specs = tensor_specs(&config);
    check_tensors(&file, &specs)?;
    let files = tokenizer::files(&file.metadata, config.vocab_size, config.max_position_embeddings)?;
    std::fs::create_dir_all(out_dir).map_err(Error::io("create", out_dir))?;
    for (name, value) in [("tokenizer.json", &files.tokenizer), ("tokenizer_config.json", &files.settings)] {
        write_json(&out_dir.join(name), value)?;
    }
    write_json(&out_dir.join("generation_config.json"), &generation_config(&config))?;
    let options = WriteOptions { dtype, ..WriteOptions::default() };
    write_checkpoint(out_dir, &config, &options, |spec| Ok(TensorData::F32(read(&file, &config, spec)?.into())))?;
    let mut tensor_types = BTreeMap::new();
    for tensor in &file.tensors {
        *tensor_types.entry(tensor.block_type.to_string()).or_insert(0) += 1;
    }
    let num_parameters = specs.iter().map(TensorSpec::num_elements).sum();
    let has_chat_template = files.settings.get("chat_template").is_some();
    Ok(ImportSummary { config, tensor_types, num_parameters, has_chat_template })
}

fn read(file: &GgufFile, config: &ModelConfig, spec: &TensorSpec) -> Result<Vec<f32>> {
    let data = file.read_f32(find(file, spec)?);
    Ok(match interleaved_heads(config, &spec.name) {
        Some(heads) => reorder_rows(&data, heads, config.head_dim, RowOrder::ToHalves),
        None => data,
    })
}

fn find<'a>(file: &'a GgufFile, spec: &TensorSpec) -> Result<&'a TensorInfo> {
    let name = gguf_name(&spec.name).unwrap_or_else(|| spec.name.clone());
    let missing = || Error::tensor(file.path(), &name, format!("shape {:?}", spec.shape), "no such tensor");
    let tensor = file.tensor(&name).ok_or_else(missing)?;
    if tensor.shape != spec.shape {
        let (expected, got) = (format!("shape {:?}", spec.shape), format!("shape {:?}", tensor.shape));
        return Err(Error::tensor(file.path(), &name, expected, got));
    }
    Ok(tensor)
}

/// Every tensor of the model is there, and every tensor of the file has a place.
fn check_tensors(file: &GgufFile, specs: &[TensorSpec]) -> Result<()> {
    let mut used: Vec<&str> = Vec::with_capacity(specs.len());
    for spec in specs {
        used.push(&find(file, spec)?.name);
    }
    used.sort_unstable();
    match file.tensors.iter().find(|tensor| used.binary_search(&tensor.name.as_str()).is_err()) {
        Some(extra) if extra.name == "rope_freqs.weight" => {
            let got = "rotary frequency factors, which config.json can not express exactly";
            Err(Error::tensor(file.path(), &extra.name, "a model without rope scaling by factors", got))
        }
        Some(extra) => Err(Error::tensor(file.path(), &extra.name, "tensors of the architecture only", "this one too")),
        None => Ok(()),
    }
}

fn family(metadata: &Metadata) -> Result<Family> {
    let key = "general.architecture";
    match metadata.text(key)? {
        Some("llama") => Ok(Family::Llama),
        Some("qwen2") => Ok(Family::Qwen2),
        Some("qwen3") => Ok(Family::Qwen3),
        _ => Err(metadata.error(key, "one of llama, qwen2, qwen3")),
    }
}

/// `config.json` from metadata and tensor shapes.
fn config_json(file: &GgufFile) -> Result<Map<String, Value>> {
    let meta = &file.metadata;
    let family = family(meta)?;
    let key = |rest: &str| format!("{}.{rest}", family.model_type());
    refuse_unsupported(meta, &key)?;
    let integer = |rest: &str| meta.required_integer(&key(rest));
    let heads = integer("attention.head_count")?;
    let hidden = integer("embedding_length")?;
    let head_dim = match meta.integer(&key("attention.key_length"))? {
        Some(width) => width,
        None if heads > 0 => hidden / heads,
        None => return Err(meta.error(&key("attention.head_count"), "1 or more")),
    };
    for other in ["attention.value_length", "rope.dimension_count"] {
        if meta.integer(&key(other))?.is_some_and(|width| width != head_dim) {
            return Err(meta.error(&key(other), &format!("{head_dim}, the width of a head")));
        }
    }
    let epsilon = key("attention.layer_norm_rms_epsilon");
    let epsilon = meta.number(&epsilon)?.ok_or_else(|| meta.error(&epsilon, "a number"))?;
    let embedding = file.tensor("token_embd.weight").map(|tensor| tensor.shape[0]);
    let mut config = json!({
        "architectures": [format!("{}ForCausalLM", family.class_prefix())],
        "attention_dropout": 0.0,
        "bos_token_id": meta.integer("tokenizer.ggml.bos_token_id")?,
        "eos_token_id": meta.integer("tokenizer.ggml.eos_token_id")?,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": integer("feed_forward_length")?,
        "max_position_embeddings": integer("context_length")?,
        "model_type": family.model_type(),
        "num_attention_heads": heads,
        "num_hidden_layers": integer("block_count")?,
        "num_key_value_heads": meta.integer(&key("attention.head_count_kv"))?.unwrap_or(heads),
        "pad_token_id": meta.integer("tokenizer.ggml.padding_token_id")?,
        "rms_norm_eps": epsilon,
        "rope_scaling": rope_scaling(meta, &key)?,
        "rope_theta": meta.number(&key("rope.freq_base"))?.unwrap_or(10_000.0),
        "tie_word_embeddings": file.tensor("output.weight").is_none(),
        "torch_dtype": "float32",
        "use_cache": true,
        "vocab_size": embedding.map_or(0, |rows| rows),
    });
    if family == Family::Llama {
        config["attention_bias"] = file.tensor("blk.0.attn_q.bias").is_some().into();
        config["mlp_bias"] = file.tensor("blk.0.ffn_up.bias").is_some().into();
    }
    match config {
        Value::Object(map) => Ok(map),
        _ => unreachable!("an object literal is an object"),
    }
}

fn refuse_unsupported(meta: &Metadata, key: &impl Fn(&str) -> String) -> Result<()> {
    for rest in ["expert_count", "attention.sliding_window", "attention.key_length_mla"] {
        if meta.integer(&key(rest))?.is_some_and(|n| n != 0) {
            return Err(meta.error(&key(rest), "0 or no such key"));
        }
    }
    if meta.integer("split.count")?.is_some_and(|n| n > 1) {
        return Err(meta.error("split.count", "a model in one file"));
    }
    Ok(())
}

fn rope_scaling(meta: &Metadata, key: &impl Fn(&str) -> String) -> Result<Value> {
    let factor = || meta.number(&key("rope.scaling.factor"));
    match meta.text(&key("rope.scaling.type"))? {
        None if meta.contains(&key("rope.scale_linear")) => {
            Ok(json!({"type": "linear", "factor": meta.number(&key("rope.scale_linear"))?}))
        }
        None | Some("none") => Ok(Value::Null),
        Some("linear") => Ok(json!({"type": "linear", "factor": factor()?})),
        Some(_) => Err(meta.error(&key("rope.scaling.type"), "one of none, linear")),
    }
}

fn generation_config(config: &ModelConfig) -> Value {
    let mut json = json!({"_from_model_config": true});
    if let Some(id) = config.bos_token_id {
        json["bos_token_id"] = id.into();
    }
    if let Some(id) = config.eos_token_ids.first() {
        json["eos_token_id"] = (*id).into();
    }
    if let Some(id) = config.pad_token_id {
        json["pad_token_id"] = id.into();
    }
    json
}
