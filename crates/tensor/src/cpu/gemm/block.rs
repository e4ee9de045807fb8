//! The one matrix kernel: rows times one panel of 64 output columns.
//!
//! A block walks the summed dimension in segments. For each segment it makes the panel's words readable (in place,
//! widened or gathered into scratch that stays in the first cache levels) and runs register tiles over its rows.
//! Sums that are not complete at the end of a segment rest in the block's carry memory, as f32, so that cutting a
//! chain changes no bit.

use super::words::{self, Gather};
use crate::Reduction;
use crate::cpu::simd::{Kernel, Simd};

/// Output columns of a panel.
pub(super) const PANEL: usize = 64;
/// Most steps of the summed dimension that run before the tiles move to the next rows: 160 KiB of panel words, which
/// stay in the second cache level while a block's tiles pass over them. Even, so that no pair is cut.
const SEGMENT_STEPS: usize = 640;
/// Carry memory: one slot for each level of the tree that joins eight parts, one for a chain that is cut.
const CARRY_SLOTS: usize = 4;
const CHAIN_SLOT: usize = 3;
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

/// The left operand.
#[derive(Clone, Copy)]
pub(super) struct Left {
    pub(super) ptr: *const f32,
    pub(super) layout: Layout,
    /// Words from one row to the next ([`Layout::Rows`]) or from one group of rows to the next ([`Layout::Groups`]).
    pub(super) ld: usize,
}

/// How the left operand lies in memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    /// The words of a row are contiguous.
    Rows,
    /// Groups of [`GROUP_ROWS`] rows, `[group][step][row]`. Only for products of one word a step.
    Groups,
}

/// Where the words of a panel come from.
#[derive(Clone, Copy)]
pub(super) enum PanelSource {
    /// Words of the kernel, `[steps][64]`, read in place.
    Resident(*const f32),
    /// bf16 pairs `[steps / 2][64]`, widened into scratch as f32, odd number first.
    Widen(*const f32),
    /// Columns of a row-major f32 matrix whose rows are the summed dimension, packed into scratch.
    Gather(Gather),
}

/// Where results go: `columns` numbers of each row, rows `ld` apart.
#[derive(Clone, Copy)]
pub(super) struct Output {
    pub(super) ptr: *mut f32,
    pub(super) ld: usize,
    pub(super) columns: usize,
    /// One number per column, or null.
    pub(super) bias: *const f32,
    /// Add to what is there.
    pub(super) add: bool,
}

/// Rows times one panel.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub(super) rows: usize,
    /// Steps of the summed dimension.
    pub(super) steps: usize,
    pub(super) reduction: Reduction,
    /// Numbers of the summed dimension that one step multiplies.
    pub(super) numbers_per_step: usize,
    pub(super) left: Left,
    pub(super) panel: PanelSource,
    pub(super) out: Output,
    /// Memory for a packed segment and for unfinished sums; set by `run_block`.
    pub(super) scratch: *mut f32,
}

/// A range of steps within one part of the reduction.
struct Segment {
    start: usize,
    end: usize,
    /// The part's chain begins here.
    opens: bool,
    /// The part's chain ends here.
    closes: bool,
    part: usize,
    last_part: usize,
}

/// Words of a segment's panel and the block's carry memory.
#[derive(Clone, Copy)]
struct Memory {
    panel: *const f32,
    carry: *mut f32,
}

/// A block over f32 words.
pub(super) struct SingleBlock(pub(super) Block);

impl Kernel for SingleBlock {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's contract.
        unsafe { self.0.run::<Single<S>>() }
    }
}

/// A block over resident bf16 pairs, widened in registers.
pub(super) struct WidenedBlock(pub(super) Block);

impl Kernel for WidenedBlock {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's contract.
        unsafe { self.0.run::<WidenedPair<S>>() }
    }
}

/// Numbers of each part of a reduction over `k` numbers, and how many parts there are.
pub(super) fn parts(reduction: Reduction, k: usize) -> (usize, usize) {
    match reduction {
        Reduction::Chain => (k, 1),
        Reduction::Groups8 => (k.div_ceil(8).next_multiple_of(2), 8),
    }
}

impl Block {
    /// Words of scratch that the block needs.
    pub(super) const fn scratch_len(&self) -> usize {
        (SEGMENT_STEPS + CARRY_SLOTS * self.rows) * PANEL
    }

