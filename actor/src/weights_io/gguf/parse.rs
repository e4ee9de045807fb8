//! The container: header, metadata and tensor directory, every claim checked against the file.

use super::blocks::BlockType;
use super::metadata::{MetaValue, Metadata};
use crate::error::{Error, Result};
use crate::weights_io::mmap::MappedFile;
use std::ops::Range;
use std::path::Path;

/// First four bytes of a file.
pub(super) const MAGIC: [u8; 4] = *b"GGUF";
/// Alignment of tensor data where `general.alignment` is absent.
pub(super) const DEFAULT_ALIGNMENT: usize = 32;
/// Arrays of arrays deeper than this are refused.
const MAX_DEPTH: usize = 3;

/// One tensor of the directory; `range` is absolute in the file and inside it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TensorInfo {
    pub(super) name: String,
    /// Shape as Hugging Face writes it: outermost dimension first, the reverse of the file's order.
    pub(super) shape: Vec<usize>,
    pub(super) block_type: BlockType,
    pub(super) range: Range<usize>,
}

impl TensorInfo {
    pub(super) fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A parsed file.
pub(super) struct GgufFile {
    map: MappedFile,
    pub(super) metadata: Metadata,
    pub(super) tensors: Vec<TensorInfo>,
}

impl GgufFile {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let map = MappedFile::open(path)?;
        let (metadata, tensors) = parse(map.bytes(), path)?;
        Ok(GgufFile { map, metadata, tensors })
    }

    pub(super) fn path(&self) -> &Path {
        self.map.path()
    }

    pub(super) fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// Elements of a tensor as f32, in the file's row order.
    pub(super) fn read_f32(&self, tensor: &TensorInfo) -> Vec<f32> {
        let mut out = vec![0.0; tensor.num_elements()];
        tensor.block_type.decode(&self.map.bytes()[tensor.range.clone()], &mut out);
        out
    }
}

/// Parse a whole file of bytes.
pub(super) fn parse(bytes: &[u8], file: &Path) -> Result<(Metadata, Vec<TensorInfo>)> {
    let mut cursor = Cursor { bytes, at: 0, file };
    if cursor.array::<4>("magic")? != MAGIC {
        return Err(Error::format(file, "does not begin with `GGUF`"));
    }
    let version = cursor.u32("version")?;
    if !(2..=3).contains(&version) {
        return Err(Error::format(file, format!("GGUF version {version}: expected 2 or 3, little endian")));
    }
    let num_tensors = cursor.count("number of tensors")?;
    let num_keys = cursor.count("number of metadata keys")?;
    let mut metadata = Metadata::new(file);
    for _ in 0..num_keys {
        let key = cursor.string("metadata key")?;
        let kind = cursor.u32(&key)?;
        let value = cursor.value(kind, &key, 0)?;
        metadata.insert(key, value)?;
    }
    let alignment = alignment(&metadata)?;
    let mut tensors = Vec::new();
    for _ in 0..num_tensors {
        tensors.push(cursor.tensor_info()?);
    }
    place(&mut tensors, cursor.at.next_multiple_of(alignment), alignment, bytes.len(), file)?;
    Ok((metadata, tensors))
}

fn alignment(metadata: &Metadata) -> Result<usize> {
    let key = "general.alignment";
    match metadata.integer(key)? {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(n) if (1..=1 << 20).contains(&n) => Ok(n as usize),
        Some(_) => Err(metadata.error(key, "an alignment from 1 to 1048576")),
    }
}

/// Turn offsets within the data section into ranges of the file; check that they are aligned, inside it and apart.
fn place(tensors: &mut [TensorInfo], base: usize, alignment: usize, length: usize, file: &Path) -> Result<()> {
    for tensor in tensors.iter_mut() {
        let Range { start, end } = tensor.range.clone();
        if !start.is_multiple_of(alignment) {
            let expected = format!("an offset that is a multiple of {alignment}");
            return Err(Error::tensor(file, &tensor.name, expected, start.to_string()));
        }
        tensor.range = match (base.checked_add(start), base.checked_add(end)) {
            (Some(start), Some(end)) if end <= length => start..end,
            _ => {
                let expected = format!("data inside the {length} bytes of the file (truncated?)");
                return Err(Error::tensor(
                    file,
                    &tensor.name,
                    expected,
                    format!("bytes {start}..{end} from {base} on"),
                ));
            }
        };
    }
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_unstable_by_key(|tensor| tensor.range.start);
    if let Some(pair) = order.windows(2).find(|pair| pair[0].range.end > pair[1].range.start) {
        let expected = format!("data after that of `{}`", pair[0].name);
        return Err(Error::tensor(file, &pair[1].name, expected, "data that overlaps it"));
    }
    order.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    match order.windows(2).find(|pair| pair[0].name == pair[1].name) {
        Some(pair) => Err(Error::tensor(file, &pair[0].name, "one tensor of this name", "two")),
        None => Ok(()),
    }
}

