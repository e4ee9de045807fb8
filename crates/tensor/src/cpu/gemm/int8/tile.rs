//! Rows times one panel of 64 outputs.
//!
//! Groups are walked in ascending order; of each, register tiles sum their rows' products as chains, and add what they
//! sum, times the group's scales, to totals in memory. Few rows widen the bytes in registers, each byte once where all
//! rows fit one tile; more rows share a group's bytes widened once into scratch that stays in the first cache level.

use super::{GROUP, PANEL};
use crate::Store;
use crate::cpu::simd::{Kernel, Simd};

/// Most rows of a tile over two vectors, where registers hold 24 sums.
const MAX_TALL_ROWS: usize = 12;
/// Most rows of a tile over all four vectors of a panel there, or over one elsewhere.
const MAX_WIDE_ROWS: usize = 6;
/// Rows that are addressed from one pointer: stride factors 0, 1 and 2 cost no instruction.
const BASE_ROWS: usize = 3;
/// Steps by which bytes are asked for ahead: a page of them.
const PREFETCH_STEPS: usize = 64;

/// True where the family has the registers for 24 sums beside what they are made of.
const fn holds_24_sums<S: Simd>() -> bool {
    S::TILE_VECTORS > 1
}

/// Most rows of a tile that is not tall.
const fn wide_rows<S: Simd>() -> usize {
    if holds_24_sums::<S>() || S::TILE_ROWS > MAX_WIDE_ROWS { MAX_WIDE_ROWS } else { S::TILE_ROWS }
}

/// Numbers of scratch that a piece of so many rows needs: its totals, and a group widened.
pub(super) const fn scratch_len(rows: usize) -> usize {
    (rows + GROUP) * PANEL
}

/// Where results go.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub(super) ptr: *mut f32,
    /// Numbers from one row to the next.
    pub(super) ld: usize,
    /// Outputs that exist.
    pub(super) columns: usize,
    /// One number per output, or null.
    pub(super) bias: *const f32,
    pub(super) store: Store,
}

/// Rows times one panel. Its pointers are valid for `rows` rows of `k` numbers, the panel's bytes and scales, the
/// target's outputs, which no other thread touches, and [`scratch_len`] numbers.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    pub(super) rows: usize,
    pub(super) k: usize,
    /// The rows, contiguous.
    pub(super) left: *const f32,
    /// `[k][64]`.
    pub(super) bytes: *const i8,
    /// `[group][64]`.
    pub(super) scales: *const f32,
    pub(super) target: Target,
    pub(super) scratch: *mut f32,
}

/// One group of a panel, `[steps][64]`.
trait Columns: Copy {
    /// 16 columns from `16 * vector` of a step.
    ///
    /// # Safety
    /// As [`Simd`]; the step and the columns are the group's.
    unsafe fn load<S: Simd>(self, step: usize, vector: usize) -> S::V;
    /// Ask for what will be read after this step.
    ///
    /// # Safety
    /// As [`Simd`].
    unsafe fn prefetch<S: Simd>(self, step: usize);
}

/// Bytes, widened in registers.
#[derive(Clone, Copy)]
struct Bytes(*const i8);

impl Columns for Bytes {
    #[inline(always)]
    unsafe fn load<S: Simd>(self, step: usize, vector: usize) -> S::V {
        // SAFETY: the caller's contract.
        unsafe { S::load_i8(self.0.add(step * PANEL + vector * 16)) }
    }
    #[inline(always)]
    unsafe fn prefetch<S: Simd>(self, step: usize) {
        // SAFETY: the address need not be valid.
        unsafe { S::prefetch(self.0.wrapping_add((step + PREFETCH_STEPS) * PANEL).cast()) }
    }
}

/// Bytes that were widened.
#[derive(Clone, Copy)]
struct Words(*const f32);

impl Columns for Words {
    #[inline(always)]
    unsafe fn load<S: Simd>(self, step: usize, vector: usize) -> S::V {
        // SAFETY: the caller's contract.
        unsafe { S::load(self.0.add(step * PANEL + vector * 16)) }
    }
    #[inline(always)]
    unsafe fn prefetch<S: Simd>(self, _step: usize) {}
}

