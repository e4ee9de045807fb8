//! Packing of operands into the words that the matrix kernel reads.
//!
//! A *word* has 32 bits: an f32, or two bf16 numbers of which the even one is in the low half. In bf16 without the
//! native instruction, words are f32 that hold rounded numbers, with the odd number of each pair first, so that a chain
//! over ascending words multiplies in the order of `vdpbf16ps`.

use super::tile::{GROUP_ROWS, PANEL};
use crate::cpu::simd::{Kernel, Simd, round_bf16, to_bf16};
use std::ops::Range;

/// What the words of an operand are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// f32 as given.
    Exact,
    /// f32 rounded to bf16, odd number of each pair first, padded to whole pairs.
    Swapped,
    /// bf16 pairs, padded to whole pairs.
    Pairs,
}

impl Format {
    /// Words that hold `k` numbers of the summed dimension.
    pub(super) const fn num_words(self, k: usize) -> usize {
        match self {
            Format::Exact => k,
            Format::Swapped => k.next_multiple_of(2),
            Format::Pairs => k.div_ceil(2),
        }
    }

    /// Numbers in a word.
    pub(super) const fn numbers_per_word(self) -> usize {
        match self {
            Format::Exact | Format::Swapped => 1,
            Format::Pairs => 2,
        }
    }
}

/// Two bf16 numbers in one word, as the bits of an f32 that no arithmetic ever touches.
#[inline(always)]
fn pair_word(even: f32, odd: f32) -> f32 {
    f32::from_bits(u32::from(to_bf16(even)) | (u32::from(to_bf16(odd)) << 16))
}

/// Which number of a pair is multiplied first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PairOrder {
    /// The chain of f32 numbers.
    EvenFirst,
    /// The chain of `vdpbf16ps`.
    OddFirst,
}

/// Widen pairs `[num_pairs][32]` to words `[2 num_pairs][32]`.
///
/// # Safety
/// Pointers are valid for those words.
#[inline(always)]
pub(super) unsafe fn widen_pairs<S: Simd>((pairs, order): (*const f32, PairOrder), num_pairs: usize, out: *mut f32) {
    for pair in 0..num_pairs {
        for vector in 0..PANEL / 16 {
            // SAFETY: the caller's contract.
            unsafe {
                let (even, odd) = S::load_bf16_pairs(pairs.add(pair * PANEL + vector * 16).cast());
                let (first, second) = match order {
                    PairOrder::EvenFirst => (even, odd),
                    PairOrder::OddFirst => (odd, even),
                };
                S::store(out.add(2 * pair * PANEL + vector * 16), first);
                S::store(out.add((2 * pair + 1) * PANEL + vector * 16), second);
            }
        }
    }
}

/// Rows of a gathered matrix that are asked for ahead: they are too far apart for the hardware to guess.
const PREFETCH_ROWS: usize = 24;
/// The same where more columns than a panel's are taken: so few that rows whose lines share a set do not drive each
/// other out of the first cache level.
const PREFETCH_WIDE_ROWS: usize = 4;

/// Columns of a row-major f32 matrix whose rows are the summed dimension.
#[derive(Clone, Copy)]
pub(super) struct Gather {
    /// Row 0, first column.
    pub(super) ptr: *const f32,
    /// Distance of rows.
    pub(super) ld: usize,
    /// Rows, the numbers of the summed dimension.
    pub(super) num_rows: usize,
    /// Columns that exist.
    pub(super) columns: usize,
    /// What the words are.
    pub(super) format: Format,
}

impl Gather {
    /// Write every word row to `out[word rows][32]`, columns that do not exist being zero.
    ///
    /// # Safety
    /// The matrix is valid for its rows and columns, and `out` for the words.
    #[inline(always)]
    pub(super) unsafe fn pack<S: Simd>(&self, out: *mut f32) {
        let whole = if self.columns >= PANEL { self.whole_word_rows() } else { 0 };
        for word_row in 0..self.format.num_words(self.num_rows) {
            let out = out.wrapping_add(word_row * PANEL);
            // SAFETY: the caller's contract; lanes behind the last column are not read.
            unsafe {
                if word_row < whole {
                    self.whole_words::<S>(word_row, (PANEL / 16, 16), (out, 16));
                    continue;
                }
                for column in (0..PANEL).step_by(16) {
                    let words = if column < self.columns {
                        self.words::<S>(word_row, column, self.columns - column)
                    } else {
                        S::splat(0.0)
                    };
                    S::store(out.add(column), words);
                }
            }
        }
    }

