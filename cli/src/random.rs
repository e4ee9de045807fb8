//! Bytes that nobody can guess. No number of a run depends on them.

use std::fs::File;
use std::io::{self, Read};

/// Fresh bytes from the system.
///
/// # Errors
/// A system that gives none.
pub fn bytes<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}
