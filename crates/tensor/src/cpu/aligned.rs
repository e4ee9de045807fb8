//! Memory aligned to cache lines, on huge pages where it is large.

use crate::shared::Mapping;
use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

const CACHE_LINE_BYTES: usize = 64;
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Plain numbers for which all-zero bytes are a value.
pub(crate) trait Zeroable: Copy {}
impl Zeroable for f32 {}
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
        // SAFETY: the layout has a non-zero size.
        let raw = unsafe { alloc(layout) };
        let Some(ptr) = NonNull::new(raw.cast::<T>()) else { handle_alloc_error(layout) };
        // Before the first touch: pages that are there stay small.
        advise_huge_pages(raw, layout.size());
        // SAFETY: the memory is valid for the layout's size.
        unsafe { raw.write_bytes(0, layout.size()) }
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
            // SAFETY: allocated in `zeroed` with the same layout, and never handed out.
            unsafe { dealloc(self.ptr.as_ptr().cast(), Self::layout(self.len)) }
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
