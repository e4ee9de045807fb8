//! Register tiles: the sums of up to twelve rows times 32 columns, and the loops that advance them.
//!
//! A tile never leaves the registers within a loop. Every sum is one chain: a step adds one product to it (two for a
//! pair), whatever the tile's size.

use crate::cpu::expected::LINE;
use crate::cpu::simd::Simd;

/// Output columns of a panel.
pub(super) const PANEL: usize = 32;
/// Vectors of 16 sums in a panel's row.
const PANEL_VECTORS: usize = PANEL / 16;
/// Rows that are addressed from one pointer: stride factors 0, 1 and 2 cost no instruction.
const POINTER_ROWS: usize = 3;
/// Pointers that address a tile's rows.
const NUM_POINTERS: usize = MAX_TILE_ROWS / POINTER_ROWS;
/// Steps by which the panel is asked for ahead.
const PREFETCH_STEPS: usize = 16;
/// Most rows of a register tile.
pub(super) const MAX_TILE_ROWS: usize = 12;
/// Most rows of a register tile that also holds widened pairs.
const WIDENED_TILE_ROWS: usize = 11;
/// Rows whose words of a step are neighbours in [`Layout::Groups`].
pub(super) const GROUP_ROWS: usize = MAX_TILE_ROWS;

/// One step of a chain: how words of both operands are read and multiplied.
pub(super) trait Product {
    /// The lanes of the sums.
    type S: Simd;
    /// Words of the left operand in one step.
    const LEFT_WORDS: usize;
    /// Most rows of a tile whose operands fit the registers.
    const MAX_ROWS: usize;
    /// An element of the left operand in every lane.
    type A: Copy;
    /// Sixteen elements of the panel.
    type B: Copy;

    /// # Safety
    /// As [`Simd`]; `ptr` is valid for the words of one step.
    unsafe fn load_a(ptr: *const f32) -> Self::A;
    /// # Safety
    /// As [`Simd`]; `ptr` is valid for 16 words.
    unsafe fn load_b(ptr: *const f32) -> Self::B;
    /// `acc + a b`, in the product's order.
    ///
    /// # Safety
    /// As [`Simd`].
    unsafe fn mac(a: Self::A, b: Self::B, acc: Lanes<Self>) -> Lanes<Self>;
}

/// Sixteen sums.
pub(super) type Lanes<P> = <<P as Product>::S as Simd>::V;

/// f32 words on both sides: one fused multiply-add a step.
pub(super) struct Single<S>(std::marker::PhantomData<S>);

// SAFETY of every block below: the trait's contract is that of the lanes.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one contract for all methods, stated on the trait")]
impl<S: Simd> Product for Single<S> {
    type S = S;
    const LEFT_WORDS: usize = 1;
    const MAX_ROWS: usize = S::TILE_ROWS;
    type A = S::V;
    type B = S::V;

    #[inline(always)]
    unsafe fn load_a(ptr: *const f32) -> S::V {
        unsafe { S::splat(*ptr) }
    }
    #[inline(always)]
    unsafe fn load_b(ptr: *const f32) -> S::V {
        unsafe { S::load(ptr) }
    }
    #[inline(always)]
    unsafe fn mac(a: S::V, b: S::V, acc: S::V) -> S::V {
        unsafe { S::fma(a, b, acc) }
    }
}

/// bf16 pairs in the panel, widened in registers, times two f32 words in the order of the pair that is multiplied: with
/// `ODD_FIRST` rounded numbers, as [`PairOrder::OddFirst`](super::words::PairOrder), else the numbers that were given.
pub(super) struct WidenedPair<S, const ODD_FIRST: bool>(std::marker::PhantomData<S>);

// SAFETY of every block below: the trait's contract is that of the lanes.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one contract for all methods, stated on the trait")]
impl<S: Simd, const ODD_FIRST: bool> Product for WidenedPair<S, ODD_FIRST> {
    type S = S;
    const LEFT_WORDS: usize = 2;
    const MAX_ROWS: usize = if S::TILE_VECTORS > 1 { WIDENED_TILE_ROWS } else { 4 };
    type A = (S::V, S::V);
    type B = (S::V, S::V);

