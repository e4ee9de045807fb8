//! The two products of attention over tiles of 16 keys, shared by forward and backward.
//!
//! Every output element is one chain of fused multiply-adds over its ascending inner index, whatever rows and vectors
//! are computed beside it, so blocking never reaches a number.

use super::super::kv::TILE;
use super::super::simd::Simd;

/// A number as the cache stores it.
pub(crate) trait KvElement: Copy + Default + Send + Sync {
    /// 16 numbers, widened.
    ///
    /// # Safety
    /// As [`Simd::load`].
    unsafe fn load<S: Simd>(ptr: *const Self) -> S::V;
    /// 16 numbers, rounded.
    ///
    /// # Safety
    /// As [`Simd::store`].
    unsafe fn store<S: Simd>(ptr: *mut Self, v: S::V);
}

impl KvElement for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(ptr: *const f32) -> S::V {
        // SAFETY: passed on to the caller.
        unsafe { S::load(ptr) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(ptr: *mut f32, v: S::V) {
        // SAFETY: passed on to the caller.
        unsafe { S::store(ptr, v) }
    }
}

impl KvElement for u16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(ptr: *const u16) -> S::V {
        // SAFETY: passed on to the caller.
        unsafe { S::load_bf16(ptr) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(ptr: *mut u16, v: S::V) {
        // SAFETY: passed on to the caller.
        unsafe { S::store_bf16(ptr, v) }
    }
}

/// The left operand: element (row, k) lies at `ptr + row * row_stride + k * step`.
#[derive(Clone, Copy)]
pub(crate) struct Left {
    pub(crate) ptr: *const f32,
    pub(crate) rows: usize,
    pub(crate) row_stride: usize,
    pub(crate) step: usize,
}

impl Left {
    /// The same rows from row `first` on, from inner index `k` on.
    #[inline(always)]
    fn at(self, first: usize, k: usize) -> *const f32 {
        self.ptr.wrapping_add(first * self.row_stride + k * self.step)
    }
}

/// The result: element (row, column) lies at `ptr + row * row_stride + column`.
#[derive(Clone, Copy)]
pub(crate) struct Out {
    pub(crate) ptr: *mut f32,
    pub(crate) row_stride: usize,
}

impl Out {
    #[inline(always)]
    fn at(self, row: usize, column: usize) -> *mut f32 {
        self.ptr.wrapping_add(row * self.row_stride + column)
    }
}

/// The right operand of [`accumulate`]: row k lies at `tiles[k / 16] + (k % 16) * stride`, `vectors` vectors wide.
#[derive(Clone, Copy)]
pub(crate) struct Right<'a, E> {
    pub(crate) tiles: &'a [*const E],
    pub(crate) stride: usize,
    pub(crate) vectors: usize,
}

/// Rows of the micro-kernel that comes next: as many as fit, of the sizes that are compiled.
#[inline(always)]
fn next_rows<S: Simd>(left: usize) -> usize {
    match left.min(S::TILE_ROWS) {
        0..=2 => left.min(S::TILE_ROWS),
        3..=5 => 3,
        _ => 6,
    }
}

/// Calls `$body` with the constant `$rows` equal to `$count`, one of the results of [`next_rows`].
macro_rules! with_rows {
    ($count:expr, $rows:ident => $body:expr) => {
        match $count {
            1 => {
                const $rows: usize = 1;
                $body
            }
            2 => {
                const $rows: usize = 2;
                $body
            }
            3 => {
                const $rows: usize = 3;
                $body
            }
            _ => {
                if S::TILE_ROWS >= 6 {
                    const $rows: usize = 6;
                    $body
                }
            }
        }
    };
}

/// `out[row][16 t + lane] = sum over d of left[row][d] * tiles[t][d][lane]`, d ascending over `depth`.
///
/// # Safety
/// Each tile holds `depth` rows of 16 numbers, `left` has `depth` steps, `out` has room for 16 columns per tile.
#[inline(always)]
pub(crate) unsafe fn scores<S: Simd, E: KvElement>(left: Left, tiles: &[*const E], depth: usize, out: Out) {
    // SAFETY: rows and tiles stay inside what the caller promised.
    unsafe {
        let mut tile = 0;
        while tile < tiles.len() {
            let wide = S::TILE_VECTORS > 1 && tile + 4 <= tiles.len();
            let mut row = 0;
            while row < left.rows {
                let count = next_rows::<S>(left.rows - row);
                let (from, to) = (left.at(row, 0), out.at(row, tile * TILE));
                let strides = (left.row_stride, left.step, out.row_stride);
                if wide {
                    let at = [tiles[tile], tiles[tile + 1], tiles[tile + 2], tiles[tile + 3]];
                    with_rows!(count, R => scores_micro::<S, E, R, 4>(from, at, depth, to, strides));
                } else {
                    with_rows!(count, R => scores_micro::<S, E, R, 1>(from, [tiles[tile]], depth, to, strides));
                }
                row += count;
            }
            tile += if wide { 4 } else { 1 };
        }
    }
}

/// # Safety
/// As [`scores`], for R rows and N tiles.
#[inline(always)]
unsafe fn scores_micro<S: Simd, E: KvElement, const R: usize, const N: usize>(
    left: *const f32,
    tiles: [*const E; N],
    depth: usize,
    out: *mut f32,
    (row_stride, step, out_stride): (usize, usize, usize),
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[S::splat(0.0); N]; R];
        for d in 0..depth {
            let mut keys = [S::splat(0.0); N];
            for (key, tile) in keys.iter_mut().zip(&tiles) {
                *key = E::load::<S>(tile.add(d * TILE));
            }
            add_products::<S, R, N>(&mut sums, (left.add(d * step), row_stride), &keys);
        }
        store_sums::<S, R, N>(&sums, Out { ptr: out, row_stride: out_stride });
    }
}

