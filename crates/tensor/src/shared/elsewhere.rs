//! Systems on which no memory is shared: every attempt says so.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ptr::NonNull;

fn unsupported() -> io::Error {
    io::Error::new(ErrorKind::Unsupported, "memory is shared between processes on Linux only")
}

pub(super) fn anonymous_file(_num_bytes: u64) -> io::Result<File> {
    Err(unsupported())
}

pub(super) fn descriptor(_file: &File) -> u32 {
    0
}

pub(super) fn open(_process_id: u32, _descriptor: u32) -> io::Result<File> {
    Err(unsupported())
}

/// No value of it exists.
pub(crate) enum Mapping {}

impl Mapping {
    pub(super) fn writable(_file: File, _num_bytes: usize) -> io::Result<Self> {
        Err(unsupported())
    }

    pub(super) fn readable(_file: File, _num_bytes: usize) -> io::Result<Self> {
        Err(unsupported())
    }

    pub(crate) fn num_bytes(&self) -> usize {
        match *self {}
    }

    pub(crate) fn at(&self, _offset: usize) -> NonNull<u8> {
        match *self {}
    }
}
