//! Reading Arrow IPC and Parquet bytes that may be damaged.

use crate::Error;
use arrow_array::RecordBatch;
use arrow_buffer::Buffer;
use arrow_ipc::reader::StreamDecoder;
use arrow_schema::SchemaRef;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::Compression;
use parquet::file::metadata::ParquetMetaData;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// First and last bytes of an IPC file.
const FILE_MAGIC: &[u8] = b"ARROW1";
/// First bytes of an IPC file, padding included; an IPC stream follows.
const FILE_HEADER: &[u8] = b"ARROW1\0\0";
/// What stands before the length of every message.
pub(crate) const CONTINUATION: [u8; 4] = [0xff; 4];
/// Continuation mark and length 0: the end of an IPC stream.
pub(crate) const END_OF_STREAM: [u8; 8] = [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0];

/// Most bytes that one byte stands for, under Zstandard: a block of 128 KiB of equal bytes takes 4. LZ4 is less dense.
const MAX_EXPANSION: i64 = 1 << 15;

/// A schema and the batches that follow it.
#[derive(Debug)]
pub(crate) struct Table {
    pub schema: SchemaRef,
    pub batches: Vec<RecordBatch>,
}

/// Read an IPC file or stream whole.
///
/// # Errors
/// Names the file where it is empty, truncated, damaged, or no Arrow at all.
pub(crate) fn read_ipc(path: &Path) -> Result<Table, Error> {
    let bytes = Buffer::from(std::fs::read(path).map_err(Error::io("read", path))?);
    if bytes.is_empty() {
        return Err(Error::file(path, "the file is empty: expected an Arrow IPC file or stream"));
    }
    let stream = if bytes.starts_with(FILE_HEADER) { stream_of_file(path, &bytes)? } else { bytes };
    if !stream.ends_with(&END_OF_STREAM) {
        return Err(Error::file(path, "no Arrow IPC data, or truncated: the stream does not end with its end mark"));
    }
    guarded(path, "Arrow IPC", || check_framing(&stream).and_then(|()| decode_stream(stream)))
}

/// The stream inside an IPC file: what stands between the header and the footer.
fn stream_of_file(path: &Path, bytes: &Buffer) -> Result<Buffer, Error> {
    let truncated = || Error::file(path, "Arrow IPC file without its footer: the file is truncated");
    let body = bytes.strip_suffix(FILE_MAGIC).ok_or_else(truncated)?;
    let (rest, length) = body.split_last_chunk::<4>().ok_or_else(truncated)?;
    let footer = usize::try_from(i32::from_le_bytes(*length)).map_err(|_| truncated())?;
    let end = rest.len().checked_sub(footer).filter(|end| *end >= FILE_HEADER.len()).ok_or_else(truncated)?;
    Ok(bytes.slice_with_length(FILE_HEADER.len(), end - FILE_HEADER.len()))
}

/// Check that every message lies within the stream and every buffer within its message's body, which the decoder takes
/// for granted.
fn check_framing(stream: &[u8]) -> Result<(), String> {
    let mut rest = stream;
    while !rest.is_empty() {
        let header = rest.strip_prefix(&CONTINUATION).unwrap_or(rest);
        let (length, after) = header.split_first_chunk::<4>().ok_or("a message header is cut")?;
        let metadata_length = u32::from_le_bytes(*length) as usize;
        if metadata_length == 0 {
            return if after.is_empty() { Ok(()) } else { Err("data follow the end mark".to_owned()) };
        }
        let (metadata, after) = after.split_at_checked(metadata_length).ok_or("a message is cut")?;
        let message = arrow_ipc::root_as_message(metadata).map_err(|e| format!("a damaged message: {e}"))?;
        let body_length = usize::try_from(message.bodyLength()).map_err(|_| "a body of negative length")?;
        let (body, after) = after.split_at_checked(body_length).ok_or("a message's body is cut")?;
        rest = after;
        check_buffers(&message)?;
        check_expansion(&message, body)?;
    }
    Err("the end mark is missing".to_owned())
}

fn batch_of<'a>(message: &arrow_ipc::Message<'a>) -> Option<arrow_ipc::RecordBatch<'a>> {
    message.header_as_record_batch().or_else(|| message.header_as_dictionary_batch()?.data())
}

/// The compression of a column of a Parquet file, where it is none that can be decoded.
fn unknown_codec(metadata: &ParquetMetaData) -> Option<&'static str> {
    let mut columns = metadata.row_groups().iter().flat_map(|group| group.columns());
    columns.find_map(|column| match column.compression() {
        Compression::LZO => Some("LZO"),
        Compression::BROTLI(_) => Some("BROTLI"),
        _ => None,
    })
}