/// `sums[r] += left[r] * right`, the numbers of `left` lying `stride` apart.
///
/// # Safety
/// `left` has R numbers.
#[inline(always)]
unsafe fn add_products<S: Simd, const R: usize, const N: usize>(
    sums: &mut [[S::V; N]; R],
    (left, stride): (*const f32, usize),
    right: &[S::V; N],
) {
    for (r, sums) in sums.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        unsafe {
            let x = S::splat(*left.add(r * stride));
            for (sum, right) in sums.iter_mut().zip(right) {
                *sum = S::fma(x, *right, *sum);
            }
        }
    }
}

/// # Safety
/// `out` has R rows of N vectors.
#[inline(always)]
unsafe fn store_sums<S: Simd, const R: usize, const N: usize>(sums: &[[S::V; N]; R], out: Out) {
    for (r, sums) in sums.iter().enumerate() {
        for (n, sum) in sums.iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { S::store(out.at(r, n * 16), *sum) }
        }
    }
}

/// `out[row][column] += sum over k of left[row][k] * right[k][column]`, k ascending from `first` to before `end`, as
/// one chain that starts at the old value. Column k = 0 of `left` belongs to row 0 of the first tile.
///
/// # Safety
/// `right` and `left` hold every k named, and `out` has `16 * right.vectors` columns.
#[inline(always)]
pub(crate) unsafe fn accumulate<S: Simd, E: KvElement>(
    left: Left,
    right: Right<'_, E>,
    (first, end): (usize, usize),
    out: Out,
) {
    if first >= end {
        return;
    }
    // SAFETY: rows and vectors stay inside what the caller promised.
    unsafe {
        let mut vector = 0;
        while vector < right.vectors {
            let wide = S::TILE_VECTORS > 1 && vector + 4 <= right.vectors;
            let mut row = 0;
            while row < left.rows {
                let count = next_rows::<S>(left.rows - row);
                let (from, to) = (Left { ptr: left.at(row, 0), ..left }, Out { ptr: out.at(row, vector * 16), ..out });
                if wide {
                    with_rows!(count, R => values_micro::<S, E, R, 4>(from, (right, vector * 16), (first, end), to));
                } else {
                    with_rows!(count, R => values_micro::<S, E, R, 1>(from, (right, vector * 16), (first, end), to));
                }
                row += count;
            }
            vector += if wide { 4 } else { 1 };
        }
    }
}

/// # Safety
/// As [`accumulate`], for R rows and N vectors from `column` on.
#[inline(always)]
unsafe fn values_micro<S: Simd, E: KvElement, const R: usize, const N: usize>(
    left: Left,
    (right, column): (Right<'_, E>, usize),
    (first, end): (usize, usize),
    out: Out,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[S::splat(0.0); N]; R];
        for (r, sums) in sums.iter_mut().enumerate() {
            for (n, sum) in sums.iter_mut().enumerate() {
                *sum = S::load(out.at(r, n * 16));
            }
        }
        let mut k = first;
        while k < end {
            let tile_end = (k / TILE + 1) * TILE;
            let base = right.tiles[k / TILE].add(column);
            while k < end.min(tile_end) {
                let value = base.add((k % TILE) * right.stride);
                let mut values = [S::splat(0.0); N];
                for (n, v) in values.iter_mut().enumerate() {
                    *v = E::load::<S>(value.add(n * 16));
                }
                add_products::<S, R, N>(&mut sums, (left.at(0, k), left.row_stride), &values);
                k += 1;
            }
        }
        store_sums::<S, R, N>(&sums, out);
    }
}
