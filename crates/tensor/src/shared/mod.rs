//! Host memory that processes of one host share.
//!
//! Owns: an anonymous file in memory whose pages are the memory of buffers, and how another process opens and reads
//! it. The file stands in no directory: the system takes it back when the last process that holds it ends, however it
//! ends. It is sealed: it keeps its length, so that no read of it can fault, and whoever opens it can only read.
//!
//! A reader copies, and the owner may write meanwhile: what was copied is then of two moments. Who reads proves what it
//! has, by a hash of the copy.
#![allow(unsafe_code, reason = "mapping memory that processes share has no safe form")]

#[cfg(not(target_os = "linux"))]
mod elsewhere;
#[cfg(target_os = "linux")]
mod linux;

#[cfg(not(target_os = "linux"))]
use elsewhere as os;
#[cfg(target_os = "linux")]
use linux as os;

use crate::cpu::AlignedVec;
use crate::{Buffer, Incoming};
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::sync::Arc;

pub(crate) use os::Mapping;

/// Bytes of a nonce.
const NONCE_BYTES: usize = 16;
/// Bytes before the first buffer: the nonce, and nothing else.
const HEADER_BYTES: usize = 4096;
/// Buffers begin at multiples of so many bytes.
const ALIGNMENT: usize = 64;

/// How another process of the host finds shared memory, and knows that it found what was meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedPlace {
    /// Process that holds the memory.
    pub process_id: u32,
    /// Its descriptor of the memory.
    pub descriptor: u32,
    /// Random bytes with which the memory begins.
    pub nonce: [u8; NONCE_BYTES],
}

/// Buffers in memory that processes of the host can read.
#[derive(Debug)]
pub struct SharedBuffers {
    /// How they are found, for as long as one of them lives.
    pub place: SharedPlace,
    /// Where each of them begins, in bytes.
    pub offsets: Vec<u64>,
    /// The buffers, all zero.
    pub buffers: Vec<Buffer>,
}

/// New buffers of so many elements.
pub(crate) fn zeros(lens: &[usize]) -> io::Result<SharedBuffers> {
    let too_large =
        || io::Error::new(ErrorKind::OutOfMemory, "shared memory: the buffers do not fit the address space");
    let (mut end, mut offsets) = (HEADER_BYTES, Vec::with_capacity(lens.len()));
    for len in lens {
        offsets.push(end as u64);
        let bytes = len.checked_mul(size_of::<f32>()).and_then(|bytes| bytes.checked_next_multiple_of(ALIGNMENT));
        end = bytes.and_then(|bytes| end.checked_add(bytes)).ok_or_else(too_large)?;
    }
    let mut nonce = [0; NONCE_BYTES];
    File::open("/dev/urandom")?.read_exact(&mut nonce)?;
    let mut file = os::anonymous_file(end as u64)?;
    file.write_all(&nonce)?;
    let descriptor = os::descriptor(&file);
    let mapping = Arc::new(Mapping::writable(file, end)?);
    let buffer = |(len, offset): (&usize, &u64)| {
        // SAFETY: offsets ascend by the length of the buffer before, so that the ranges are disjoint, aligned and
        // inside of the mapping, which is new: its pages are zero and nobody else in this process has them.
        Buffer { data: unsafe { AlignedVec::in_mapping(&mapping, *offset as usize, *len) } }
    };
    let buffers = lens.iter().zip(&offsets).map(buffer).collect();
    Ok(SharedBuffers { place: SharedPlace { process_id: std::process::id(), descriptor, nonce }, offsets, buffers })
}

/// Reads the shared memory of another process.
pub struct SharedReader {
    mapping: Mapping,
}

impl SharedReader {
    /// Open what stands at `place`.
    ///
    /// # Errors
    /// Where it cannot be opened, as from another host, by another user, or after its owner ended, or is something else
    /// than was meant.
    pub fn open(place: &SharedPlace) -> io::Result<Self> {
        let mut file = os::open(place.process_id, place.descriptor)?;
        let mut nonce = [0; NONCE_BYTES];
        file.read_exact(&mut nonce)?;
        if nonce != place.nonce {
            return Err(io::Error::new(ErrorKind::InvalidData, "the memory found there is not the one that was meant"));
        }
        let num_bytes = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        Ok(SharedReader { mapping: Mapping::readable(file, num_bytes)? })
    }

    /// `len` elements that begin `offset` bytes into the memory.
    ///
    /// # Errors
    /// A range that is not all inside of the memory.
    pub fn values(&self, offset: u64, len: u64) -> io::Result<Incoming<'_>> {
        let outside = || {
            let held = self.mapping.num_bytes();
            let problem = format!("shared memory of {held} bytes has no {len} elements from byte {offset} on");
            io::Error::new(ErrorKind::InvalidInput, problem)
        };
        let start = usize::try_from(offset).map_err(|_| outside())?;
        let len = usize::try_from(len).map_err(|_| outside())?;
        let end = len.checked_mul(size_of::<f32>()).and_then(|bytes| start.checked_add(bytes));
        if end.is_none_or(|end| end > self.mapping.num_bytes()) {
            return Err(outside());
        }
        // SAFETY: the range is inside of the mapping, whose file is sealed against shrinking, so that every byte can be
        // read for as long as this value lives.
        Ok(unsafe { Incoming::at(self.mapping.at(start).as_ptr().cast(), len) })
    }
}

impl std::fmt::Debug for SharedReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SharedReader({} bytes)", self.mapping.num_bytes())
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests;
