//! The header of a safetensors file: parsed with every claim checked against the file, and written.
//!
//! # Source
//! The format's description in the `huggingface/safetensors` README: 8 bytes of header length (little endian), a JSON
//! object of `{name: {dtype, shape, data_offsets}}` with an optional `__metadata__`, then the data without holes.

use super::reader::StoredDType;
use crate::error::{Error, Result};
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;
use std::ops::Range;
use std::path::Path;

/// Longest header accepted, as in the reference implementation.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Key of the free-form metadata.
const METADATA_KEY: &str = "__metadata__";

/// One entry of a header; `range` is absolute in the file and inside it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) dtype: StoredDType,
    pub(crate) shape: Vec<usize>,
    pub(crate) range: Range<usize>,
}

/// Parse and check the header of a whole file.
pub(crate) fn parse(bytes: &[u8], file: &Path) -> Result<Vec<Entry>> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        let problem = format!("{} bytes are too few for a safetensors header: truncated?", bytes.len());
        return Err(Error::format(file, problem));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES || length > rest.len() as u64 {
        let problem = format!("the header claims {length} bytes, but {} follow it: truncated?", rest.len());
        return Err(Error::format(file, problem));
    }
    let (header, data) = rest.split_at(length as usize);
    let mut reader = serde_json::Deserializer::from_slice(header);
    let pairs = (&mut reader)
        .deserialize_map(PairVisitor)
        .and_then(|pairs| reader.end().map(|()| pairs))
        .map_err(|cause| Error::format(file, format!("the safetensors header is not valid JSON: {cause}")))?;
    let mut entries = Vec::with_capacity(pairs.len());
    for (name, value) in pairs.into_iter().filter(|(name, _)| name != METADATA_KEY) {
        entries.push(parse_entry(name, &value, data.len(), file)?);
    }
    check_layout(&entries, data.len(), file)?;
    let base = 8 + header.len();
    for entry in &mut entries {
        entry.range = base + entry.range.start..base + entry.range.end;
    }
    Ok(entries)
}

/// Keeps pairs in order and duplicates apart, which a map would silently merge.
struct PairVisitor;

impl<'de> Visitor<'de> for PairVisitor {
    type Value = Vec<(String, Value)>;

    fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut pairs = Vec::new();
        while let Some(pair) = map.next_entry()? {
            pairs.push(pair);
        }
        Ok(pairs)
    }
}

fn parse_entry(name: String, value: &Value, data_bytes: usize, file: &Path) -> Result<Entry> {
    let fail = |expected: &str, key: &str| {
        let got = value.get(key).map_or_else(|| format!("no {key}"), |v| format!("{key} {v}"));
        Error::tensor(file, &name, expected, got)
    };
    let dtype = value.get("dtype").and_then(Value::as_str).ok_or_else(|| fail("a dtype", "dtype"))?;
    let dtype = StoredDType::from_safetensors(dtype);
    let shape = sizes(value.get("shape")).ok_or_else(|| fail("a shape of non-negative integers", "shape"))?;
    let offsets = sizes(value.get("data_offsets")).filter(|offsets| offsets.len() == 2);
    let offsets = offsets.ok_or_else(|| fail("two data_offsets", "data_offsets"))?;
    let range = offsets[0]..offsets[1];
    if range.start > range.end || range.end > data_bytes {
        let expected = format!("data_offsets inside the {data_bytes} data bytes of the file (truncated?)");
        return Err(fail(&expected, "data_offsets"));
    }
    let elements = shape.iter().try_fold(1usize, |product, n| product.checked_mul(*n));
    let elements = elements.ok_or_else(|| fail("a shape whose size fits memory", "shape"))?;
    if let Some(element_bytes) = dtype.size_bytes()
        && elements.checked_mul(element_bytes) != Some(range.len())
    {
        let expected = format!("{elements} elements of {element_bytes} bytes for shape {shape:?}");
        return Err(fail(&expected, "data_offsets"));
    }
    Ok(Entry { name, dtype, shape, range })
}

fn sizes(value: Option<&Value>) -> Option<Vec<usize>> {
    value?.as_array()?.iter().map(|n| n.as_u64().and_then(|n| usize::try_from(n).ok())).collect()
}

/// Names are distinct, ranges do not overlap and cover the data without holes.
fn check_layout(entries: &[Entry], data_bytes: usize, file: &Path) -> Result<()> {
    let mut by_name: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
    by_name.sort_unstable();
    if let Some(pair) = by_name.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(Error::tensor(file, pair[0], "one entry in the header", "two"));
    }
    let mut by_offset: Vec<&Entry> = entries.iter().collect();
    by_offset.sort_unstable_by_key(|entry| (entry.range.start, entry.range.end));
    let mut end = 0;
    for entry in by_offset {
        if entry.range.start != end {
            let problem = if entry.range.start < end { "overlaps the tensor before" } else { "leaves a hole" };
            let got = format!("{} ({problem})", entry.range.start);
            return Err(Error::tensor(file, &entry.name, format!("data from byte {end} on"), got));
        }
        end = entry.range.end;
    }
    if end != data_bytes {
        let problem = format!("tensors cover {end} bytes, but {data_bytes} data bytes are in the file");
        return Err(Error::format(file, problem));
    }
    Ok(())
}

/// The header of a file that holds `tensors` (name, dtype, shape) in this order, length prefix included. The data
/// begins at a multiple of 8 bytes.
pub(crate) fn header<'a>(tensors: impl Iterator<Item = (&'a str, StoredDType, &'a [usize])>) -> Vec<u8> {
    let mut object = serde_json::Map::new();
    object.insert(METADATA_KEY.into(), serde_json::json!({"format": "pt"}));
    let mut offset = 0usize;
    for (name, dtype, shape) in tensors {
        let bytes = shape.iter().product::<usize>() * dtype.size_bytes().unwrap_or(0);
        let entry = serde_json::json!({
            "dtype": dtype.to_string(), "shape": shape, "data_offsets": [offset, offset + bytes],
        });
        object.insert(name.into(), entry);
        offset += bytes;
    }
    let mut json = Value::Object(object).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    header
}
