//! The law over the vocabulary of each row of logits: maximum, sums of exponentials, moments.
//!
//! This is the only place where a softmax over the vocabulary is normalised, so sampling, scoring and training agree
//! in every bit. The vocabulary is cut into blocks of 256 ids (f32, 16 lanes, joined by the tree) and the blocks into
//! 8 parts (f64, ascending), which are joined by a binary tree of neighbours.

use super::super::CpuDevice;
use super::super::math::{exp, ln, load_lanes, store_lanes};
use super::super::parallel::SharedMut;
use super::super::simd::{Kernel, Simd};

/// Ids of a block.
pub(crate) const BLOCK: usize = 256;
/// Parts of the vocabulary.
pub(crate) const PARTS: usize = 8;
/// Distances to the maximum count as this at most: there, `e^x` is 0, and 0 times it stays 0.
const LOWEST: f32 = -100.0;

/// Which sums to take beside the exponentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moments {
    /// None.
    Skip,
    /// Those of entropy and sum of squares.
    Take,
}

/// The laws of some rows of logits.
#[derive(Default)]
pub(crate) struct Laws {
    vocab: usize,
    /// Largest `logit / T` of each row.
    pub(crate) max: Vec<f32>,
    /// Sum of exponentials of each row.
    pub(crate) total: Vec<f64>,
    /// Sum of exponentials of each block, `[rows, blocks]`.
    blocks: Vec<f32>,
    /// Sums of `e x` and of `e^2` of each row, where taken.
    moments: Vec<[f64; 2]>,
    /// Largest logit of each (row, part), and moments of each block: on the way to the others.
    part_max: Vec<f32>,
    block_moments: Vec<[f32; 2]>,
}

/// Number of blocks of a vocabulary.
pub(crate) fn num_blocks(vocab: usize) -> usize {
    vocab.div_ceil(BLOCK)
}

/// Blocks of part `part`.
fn part_blocks(vocab: usize, part: usize) -> std::ops::Range<usize> {
    let (blocks, each) = (num_blocks(vocab), num_blocks(vocab).div_ceil(PARTS));
    (part * each).min(blocks)..((part + 1) * each).min(blocks)
}

/// Ids of part `part`.
pub(crate) fn part_ids(vocab: usize, part: usize) -> std::ops::Range<usize> {
    let blocks = part_blocks(vocab, part);
    (blocks.start * BLOCK).min(vocab)..(blocks.end * BLOCK).min(vocab)
}

fn join(parts: [f64; PARTS]) -> f64 {
    let [a, b, c, d, e, f, g, h] = parts;
    ((a + b) + (c + d)) + ((e + f) + (g + h))
}

/// `logit / T - max`, the one way in which it is computed.
///
/// # Safety
/// As every method of [`Simd`].
#[inline(always)]
pub(crate) unsafe fn shifted<S: Simd>(logit: S::V, inv_temperature: f32, max: f32) -> S::V {
    // SAFETY: passed on to the caller.
    unsafe { S::sub(S::mul(logit, S::splat(inv_temperature)), S::splat(max)) }
}

/// The largest of some numbers; minus infinity of none.
pub(crate) struct MaxOf<'a>(pub(crate) &'a [f32]);

impl Kernel for MaxOf<'_> {
    type Output = f32;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        let whole = self.0.len() / 64 * 64;
        // SAFETY: four whole vectors from each start on; the rest one by one.
        unsafe {
            let mut max = [S::splat(f32::NEG_INFINITY); 4];
            for start in (0..whole).step_by(64) {
                for (i, max) in max.iter_mut().enumerate() {
                    *max = S::max(*max, S::load(self.0.as_ptr().add(start + 16 * i)));
                }
            }
            let max = S::reduce_max(S::max(S::max(max[0], max[1]), S::max(max[2], max[3])));
            self.0[whole..].iter().fold(max, |max, x| if *x > max { *x } else { max })
        }
    }
}

/// Sums of the blocks of a range of ids that starts at a block.
struct BlockSums<'a> {
    logits: &'a [f32],
    inv_temperature: f32,
    max: f32,
    sums: &'a mut [f32],
    /// `[blocks, 2]`; empty to skip.
    moments: &'a mut [[f32; 2]],
}

impl Kernel for BlockSums<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for (index, block) in self.logits.chunks(BLOCK).enumerate() {
            // SAFETY: lanes stop at the block's end; lanes behind it are selected away.
            unsafe {
                let mut sum = S::splat(0.0);
                let (mut first, mut square) = (sum, sum);
                for start in (0..block.len()).step_by(16) {
                    let lanes = block.len() - start;
                    let logit = load_lanes::<S>(block.as_ptr().add(start), lanes);
                    let mut x = shifted::<S>(logit, self.inv_temperature, self.max);
                    if lanes < 16 {
                        x = keep_lanes::<S>(x, lanes);
                    }
                    let e = exp::<S>(x);
                    sum = S::add(sum, e);
                    if !self.moments.is_empty() {
                        first = S::fma(e, S::max(S::splat(LOWEST), x), first);
                        square = S::fma(e, e, square);
                    }
                }
                self.sums[index] = S::reduce_add(sum);
                if !self.moments.is_empty() {
                    self.moments[index] = [S::reduce_add(first), S::reduce_add(square)];
                }
            }
        }
    }
}

/// Lanes from `lanes` on become [`LOWEST`], where an exponential is 0.
///
/// # Safety
/// As every method of [`Simd`].
#[inline(always)]
unsafe fn keep_lanes<S: Simd>(x: S::V, lanes: usize) -> S::V {
    let mut memory = [LOWEST; 16];
    // SAFETY: the array has 16 lanes.
    unsafe {
        S::store_partial(memory.as_mut_ptr(), lanes, x);
        S::load(memory.as_ptr())
    }
}