/// Check that no compressed buffer says that it holds more than it can: that much memory would be asked for.
pub(crate) fn check_expansion(message: &arrow_ipc::Message<'_>, body: &[u8]) -> Result<(), String> {
    let batch = batch_of(message).filter(|batch| batch.compression().is_some());
    for buffer in batch.and_then(|batch| batch.buffers()).into_iter().flatten() {
        let range = usize::try_from(buffer.offset()).ok().zip(usize::try_from(buffer.length()).ok());
        let bytes = range.and_then(|(offset, length)| body.get(offset..)?.get(..length)).unwrap_or_default();
        let Some(length) = bytes.first_chunk().map(|bytes| i64::from_le_bytes(*bytes)) else { continue };
        if length > MAX_EXPANSION.saturating_mul(buffer.length()) {
            return Err(format!("a compressed buffer of {} bytes claims to hold {length}", buffer.length()));
        }
    }
    Ok(())
}

/// Check that every buffer of a message lies within its body.
pub(crate) fn check_buffers(message: &arrow_ipc::Message<'_>) -> Result<(), String> {
    let Some(buffers) = batch_of(message).and_then(|batch| batch.buffers()) else { return Ok(()) };
    for buffer in buffers {
        let (offset, length) = (buffer.offset(), buffer.length());
        let end = offset.checked_add(length).filter(|_| offset >= 0 && length >= 0);
        if end.is_none_or(|end| end > message.bodyLength()) {
            let body = message.bodyLength();
            return Err(format!("a buffer at {offset} of {length} bytes is outside of its body of {body} bytes"));
        }
    }
    Ok(())
}

fn decode_stream(mut stream: Buffer) -> Result<Table, String> {
    let mut decoder = StreamDecoder::new();
    let mut batches = Vec::new();
    while !stream.is_empty() {
        batches.extend(decoder.decode(&mut stream).map_err(|e| e.to_string())?);
    }
    decoder.finish().map_err(|e| e.to_string())?;
    let schema = decoder.schema().ok_or("the stream holds no schema")?;
    Ok(Table { schema, batches })
}

/// Read a Parquet file whole.
///
/// # Errors
/// Names the file where it is empty, truncated, damaged or compressed in a way that is not supported.
pub(crate) fn read_parquet(path: &Path) -> Result<Table, Error> {
    let file = File::open(path).map_err(Error::io("open", path))?;
    if file.metadata().map_err(Error::io("read", path))?.len() == 0 {
        return Err(Error::file(path, "the file is empty: expected Parquet"));
    }
    let open = || ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| e.to_string());
    let builder = guarded(path, "Parquet", open)?;
    if let Some(codec) = unknown_codec(builder.metadata()) {
        let expected = "expected no compression, gzip, LZ4, Snappy or Zstandard";
        return Err(Error::file(path, format!("compressed with {codec}, which is not supported: {expected}")));
    }
    guarded(path, "Parquet", || {
        let schema = builder.schema().clone();
        let reader = builder.build().map_err(|e| e.to_string())?;
        let batches = reader.collect::<Result<Vec<_>, _>>().map_err(|e| e.to_string())?;
        Ok(Table { schema, batches })
    })
}

/// Run a decoder of foreign bytes: its errors, and any panic of the decoding library on damaged input, name the file.
pub(crate) fn guarded<T>(path: &Path, format: &str, decode: impl FnOnce() -> Result<T, String>) -> Result<T, Error> {
    let outcome = catch_unwind(AssertUnwindSafe(decode));
    let decoded = outcome.unwrap_or_else(|_| Err("the decoder gave up on damaged data".to_owned()));
    decoded.map_err(|cause| Error::file(path, format!("not readable as {format} (truncated or damaged?): {cause}")))
}

/// The shards that a saved dataset's `state.json` lists, in order.
///
/// # Errors
/// Names `state.json` where it is missing, no JSON, or lists something other than plain file names.
pub(crate) fn data_files(dir: &Path) -> Result<Vec<String>, Error> {
    let path = dir.join("state.json");
    let text = std::fs::read(&path).map_err(Error::io("read", &path))?;
    let state: serde_json::Value =
        serde_json::from_slice(&text).map_err(|e| Error::file(&path, format!("bad JSON: {e}")))?;
    let wrong = || Error::file(&path, "expected `_data_files` as a list of {\"filename\": NAME} with plain file names");
    let files = state.get("_data_files").and_then(|files| files.as_array()).ok_or_else(wrong)?;
    let name = |file: &serde_json::Value| {
        let name = file.get("filename")?.as_str()?;
        let is_plain = !name.is_empty() && !name.contains(['/', '\\']) && name != "..";
        is_plain.then(|| name.to_owned())
    };
    files.iter().map(|file| name(file).ok_or_else(wrong)).collect()
}
