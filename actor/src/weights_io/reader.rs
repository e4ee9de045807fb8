//! Opens a checkpoint, checks that it is whole and gives its tensors as f32.

use super::mmap::MappedFile;
use super::names::tensor_specs;
use super::safetensors::{self, Entry};
use super::{INDEX_FILE, SINGLE_FILE};
use crate::config::{Head, ModelConfig};
use crate::error::{Error, Result};
use half::{bf16, f16};
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

/// Number format of a tensor on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoredDType {
    /// IEEE 754 binary32.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE 754 binary16.
    F16,
    /// A format of the file that this crate does not read, by its name there.
    Other(String),
}

impl StoredDType {
    pub(super) fn from_safetensors(name: &str) -> Self {
        match name {
            "F32" => StoredDType::F32,
            "BF16" => StoredDType::Bf16,
            "F16" => StoredDType::F16,
            other => StoredDType::Other(other.to_owned()),
        }
    }

    /// Bytes of one element, where the format is read by this crate.
    pub fn size_bytes(&self) -> Option<usize> {
        match self {
            StoredDType::F32 => Some(4),
            StoredDType::Bf16 | StoredDType::F16 => Some(2),
            StoredDType::Other(_) => None,
        }
    }
}

impl fmt::Display for StoredDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            StoredDType::F32 => "F32",
            StoredDType::Bf16 => "BF16",
            StoredDType::F16 => "F16",
            StoredDType::Other(name) => name,
        })
    }
}

/// A tensor as it lies in the file.
#[derive(Debug, Clone, Copy)]
pub struct StoredTensor<'a> {
    /// Its number format.
    pub dtype: &'a StoredDType,
    /// Its shape.
    pub shape: &'a [usize],
    /// Its elements, little endian, without alignment.
    pub bytes: &'a [u8],
}

/// The tensors of a model directory: `model.safetensors`, or the shards that `model.safetensors.index.json` names.
///
/// Opening reads headers only. Files are memory-mapped and must not be truncated while this value lives.
pub struct CheckpointReader {
    dir: PathBuf,
    files: Vec<MappedFile>,
    tensors: BTreeMap<String, (usize, Entry)>,
}

impl CheckpointReader {
    /// Open the weights of a model directory.
    ///
    /// # Errors
    /// There are none, or only a pickle; a header lies about lengths, overlaps, or leaves holes; the index and the
    /// shards disagree. The error names the file, and the tensor where there is one.
    pub fn open(model_dir: &Path) -> Result<Self> {
        let mut reader = CheckpointReader { dir: model_dir.to_owned(), files: Vec::new(), tensors: BTreeMap::new() };
        if model_dir.join(SINGLE_FILE).is_file() {
            reader.add_file(SINGLE_FILE)?;
        } else if model_dir.join(INDEX_FILE).is_file() {
            reader.add_shards()?;
        } else {
            return Err(no_weights(model_dir));
        }
        Ok(reader)
    }

    /// Check that every tensor of `config` is there with its shape in a readable number format.
    ///
    /// Returns the names of tensors the model has no use for. Rotary frequency buffers and the LM head of a tied model
    /// where it equals the embedding are of use to nobody and not reported.
    ///
    /// # Errors
    /// The first tensor that is missing, of another shape, or stored in a format that is not read.
    pub fn validate(&self, config: &ModelConfig) -> Result<Vec<String>> {
        let mut extra: BTreeSet<&str> = self.tensors.keys().map(String::as_str).collect();
        for spec in tensor_specs(config) {
            let (file, entry) = self.find(&spec.name, || format!("shape {:?} for {}", spec.shape, describe(config)))?;
            if entry.shape != spec.shape {
                let expected = format!("shape {:?} by {}", spec.shape, config.file().display());
                return Err(Error::tensor(file.path(), &spec.name, expected, format!("shape {:?}", entry.shape)));
            }
            check_dtype(file.path(), entry)?;
            extra.remove(spec.name.as_str());
        }
        extra.retain(|name| !name.ends_with(".rotary_emb.inv_freq"));
        if config.head == Head::CausalLm && config.tie_word_embeddings && self.lm_head_repeats_embedding() {
            extra.remove("lm_head.weight");
        }
        Ok(extra.into_iter().map(str::to_owned).collect())
    }

