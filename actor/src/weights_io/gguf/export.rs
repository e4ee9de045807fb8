//! From a Hugging Face model directory to a GGUF file, unquantised.

use super::blocks::BlockType;
use super::names::{RowOrder, gguf_name, interleaved_heads, reorder_rows};
use super::parse::{DEFAULT_ALIGNMENT, MAGIC};
use super::tokenizer_export;
use crate::config::{Family, Head, ModelConfig, RopeConfig, RopeScaling};
use crate::error::{Error, Result};
use crate::weights_io::writer::write_atomically;
use crate::weights_io::{CheckpointReader, TensorKind, TensorSpec, tensor_specs};
use half::{bf16, f16};
use std::io::Write;
use std::path::Path;

/// Version of the format that is written.
const VERSION: u32 = 3;
/// Tensor of rotary frequency divisors.
const ROPE_FREQS: &str = "rope_freqs.weight";

/// Number format of exported matrices; norms and biases are always F32, as llama.cpp wants them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GgufType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16; a finite weight beyond its range is an error.
    F16,
    /// bfloat16.
    Bf16,
}

impl GgufType {
    fn block_type(self) -> BlockType {
        match self {
            GgufType::F32 => BlockType::F32,
            GgufType::F16 => BlockType::F16,
            GgufType::Bf16 => BlockType::Bf16,
        }
    }

    /// Code of `general.file_type`.
    fn file_type(self) -> u32 {
        match self {
            GgufType::F32 => 0,
            GgufType::F16 => 1,
            GgufType::Bf16 => 32,
        }
    }
}

/// Export a model directory as a GGUF file that llama.cpp reads, tokenizer and chat template included.
///
/// # Errors
/// The directory is not whole; the model has a value or reward head or a sliding window, or the tokenizer is not one
/// of the byte-level kinds that GGUF names; a weight does not fit F16. The error names file and key or tensor.
pub fn export_gguf(model_dir: &Path, out: &Path, kind: GgufType) -> Result<()> {
    let config = ModelConfig::load(model_dir)?;
    refuse_inexpressible(&config)?;
    let reader = CheckpointReader::open(model_dir)?;
    reader.validate(&config)?;
    let mut meta = MetaWriter::default();
    model_metadata(&mut meta, &config, kind);
    tokenizer_export::metadata(&mut meta, model_dir, config.vocab_size)?;
    let specs = tensor_specs(&config);
    let tensors = plan(&config, &specs, kind)?;
    let header = header(&meta, &tensors);
    write_atomically(out, |file| {
        let mut write = |bytes: &[u8]| file.write_all(bytes).map_err(Error::io("write", out));
        write(&header)?;
        for tensor in &tensors {
            let mut bytes = encode(&tensor.read(&config, &reader)?, tensor.block_type, out, &tensor.name)?;
            bytes.resize(bytes.len().next_multiple_of(DEFAULT_ALIGNMENT), 0);
            write(&bytes)?;
        }
        Ok(())
    })
}

fn refuse_inexpressible(config: &ModelConfig) -> Result<()> {
    if config.head != Head::CausalLm {
        return Err(Error::config(config.file(), "architectures", "a value or reward model", "a causal LM for GGUF"));
    }
    match config.windows.iter().flatten().next() {
        Some(window) => Err(Error::config(config.file(), "sliding_window", window, "null: GGUF's llama has no window")),
        None => Ok(()),
    }
}

fn architecture(family: Family) -> &'static str {
    match family {
        Family::Llama | Family::Mistral => "llama",
        Family::Qwen2 => "qwen2",
        Family::Qwen3 => "qwen3",
    }
}

fn model_metadata(meta: &mut MetaWriter, config: &ModelConfig, kind: GgufType) {
    let arch = architecture(config.family);
    meta.text("general.architecture", arch);
    meta.u32("general.file_type", kind.file_type());
    let sizes = [
        ("vocab_size", config.vocab_size),
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("block_count", config.num_hidden_layers),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.num_attention_heads),
        ("attention.head_count_kv", config.num_key_value_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
        ("rope.dimension_count", config.head_dim),
    ];
    for (key, size) in sizes {
        meta.u32(&format!("{arch}.{key}"), size as u32);
    }
    meta.f32(&format!("{arch}.attention.layer_norm_rms_epsilon"), config.rms_norm_eps);
    meta.f32(&format!("{arch}.rope.freq_base"), config.rope.theta as f32);
    match config.rope.scaling {
        RopeScaling::Linear { factor } => {
            meta.text(&format!("{arch}.rope.scaling.type"), "linear");
            meta.f32(&format!("{arch}.rope.scaling.factor"), factor as f32);
        }
        RopeScaling::Default | RopeScaling::Llama3 { .. } => {}
    }
    let ids = [
        ("bos_token_id", config.bos_token_id),
        ("eos_token_id", config.eos_token_ids.first().copied()),
        ("padding_token_id", config.pad_token_id),
    ];
    for (key, id) in ids {
        if let Some(id) = id {
            meta.u32(&format!("tokenizer.ggml.{key}"), id);
        }
    }
}

