//! Memory aligned to cache lines, on huge pages where it is large.

use crate::shared::Mapping;
use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

const CACHE_LINE_BYTES: usize = 64;
/// Bytes of a huge page.
pub(crate) const HUGE_PAGE_BYTES: usize = 2 << 20;
/// From here on memory is mapped, not allocated: it is zero without being touched, so that a page costs nothing until
/// it is used. The system's allocator would map it anew each time as well.
#[cfg(target_os = "linux")]
const MAPPED_BYTES: usize = 32 << 20;

/// Plain numbers for which all-zero bytes are a value.
pub(crate) trait Zeroable: Copy {}
impl Zeroable for f32 {}
impl Zeroable for i8 {}
impl Zeroable for u16 {}
impl Zeroable for u32 {}

/// A fixed-length vector of numbers, aligned to 64 bytes (2 MiB where it is larger than that and this process's alone).
pub(crate) struct AlignedVec<T: Zeroable> {
    ptr: NonNull<T>,
    len: usize,
    /// What holds the memory, where it is not allocated.
    mapping: Option<Arc<Mapping>>,
}

// SAFETY: the vector owns its memory exclusively and `T` is a plain number.
unsafe impl<T: Zeroable> Send for AlignedVec<T> {}
// SAFETY: shared access only reads plain numbers.
unsafe impl<T: Zeroable> Sync for AlignedVec<T> {}

impl<T: Zeroable> AlignedVec<T> {
    /// `len` zeros.
    pub(crate) fn zeroed(len: usize) -> Self {
        if len == 0 {
            return AlignedVec { ptr: NonNull::dangling(), len, mapping: None };
        }
        let layout = Self::layout(len);
        let Some(ptr) = NonNull::new(take_zeroed(layout).cast::<T>()) else { handle_alloc_error(layout) };
        AlignedVec { ptr, len, mapping: None }
    }

    /// `len` numbers that lie `offset` bytes into a mapping.
    ///
    /// # Safety
    /// They are inside of the mapping, at a multiple of the cache line, initialised, and nobody else's in this process;
    /// the mapping can be written.
    pub(crate) unsafe fn in_mapping(mapping: &Arc<Mapping>, offset: usize, len: usize) -> Self {
        AlignedVec { ptr: mapping.at(offset).cast(), len, mapping: Some(Arc::clone(mapping)) }
    }

    /// A copy of `data`.
    pub(crate) fn from_slice(data: &[T]) -> Self {
        let mut new = Self::zeroed(data.len());
        new.copy_from_slice(data);
        new
    }

    fn layout(len: usize) -> Layout {
        let bytes = len.checked_mul(size_of::<T>()).expect("a tensor's size in bytes fits usize");
        let align = if bytes >= HUGE_PAGE_BYTES { HUGE_PAGE_BYTES } else { CACHE_LINE_BYTES };
        Layout::from_size_align(bytes, align).expect("a tensor's size fits the address space")
    }
}

/// Zeros as `layout`, whose size is not 0, wants them; null where there is no memory.
fn take_zeroed(layout: Layout) -> *mut u8 {
    #[cfg(target_os = "linux")]
    if layout.size() >= MAPPED_BYTES {
        return pages::take(layout);
    }
    // SAFETY: the layout has a non-zero size.
    let raw = unsafe { alloc(layout) };
    if !raw.is_null() {
        // Before the first touch: pages that are there stay small.
        advise_huge_pages(raw, layout.size());
        // SAFETY: the memory is valid for the layout's size.
        unsafe { raw.write_bytes(0, layout.size()) }
    }
    raw
}

/// Give back what `take_zeroed` gave.
///
/// # Safety
/// `ptr` came from `take_zeroed` with the same layout, and is not used any more.
unsafe fn give_back(ptr: *mut u8, layout: Layout) {
    #[cfg(target_os = "linux")]
    if layout.size() >= MAPPED_BYTES {
        // SAFETY: the caller's contract.
        return unsafe { pages::give_back(ptr, layout.size()) };
    }
    // SAFETY: the caller's contract.
    unsafe { dealloc(ptr, layout) }
}

