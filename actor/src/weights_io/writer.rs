//! Writes a checkpoint that transformers loads: every file appears whole or not at all.

use super::names::{TensorSpec, tensor_specs};
use super::reader::StoredDType;
use super::{INDEX_FILE, SINGLE_FILE, safetensors};
use crate::config::{CONFIG_FILE, ModelConfig};
use crate::error::{Error, Result};
use half::bf16;
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use temper_types::DType;

/// Files that travel with the weights from one model directory to the next, where they exist.
pub const SIDE_FILES: [&str; 10] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
];

/// Elements of one tensor, handed to the writer.
#[derive(Debug, Clone)]
pub enum TensorData<'a> {
    /// f32 elements; rounded to nearest even where bf16 is written.
    F32(Cow<'a, [f32]>),
    /// bf16 elements; widened where f32 is written.
    Bf16(Cow<'a, [bf16]>),
}

impl TensorData<'_> {
    fn len(&self) -> usize {
        match self {
            TensorData::F32(data) => data.len(),
            TensorData::Bf16(data) => data.len(),
        }
    }
}

/// How a checkpoint is written.
#[derive(Debug, Clone)]
pub struct WriteOptions<'a> {
    /// Number format on disk.
    pub dtype: DType,
    /// Largest number of data bytes in one file, unless a single tensor is larger; 5 GB is what transformers uses.
    pub max_shard_bytes: usize,
    /// Model directory from which [`SIDE_FILES`] are copied; `None` copies none.
    pub side_files_from: Option<&'a Path>,
}

impl Default for WriteOptions<'_> {
    fn default() -> Self {
        WriteOptions { dtype: DType::F32, max_shard_bytes: 5_000_000_000, side_files_from: None }
    }
}

/// Write weights, `config.json` and side files into `dir`, which is made where it does not exist.
///
/// `tensor` is called once for every tensor of [`tensor_specs`], in that order, and may borrow what it returns. Each
/// file is written under another name, synced and renamed; shards of an older checkpoint that the new one does not
/// name are removed last.
///
/// # Errors
/// A file cannot be written, `tensor` fails, or it gives another number of elements than the tensor has.
pub fn write_checkpoint<'a>(
    dir: &Path,
    config: &ModelConfig,
    options: &WriteOptions,
    mut tensor: impl FnMut(&TensorSpec) -> Result<TensorData<'a>>,
) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Error::io("create", dir))?;
    let specs = tensor_specs(config);
    let shards = plan_shards(&specs, options);
    for (name, specs) in &shards {
        write_shard(&dir.join(name), specs, options.dtype, &mut tensor)?;
    }
    match shards.as_slice() {
        [_] => remove_if_present(&dir.join(INDEX_FILE))?,
        _ => write_json(&dir.join(INDEX_FILE), &index(&shards, options.dtype))?,
    }
    remove_stale_shards(dir, &shards)?;
    write_json(&dir.join(CONFIG_FILE), &config.to_json(options.dtype))?;
    copy_side_files(options.side_files_from, dir)?;
    sync_dir(dir)
}

/// Write a JSON value as an indented file, atomically.
pub(crate) fn write_json(path: &Path, value: &Value) -> Result<()> {
    write_atomically(path, |out| {
        serde_json::to_writer_pretty(&mut *out, value).map_err(|cause| Error::io("write", path)(cause.into()))?;
        out.write_all(b"\n").map_err(Error::io("write", path))
    })
}

/// Make the names in a directory durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(Error::io("sync", dir))
}

/// A file name and the tensors that go there.
type Shard<'a> = (String, &'a [TensorSpec]);

fn plan_shards<'a>(specs: &'a [TensorSpec], options: &WriteOptions) -> Vec<Shard<'a>> {
    let element_bytes = options.dtype.size_bytes();
    let mut cuts = vec![0];
    let mut bytes = 0;
    for (index, spec) in specs.iter().enumerate() {
        let size = spec.num_elements() * element_bytes;
        if bytes > 0 && bytes + size > options.max_shard_bytes {
            cuts.push(index);
            bytes = 0;
        }
        bytes += size;
    }
    cuts.push(specs.len());
    let count = cuts.len() - 1;
    let name = |index: usize| match count {
        1 => SINGLE_FILE.to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
    };
    cuts.windows(2).enumerate().map(|(index, cut)| (name(index), &specs[cut[0]..cut[1]])).collect()
}