/// A tensor to be written.
struct Planned<'a> {
    name: String,
    shape: Vec<usize>,
    block_type: BlockType,
    /// Its source, `None` for the rotary divisors, which are computed.
    spec: Option<&'a TensorSpec>,
}

impl Planned<'_> {
    fn bytes(&self) -> usize {
        let shape: Vec<u64> = self.shape.iter().map(|n| *n as u64).collect();
        self.block_type.bytes_of(&shape).expect("shapes of a loaded model fit memory and are no blocks") as usize
    }

    fn read(&self, config: &ModelConfig, reader: &CheckpointReader) -> Result<Vec<f32>> {
        let Some(spec) = self.spec else { return Ok(rope_divisors(config)) };
        let data = reader.read_f32(&spec.name)?;
        Ok(match interleaved_heads(config, &spec.name) {
            Some(heads) => reorder_rows(&data, heads, config.head_dim, RowOrder::ToNeighbours),
            None => data,
        })
    }
}

fn plan<'a>(config: &ModelConfig, specs: &'a [TensorSpec], kind: GgufType) -> Result<Vec<Planned<'a>>> {
    let mut tensors = Vec::with_capacity(specs.len() + 1);
    if let RopeScaling::Llama3 { .. } = config.rope.scaling {
        let shape = vec![config.head_dim / 2];
        tensors.push(Planned { name: ROPE_FREQS.into(), shape, block_type: BlockType::F32, spec: None });
    }
    for spec in specs {
        let unnamed = || Error::tensor(config.file(), &spec.name, "a tensor that GGUF has a name for", "another");
        let block_type = match spec.kind {
            TensorKind::Embedding | TensorKind::Matrix => kind.block_type(),
            TensorKind::Norm | TensorKind::Bias => BlockType::F32,
        };
        let name = gguf_name(&spec.name).ok_or_else(unnamed)?;
        tensors.push(Planned { name, shape: spec.shape.clone(), block_type, spec: Some(spec) });
    }
    Ok(tensors)
}

/// What llama.cpp divides each rotary frequency by.
fn rope_divisors(config: &ModelConfig) -> Vec<f32> {
    let plain = RopeConfig { scaling: RopeScaling::Default, ..config.rope }.inv_frequencies(config.head_dim);
    plain.iter().zip(config.inv_frequencies()).map(|(plain, scaled)| plain / scaled).collect()
}

/// Everything before the data, padded to the alignment.
fn header(meta: &MetaWriter, tensors: &[Planned]) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend(meta.count.to_le_bytes());
    out.extend(&meta.bytes);
    let mut offset = 0u64;
    for tensor in tensors {
        put_text(&mut out, &tensor.name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|n| out.extend((*n as u64).to_le_bytes()));
        out.extend(tensor.block_type.code().to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset += tensor.bytes().next_multiple_of(DEFAULT_ALIGNMENT) as u64;
    }
    out.resize(out.len().next_multiple_of(DEFAULT_ALIGNMENT), 0);
    out
}

fn encode(data: &[f32], kind: BlockType, file: &Path, name: &str) -> Result<Vec<u8>> {
    match kind {
        BlockType::F32 => Ok(data.iter().flat_map(|x| x.to_le_bytes()).collect()),
        BlockType::Bf16 => Ok(data.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect()),
        BlockType::F16 => match data.iter().find(|x| x.is_finite() && f16::from_f32(**x).is_infinite()) {
            Some(x) => Err(Error::tensor(file, name, "weights within the range of F16", x.to_string())),
            None => Ok(data.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect()),
        },
        BlockType::Q4_0 | BlockType::Q4_1 | BlockType::Q8_0 => unreachable!("no GgufType is a quantised format"),
    }
}

/// Collects metadata pairs in the order they are given.
#[derive(Default)]
pub(super) struct MetaWriter {
    bytes: Vec<u8>,
    count: u64,
}

impl MetaWriter {
    pub(super) fn u32(&mut self, key: &str, value: u32) {
        self.key(key, 4);
        self.bytes.extend(value.to_le_bytes());
    }

    pub(super) fn f32(&mut self, key: &str, value: f32) {
        self.key(key, 6);
        self.bytes.extend(value.to_le_bytes());
    }

    pub(super) fn flag(&mut self, key: &str, value: bool) {
        self.key(key, 7);
        self.bytes.push(value.into());
    }

    pub(super) fn text(&mut self, key: &str, value: &str) {
        self.key(key, 8);
        put_text(&mut self.bytes, value);
    }

    pub(super) fn texts(&mut self, key: &str, values: &[String]) {
        self.list(key, 8, values.len());
        values.iter().for_each(|value| put_text(&mut self.bytes, value));
    }

    pub(super) fn i32s(&mut self, key: &str, values: &[i32]) {
        self.list(key, 5, values.len());
        values.iter().for_each(|value| self.bytes.extend(value.to_le_bytes()));
    }

    fn list(&mut self, key: &str, kind: u32, length: usize) {
        self.key(key, 9);
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend((length as u64).to_le_bytes());
    }

    fn key(&mut self, key: &str, kind: u32) {
        self.count += 1;
        put_text(&mut self.bytes, key);
        self.bytes.extend(kind.to_le_bytes());
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}