/// Memory straight from the system.
#[cfg(target_os = "linux")]
mod pages {
    use super::{HUGE_PAGE_BYTES, advise_huge_pages};
    use std::alloc::Layout;

    /// The mapping of `size` bytes ends with a whole huge page.
    fn mapped_len(size: usize) -> usize {
        size.next_multiple_of(HUGE_PAGE_BYTES)
    }

    /// Zeros at a huge page's start; null where there is no memory.
    pub(super) fn take(layout: Layout) -> *mut u8 {
        let len = mapped_len(layout.size());
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address of the system's choice; what lies outside of the aligned part is unmapped
        // before anyone knows of it.
        unsafe {
            let all = libc::mmap(std::ptr::null_mut(), len + HUGE_PAGE_BYTES, access, kind, -1, 0);
            if all == libc::MAP_FAILED {
                return std::ptr::null_mut();
            }
            let all = all.cast::<u8>();
            let before = all.addr().next_multiple_of(layout.align()) - all.addr();
            let ptr = all.add(before);
            if before > 0 {
                libc::munmap(all.cast(), before);
            }
            if before < HUGE_PAGE_BYTES {
                libc::munmap(ptr.add(len).cast(), HUGE_PAGE_BYTES - before);
            }
            advise_huge_pages(ptr, len);
            ptr
        }
    }

    /// # Safety
    /// `ptr` came from `take` for `size` bytes, and is not used any more.
    pub(super) unsafe fn give_back(ptr: *mut u8, size: usize) {
        // SAFETY: the caller's contract.
        unsafe { libc::munmap(ptr.cast(), mapped_len(size)) };
    }
}

#[cfg(target_os = "linux")]
fn advise_huge_pages(ptr: *mut u8, bytes: usize) {
    if bytes >= HUGE_PAGE_BYTES {
        // SAFETY: the range was just allocated and is page-aligned; the advice changes no contents.
        let _advice_is_optional = unsafe { libc::madvise(ptr.cast(), bytes, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn advise_huge_pages(_ptr: *mut u8, _bytes: usize) {}

impl<T: Zeroable> Default for AlignedVec<T> {
    fn default() -> Self {
        Self::zeroed(0)
    }
}

impl<T: Zeroable> Drop for AlignedVec<T> {
    fn drop(&mut self) {
        if self.len > 0 && self.mapping.is_none() {
            // SAFETY: taken in `zeroed` with the same layout, and never handed out.
            unsafe { give_back(self.ptr.as_ptr().cast(), Self::layout(self.len)) }
        }
    }
}

impl<T: Zeroable> Deref for AlignedVec<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `ptr` holds `len` initialised numbers (zeroed at allocation, or by the caller's word).
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl<T: Zeroable> DerefMut for AlignedVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of this process that are in memory.
    #[cfg(target_os = "linux")]
    fn resident_bytes() -> usize {
        let statm = std::fs::read_to_string("/proc/self/statm").expect("the process's own numbers");
        let pages: usize = statm.split(' ').nth(1).expect("resident pages").parse().expect("a number");
        pages * 4096
    }

    #[test]
    fn every_size_is_zero_aligned_and_can_be_written() {
        for len in [1, 15, 16, 1 << 19, (8 << 20) - 1, 8 << 20, (8 << 20) + 1] {
            let mut vec = AlignedVec::<f32>::zeroed(len);
            let align = if len * 4 >= HUGE_PAGE_BYTES { HUGE_PAGE_BYTES } else { CACHE_LINE_BYTES };
            assert!(vec.as_ptr().addr().is_multiple_of(align) && vec.len() == len, "{len}");
            assert!(vec.iter().all(|x| x.to_bits() == 0), "{len}");
            vec.fill(1.0);
            assert_eq!(AlignedVec::from_slice(&vec)[len - 1], 1.0);
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn large_memory_is_there_when_it_is_used() {
        let len = 256 << 20;
        let before = resident_bytes();
        let mut vec = AlignedVec::<f32>::zeroed(len);
        vec[len / 2] = 1.0;
        let used = resident_bytes().saturating_sub(before);
        assert!(used < 512 << 20, "{used} of {} bytes are in memory", len * 4);
        drop(vec);
    }
}
