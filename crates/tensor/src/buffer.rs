//! Flat f32 device memory and views into it.

use crate::cpu::AlignedVec;
use std::ops::Range;

/// Flat f32 memory on one device. Only kernels look inside; everyone else goes through [`crate::Device`].
pub struct Buffer {
    pub(crate) data: AlignedVec<f32>,
}

impl Buffer {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.data.len()
    }

    /// True where there is no element.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// All of it, to read.
    pub fn all(&self) -> View<'_> {
        View { data: &self.data }
    }

    /// All of it, to write.
    pub fn all_mut(&mut self) -> ViewMut<'_> {
        ViewMut { data: &mut self.data }
    }

    /// The elements of `range`, to read.
    ///
    /// # Panics
    /// If the range leaves the buffer.
    pub fn view(&self, range: Range<usize>) -> View<'_> {
        View { data: &self.data[range] }
    }

    /// The elements of `range`, to write.
    ///
    /// # Panics
    /// If the range leaves the buffer.
    pub fn view_mut(&mut self, range: Range<usize>) -> ViewMut<'_> {
        ViewMut { data: &mut self.data[range] }
    }

    /// Several disjoint ranges in ascending order, to write at once.
    ///
    /// # Panics
    /// If ranges overlap, descend or leave the buffer.
    pub fn views_mut<const N: usize>(&mut self, ranges: [Range<usize>; N]) -> [ViewMut<'_>; N] {
        let mut rest: &mut [f32] = &mut self.data;
        let mut start = 0;
        ranges.map(|range| {
            let (_, tail) = std::mem::take(&mut rest).split_at_mut(range.start - start);
            let (data, tail) = tail.split_at_mut(range.len());
            rest = tail;
            start = range.end;
            ViewMut { data }
        })
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer(f32 x {})", self.len())
    }
}

/// A readable range of a [`Buffer`].
#[derive(Clone, Copy)]
pub struct View<'a> {
    pub(crate) data: &'a [f32],
}

impl<'a> View<'a> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.data.len()
    }

    /// True where there is no element.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// A range within this view.
    ///
    /// # Panics
    /// If the range leaves the view.
    pub fn slice(&self, range: Range<usize>) -> View<'a> {
        View { data: &self.data[range] }
    }
}

impl std::fmt::Debug for View<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "View(f32 x {})", self.len())
    }
}

/// A writable range of a [`Buffer`].
pub struct ViewMut<'a> {
    pub(crate) data: &'a mut [f32],
}

impl<'a> ViewMut<'a> {
    /// The first `mid` elements, and the others.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn split_at(self, mid: usize) -> (ViewMut<'a>, ViewMut<'a>) {
        let (head, tail) = self.data.split_at_mut(mid);
        (ViewMut { data: head }, ViewMut { data: tail })
    }
}

impl ViewMut<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.data.len()
    }

    /// True where there is no element.
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// The same range for a shorter time, so that it can be passed on twice.
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        ViewMut { data: self.data }
    }

    /// The same range, to read.
    pub fn as_view(&self) -> View<'_> {
        View { data: self.data }
    }
}

impl std::fmt::Debug for ViewMut<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ViewMut(f32 x {})", self.len())
    }
}