/// Reads little-endian values; every read is bounded by the file.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    file: &'a Path,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, length: usize, what: &str) -> Result<&'a [u8]> {
        let end = self.at.checked_add(length).filter(|end| *end <= self.bytes.len()).ok_or_else(|| {
            let left = self.bytes.len() - self.at;
            let problem = format!("`{what}` at byte {} takes {length} bytes, but {left} are left: truncated?", self.at);
            Error::format(self.file, problem)
        })?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A number of things that take at least one byte each.
    fn count(&mut self, what: &str) -> Result<usize> {
        let count = self.u64(what)?;
        let left = (self.bytes.len() - self.at) as u64;
        if count > left {
            let problem = format!("`{what}` is {count}, but {left} bytes are left: truncated?");
            return Err(Error::format(self.file, problem));
        }
        Ok(count as usize)
    }

    fn string(&mut self, what: &str) -> Result<String> {
        let length = self.count(what)?;
        let bytes = self.take(length, what)?.to_vec();
        String::from_utf8(bytes).map_err(|_| Error::format(self.file, format!("`{what}` is not UTF-8")))
    }

    fn value(&mut self, kind: u32, key: &str, depth: usize) -> Result<MetaValue> {
        Ok(match kind {
            0 => MetaValue::Integer(i128::from(self.array::<1>(key)?[0])),
            1 => MetaValue::Integer(i128::from(i8::from_le_bytes(self.array(key)?))),
            2 => MetaValue::Integer(i128::from(u16::from_le_bytes(self.array(key)?))),
            3 => MetaValue::Integer(i128::from(i16::from_le_bytes(self.array(key)?))),
            4 => MetaValue::Integer(i128::from(self.u32(key)?)),
            5 => MetaValue::Integer(i128::from(i32::from_le_bytes(self.array(key)?))),
            6 => MetaValue::Float(decimal(f32::from_le_bytes(self.array(key)?))),
            7 => MetaValue::Flag(self.array::<1>(key)?[0] != 0),
            8 => MetaValue::Text(self.string(key)?),
            9 if depth < MAX_DEPTH => self.list(key, depth)?,
            10 => MetaValue::Integer(i128::from(self.u64(key)?)),
            11 => MetaValue::Integer(i128::from(i64::from_le_bytes(self.array(key)?))),
            12 => MetaValue::Float(f64::from_le_bytes(self.array(key)?)),
            _ => {
                let problem = format!("metadata `{key}` has type {kind} at depth {depth}, which GGUF does not define");
                return Err(Error::format(self.file, problem));
            }
        })
    }

    fn list(&mut self, key: &str, depth: usize) -> Result<MetaValue> {
        let kind = self.u32(key)?;
        let count = self.count(key)?;
        (0..count).map(|_| self.value(kind, key, depth + 1)).collect::<Result<_>>().map(MetaValue::List)
    }

    /// An entry of the directory, its range still relative to the data section.
    fn tensor_info(&mut self) -> Result<TensorInfo> {
        let name = self.string("tensor name")?;
        let num_dims = self.u32(&name)?;
        if !(1..=4).contains(&num_dims) {
            return Err(Error::tensor(self.file, &name, "1 to 4 dimensions", num_dims.to_string()));
        }
        let mut shape = Vec::new();
        for _ in 0..num_dims {
            shape.push(self.u64(&name)?);
        }
        shape.reverse();
        let block_type = BlockType::from_code(self.u32(&name)?).map_err(|kind| {
            let expected = format!("type {}", BlockType::SUPPORTED);
            Error::tensor(self.file, &name, expected, format!("type {kind}"))
        })?;
        let start = self.u64(&name)?;
        let bytes = block_type.bytes_of(&shape).and_then(|bytes| start.checked_add(bytes));
        let fits = bytes.and_then(|end| Some(usize::try_from(start).ok()?..usize::try_from(end).ok()?));
        let range = fits.ok_or_else(|| {
            let expected = format!("rows that are whole {block_type} blocks and fit memory");
            Error::tensor(self.file, &name, expected, format!("shape {shape:?}"))
        })?;
        Ok(TensorInfo { name, shape: shape.into_iter().map(|n| n as usize).collect(), block_type, range })
    }
}

/// The shortest decimal that names this f32, as f64: 1e-5 stays 1e-5.
fn decimal(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}
