//! Reading an Arrow IPC stream message by message: one batch is in memory at a time.

use crate::Error;
use crate::arrow_io::{CONTINUATION, END_OF_STREAM, check_buffers, check_expansion, guarded};
use arrow_array::RecordBatch;
use arrow_buffer::Buffer;
use arrow_ipc::convert::try_fb_to_schema;
use arrow_ipc::reader::RecordBatchDecoder;
use arrow_schema::SchemaRef;
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes before the metadata of a message: continuation mark and length.
const PREFIX: usize = 8;

/// The batches of an IPC stream on disk, in order. The file stays open: its rows are those of when it was opened,
/// whatever takes its name later. Nothing comes after the first error.
#[derive(Debug)]
pub(crate) struct IpcStream {
    path: PathBuf,
    file: BufReader<File>,
    num_bytes: u64,
    num_left: u64,
    schema: Option<SchemaRef>,
    is_over: bool,
}

/// A message without its body.
struct Header {
    metadata: Vec<u8>,
    body_length: u64,
    num_rows: u64,
}

impl IpcStream {
    /// Open the stream at `path`.
    ///
    /// # Errors
    /// Names the file that cannot be opened.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let num_bytes = file.metadata().map_err(Error::io("read", path))?.len();
        let file = BufReader::new(file);
        Ok(IpcStream { path: path.to_owned(), file, num_bytes, num_left: num_bytes, schema: None, is_over: false })
    }

    /// Size of the file in bytes.
    pub(crate) fn num_bytes(&self) -> u64 {
        self.num_bytes
    }

    /// Count the rows by the headers alone; the bodies are passed over.
    ///
    /// # Errors
    /// Names the file that is damaged or truncated.
    pub(crate) fn count_rows(mut self) -> Result<u64, Error> {
        let mut num_rows = 0;
        while let Some(header) = self.header()? {
            num_rows += header.num_rows;
            let body = i64::try_from(header.body_length).map_err(|_| self.damaged("a body without end"))?;
            self.file.seek_relative(body).map_err(Error::io("read", &self.path))?;
            self.num_left -= header.body_length;
        }
        Ok(num_rows)
    }

    fn damaged(&self, cause: impl std::fmt::Display) -> Error {
        Error::file(&self.path, format!("not readable as Arrow IPC (truncated or damaged?): {cause}"))
    }

    fn take(&mut self, length: u64, what: &str) -> Result<Vec<u8>, Error> {
        if length > self.num_left {
            return Err(self.damaged(format!("{what} is cut")));
        }
        // What is left of a file that exists fits in memory's address space.
        let mut bytes = vec![0; length as usize];
        self.file.read_exact(&mut bytes).map_err(Error::io("read", &self.path))?;
        self.num_left -= length;
        Ok(bytes)
    }

    /// The next message, checked so far that its body can be passed over or decoded; `None` at the end mark.
    fn header(&mut self) -> Result<Option<Header>, Error> {
        let prefix = self.take(PREFIX as u64, "a message header")?;
        if prefix == END_OF_STREAM {
            return if self.num_left == 0 { Ok(None) } else { Err(self.damaged("data follow the end mark")) };
        }
        let length = prefix.strip_prefix(&CONTINUATION).and_then(|rest| rest.first_chunk::<4>());
        let length = length.ok_or_else(|| self.damaged("a message begins without its mark"))?;
        let metadata = self.take(u64::from(u32::from_le_bytes(*length)), "a message")?;
        let message = arrow_ipc::root_as_message(&metadata).map_err(|e| self.damaged(format!("a message: {e}")))?;
        check_buffers(&message).map_err(|problem| self.damaged(problem))?;
        let body_length = u64::try_from(message.bodyLength()).ok().filter(|length| *length <= self.num_left);
        let body_length = body_length.ok_or_else(|| self.damaged("a message's body is cut"))?;
        let num_rows = message.header_as_record_batch().map_or(0, |batch| batch.length());
        let num_rows = u64::try_from(num_rows).map_err(|_| self.damaged("a batch of fewer than 0 rows"))?;
        Ok(Some(Header { metadata, body_length, num_rows }))
    }

    fn next_batch(&mut self) -> Result<Option<RecordBatch>, Error> {
        while let Some(header) = self.header()? {
            let body = self.take(header.body_length, "a message's body")?;
            let schema = self.schema.clone();
            let decoded = guarded(&self.path, "Arrow IPC", || decode(&header.metadata, body, schema))?;
            match decoded {
                Decoded::Schema(schema) => self.schema = Some(schema),
                Decoded::Batch(batch) => return Ok(Some(batch)),
            }
        }
        Ok(None)
    }
}

impl Iterator for IpcStream {
    type Item = Result<RecordBatch, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.is_over {
            return None;
        }
        let item = self.next_batch().transpose();
        self.is_over = !matches!(item, Some(Ok(_)));
        item
    }
}

enum Decoded {
    Schema(SchemaRef),
    Batch(RecordBatch),
}

fn decode(metadata: &[u8], body: Vec<u8>, schema: Option<SchemaRef>) -> Result<Decoded, String> {
    let message = arrow_ipc::root_as_message(metadata).map_err(|e| e.to_string())?;
    check_expansion(&message, &body)?;
    match (message.header_as_schema(), message.header_as_record_batch(), schema) {
        (Some(schema), _, None) => {
            try_fb_to_schema(schema).map(|schema| Decoded::Schema(Arc::new(schema))).map_err(|e| e.to_string())
        }
        (_, Some(batch), Some(schema)) => {
            let (body, dictionaries, version) = (Buffer::from(body), HashMap::new(), message.version());
            let decoder = RecordBatchDecoder::try_new(&body, batch, schema, &dictionaries, &version);
            decoder.and_then(RecordBatchDecoder::read_record_batch).map(Decoded::Batch).map_err(|e| e.to_string())
        }
        (Some(_), _, Some(_)) => Err("a second schema".to_owned()),
        (_, Some(_), None) => Err("a batch before the schema".to_owned()),
        _ => Err("a message that is neither a schema nor a batch".to_owned()),
    }
}