/// What the tiles of one group share.
#[derive(Clone, Copy)]
struct Group {
    /// Steps of the group.
    steps: usize,
    /// The group's first number of row 0.
    left: *const f32,
    /// Its scales, `[64]`.
    scales: *const f32,
    /// The totals open with this group.
    opens: bool,
}

impl Kernel for Piece {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let words = self.scratch.wrapping_add(self.rows * PANEL);
        for index in 0..self.k.div_ceil(GROUP) {
            let start = index * GROUP;
            let group = Group {
                steps: (self.k - start).min(GROUP),
                left: self.left.wrapping_add(start),
                scales: self.scales.wrapping_add(index * PANEL),
                opens: index == 0,
            };
            // SAFETY: the piece's pointers are valid for the group.
            unsafe {
                let bytes = Bytes(self.bytes.add(start * PANEL));
                if holds_24_sums::<S>() && MAX_WIDE_ROWS < self.rows && self.rows <= MAX_TALL_ROWS {
                    self.tall_tiles::<S>(group, bytes);
                } else if self.rows <= wide_rows::<S>() {
                    self.wide_tiles::<S, _>(group, bytes);
                } else {
                    widen::<S>(bytes, group.steps, words);
                    self.wide_tiles::<S, _>(group, Words(words));
                }
            }
        }
        // SAFETY: the piece's pointers are valid.
        unsafe { self.emit::<S>() }
    }
}

impl Piece {
    /// All rows in one tile, two vectors at a time.
    #[inline(always)]
    unsafe fn tall_tiles<S: Simd>(&self, group: Group, columns: Bytes) {
        for vector in (0..self.num_vectors()).step_by(2) {
            // SAFETY: the caller's contract; a panel has an even number of vectors.
            unsafe {
                match self.rows {
                    7 => self.tile::<S, _, 7, 2>(group, columns, (0, vector)),
                    8 => self.tile::<S, _, 8, 2>(group, columns, (0, vector)),
                    9 => self.tile::<S, _, 9, 2>(group, columns, (0, vector)),
                    10 => self.tile::<S, _, 10, 2>(group, columns, (0, vector)),
                    11 => self.tile::<S, _, 11, 2>(group, columns, (0, vector)),
                    12 => self.tile::<S, _, 12, 2>(group, columns, (0, vector)),
                    rows => unreachable!("a tall tile of {rows} rows"),
                }
            }
        }
    }

    /// Every row and vector of a group; rows are split as evenly as the largest tile allows.
    #[inline(always)]
    unsafe fn wide_tiles<S: Simd, C: Columns>(&self, group: Group, columns: C) {
        for vector in (0..self.num_vectors()).step_by(if holds_24_sums::<S>() { 4 } else { 1 }) {
            let mut row = 0;
            while row < self.rows {
                let left = self.rows - row;
                let rows = left.div_ceil(left.div_ceil(wide_rows::<S>()));
                // SAFETY: the caller's contract; a panel has four vectors.
                unsafe {
                    if holds_24_sums::<S>() {
                        self.rows_tile::<S, C, 4>(group, columns, (row, vector), rows);
                    } else {
                        self.rows_tile::<S, C, 1>(group, columns, (row, vector), rows);
                    }
                }
                row += rows;
            }
        }
    }

    #[inline(always)]
    unsafe fn rows_tile<S: Simd, C: Columns, const NV: usize>(
        &self,
        group: Group,
        columns: C,
        at: (usize, usize),
        rows: usize,
    ) {
        // SAFETY: the caller's contract.
        unsafe {
            match rows {
                1 => self.tile::<S, C, 1, NV>(group, columns, at),
                2 => self.tile::<S, C, 2, NV>(group, columns, at),
                3 => self.tile::<S, C, 3, NV>(group, columns, at),
                4 => self.tile::<S, C, 4, NV>(group, columns, at),
                5 if wide_rows::<S>() >= 5 => self.tile::<S, C, 5, NV>(group, columns, at),
                6 if wide_rows::<S>() >= 6 => self.tile::<S, C, MAX_WIDE_ROWS, NV>(group, columns, at),
                _ => unreachable!("tiles have at most {} rows", wide_rows::<S>()),
            }
        }
    }