    /// Compute the block.
    ///
    /// # Safety
    /// The CPU has the features of `P`; operands are valid for `rows`, `steps` and the output's columns; no other
    /// thread touches the output's elements; `scratch` is valid for [`Block::scratch_len`] words.
    #[inline(always)]
    pub(super) unsafe fn run<P: Product>(&self) {
        let buffer = self.scratch;
        let carry = buffer.wrapping_add(SEGMENT_STEPS * PANEL);
        let (part_numbers, num_parts) = parts(self.reduction, self.steps * self.numbers_per_step);
        let part_steps = part_numbers.div_ceil(self.numbers_per_step);
        for part in 0..num_parts {
            let part_start = (part * part_steps).min(self.steps);
            let part_end = (part_start + part_steps).min(self.steps);
            let num_segments = (part_end - part_start).div_ceil(SEGMENT_STEPS).max(1);
            let segment_steps = (part_end - part_start).div_ceil(num_segments).next_multiple_of(2);
            let mut start = part_start;
            loop {
                let end = (start + segment_steps).min(part_end);
                let (opens, closes) = (start == part_start, end == part_end);
                let segment = Segment { start, end, opens, closes, part, last_part: num_parts - 1 };
                // SAFETY: the buffer holds a segment of words; the rest is the caller's contract.
                unsafe {
                    let panel = self.panel_words::<P::S>(&segment, buffer);
                    self.all_tiles::<P>(&segment, Memory { panel, carry });
                }
                start = end;
                if closes {
                    break;
                }
            }
        }
    }

    /// The address of the segment's panel words, which this makes readable.
    #[inline(always)]
    unsafe fn panel_words<S: Simd>(&self, segment: &Segment, buffer: *mut f32) -> *const f32 {
        // SAFETY: sources are valid for every step; the buffer holds the segment.
        unsafe {
            match self.panel {
                PanelSource::Resident(ptr) => ptr.add(segment.start * PANEL),
                PanelSource::Widen(pairs) => {
                    let from = pairs.add(segment.start / 2 * PANEL);
                    words::widen_pairs::<S>(from, (segment.end - segment.start) / 2, buffer);
                    buffer
                }
                PanelSource::Gather(gather) => {
                    gather.pack::<S>(segment.start..segment.end, buffer);
                    buffer
                }
            }
        }
    }

    /// Every register tile of a segment. Rows are split as evenly as the largest tile allows; groups are split alone.
    #[inline(always)]
    unsafe fn all_tiles<P: Product>(&self, segment: &Segment, memory: Memory) {
        let whole = if self.left.layout == Layout::Groups { GROUP_ROWS } else { self.rows };
        for vector in (0..PANEL / 16).step_by(P::S::TILE_VECTORS) {
            if vector * 16 >= self.out.columns {
                break;
            }
            let (mut row, mut end) = (0, whole.min(self.rows));
            while row < self.rows {
                let rows = (end - row).div_ceil((end - row).div_ceil(P::MAX_ROWS));
                // SAFETY: the caller's contract; the tile lies within the block and within a group.
                unsafe {
                    match rows {
                        1 => self.tile::<P, 1>(segment, memory, (row, vector)),
                        2 => self.tile::<P, 2>(segment, memory, (row, vector)),
                        3 => self.tile::<P, 3>(segment, memory, (row, vector)),
                        4 => self.tile::<P, 4>(segment, memory, (row, vector)),
                        5 if P::MAX_ROWS >= 5 => self.tile::<P, 5>(segment, memory, (row, vector)),
                        _ if P::MAX_ROWS >= 6 => self.tile::<P, MAX_TILE_ROWS>(segment, memory, (row, vector)),
                        _ => unreachable!("tiles have at most {} rows", P::MAX_ROWS),
                    }
                }
                row += rows;
                if row == end {
                    end = (end + whole).min(self.rows);
                }
            }
        }
    }

    /// One register tile: `MR` rows from `row`, `TILE_VECTORS` vectors from `vector`.
    #[inline(always)]
    unsafe fn tile<P: Product, const MR: usize>(&self, seg: &Segment, memory: Memory, (row, vector): (usize, usize)) {
        // SAFETY: the tile lies within the operands, the panel's words and the carry memory.
        unsafe {
            let mut acc = [[P::S::splat(0.0); 4]; MR];
            if !seg.opens {
                let carry = memory.carry.add(CHAIN_SLOT * self.rows * PANEL);
                acc = load_tile::<P, MR>(carry.add(row * PANEL + vector * 16));
            }
            if seg.closes && seg.part == seg.last_part {
                self.prefetch_out::<P, MR>((row, vector));
            }
            let b = memory.panel.add(vector * 16);
            let (left, ld, steps) = (self.left.ptr, self.left.ld, seg.end - seg.start);
            acc = match self.left.layout {
                Layout::Rows => chain_rows::<P, MR>(acc, left.add(row * ld + seg.start * P::LEFT_WORDS), ld, b, steps),
                Layout::Groups => {
                    let group = left.add(row / GROUP_ROWS * ld + seg.start * GROUP_ROWS + row % GROUP_ROWS);
                    chain_groups::<P, MR>(acc, group, b, steps)
                }
            };
            self.finish::<P, MR>(acc, seg, memory.carry, (row, vector));
        }
    }