fn index(shards: &[Shard], dtype: DType) -> Value {
    let total: usize = shards.iter().flat_map(|(_, specs)| *specs).map(TensorSpec::num_elements).sum();
    let entries =
        shards.iter().flat_map(|(file, specs)| specs.iter().map(move |spec| (spec.name.clone(), json!(file))));
    let weight_map: Map<String, Value> = entries.collect();
    json!({"metadata": {"total_size": total * dtype.size_bytes()}, "weight_map": weight_map})
}

fn write_shard<'a>(
    path: &Path,
    specs: &[TensorSpec],
    dtype: DType,
    tensor: &mut impl FnMut(&TensorSpec) -> Result<TensorData<'a>>,
) -> Result<()> {
    let stored = match dtype {
        DType::F32 => StoredDType::F32,
        DType::Bf16 => StoredDType::Bf16,
    };
    let header =
        safetensors::header(specs.iter().map(|spec| (spec.name.as_str(), stored.clone(), spec.shape.as_slice())));
    write_atomically(path, |out| {
        out.write_all(&header).map_err(Error::io("write", path))?;
        for spec in specs {
            let data = tensor(spec)?;
            if data.len() != spec.num_elements() {
                let expected = format!("{} elements for shape {:?}", spec.num_elements(), spec.shape);
                return Err(Error::tensor(path, &spec.name, expected, format!("{} elements", data.len())));
            }
            encode(&data, dtype, out).map_err(Error::io("write", path))?;
        }
        Ok(())
    })
}

fn encode(data: &TensorData, dtype: DType, out: &mut impl Write) -> std::io::Result<()> {
    match (data, dtype) {
        (TensorData::F32(data), DType::F32) => encode_chunks(data, |x| x.to_le_bytes(), out),
        (TensorData::F32(data), DType::Bf16) => encode_chunks(data, |x| bf16::from_f32(x).to_le_bytes(), out),
        (TensorData::Bf16(data), DType::F32) => encode_chunks(data, |x| x.to_f32().to_le_bytes(), out),
        (TensorData::Bf16(data), DType::Bf16) => encode_chunks(data, bf16::to_le_bytes, out),
    }
}

/// Convert a chunk at a time, so that the writer sees few large pieces.
fn encode_chunks<T: Copy, const N: usize>(
    data: &[T],
    bytes: impl Fn(T) -> [u8; N],
    out: &mut impl Write,
) -> std::io::Result<()> {
    const CHUNK: usize = 16_384;
    let mut buffer = vec![[0u8; N]; CHUNK.min(data.len())];
    for chunk in data.chunks(CHUNK) {
        let buffer = &mut buffer[..chunk.len()];
        buffer.iter_mut().zip(chunk).for_each(|(out, x)| *out = bytes(*x));
        out.write_all(buffer.as_flattened())?;
    }
    Ok(())
}

/// Write through a temporary file beside `path`, sync it and rename it; nothing is left behind on failure.
pub(crate) fn write_atomically(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".tmp-{}", std::process::id()));
    let temporary = path.with_file_name(name);
    let written = write_and_sync(&temporary, write)
        .and_then(|()| std::fs::rename(&temporary, path).map_err(Error::io("rename into place", path)));
    if written.is_err() {
        // The first error is the one to report; a file that cannot be removed either does no harm under this name.
        let _ = std::fs::remove_file(&temporary);
    }
    written
}

fn write_and_sync(path: &Path, write: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let file = File::create(path).map_err(Error::io("create", path))?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    write(&mut out)?;
    let file = out.into_inner().map_err(|e| Error::io("write", path)(e.into_error()))?;
    file.sync_all().map_err(Error::io("sync", path))
}

fn copy_side_files(from: Option<&Path>, to: &Path) -> Result<()> {
    let Some(from) = from else { return Ok(()) };
    let pairs = SIDE_FILES.map(|name| (from.join(name), to.join(name)));
    for (source, target) in pairs.iter().filter(|(source, target)| source.is_file() && !same_file(source, target)) {
        let bytes = std::fs::read(source).map_err(Error::io("read", source))?;
        write_atomically(target, |out| out.write_all(&bytes).map_err(Error::io("write", target)))?;
    }
    Ok(())
}

fn same_file(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

fn remove_if_present(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path)(cause)),
        _ => Ok(()),
    }
}

/// Remove `model.safetensors` and `model-N-of-M.safetensors` of an older checkpoint.
fn remove_stale_shards(dir: &Path, shards: &[Shard]) -> Result<()> {
    let entries = std::fs::read_dir(dir).map_err(Error::io("list", dir))?;
    let paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let weights = name == SINGLE_FILE || (name.starts_with("model-") && name.ends_with(".safetensors"));
        if weights && !shards.iter().any(|(shard, _)| *shard == name) {
            remove_if_present(&path)?;
        }
    }
    Ok(())
}
