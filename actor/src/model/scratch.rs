//! Buffers that grow to the largest size asked for and are then reused.

use temper_tensor::{Buffer, Device, View, ViewMut};

/// A buffer that is replaced by a larger one where needed. Contents do not survive growth.
#[derive(Debug, Default)]
pub(super) struct GrowBuffer {
    buffer: Option<Buffer>,
}

impl GrowBuffer {
    /// Make sure that `len` elements fit. Growth is by an eighth at least, so that a batch that grows by one row a step
    /// rarely allocates.
    pub fn reserve(&mut self, dev: &dyn Device, len: usize) {
        let capacity = self.capacity();
        if self.buffer.is_none() || capacity < len {
            self.buffer = None;
            self.buffer = Some(dev.zeros(len.max(capacity + capacity / 8)));
        }
    }

    /// Elements that are allocated.
    pub fn capacity(&self) -> usize {
        self.buffer.as_ref().map_or(0, Buffer::len)
    }

    /// The first `len` elements, to read.
    pub fn view(&self, len: usize) -> View<'_> {
        self.buffer.as_ref().expect("reserved before it is read").view(0..len)
    }

    /// The first `len` elements, to write.
    pub fn view_mut(&mut self, len: usize) -> ViewMut<'_> {
        self.buffer.as_mut().expect("reserved before it is written").view_mut(0..len)
    }
}
