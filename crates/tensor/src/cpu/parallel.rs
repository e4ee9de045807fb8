//! Splitting work over the pool: fixed pieces that never reach a number, run inline where a job would cost more.

use super::CpuDevice;
use std::marker::PhantomData;
use std::ops::Range;

/// Elements that one task of a cheap elementwise kernel handles; less than two tasks' worth runs on the caller.
pub(crate) const ELEMENTS_PER_TASK: usize = 16 * 1024;

/// Memory that the tasks of one job write, each in ranges of its own.
#[derive(Clone, Copy)]
pub(crate) struct SharedMut<'a, T> {
    ptr: *mut T,
    len: usize,
    memory: PhantomData<&'a mut [T]>,
}

// SAFETY: a `SharedMut` only hands out memory through `range`, whose callers promise disjoint ranges.
unsafe impl<T: Send> Send for SharedMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    /// Share `data` among the tasks of a job.
    pub(crate) fn new(data: &'a mut [T]) -> Self {
        SharedMut { ptr: data.as_mut_ptr(), len: data.len(), memory: PhantomData }
    }

    /// The elements of `range`.
    ///
    /// # Safety
    /// No other task may hold an overlapping range at the same time.
    ///
    /// # Panics
    /// If the range leaves the memory.
    #[allow(clippy::mut_from_ref, reason = "ranges of different tasks are disjoint by contract")]
    pub(crate) unsafe fn range(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "range {range:?} of {}", self.len);
        // SAFETY: in bounds by the assertion, exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(range.start), range.len()) }
    }

    /// Write element `index`.
    ///
    /// # Safety
    /// No other task may read or write the element at the same time.
    ///
    /// # Panics
    /// If `index` lies outside the memory.
    pub(crate) unsafe fn set(&self, index: usize, value: T)
    where
        T: Copy,
    {
        // SAFETY: passed on to the caller.
        unsafe { self.range(index..index + 1)[0] = value }
    }

    /// The address of element `index`, for kernels whose tasks write interleaved elements.
    ///
    /// # Panics
    /// If `index` lies behind the end.
    pub(crate) fn ptr_at(&self, index: usize) -> *mut T {
        assert!(index <= self.len, "index {index} of {}", self.len);
        self.ptr.wrapping_add(index)
    }
}

/// Call `f` on consecutive ranges of `0..len`, each of at most `grain` items. A job too small for two threads runs on
/// the caller as one range.
pub(crate) fn for_ranges(dev: &CpuDevice, len: usize, grain: usize, f: impl Fn(Range<usize>) + Sync) {
    let grain = grain.max(1);
    let num_tasks = len.div_ceil(grain);
    if num_tasks <= 1 || dev.pool.num_threads() == 1 {
        if len > 0 {
            f(0..len);
        }
        return;
    }
    dev.pool.run(num_tasks, &|task| f(task * grain..((task + 1) * grain).min(len)));
}

/// Rows of `width` elements that make up one task of a cheap kernel.
pub(crate) fn rows_per_task(width: usize) -> usize {
    (ELEMENTS_PER_TASK / width.max(1)).max(1)
}