    /// Ask for the output's lines while the last chain runs.
    #[inline(always)]
    unsafe fn prefetch_out<P: Product, const MR: usize>(&self, (row, vector): (usize, usize)) {
        for i in row..row + MR {
            for j in vector..vector + P::S::TILE_VECTORS {
                // SAFETY: the caller's contract; the address need not be valid.
                unsafe { P::S::prefetch(self.out.ptr.wrapping_add(i * self.out.ld + j * 16)) }
            }
        }
    }

    /// Put the sums of a segment where they belong: the carry, a level of the tree, or the output.
    #[inline(always)]
    #[allow(clippy::needless_range_loop, reason = "indices keep the sums in registers")]
    unsafe fn finish<P: Product, const MR: usize>(
        &self,
        mut acc: Tile<P, MR>,
        seg: &Segment,
        carry: *mut f32,
        (row, vector): (usize, usize),
    ) {
        // SAFETY: carry slots hold the block's rows; the output is valid for the block.
        unsafe {
            let slot_len = self.rows * PANEL;
            let carry = carry.add(row * PANEL + vector * 16);
            if !seg.closes {
                store_tile::<P, MR>(carry.add(CHAIN_SLOT * slot_len), &acc);
                return;
            }
            let level = (!seg.part).trailing_zeros() as usize;
            for lower in 0..level {
                let left = load_tile::<P, MR>(carry.add(lower * slot_len));
                for i in 0..MR {
                    for j in 0..P::S::TILE_VECTORS {
                        acc[i][j] = P::S::add(left[i][j], acc[i][j]);
                    }
                }
            }
            if seg.part != seg.last_part {
                store_tile::<P, MR>(carry.add(level * slot_len), &acc);
                return;
            }
            for (i, acc) in acc.iter().enumerate() {
                for j in 0..P::S::TILE_VECTORS {
                    self.emit::<P::S>((row + i, vector + j), acc[j]);
                }
            }
        }
    }

    /// Write 16 results: bias first, then the addition to what is there.
    #[inline(always)]
    unsafe fn emit<S: Simd>(&self, (row, vector): (usize, usize), mut v: S::V) {
        let out = &self.out;
        let column = vector * 16;
        if column >= out.columns {
            return;
        }
        let lanes = out.columns - column;
        // SAFETY: the lanes named lie within the row's columns and the bias.
        unsafe {
            let ptr = out.ptr.add(row * out.ld + column);
            if lanes >= 16 {
                if !out.bias.is_null() {
                    v = S::add(v, S::load(out.bias.add(column)));
                }
                if out.add {
                    v = S::add(S::load(ptr), v);
                }
                S::store(ptr, v);
                return;
            }
            if !out.bias.is_null() {
                v = S::add(v, S::load_partial(out.bias.add(column), lanes));
            }
            if out.add {
                v = S::add(S::load_partial(ptr, lanes), v);
            }
            S::store_partial(ptr, lanes, v);
        }
    }
}

/// The sums of a register tile.
type Tile<P, const MR: usize> = [[Lanes<P>; 4]; MR];

/// Read a tile from rows of carry memory.
#[inline(always)]
unsafe fn load_tile<P: Product, const MR: usize>(ptr: *const f32) -> Tile<P, MR> {
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
unsafe fn store_tile<P: Product, const MR: usize>(ptr: *mut f32, tile: &Tile<P, MR>) {
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

/// Continue a tile's chains over steps whose left words are contiguous in each row.
#[inline(always)]
unsafe fn chain_rows<P: Product, const MR: usize>(
    mut acc: Tile<P, MR>,
    mut a: *const f32,
    row_stride: usize,
    mut b: *const f32,
    steps: usize,
) -> Tile<P, MR> {
    // SAFETY: the caller's pointers are valid for `steps` steps.
    unsafe {
        let mut below = a.wrapping_add(HALF_ROWS * row_stride);
        for _ in 0..steps {
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
unsafe fn chain_groups<P: Product, const MR: usize>(
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