    /// Sum `MR` rows from `row` times `NV` vectors from `vector` over a group, and add it to the totals.
    #[inline(always)]
    #[allow(clippy::needless_range_loop, reason = "indices keep the sums in registers")]
    unsafe fn tile<S: Simd, C: Columns, const MR: usize, const NV: usize>(
        &self,
        group: Group,
        columns: C,
        (row, vector): (usize, usize),
    ) {
        // SAFETY: the tile lies within the rows, the panel and the totals.
        unsafe {
            let left = group.left.add(row * self.k);
            let sums = chain::<S, C, MR, NV>((left, self.k), (columns, vector), group.steps);
            let totals = self.scratch.add(row * PANEL + vector * 16);
            for j in 0..NV {
                let scale = S::load(group.scales.add((vector + j) * 16));
                for i in 0..MR {
                    let total = totals.add(i * PANEL + j * 16);
                    let scaled = match group.opens {
                        true => S::mul(sums[i][j], scale),
                        false => S::fma(sums[i][j], scale, S::load(total)),
                    };
                    S::store(total, scaled);
                }
            }
        }
    }

    /// Vectors of the panel with outputs that exist.
    #[inline(always)]
    fn num_vectors(&self) -> usize {
        self.target.columns.div_ceil(16)
    }

    /// Write the totals: bias first, then the addition to what is there.
    #[inline(always)]
    unsafe fn emit<S: Simd>(&self) {
        let target = &self.target;
        for row in 0..self.rows {
            for column in (0..target.columns).step_by(16) {
                let lanes = (target.columns - column).min(16);
                // SAFETY: the lanes named lie within the row's outputs and the bias.
                unsafe {
                    let ptr = target.ptr.add(row * target.ld + column);
                    let mut v =
                        if self.k == 0 { S::splat(0.0) } else { S::load(self.scratch.add(row * PANEL + column)) };
                    if !target.bias.is_null() {
                        v = S::add(v, load_lanes::<S>(target.bias.add(column), lanes));
                    }
                    if target.store == Store::Add {
                        v = S::add(load_lanes::<S>(ptr, lanes), v);
                    }
                    if lanes == 16 { S::store(ptr, v) } else { S::store_partial(ptr, lanes, v) }
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn load_lanes<S: Simd>(ptr: *const f32, lanes: usize) -> S::V {
    // SAFETY: the caller's contract.
    unsafe { if lanes == 16 { S::load(ptr) } else { S::load_partial(ptr, lanes) } }
}

/// The bytes of a group as numbers, `[steps][64]`.
#[inline(always)]
unsafe fn widen<S: Simd>(bytes: Bytes, steps: usize, words: *mut f32) {
    for step in 0..steps {
        // SAFETY: the caller's contract.
        unsafe {
            bytes.prefetch::<S>(step);
            for vector in 0..PANEL / 16 {
                S::store(words.add(step * PANEL + vector * 16), bytes.load::<S>(step, vector));
            }
        }
    }
}

/// Chains over the steps of a group, from zero: rows of the left operand lie `ld` apart.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "indices keep the sums in registers")]
unsafe fn chain<S: Simd, C: Columns, const MR: usize, const NV: usize>(
    (left, ld): (*const f32, usize),
    (columns, vector): (C, usize),
    steps: usize,
) -> [[S::V; NV]; MR] {
    // SAFETY: the caller's pointers are valid for the tile.
    unsafe {
        let mut sums = [[S::splat(0.0); NV]; MR];
        let bases: [*const f32; MAX_TALL_ROWS / BASE_ROWS] =
            std::array::from_fn(|base| left.wrapping_add(base * BASE_ROWS * ld));
        for step in 0..steps {
            columns.prefetch::<S>(step);
            let mut b = [S::splat(0.0); NV];
            for j in 0..NV {
                b[j] = columns.load::<S>(step, vector + j);
            }
            for i in 0..MR {
                let number = S::splat(*bases[i / BASE_ROWS].wrapping_add(step + i % BASE_ROWS * ld));
                for j in 0..NV {
                    sums[i][j] = S::fma(number, b[j], sums[i][j]);
                }
            }
        }
        sums
    }
}