    /// Word rows of which every number exists.
    #[inline(always)]
    const fn whole_word_rows(&self) -> usize {
        match self.format {
            Format::Exact => self.num_rows,
            Format::Swapped => self.num_rows / 2 * 2,
            Format::Pairs => self.num_rows / 2,
        }
    }

    /// The words of 16 columns from each of the columns `0, step, ..., (count - 1) * step`, all of which exist, to
    /// `out` and every `out_step` words behind it.
    ///
    /// # Safety
    /// The matrix is valid for these columns of the word row, and `out` for the words.
    #[inline(always)]
    unsafe fn whole_words<S: Simd>(
        &self,
        word_row: usize,
        (count, step): (usize, usize),
        (out, out_step): (*mut f32, usize),
    ) {
        let rows = self.format.numbers_per_word();
        let row = self.ptr.wrapping_add(word_row * rows * self.ld);
        // SAFETY: the caller's contract; prefetched addresses need not be valid.
        unsafe {
            for line in (0..(count - 1) * step + 16).step_by(16) {
                let ahead = if count * step > PANEL { PREFETCH_WIDE_ROWS } else { PREFETCH_ROWS };
                for next in ahead * rows..(ahead + 1) * rows {
                    S::prefetch(row.wrapping_add(next * self.ld + line));
                }
            }
            match self.format {
                Format::Exact => {
                    for i in 0..count {
                        S::store(out.add(i * out_step), S::load(row.add(i * step)));
                    }
                }
                Format::Swapped => {
                    let row = self.ptr.add((word_row ^ 1) * self.ld);
                    for i in 0..count {
                        S::store(out.add(i * out_step), S::round_bf16(S::load(row.add(i * step))));
                    }
                }
                Format::Pairs => {
                    for i in 0..count {
                        let pair = S::pair_bf16(S::load(row.add(i * step)), S::load(row.add(self.ld + i * step)));
                        S::store(out.add(i * out_step), pair);
                    }
                }
            }
        }
    }

    /// The words of up to `lanes` columns from `column` in a word row.
    #[inline(always)]
    unsafe fn words<S: Simd>(&self, word_row: usize, column: usize, lanes: usize) -> S::V {
        // SAFETY: the caller's contract.
        unsafe {
            match self.format {
                Format::Exact => self.numbers::<S>(word_row, column, lanes),
                Format::Swapped => S::round_bf16(self.numbers::<S>(word_row ^ 1, column, lanes)),
                Format::Pairs => {
                    let even = self.numbers::<S>(2 * word_row, column, lanes);
                    S::pair_bf16(even, self.numbers::<S>(2 * word_row + 1, column, lanes))
                }
            }
        }
    }

    /// Up to `lanes` numbers of a row, 0 behind the last row.
    #[inline(always)]
    unsafe fn numbers<S: Simd>(&self, row: usize, column: usize, lanes: usize) -> S::V {
        // SAFETY: the caller's contract; the prefetched address need not be valid.
        unsafe {
            if row >= self.num_rows {
                return S::splat(0.0);
            }
            let from = self.ptr.add(row * self.ld + column);
            if lanes >= 16 { S::load(from) } else { S::load_partial(from, lanes) }
        }
    }
}

/// Columns of a row-major matrix as a left operand in groups of twelve: `[group][word row][12]`.
pub(super) struct LeftGroups<'a> {
    /// The columns.
    pub(super) gather: Gather,
    /// Numbers that may be read from the first column of a row on; at least the columns.
    pub(super) readable: usize,
    /// Words from one group to the next, [`LeftGroups::group_len`].
    pub(super) out: &'a mut [f32],
}

impl LeftGroups<'_> {
    /// Words of a group: its own, and room for the lanes that a vector store writes behind them.
    pub(super) const fn group_len(num_words: usize) -> usize {
        num_words * GROUP_ROWS + 16
    }
}

impl Kernel for LeftGroups<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let gather = self.gather;
        let num_words = gather.format.num_words(gather.num_rows);
        let (group_len, num_groups) = (Self::group_len(num_words), gather.columns.div_ceil(GROUP_ROWS));
        assert!(self.out.len() >= num_groups * group_len, "the packed operand fits its memory");
        let (out, whole_rows) = (self.out.as_mut_ptr(), gather.whole_word_rows());
        // Groups whose 16 lanes may all be read.
        let whole_groups = if self.readable < 16 { 0 } else { ((self.readable - 16) / GROUP_ROWS + 1).min(num_groups) };
        for word_row in 0..num_words {
            // SAFETY: the matrix is valid by the caller's contract, the memory by the assertion. Lanes behind a group's
            // words are overwritten by its next step or lie in the room behind the group.
            unsafe {
                let out = out.add(word_row * GROUP_ROWS);
                let whole = if word_row < whole_rows { whole_groups } else { 0 };
                if whole > 0 {
                    gather.whole_words::<S>(word_row, (whole, GROUP_ROWS), (out, group_len));
                }
                for group in whole..num_groups {
                    let column = group * GROUP_ROWS;
                    S::store(out.add(group * group_len), gather.words::<S>(word_row, column, self.readable - column));
                }
            }
        }
    }
}

