//! Memory that calls refill: one value per thread and kind, so that no call allocates once sizes have settled.

use std::cell::Cell;
use std::thread::LocalKey;

/// Run `f` with this thread's `kept` value, contents arbitrary. A nested call gets one of its own.
pub(super) fn with_reused<T: Default, R>(kept: &'static LocalKey<Cell<T>>, f: impl FnOnce(&mut T) -> R) -> R {
    let mut value = kept.take();
    let result = f(&mut value);
    kept.set(value);
    result
}