    #[inline(always)]
    unsafe fn load_a(ptr: *const f32) -> Self::A {
        unsafe { (S::splat(*ptr), S::splat(*ptr.add(1))) }
    }
    #[inline(always)]
    unsafe fn load_b(ptr: *const f32) -> Self::B {
        unsafe { S::load_bf16_pairs(ptr.cast()) }
    }
    #[inline(always)]
    unsafe fn mac((a_first, a_second): Self::A, (b_even, b_odd): Self::B, acc: S::V) -> S::V {
        let (b_first, b_second) = if ODD_FIRST { (b_odd, b_even) } else { (b_even, b_odd) };
        unsafe { S::fma(a_second, b_second, S::fma(a_first, b_first, acc)) }
    }
}

/// The sums of a register tile.
pub(super) type Tile<P, const MR: usize> = [[Lanes<P>; PANEL_VECTORS]; MR];

/// Read a tile from rows of carry memory.
#[inline(always)]
pub(super) unsafe fn load_tile<P: Product, const MR: usize>(ptr: *const f32) -> Tile<P, MR> {
    // SAFETY: the caller's pointer is valid for the tile.
    unsafe {
        let mut tile = [[P::S::splat(0.0); PANEL_VECTORS]; MR];
        for (i, row) in tile.iter_mut().enumerate() {
            for (j, v) in row.iter_mut().enumerate().take(P::S::TILE_VECTORS) {
                *v = P::S::load(ptr.add(i * PANEL + j * 16));
            }
        }
        tile
    }
}

/// Write a tile to rows of carry memory.
#[inline(always)]
pub(super) unsafe fn store_tile<P: Product, const MR: usize>(ptr: *mut f32, tile: &Tile<P, MR>) {
    for (i, row) in tile.iter().enumerate() {
        for (j, v) in row.iter().enumerate().take(P::S::TILE_VECTORS) {
            // SAFETY: the caller's pointer is valid for the tile.
            unsafe { P::S::store(ptr.add(i * PANEL + j * 16), *v) }
        }
    }
}

/// One step of every sum of a tile; row i of the left operand is at `a[i / 3] + i % 3 * row_stride`.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "indices keep the sums in registers")]
unsafe fn step<P: Product, const MR: usize>(
    mut acc: Tile<P, MR>,
    a: [*const f32; NUM_POINTERS],
    row_stride: usize,
    b: *const f32,
) -> Tile<P, MR> {
    // SAFETY: the caller's pointers are valid for the step.
    unsafe {
        let mut columns = [P::load_b(b); PANEL_VECTORS];
        for (j, column) in columns.iter_mut().enumerate().take(P::S::TILE_VECTORS) {
            *column = P::load_b(b.add(j * 16));
            P::S::prefetch(b.wrapping_add(PREFETCH_STEPS * PANEL + j * 16));
        }
        for i in 0..MR {
            let number = P::load_a(a[i / POINTER_ROWS].wrapping_add(i % POINTER_ROWS * row_stride));
            for j in 0..P::S::TILE_VECTORS {
                acc[i][j] = P::mac(number, columns[j], acc[i][j]);
            }
        }
    }
    acc
}

/// Words that are fetched into the second cache level while chains run.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    pub(super) ptr: *const f32,
    pub(super) len: usize,
}

impl Ahead {
    /// Nothing.
    pub(super) const NONE: Ahead = Ahead { ptr: std::ptr::null(), len: 0 };

    /// Tiles of `steps` steps that it takes to ask for every line.
    #[inline(always)]
    pub(super) const fn num_tiles(&self, steps: usize) -> usize {
        match steps {
            0 => 0,
            _ => (self.len * size_of::<f32>()).div_ceil(LINE * steps),
        }
    }