/// `out = e^(logit / T - max)`.
pub(crate) struct Weights<'a> {
    pub(crate) logits: &'a [f32],
    pub(crate) inv_temperature: f32,
    pub(crate) max: f32,
    pub(crate) out: &'a mut [f32],
}

impl Kernel for Weights<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        assert_eq!(self.logits.len(), self.out.len(), "one weight per logit");
        for start in (0..self.out.len()).step_by(16) {
            let lanes = self.out.len() - start;
            // SAFETY: lanes stop at the end of both slices.
            unsafe {
                let logit = load_lanes::<S>(self.logits.as_ptr().add(start), lanes);
                let e = exp::<S>(shifted::<S>(logit, self.inv_temperature, self.max));
                store_lanes::<S>(self.out.as_mut_ptr().add(start), lanes, e);
            }
        }
    }
}

impl Laws {
    /// The laws of `logits[rows, vocab]`, row `i` at temperature `1 / inv_temperatures[i]`. Masked ids hold minus
    /// infinity.
    pub(crate) fn new(dev: &CpuDevice, logits: &[f32], inv_temperatures: &[f32], moments: Moments) -> Laws {
        let mut laws = Laws::default();
        laws.take(dev, logits, inv_temperatures, moments);
        laws
    }

    /// [`Laws::new`] in the memory of laws that are no longer needed.
    pub(crate) fn take(&mut self, dev: &CpuDevice, logits: &[f32], inv_temperatures: &[f32], moments: Moments) {
        let rows = inv_temperatures.len();
        let vocab = logits.len() / rows.max(1);
        let blocks = num_blocks(vocab);
        let Laws { max, total, blocks: sums, moments: taken, part_max, block_moments, .. } = self;
        find_part_maxima(dev, logits, (rows, vocab), part_max);
        max.clear();
        max.extend((0..rows).map(|row| {
            let parts = &part_max[row * PARTS..(row + 1) * PARTS];
            parts.iter().fold(f32::NEG_INFINITY, |max, x| if *x > max { *x } else { max }) * inv_temperatures[row]
        }));
        refill(sums, rows * blocks, 0f32);
        refill(block_moments, if moments == Moments::Take { rows * blocks } else { 0 }, [0f32; 2]);
        let (shared_sums, shared_moments) = (SharedMut::new(sums), SharedMut::new(block_moments));
        dev.pool.run(rows * PARTS, &|task| {
            let (row, part) = (task / PARTS, task % PARTS);
            let (ids, range) = (part_ids(vocab, part), part_blocks(vocab, part));
            let range = row * blocks + range.start..row * blocks + range.end;
            // SAFETY: every (row, part) belongs to one task.
            let (sums, moments) = unsafe {
                let taken = if moments == Moments::Take { range.clone() } else { 0..0 };
                (shared_sums.range(range), shared_moments.range(taken))
            };
            let logits = &logits[row * vocab + ids.start..row * vocab + ids.end];
            let (inv_temperature, max) = (inv_temperatures[row], max[row]);
            dev.isa.run(BlockSums { logits, inv_temperature, max, sums, moments });
        });
        let join_row = |row: usize, value: &dyn Fn(usize) -> f64| {
            join(std::array::from_fn(|part| part_blocks(vocab, part).map(|block| value(row * blocks + block)).sum()))
        };
        total.clear();
        total.extend((0..rows).map(|row| join_row(row, &|index| f64::from(sums[index]))));
        taken.clear();
        taken.extend(
            (0..if moments == Moments::Take { rows } else { 0 })
                .map(|row| [0, 1].map(|which| join_row(row, &|index| f64::from(block_moments[index][which])))),
        );
        self.vocab = vocab;
    }

    /// Sums of the blocks of `row`.
    pub(crate) fn block_sums(&self, row: usize) -> &[f32] {
        let blocks = num_blocks(self.vocab);
        &self.blocks[row * blocks..(row + 1) * blocks]
    }

    /// Log-prob of an id whose logit, divided by the temperature as `logit * inv_temperature`, is given.
    pub(crate) fn log_prob(&self, row: usize, logit: f32, inv_temperature: f32) -> f32 {
        let scaled = logit * inv_temperature;
        ((f64::from(scaled) - f64::from(self.max[row])) - ln(self.total[row])) as f32
    }

    /// Entropy in nats. Needs [`Moments::Take`].
    pub(crate) fn entropy(&self, row: usize) -> f64 {
        ln(self.total[row]) - self.moments[row][0] / self.total[row]
    }

    /// Sum of squared probabilities. Needs [`Moments::Take`].
    pub(crate) fn sum_squares(&self, row: usize) -> f64 {
        self.moments[row][1] / (self.total[row] * self.total[row])
    }
}

/// `len` times `value` in the memory of `list`.
fn refill<T: Clone>(list: &mut Vec<T>, len: usize, value: T) {
    list.clear();
    list.resize(len, value);
}

/// Largest logit of each (row, part).
fn find_part_maxima(dev: &CpuDevice, logits: &[f32], (rows, vocab): (usize, usize), maxima: &mut Vec<f32>) {
    refill(maxima, rows * PARTS, f32::NEG_INFINITY);
    let shared = SharedMut::new(maxima);
    dev.pool.run(rows * PARTS, &|task| {
        let ids = part_ids(vocab, task % PARTS);
        let start = task / PARTS * vocab;
        let max = dev.isa.run(MaxOf(&logits[start + ids.start..start + ids.end]));
        // SAFETY: every task has an element of its own.
        unsafe { shared.set(task, max) };
    });
}
