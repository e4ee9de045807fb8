//! The one matrix kernel: rows times one panel of 32 output columns.
//!
//! A block walks the summed dimension in segments. For each segment it makes the panel's words readable (in place,
//! widened or gathered into scratch that stays in the first cache levels) and runs register tiles over its rows.
//! Sums that are not complete at the end of a segment rest in the block's carry memory, as f32, so that cutting a
//! chain changes no bit. A caller cuts chains the same way by giving a block the sums so far ([`Block::seed`]).

use super::tile::{
    Ahead, GROUP_ROWS, MAX_TILE_ROWS, PANEL, Product, Single, Tile, Walk, WidenedPair, chain_groups, chain_rows,
    load_tile, store_tile,
};
use super::words::{self, Gather, PairOrder};
use crate::Reduction;
use crate::cpu::simd::{Kernel, Simd};
use std::ops::Range;

/// Most steps of a segment of a long sum: 80 KiB of panel words, which stay in the second cache level while a block's
/// tiles pass over them. Even, so that no pair is cut.
const SEGMENT_STEPS: usize = 640;
/// Sums of up to this many steps run whole, tile by tile. Gathered sums always do.
const WHOLE_STEPS: usize = 2048;
/// Carry memory: one slot for each level of the tree that joins eight parts, one for a chain that is cut.
const CARRY_SLOTS: usize = 4;
const CHAIN_SLOT: usize = 3;

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
    /// Words of the kernel, `[steps][32]`, read in place.
    Resident(*const f32),
    /// bf16 pairs `[steps / 2][32]`, widened into scratch as f32.
    Widen(*const f32, PairOrder),
    /// Columns of a row-major f32 matrix whose rows are the summed dimension, packed into scratch as a whole.
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
    /// Where the chains begin, `[rows][32]`; null for +0. Only for chains that run whole.
    pub(super) seed: *const f32,
    /// What the next block reads, fetched into the second cache level while the tiles run.
    pub(super) ahead: Ahead,
    /// What operations behind this one read, fetched by the tiles that `ahead` leaves free.
    pub(super) later: Ahead,
    /// Memory for a packed segment and for unfinished sums; set by `run_block`.
    pub(super) scratch: *mut f32,
}

/// How the summed dimension is cut: into parts that the reduction joins, and each part into segments.
#[derive(Clone, Copy)]
struct Cut {
    steps: usize,
    num_parts: usize,
    part_steps: usize,
    segments_per_part: usize,
    segment_steps: usize,
}

impl Cut {
    #[inline(always)]
    fn segment(&self, index: usize) -> Segment {
        // A division for every part of every tile would show.
        let (part, segment) = match self.segments_per_part {
            1 => (index, 0),
            segments => (index / segments, index % segments),
        };
        let part_start = (part * self.part_steps).min(self.steps);
        let part_end = (part_start + self.part_steps).min(self.steps);
        let start = (part_start + segment * self.segment_steps).min(part_end);
        Segment {
            start,
            end: (start + self.segment_steps).min(part_end),
            opens: segment == 0,
            closes: segment + 1 == self.segments_per_part,
            part,
            last: index + 1 == self.num_parts * self.segments_per_part,
        }
    }
}

/// A range of steps within one part of the reduction.
#[derive(Clone, Copy)]
struct Segment {
    start: usize,
    end: usize,
    /// The part's chain begins here.
    opens: bool,
    /// The part's chain ends here.
    closes: bool,
    part: usize,
    /// The whole sum ends here.
    last: bool,
}

/// Segments that run over one stretch of readable panel words.
#[derive(Clone, Copy)]
struct Pass {
    cut: Cut,
    first: usize,
    end: usize,
    /// Words of step 0; only the pass's steps are readable.
    panel: *const f32,
    carry: *mut f32,
    /// Carry memory belongs to one tile and is used again by the next, or every row of the block has its own.
    whole: bool,
    /// Tiles so far, and all tiles of the block.
    tiles: (usize, usize),
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
pub(super) struct WidenedBlock<const ODD_FIRST: bool>(pub(super) Block);

impl<const ODD_FIRST: bool> Kernel for WidenedBlock<ODD_FIRST> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's contract.
        unsafe { self.0.run::<WidenedPair<S, ODD_FIRST>>() }
    }
}

/// Numbers of each part of a reduction over `k` numbers, and how many parts there are.
pub(super) fn parts(reduction: Reduction, k: usize) -> (usize, usize) {
    let num_parts = match reduction {
        Reduction::Chain => return (k, 1),
        Reduction::Groups8 => 8,
        Reduction::Groups4 => 4,
        Reduction::Groups2 => 2,
    };
    (k.div_ceil(num_parts).next_multiple_of(2), num_parts)
}

impl Block {
    /// True where tiles run the whole sum one after the other.
    #[inline(always)]
    const fn runs_whole(&self) -> bool {
        matches!(self.panel, PanelSource::Gather(_)) || self.steps <= WHOLE_STEPS
    }

