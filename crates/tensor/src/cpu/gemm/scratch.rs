//! Memory that kernels reuse from call to call, one set per thread, so that no call allocates once sizes have settled.

use crate::cpu::AlignedVec;
use crate::cpu::reused::with_reused;
use std::cell::Cell;

fn grown(memory: &mut AlignedVec<f32>, len: usize) -> *mut f32 {
    if memory.len() < len {
        *memory = AlignedVec::zeroed(len.next_power_of_two());
    }
    memory.as_mut_ptr()
}

thread_local! {
    static BLOCK: Cell<AlignedVec<f32>> = Cell::default();
    static LEFT: Cell<AlignedVec<f32>> = Cell::default();
    static CARRY: Cell<AlignedVec<f32>> = Cell::default();
}

/// Run `f` with `len` words of this thread's memory for the segments of a block.
pub(super) fn with_block(len: usize, f: impl FnOnce(*mut f32)) {
    with_reused(&BLOCK, |memory| f(grown(memory, len)));
}

/// Run `f` with `len` words of this thread's memory for a packed left operand.
pub(super) fn with_left(len: usize, f: impl FnOnce(&mut [f32])) {
    with_reused(&LEFT, |memory| {
        grown(memory, len);
        f(&mut memory[..len]);
    });
}

/// Run `f` with `len` words of this thread's memory for sums that are not complete, contents arbitrary.
pub(super) fn with_carry(len: usize, f: impl FnOnce(&mut [f32])) {
    with_reused(&CARRY, |memory| {
        grown(memory, len);
        f(&mut memory[..len]);
    });
}
