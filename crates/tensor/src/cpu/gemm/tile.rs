//! Register tiles: the sums of up to six rows times 64 columns, and the loops that advance them.
//!
//! A tile never leaves the registers within a loop. Every sum is one chain: a step adds one product to it (two for a
//! pair), whatever the tile's size.

use crate::cpu::simd::Simd;

/// Output columns of a panel.
pub(super) const PANEL: usize = 64;
/// Rows that are addressed from one pointer: stride factors 0, 1 and 2 cost no instruction.
const HALF_ROWS: usize = 3;
/// Steps by which the panel is asked for ahead.
const PREFETCH_STEPS: usize = 16;
/// Most rows of a register tile.
pub(super) const MAX_TILE_ROWS: usize = 6;
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

/// bf16 pairs in the panel, widened in registers, times two f32 words that hold rounded numbers, odd one first.
pub(super) struct WidenedPair<S>(std::marker::PhantomData<S>);

// SAFETY of every block below: the trait's contract is that of the lanes.
#[allow(clippy::undocumented_unsafe_blocks, reason = "one contract for all methods, stated on the trait")]
impl<S: Simd> Product for WidenedPair<S> {
    type S = S;
    const LEFT_WORDS: usize = 2;
    const MAX_ROWS: usize = if S::TILE_ROWS < 4 { S::TILE_ROWS } else { 4 };
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
    unsafe fn mac((a_odd, a_even): Self::A, (b_even, b_odd): Self::B, acc: S::V) -> S::V {
        unsafe { S::fma(a_even, b_even, S::fma(a_odd, b_odd, acc)) }
    }
}

/// The sums of a register tile.
pub(super) type Tile<P, const MR: usize> = [[Lanes<P>; 4]; MR];

/// Read a tile from rows of carry memory.
#[inline(always)]
pub(super) unsafe fn load_tile<P: Product, const MR: usize>(ptr: *const f32) -> Tile<P, MR> {
    // SAFETY: the caller's pointer is valid for the tile.
    unsafe {
        let mut tile = [[P::S::splat(0.0); 4]; MR];
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

/// One step of every sum of a tile; rows 0, 1, 2 of the left operand are at `a[0] + i * row_stride`, the others behind
/// `a[1]`.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "indices keep the sums in registers")]
unsafe fn step<P: Product, const MR: usize>(
    mut acc: Tile<P, MR>,
    a: [*const f32; 2],
    row_stride: usize,
    b: *const f32,
) -> Tile<P, MR> {
    // SAFETY: the caller's pointers are valid for the step.
    unsafe {
        let mut columns = [P::load_b(b); 4];
        for (j, column) in columns.iter_mut().enumerate().take(P::S::TILE_VECTORS) {
            *column = P::load_b(b.add(j * 16));
            P::S::prefetch(b.wrapping_add(PREFETCH_STEPS * PANEL + j * 16));
        }
        for i in 0..MR {
            let number = P::load_a(a[i / HALF_ROWS].add(i % HALF_ROWS * row_stride));
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

    /// The share of tile `index` of `num_tiles`, each of `steps` steps.
    #[inline(always)]
    pub(super) fn share(&self, (index, num_tiles): (usize, usize), steps: usize) -> Walk {
        /// Bytes of a cache line.
        const LINE: usize = 64;
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

/// Continue a tile's chains over steps whose left words are contiguous in each row, rows lying `row_stride` apart. With
/// `AHEAD` every step asks for an address of `ahead`.
#[inline(always)]
pub(super) unsafe fn chain_rows<P: Product, const MR: usize, const AHEAD: bool>(
    mut acc: Tile<P, MR>,
    (mut a, row_stride): (*const f32, usize),
    mut b: *const f32,
    steps: usize,
    ahead: &mut Walk,
) -> Tile<P, MR> {
    // SAFETY: the caller's pointers are valid for `steps` steps.
    unsafe {
        let mut below = a.wrapping_add(HALF_ROWS * row_stride);
        for _ in 0..steps {
            if AHEAD {
                P::S::prefetch_far(ahead.ptr);
                ahead.ptr = ahead.ptr.wrapping_byte_add(ahead.stride);
            }
            acc = step::<P, MR>(acc, [a, below], row_stride, b);
            a = a.add(P::LEFT_WORDS);
            below = below.wrapping_add(P::LEFT_WORDS);
            b = b.add(PANEL);
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
            acc = step::<P, MR>(acc, [a, a.wrapping_add(HALF_ROWS)], 1, b);
            a = a.add(GROUP_ROWS);
            b = b.add(PANEL);
        }
    }
    acc
}