    /// Steps of panel words that scratch holds at once.
    #[inline(always)]
    const fn buffer_steps(&self) -> usize {
        match self.panel {
            PanelSource::Resident(_) => 0,
            _ if self.runs_whole() => self.steps,
            _ => SEGMENT_STEPS,
        }
    }

    /// Words of scratch that the block needs.
    pub(super) const fn scratch_len(&self) -> usize {
        (self.buffer_steps() + CARRY_SLOTS * (self.rows + MAX_TILE_ROWS)) * PANEL
    }

    #[inline(always)]
    fn cut(&self) -> Cut {
        let (part_numbers, num_parts) = parts(self.reduction, self.steps * self.numbers_per_step);
        let part_steps = part_numbers.div_ceil(self.numbers_per_step);
        let longest = if self.runs_whole() { self.steps.max(1) } else { SEGMENT_STEPS };
        let segments_per_part = part_steps.div_ceil(longest).max(1);
        let segment_steps = part_steps.div_ceil(segments_per_part).next_multiple_of(2);
        Cut { steps: self.steps, num_parts, part_steps, segments_per_part, segment_steps }
    }

    /// Compute the block.
    ///
    /// # Safety
    /// The CPU has the features of `P`; operands are valid for `rows`, `steps` and the output's columns; no other
    /// thread touches the output's elements; `scratch` is valid for [`Block::scratch_len`] words.
    #[inline(always)]
    pub(super) unsafe fn run<P: Product>(&self) {
        let cut = self.cut();
        let num_segments = cut.num_parts * cut.segments_per_part;
        let whole = self.runs_whole();
        let segments_per_pass = if whole { num_segments } else { 1 };
        let carry = self.scratch.wrapping_add(self.buffer_steps() * PANEL);
        let num_tiles = self.rows.div_ceil(P::MAX_ROWS) * self.out.columns.div_ceil(16 * P::S::TILE_VECTORS);
        for first in (0..num_segments).step_by(segments_per_pass) {
            let end = first + segments_per_pass;
            let tiles = (0, num_tiles);
            // SAFETY: the buffer holds the words of a pass; the rest is the caller's contract.
            unsafe {
                let panel = self.panel_words::<P::S>(cut.segment(first).start..cut.segment(end - 1).end);
                self.all_tiles::<P>(&mut Pass { cut, first, end, panel, carry, whole, tiles });
            }
        }
    }

    /// The address of step 0 in panel words of which this makes `steps` readable.
    #[inline(always)]
    unsafe fn panel_words<S: Simd>(&self, steps: Range<usize>) -> *const f32 {
        let buffer = self.scratch;
        // SAFETY: sources are valid for every step; the buffer holds the pass.
        unsafe {
            match self.panel {
                PanelSource::Resident(ptr) => return ptr,
                PanelSource::Widen(pairs, order) => {
                    let pairs = pairs.add(steps.start / 2 * PANEL);
                    words::widen_pairs::<S>((pairs, order), steps.len() / 2, buffer);
                }
                PanelSource::Gather(gather) => gather.pack::<S>(buffer),
            }
        }
        buffer.wrapping_sub(steps.start * PANEL)
    }

    /// Every register tile of a pass. Rows are split as evenly as the largest tile allows; groups are split alone.
    #[inline(always)]
    unsafe fn all_tiles<P: Product>(&self, pass: &mut Pass) {
        let unit = if self.left.layout == Layout::Groups { GROUP_ROWS } else { self.rows };
        for vector in (0..self.out.columns.div_ceil(16)).step_by(P::S::TILE_VECTORS) {
            let (mut row, mut end) = (0, unit.min(self.rows));
            while row < self.rows {
                let rows = (end - row).div_ceil((end - row).div_ceil(P::MAX_ROWS));
                // SAFETY: the caller's contract; the tile lies within the block and within a group.
                unsafe {
                    match rows {
                        1 => self.tile::<P, 1>(pass, (row, vector)),
                        2 => self.tile::<P, 2>(pass, (row, vector)),
                        3 => self.tile::<P, 3>(pass, (row, vector)),
                        4 => self.tile::<P, 4>(pass, (row, vector)),
                        5 if P::MAX_ROWS >= 5 => self.tile::<P, 5>(pass, (row, vector)),
                        6 if P::MAX_ROWS >= 6 => self.tile::<P, 6>(pass, (row, vector)),
                        7 if P::MAX_ROWS >= 7 => self.tile::<P, 7>(pass, (row, vector)),
                        8 if P::MAX_ROWS >= 8 => self.tile::<P, 8>(pass, (row, vector)),
                        9 if P::MAX_ROWS >= 9 => self.tile::<P, 9>(pass, (row, vector)),
                        10 if P::MAX_ROWS >= 10 => self.tile::<P, 10>(pass, (row, vector)),
                        11 if P::MAX_ROWS >= 11 => self.tile::<P, 11>(pass, (row, vector)),
                        _ if P::MAX_ROWS >= 12 => self.tile::<P, MAX_TILE_ROWS>(pass, (row, vector)),
                        _ => unreachable!("tiles have at most {} rows", P::MAX_ROWS),
                    }
                }
                row += rows;
                if row == end {
                    end = (end + unit).min(self.rows);
                }
            }
        }
    }

