//! Responses of earlier passes in a file: token ids, appended, read back when a prompt is scheduled.
//!
//! ```text
//! header   "temper history 1\n" and 16 bytes that name the vocabulary
//! record   key of the prompt (16 bytes) · length of the payload in bytes (u32) · checksum of the payload (u32)
//! payload  for each response: sample index (u32), number of ids (u32), ids (u32 each)
//! ```
//! All numbers are little-endian. What a file says can only cost time: drafts are verified. So a file that is
//! damaged is cut at the first record that does not hold, a file of another kind or vocabulary is written anew, both
//! with a warning, and a file that cannot be read or written leaves a history that is empty or in memory.

use super::PastResponse;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 17] = b"temper history 1\n";
const HEADER_BYTES: u64 = 17 + 16;
const RECORD_HEADER_BYTES: usize = 16 + 4 + 4;

/// Names a prompt by its ids.
pub(super) type PromptKey = [u8; 16];

/// Where the payload of a record lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    offset: u64,
    num_bytes: u32,
    checksum: u32,
}

impl Span {
    /// Where it begins.
    pub fn offset(self) -> u64 {
        self.offset
    }
}

/// A record as it was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Found {
    pub key: PromptKey,
    pub span: Span,
    pub num_tokens: usize,
}

/// The file. See the module.
#[derive(Debug)]
pub(super) struct HistoryFile {
    path: PathBuf,
    file: File,
    vocabulary: [u8; 16],
    len: u64,
}

/// Key of a prompt.
pub(super) fn prompt_key(prompt: &[u32]) -> PromptKey {
    let mut hasher = blake3::Hasher::new();
    for id in prompt {
        hasher.update(&id.to_le_bytes());
    }
    first_16(&hasher)
}

fn first_16(hasher: &blake3::Hasher) -> [u8; 16] {
    let mut out = [0; 16];
    out.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    out
}

fn checksum(payload: &[u8]) -> u32 {
    let hash = blake3::hash(payload);
    u32::from_le_bytes([hash.as_bytes()[0], hash.as_bytes()[1], hash.as_bytes()[2], hash.as_bytes()[3]])
}

