//! Memory that kernels reuse from call to call, one set per thread, so that no call allocates once sizes have settled.

use crate::cpu::AlignedVec;
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
    let mut memory = BLOCK.take();
    f(grown(&mut memory, len));
    BLOCK.set(memory);
}

/// Run `f` with `len` words of this thread's memory for a packed left operand. A nested call gets memory of its own.
pub(super) fn with_left(len: usize, f: impl FnOnce(&mut [f32])) {
    let mut memory = LEFT.take();
    grown(&mut memory, len);
    f(&mut memory[..len]);
    LEFT.set(memory);
}

/// Run `f` with `len` words of this thread's memory for sums that are not complete, contents arbitrary.
pub(super) fn with_carry(len: usize, f: impl FnOnce(&mut [f32])) {
    let mut memory = CARRY.take();
    grown(&mut memory, len);
    f(&mut memory[..len]);
    CARRY.set(memory);
}