    /// The share of tile `index` of `num_tiles`, each of `steps` steps.
    #[inline(always)]
    pub(super) fn share(&self, (index, num_tiles): (usize, usize), steps: usize) -> Walk {
        let stride = (self.len * size_of::<f32>()).div_ceil((num_tiles * steps).max(1)).min(LINE);
        Walk { ptr: self.ptr.wrapping_byte_add(index * steps * stride), stride }
    }
}

/// An address that is asked for at every step of a chain, `stride` bytes behind the one before: no branch in the loop,
/// which a guess that goes wrong would cost more than the requests.
#[derive(Clone, Copy)]
pub(super) struct Walk {
    ptr: *const f32,
    stride: usize,
}

impl Walk {
    /// Whether there is nothing to ask for.
    #[inline(always)]
    pub(super) const fn is_empty(&self) -> bool {
        self.stride == 0
    }

    /// Ask for the address and go on to the next.
    #[inline(always)]
    unsafe fn ask<S: Simd>(&mut self) {
        // SAFETY: the caller's contract; the address need not be valid.
        unsafe { S::prefetch_far(self.ptr) }
        self.ptr = self.ptr.wrapping_byte_add(self.stride);
    }
}

/// The same address, of which the compiler no longer knows how it was made. Pointers that it knows to be a constant
/// distance apart it makes from one of them at every step, which takes more instructions than the multiplications leave
/// room for.
#[inline(always)]
#[allow(clippy::pointers_in_nomem_asm_block, reason = "nothing is read or written through it")]
fn unrelated(mut ptr: *const f32) -> *const f32 {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    // SAFETY: there is no instruction in it.
    unsafe {
        std::arch::asm!("/* {0} */", inout(reg) ptr, options(pure, nomem, nostack, preserves_flags));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        ptr = std::hint::black_box(ptr);
    }
    ptr
}

/// Continue a tile's chains over steps whose left words are contiguous in each row, rows lying `row_stride` apart. With
/// `AHEAD` every step asks for an address of `ahead`.
#[inline(always)]
pub(super) unsafe fn chain_rows<P: Product, const MR: usize, const AHEAD: bool>(
    mut acc: Tile<P, MR>,
    (a, row_stride): (*const f32, usize),
    mut b: *const f32,
    steps: usize,
    ahead: &mut Walk,
) -> Tile<P, MR> {
    let mut rows: [*const f32; NUM_POINTERS] = std::array::from_fn(|i| a.wrapping_add(i * POINTER_ROWS * row_stride));
    // SAFETY: the caller's pointers are valid for `steps` steps.
    unsafe {
        // Two steps a round: moving the pointers for each would cost as much as two of its multiplications.
        for _ in 0..steps / 2 {
            if AHEAD {
                ahead.ask::<P::S>();
            }
            acc = step::<P, MR>(acc, rows, row_stride, b);
            if AHEAD {
                ahead.ask::<P::S>();
            }
            acc = step::<P, MR>(acc, rows.map(|row| row.wrapping_add(P::LEFT_WORDS)), row_stride, b.add(PANEL));
            rows = rows.map(|row| unrelated(row.wrapping_add(2 * P::LEFT_WORDS)));
            b = b.add(2 * PANEL);
        }
        if !steps.is_multiple_of(2) {
            acc = step::<P, MR>(acc, rows, row_stride, b);
        }
    }
    acc
}

/// Continue a tile's chains over steps of a group of rows.
#[inline(always)]
pub(super) unsafe fn chain_groups<P: Product, const MR: usize>(
    mut acc: Tile<P, MR>,
    mut a: *const f32,
    mut b: *const f32,
    steps: usize,
) -> Tile<P, MR> {
    // SAFETY: the caller's pointers are valid for `steps` steps.
    unsafe {
        for _ in 0..steps {
            acc = step::<P, MR>(acc, std::array::from_fn(|i| a.wrapping_add(i * POINTER_ROWS)), 1, b);
            a = a.add(GROUP_ROWS);
            b = b.add(PANEL);
        }
    }
    acc
}