/// Words of a stretch of rows whose summed dimension is contiguous (inputs of a forward, gradients of outputs).
pub(super) struct RowWords<'a> {
    /// The rows.
    pub(super) rows: &'a [f32],
    /// Distance of rows.
    pub(super) ld: usize,
    /// The numbers of each row that are laid out.
    pub(super) numbers: Range<usize>,
    /// Format of the words.
    pub(super) format: Format,
    /// The words of each row.
    pub(super) out: &'a mut [f32],
    /// Distance of the words of rows; at least the words of one.
    pub(super) out_ld: usize,
}

impl RowWords<'_> {
    /// A distance of rows of `num_words` at which neighbouring rows fall into different sets of every cache: an odd
    /// number of lines.
    pub(super) const fn spread(num_words: usize) -> usize {
        (num_words.div_ceil(16) | 1) * 16
    }
}

impl Kernel for RowWords<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let words = self.format.num_words(self.numbers.len());
        for (row, out) in self.rows.chunks(self.ld.max(1)).zip(self.out.chunks_mut(self.out_ld.max(1))) {
            let (row, out) = (&row[self.numbers.clone()], &mut out[..words]);
            match self.format {
                Format::Exact => out.copy_from_slice(row),
                Format::Swapped => {
                    let (pairs, tail) = row.as_chunks::<2>();
                    let (out_pairs, out_tail) = out.split_at_mut(pairs.len() * 2);
                    for (&[even, odd], out) in pairs.iter().zip(out_pairs.chunks_exact_mut(2)) {
                        (out[0], out[1]) = (round_bf16(odd), round_bf16(even));
                    }
                    if let ([even], [first, second]) = (tail, out_tail) {
                        (*first, *second) = (0.0, round_bf16(*even));
                    }
                }
                Format::Pairs => {
                    let (whole, tail) = row.as_chunks::<16>();
                    let (pairs, tail_pairs) = out.split_at_mut(whole.len() * 8);
                    for (numbers, out) in whole.iter().zip(pairs.chunks_exact_mut(8)) {
                        // SAFETY: sixteen numbers, and room for as many in eight words. The words are those of a
                        // little-endian machine, as `Simd::load_bf16_pairs` reads them.
                        unsafe { S::store_bf16(out.as_mut_ptr().cast(), S::load(numbers.as_ptr())) }
                    }
                    for (numbers, out) in tail.chunks(2).zip(tail_pairs) {
                        *out = pair_word(numbers[0], numbers.get(1).copied().unwrap_or(0.0));
                    }
                }
            }
        }
    }
}

/// One panel of a weight `[n, k]`: words `[steps][32]` of 32 output rows, rows that do not exist being zero.
pub(super) struct WeightPanel<'a> {
    /// The rows of the panel that exist, each of `k` numbers.
    pub(super) rows: &'a [f32],
    /// Numbers of a row.
    pub(super) k: usize,
    /// [`Format::Exact`] or [`Format::Pairs`].
    pub(super) format: Format,
    /// `format.num_words(k) * 32` words.
    pub(super) out: &'a mut [f32],
}

impl Kernel for WeightPanel<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        /// Numbers of each row that are moved before the next row: one cache line.
        const STRIP: usize = 16;
        for start in (0..self.k).step_by(STRIP) {
            let end = (start + STRIP).min(self.k);
            for (j, row) in self.rows.chunks_exact(self.k).enumerate() {
                if self.format == Format::Exact {
                    for (step, number) in (start..end).zip(&row[start..end]) {
                        self.out[step * PANEL + j] = *number;
                    }
                } else {
                    for (pair, numbers) in (start / 2..).zip(row[start..end].chunks(2)) {
                        let odd = numbers.get(1).copied().unwrap_or(0.0);
                        self.out[pair * PANEL + j] = pair_word(numbers[0], odd);
                    }
                }
            }
        }
    }
}