impl HistoryFile {
    /// Open the file at `path` or make it, and tell `found` of every record that holds, in the order of writing.
    /// `vocabulary` is what ids mean.
    ///
    /// # Errors
    /// Where the file cannot be opened, read or written.
    pub fn open(path: &Path, vocabulary: &str, mut found: impl FnMut(Found)) -> io::Result<Self> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let vocabulary = first_16(blake3::Hasher::new().update(vocabulary.as_bytes()));
        let mut history = HistoryFile { path: path.to_owned(), file, vocabulary, len: 0 };
        let size = history.file.metadata()?.len();
        if size > 0 && history.is_own_header()? {
            history.scan(size, &mut found)?;
        } else {
            if size > 0 {
                tracing::warn!(path = %path.display(), "not a history of this vocabulary: it is written anew");
            }
            history.begin_anew()?;
        }
        Ok(history)
    }

    fn is_own_header(&mut self) -> io::Result<bool> {
        let mut header = [0; HEADER_BYTES as usize];
        self.file.seek(SeekFrom::Start(0))?;
        match self.file.read_exact(&mut header) {
            Ok(()) => Ok(header[..17] == MAGIC[..] && header[17..] == self.vocabulary),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn begin_anew(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(&[&MAGIC[..], &self.vocabulary].concat())?;
        self.len = HEADER_BYTES;
        Ok(())
    }

    /// Read every record, and cut the file behind the last one that holds.
    fn scan(&mut self, size: u64, found: &mut impl FnMut(Found)) -> io::Result<()> {
        let mut reader = io::BufReader::new(&self.file);
        let mut len = HEADER_BYTES;
        while let Some(record) = read_record(&mut reader, (len, size))? {
            len = record.span.offset + u64::from(record.span.num_bytes);
            found(record);
        }
        if len < size {
            tracing::warn!(path = %self.path.display(), offset = len, "a damaged history: what follows is dropped");
            self.file.set_len(len)?;
        }
        self.len = len;
        Ok(())
    }

    /// Bytes of the file.
    pub fn num_bytes(&self) -> u64 {
        self.len
    }

    /// Append a pass over a prompt.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn append(&mut self, key: PromptKey, pass: &[PastResponse]) -> io::Result<Span> {
        let mut payload = Vec::new();
        for response in pass {
            payload.extend((response.sample_index as u32).to_le_bytes());
            payload.extend((response.token_ids.len() as u32).to_le_bytes());
            response.token_ids.iter().for_each(|id| payload.extend(id.to_le_bytes()));
        }
        self.append_payload(key, &payload)
    }

    fn append_payload(&mut self, key: PromptKey, payload: &[u8]) -> io::Result<Span> {
        let too_long = |_| io::Error::other("a pass over a prompt of more than 4 GiB");
        let num_bytes = u32::try_from(payload.len()).map_err(too_long)?;
        let checksum = checksum(payload);
        let head = [&key[..], &num_bytes.to_le_bytes(), &checksum.to_le_bytes()].concat();
        self.file.seek(SeekFrom::Start(self.len))?;
        self.file.write_all(&[&head[..], payload].concat())?;
        let offset = self.len + RECORD_HEADER_BYTES as u64;
        self.len = offset + u64::from(num_bytes);
        Ok(Span { offset, num_bytes, checksum })
    }

    /// The responses at `span`.
    ///
    /// # Errors
    /// Where the file cannot be read, or does not hold there what it held.
    pub fn read(&mut self, span: Span) -> io::Result<Vec<PastResponse>> {
        let payload = self.read_payload(span)?;
        parse(&payload).ok_or_else(|| io::Error::other("a record of another form"))
    }

    fn read_payload(&mut self, span: Span) -> io::Result<Vec<u8>> {
        let mut payload = vec![0; span.num_bytes as usize];
        self.file.seek(SeekFrom::Start(span.offset))?;
        self.file.read_exact(&mut payload)?;
        if checksum(&payload) == span.checksum { Ok(payload) } else { Err(io::Error::other("a damaged record")) }
    }

    /// Write only the passes in `kept` to a new file that takes this one's place; their spans are moved.
    ///
    /// # Errors
    /// Where either file fails; this one stays as it was.
    pub fn compact<'a>(&mut self, kept: impl Iterator<Item = (PromptKey, &'a mut Span)>) -> io::Result<()> {
        let path = self.path.with_extension("new");
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path)?;
        let mut new = HistoryFile { path: self.path.clone(), file, vocabulary: self.vocabulary, len: 0 };
        new.begin_anew()?;
        let mut moved = Vec::new();
        for (key, span) in kept {
            let payload = self.read_payload(*span)?;
            moved.push((new.append_payload(key, &payload)?, span));
        }
        std::fs::rename(&path, &self.path)?;
        *self = new;
        moved.into_iter().for_each(|(to, span)| *span = to);
        Ok(())
    }
}

/// The record at the reader's place, which is `at` of `size` bytes; `None` where none holds.
fn read_record(reader: &mut impl Read, (at, size): (u64, u64)) -> io::Result<Option<Found>> {
    let left = (size - at) as usize;
    if left < RECORD_HEADER_BYTES {
        return Ok(None);
    }
    let mut head = [0; RECORD_HEADER_BYTES];
    reader.read_exact(&mut head)?;
    let number = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let (num_bytes, expected) = (number(16), number(20));
    if num_bytes as usize > left - RECORD_HEADER_BYTES {
        return Ok(None);
    }
    let mut payload = vec![0; num_bytes as usize];
    reader.read_exact(&mut payload)?;
    let Some(responses) = parse(&payload).filter(|_| checksum(&payload) == expected) else { return Ok(None) };
    let mut key = [0; 16];
    key.copy_from_slice(&head[..16]);
    let span = Span { offset: at + RECORD_HEADER_BYTES as u64, num_bytes, checksum: expected };
    let num_tokens = responses.iter().map(|response| response.token_ids.len()).sum();
    Ok(Some(Found { key, span, num_tokens }))
}

fn parse(payload: &[u8]) -> Option<Vec<PastResponse>> {
    let mut numbers = payload.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let mut responses = Vec::new();
    while let Some(sample_index) = numbers.next() {
        let len = numbers.next()? as usize;
        if len > numbers.len() {
            return None;
        }
        let token_ids = numbers.by_ref().take(len).collect();
        responses.push(PastResponse { sample_index: sample_index as usize, token_ids });
    }
    payload.len().is_multiple_of(4).then_some(responses)
}
