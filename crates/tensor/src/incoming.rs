//! Numbers on their way into buffers.
#![allow(unsafe_code, reason = "memory that another process may write is read by address")]

use std::marker::PhantomData;

/// Numbers that are to be copied into a buffer: of this process, or in memory that another process may write meanwhile.
/// Whoever takes them reads each once, so that what is hashed is what is kept.
#[derive(Clone, Copy)]
pub struct Incoming<'a> {
    ptr: *const f32,
    len: usize,
    memory: PhantomData<&'a [f32]>,
}

// SAFETY: the memory is only read, and may be read from any thread.
unsafe impl Send for Incoming<'_> {}

impl<'a> Incoming<'a> {
    /// Numbers at an address, which need not be aligned.
    ///
    /// # Safety
    /// `len` numbers can be read there for as long as `'a` lasts.
    pub(crate) const unsafe fn at(ptr: *const f32, len: usize) -> Incoming<'a> {
        Incoming { ptr, len, memory: PhantomData }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True where there is no element.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first `mid` elements, and the others.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn split_at(self, mid: usize) -> (Incoming<'a>, Incoming<'a>) {
        assert!(mid <= self.len, "{mid} elements of {}", self.len);
        // SAFETY: both parts are inside of the whole.
        unsafe { (Incoming::at(self.ptr, mid), Incoming::at(self.ptr.add(mid), self.len - mid)) }
    }

    /// The address of the first.
    pub(crate) const fn as_ptr(&self) -> *const f32 {
        self.ptr
    }

    /// Copy them, each read once.
    ///
    /// # Panics
    /// If `to` has another length.
    pub fn copy_to(self, to: &mut [f32]) {
        assert_eq!(to.len(), self.len, "numbers that are copied");
        // SAFETY: the numbers can be read, and `to` is other memory, as it is borrowed. Another process may write at
        // the same time: bytes are copied by address, without a reference to them, and any bits are an f32.
        unsafe { self.ptr.cast::<u8>().copy_to_nonoverlapping(to.as_mut_ptr().cast(), size_of_val(to)) };
        // What is hashed and kept is this copy: it is never read again from where others write.
        std::hint::black_box(to);
    }
}

impl<'a> From<&'a [f32]> for Incoming<'a> {
    fn from(values: &'a [f32]) -> Self {
        // SAFETY: a slice can be read for as long as it lives.
        unsafe { Incoming::at(values.as_ptr(), values.len()) }
    }
}

impl std::fmt::Debug for Incoming<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Incoming(f32 x {})", self.len)
    }
}
