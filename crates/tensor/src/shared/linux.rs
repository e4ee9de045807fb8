//! Anonymous files in memory, seals and maps of Linux.

use crate::cpu::HUGE_PAGE_BYTES;
use std::ffi::{CStr, c_int};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::ptr::{NonNull, null_mut};

/// Name of the files, for those who list a process's descriptors.
const NAME: &CStr = c"temper-buffers";
/// What a descriptor of such a file is a link to.
const LINK: &str = "/memfd:temper-buffers (deleted)";
/// The length stays, nobody gets to write who does not already, and none of that changes again.
const SEALS: c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_FUTURE_WRITE | libc::F_SEAL_SEAL;
/// Advice to put what is there on huge pages now, whatever the system does by itself (Linux 6.1).
const MADV_COLLAPSE: c_int = 25;

fn done(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A new file of zeros that this user alone may open. All of its pages are there: memory that is short is an error now,
/// and no fault later.
pub(super) fn anonymous_file(num_bytes: u64) -> io::Result<File> {
    let length = libc::off_t::try_from(num_bytes).map_err(io::Error::other)?;
    // SAFETY: the name is a string that ends in a zero byte.
    let descriptor = done(unsafe { libc::memfd_create(NAME.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) })?;
    // SAFETY: the descriptor is open, and nobody else has it.
    let file = unsafe { File::from_raw_fd(descriptor) };
    loop {
        // SAFETY: the call reads and writes no memory of this process.
        match done(unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, length) }) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            allocated => {
                allocated?;
                break;
            }
        }
    }
    file.set_permissions(Permissions::from_mode(0o400))?;
    Ok(file)
}

/// The number by which this process knows `file`.
pub(super) fn descriptor(file: &File) -> u32 {
    file.as_raw_fd().unsigned_abs()
}

/// Open the sealed file that another process has as `descriptor`.
pub(super) fn open(process_id: u32, descriptor: u32) -> io::Result<File> {
    let path = format!("/proc/{process_id}/fd/{descriptor}");
    // Something else is not even opened: that alone may have effects.
    let link = fs::read_link(&path)?;
    let unexpected = |problem: String| io::Error::new(ErrorKind::InvalidData, format!("{path} {problem}"));
    if link != Path::new(LINK) {
        return Err(unexpected(format!("is {}: expected {LINK}", link.display())));
    }
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(&path)?;
    // SAFETY: the call reads and writes no memory of this process.
    let seals = done(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) })?;
    if seals & SEALS != SEALS {
        return Err(unexpected(format!("has the seals {seals:#x}: expected {SEALS:#x}")));
    }
    Ok(file)
}

/// A file mapped into memory.
pub(crate) struct Mapping {
    start: NonNull<u8>,
    num_bytes: usize,
    /// Addresses that are this mapping's: huge pages need room to be aligned.
    reserved: NonNull<u8>,
    num_reserved: usize,
    /// Open for as long as the mapping lives, for others to find.
    file: File,
}

// SAFETY: the mapping is plain memory, which stays at its address until the value is dropped; access to it goes through
// raw pointers whose users answer for it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Map a new file to write, and seal it: this is the only mapping that can ever write to it.
    pub(super) fn writable(file: File, num_bytes: usize) -> io::Result<Self> {
        let mapping = Self::new(file, num_bytes, libc::PROT_READ | libc::PROT_WRITE)?;
        // SAFETY: the range is the mapping's, and the call changes none of its contents. It is advice: without huge
        // pages the memory works as well.
        let _advice = unsafe { libc::madvise(mapping.start.as_ptr().cast(), num_bytes, MADV_COLLAPSE) };
        // SAFETY: the call reads and writes no memory of this process.
        done(unsafe { libc::fcntl(mapping.file.as_raw_fd(), libc::F_ADD_SEALS, SEALS) })?;
        Ok(mapping)
    }

    /// Map a sealed file to read.
    pub(super) fn readable(file: File, num_bytes: usize) -> io::Result<Self> {
        Self::new(file, num_bytes, libc::PROT_READ)
    }

    fn new(file: File, num_bytes: usize, access: c_int) -> io::Result<Self> {
        let num_reserved = num_bytes.checked_add(HUGE_PAGE_BYTES).ok_or(ErrorKind::OutOfMemory)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: new addresses that no memory is behind yet.
        let reserved = map(unsafe { libc::mmap(null_mut(), num_reserved, libc::PROT_NONE, flags, -1, 0) })?;
        // From here on dropping the value gives the addresses back.
        let mut mapping = Mapping { start: reserved, num_bytes, reserved, num_reserved, file };
        let descriptor = mapping.file.as_raw_fd();
        // SAFETY: fewer bytes than one huge page are left out, and so many more were reserved.
        let start = unsafe { reserved.add(reserved.align_offset(HUGE_PAGE_BYTES)) };
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        // SAFETY: the range lies in the reserved addresses, which nobody else has.
        mapping.start = map(unsafe { libc::mmap(start.as_ptr().cast(), num_bytes, access, flags, descriptor, 0) })?;
        Ok(mapping)
    }

    /// Length.
    pub(crate) fn num_bytes(&self) -> usize {
        self.num_bytes
    }

    /// Address of a byte.
    ///
    /// # Panics
    /// If it is outside of the mapping.
    pub(crate) fn at(&self, offset: usize) -> NonNull<u8> {
        assert!(offset <= self.num_bytes, "byte {offset} of a mapping of {}", self.num_bytes);
        // SAFETY: the address is in the mapping, or at its end.
        unsafe { self.start.add(offset) }
    }
}

fn map(address: *mut libc::c_void) -> io::Result<NonNull<u8>> {
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(address.cast()).ok_or_else(|| io::Error::other("the system maps memory at no address"))
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the addresses were reserved by this value, and whoever uses memory there holds it.
        unsafe { libc::munmap(self.reserved.as_ptr().cast(), self.num_reserved) };
    }
}