    /// What tile `index` of `count` asks for: the first ones the next block's words, the others what is read later.
    #[inline(always)]
    fn fetched_by(&self, (index, count): (usize, usize)) -> Walk {
        if self.later.len == 0 {
            return self.ahead.share((index, count), self.steps);
        }
        let first = self.ahead.num_tiles(self.steps).min(count);
        if index < first {
            self.ahead.share((index, first), self.steps)
        } else {
            self.later.share((index - first, count - first), self.steps)
        }
    }

    /// The segments of one register tile: `MR` rows from `row`, `TILE_VECTORS` vectors from `vector`.
    #[inline(always)]
    unsafe fn tile<P: Product, const MR: usize>(&self, pass: &mut Pass, (row, vector): (usize, usize)) {
        let (carry_row, slot_rows) = if pass.whole { (0, MAX_TILE_ROWS) } else { (row, self.rows) };
        let (left, ld) = (self.left.ptr, self.left.ld);
        // SAFETY: the tile lies within the operands, the panel's words and the carry memory.
        unsafe {
            let carry = pass.carry.add(carry_row * PANEL + vector * 16);
            let mut ahead = self.fetched_by(pass.tiles);
            pass.tiles.0 += 1;
            for index in pass.first..pass.end {
                let seg = pass.cut.segment(index);
                let mut acc = [[P::S::splat(0.0); PANEL / 16]; MR];
                if !seg.opens {
                    acc = load_tile::<P, MR>(carry.add(CHAIN_SLOT * slot_rows * PANEL));
                } else if !self.seed.is_null() {
                    acc = load_tile::<P, MR>(self.seed.add(row * PANEL + vector * 16));
                }
                if seg.last {
                    self.prefetch_out::<P, MR>((row, vector));
                }
                let (b, steps) = (pass.panel.wrapping_add(seg.start * PANEL + vector * 16), seg.end - seg.start);
                acc = match self.left.layout {
                    Layout::Rows => {
                        let rows = (left.add(row * ld + seg.start * P::LEFT_WORDS), ld);
                        if ahead.is_empty() {
                            chain_rows::<P, MR, false>(acc, rows, b, steps, &mut ahead)
                        } else {
                            chain_rows::<P, MR, true>(acc, rows, b, steps, &mut ahead)
                        }
                    }
                    Layout::Groups => {
                        let group = left.add(row / GROUP_ROWS * ld + seg.start * GROUP_ROWS + row % GROUP_ROWS);
                        chain_groups::<P, MR>(acc, group, b, steps)
                    }
                };
                let sums = settle::<P, MR>(acc, &seg, carry, slot_rows * PANEL);
                if seg.last {
                    self.emit_tile::<P::S>((row, MR), vector, sums);
                }
            }
        }
    }

    /// Write the complete sums of a tile. They come from memory: taken from the registers they would be spilled at the
    /// end of every segment.
    #[inline(always)]
    unsafe fn emit_tile<S: Simd>(&self, (row, num_rows): (usize, usize), vector: usize, sums: *const f32) {
        for i in 0..num_rows {
            for j in 0..S::TILE_VECTORS {
                // SAFETY: `sums` holds the tile; the rest is the caller's contract.
                unsafe { self.emit::<S>((row + i, vector + j), S::load(sums.add(i * PANEL + j * 16))) }
            }
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

/// Join the sums of a segment to those of earlier parts as far as the tree allows, and save them in their slot, whose
/// address this returns.
#[inline(always)]
unsafe fn settle<P: Product, const MR: usize>(
    mut acc: Tile<P, MR>,
    seg: &Segment,
    carry: *mut f32,
    slot_len: usize,
) -> *const f32 {
    let level = if seg.closes { (!seg.part).trailing_zeros() as usize } else { CHAIN_SLOT };
    // SAFETY: the caller's carry memory holds the tile in each slot.
    unsafe {
        if seg.closes && level >= 1 {
            acc = join::<P, MR>(acc, carry);
        }
        if seg.closes && level >= 2 {
            acc = join::<P, MR>(acc, carry.add(slot_len));
        }
        if seg.closes && level >= 3 {
            acc = join::<P, MR>(acc, carry.add(2 * slot_len));
        }
        let slot = carry.add(level * slot_len);
        store_tile::<P, MR>(slot, &acc);
        slot
    }
}

/// `saved + acc`.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "indices keep the sums in registers")]
unsafe fn join<P: Product, const MR: usize>(mut acc: Tile<P, MR>, saved: *const f32) -> Tile<P, MR> {
    // SAFETY: the caller's pointer is valid for the tile.
    unsafe {
        for i in 0..MR {
            for j in 0..P::S::TILE_VECTORS {
                acc[i][j] = P::S::add(P::S::load(saved.add(i * PANEL + j * 16)), acc[i][j]);
            }
        }
    }
    acc
}