    /// The model directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// True where the checkpoint has a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// A tensor as it is stored.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn tensor(&self, name: &str) -> Result<StoredTensor<'_>> {
        let (file, entry) = self.find(name, || "a tensor of this name".to_owned())?;
        let bytes = &file.bytes()[entry.range.clone()];
        Ok(StoredTensor { dtype: &entry.dtype, shape: &entry.shape, bytes })
    }

    /// Read a whole tensor as f32.
    ///
    /// # Errors
    /// There is none of this name, or it is stored in a format that is not read.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let elements = self.tensor(name)?.shape.iter().product();
        let mut out = vec![0.0; elements];
        self.read_f32_range(name, 0, &mut out)?;
        Ok(out)
    }

    /// Read a whole tensor into `out`, whose length must be the tensor's number of elements.
    ///
    /// # Errors
    /// As [`CheckpointReader::read_f32`], or another number of elements.
    pub fn read_f32_into(&self, name: &str, out: &mut [f32]) -> Result<()> {
        let (file, entry) = self.find(name, || format!("{} elements", out.len()))?;
        let elements: usize = entry.shape.iter().product();
        if elements != out.len() {
            let expected = format!("{} elements", out.len());
            return Err(Error::tensor(file.path(), name, expected, format!("shape {:?}", entry.shape)));
        }
        self.read_f32_range(name, 0, out)
    }

    /// Read `out.len()` elements from flat index `start` on, as a shard of a tensor does.
    ///
    /// # Errors
    /// As [`CheckpointReader::read_f32`], or the range reaches past the tensor.
    pub fn read_f32_range(&self, name: &str, start: usize, out: &mut [f32]) -> Result<()> {
        let (file, entry) = self.find(name, || format!("{} elements from {start} on", out.len()))?;
        let element_bytes = check_dtype(file.path(), entry)?;
        let elements = entry.range.len() / element_bytes;
        let end = start.checked_add(out.len()).filter(|end| *end <= elements).ok_or_else(|| {
            let expected = format!("{} elements from {start} on", out.len());
            Error::tensor(file.path(), name, expected, format!("{elements} elements"))
        })?;
        let bytes = &file.bytes()[entry.range.clone()][start * element_bytes..end * element_bytes];
        decode(&entry.dtype, bytes, out);
        Ok(())
    }

    fn lm_head_repeats_embedding(&self) -> bool {
        let [head, embedding] = ["lm_head.weight", "model.embed_tokens.weight"].map(|name| self.tensor(name).ok());
        head.zip(embedding).is_some_and(|(h, e)| h.dtype == e.dtype && h.shape == e.shape && h.bytes == e.bytes)
    }

    fn find(&self, name: &str, expected: impl FnOnce() -> String) -> Result<(&MappedFile, &Entry)> {
        match self.tensors.get(name) {
            Some((file, entry)) => Ok((&self.files[*file], entry)),
            None => Err(Error::tensor(&self.dir, name, expected(), "no such tensor")),
        }
    }

    fn add_file(&mut self, name: &str) -> Result<()> {
        let file = MappedFile::open(&self.dir.join(name))?;
        for entry in safetensors::parse(file.bytes(), file.path())? {
            if let Some((other, _)) = self.tensors.get(&entry.name) {
                let got = format!("another in {}", self.files[*other].path().display());
                return Err(Error::tensor(file.path(), &entry.name, "one tensor of this name", got));
            }
            self.tensors.insert(entry.name.clone(), (self.files.len(), entry));
        }
        self.files.push(file);
        Ok(())
    }

    fn add_shards(&mut self) -> Result<()> {
        let index = self.dir.join(INDEX_FILE);
        let text = std::fs::read_to_string(&index).map_err(Error::io("read", &index))?;
        let json: Value = serde_json::from_str(&text).map_err(|e| Error::format(&index, format!("not JSON: {e}")))?;
        let map = json.get("weight_map").and_then(Value::as_object);
        let map = map.ok_or_else(|| Error::format(&index, "no object `weight_map`"))?;
        let shards = shard_names(map, &index)?;
        for shard in &shards {
            self.add_file(shard)?;
        }
        for (tensor, shard) in map {
            let found = self.tensors.get(tensor).map(|(file, _)| self.files[*file].path());
            let expected = self.dir.join(shard.as_str().unwrap_or_default());
            if found != Some(expected.as_path()) {
                let got = found.map_or("no such tensor".to_owned(), |path| format!("it in {}", path.display()));
                return Err(Error::tensor(&expected, tensor, format!("it here, by {INDEX_FILE}"), got));
            }
        }
        Ok(())
    }
}

/// The distinct shards of an index, sorted. Names with a folder part would let an index reach outside the directory.
fn shard_names(map: &Map<String, Value>, index: &Path) -> Result<BTreeSet<String>> {
    let plain = |name: &str| !name.is_empty() && !name.contains(['/', '\\']) && name.ends_with(".safetensors");
    map.iter()
        .map(|(tensor, shard)| match shard.as_str() {
            Some(name) if plain(name) => Ok(name.to_owned()),
            _ => Err(Error::tensor(index, tensor, "the plain name of a .safetensors file", shard.to_string())),
        })
        .collect()
}

fn check_dtype(file: &Path, entry: &Entry) -> Result<usize> {
    entry
        .dtype
        .size_bytes()
        .ok_or_else(|| Error::tensor(file, &entry.name, "dtype F32, BF16 or F16", format!("dtype {}", entry.dtype)))
}

fn describe(config: &ModelConfig) -> String {
    format!("{}{}", config.family.class_prefix(), config.head.class_suffix())
}

fn no_weights(dir: &Path) -> Error {
    let pickled = |name: &str| {
        name.ends_with(".bin") && name.starts_with("pytorch_model") || name.ends_with(".pt") || name.ends_with(".pth")
    };
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .map(|entries| entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default();
    names.sort_unstable();
    match names.iter().find(|name| pickled(name)) {
        Some(name) => Error::Pickle { file: dir.join(name) },
        None => Error::format(dir, format!("no weights: expected {SINGLE_FILE} or {INDEX_FILE}")),
    }
}

/// Convert little-endian elements; `bytes` holds exactly `out.len()` of them.
fn decode(dtype: &StoredDType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        StoredDType::F32 => {
            let elements = bytes.as_chunks::<4>().0;
            out.iter_mut().zip(elements).for_each(|(out, b)| *out = f32::from_le_bytes(*b));
        }
        StoredDType::Bf16 => {
            let elements = bytes.as_chunks::<2>().0;
            out.iter_mut().zip(elements).for_each(|(out, b)| *out = bf16::from_le_bytes(*b).to_f32());
        }
        StoredDType::F16 => {
            let elements = bytes.as_chunks::<2>().0;
            out.iter_mut().zip(elements).for_each(|(out, b)| *out = f16::from_le_bytes(*b).to_f32());
        }
        StoredDType::Other(name) => unreachable!("dtype {name} is refused before decoding"),
    }
}
