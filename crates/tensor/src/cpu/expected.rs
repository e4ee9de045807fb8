//! Memory that attention reads later, asked for while products leave the memory idle.
//!
//! A product of a few dozen rows takes longer to multiply than its weight takes to arrive, and attention over the keys
//! and values of as many sequences waits for memory alone. So whoever knows what attention reads next says so
//! ([`Expected::replace`]), and products before it ask for its cache lines between their multiplications. Nothing here
//! reaches a number: a line that is asked for is not read, and need not even exist.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;
/// What may wait in the last-level cache: one part of so many. Weights pass through it meanwhile, and other cores
/// share it.
const CACHE_PARTS: usize = 4;
/// Blocks for which there is room from the beginning.
const ROOM: usize = 4096;

/// What attention reads next, as far as somebody said.
pub(crate) struct Expected {
    lines: Mutex<Lines>,
    /// Most lines at once.
    limit: usize,
}

impl Expected {
    /// Nothing yet. On a machine that does not say how large its last-level cache is, nothing ever.
    pub(crate) fn new() -> Expected {
        Expected::with_limit(last_level_cache_bytes().unwrap_or(0) / CACHE_PARTS / LINE)
    }

    fn with_limit(limit: usize) -> Expected {
        let lines = Lines { ids: Vec::with_capacity(ROOM), stretches: Vec::with_capacity(ROOM), asked: 0 };
        Expected { lines: Mutex::new(lines), limit }
    }

    /// Expect the blocks of `block_bytes` bytes each, starting at `base`, that `ids` names, in any order and any number
    /// of times, instead of what was expected. Those beyond the limit are left out.
    pub(crate) fn replace(&self, (base, block_bytes): (*const u8, usize), ids: impl Iterator<Item = u32>) {
        // Where a product has them at this moment, they stay: there is nobody to wait for a hint.
        let Ok(mut lines) = self.lines.try_lock() else { return };
        let Lines { ids: own, stretches, asked } = &mut *lines;
        own.clear();
        stretches.clear();
        *asked = 0;
        own.extend(ids.take(self.limit * LINE / block_bytes.max(1)));
        own.sort_unstable();
        own.dedup();
        let mut end = 0;
        for run in own.chunk_by(|a, b| a + 1 == *b) {
            end += run.len() * block_bytes / LINE;
            stretches.push(Stretch { first: base.wrapping_add(run[0] as usize * block_bytes), end });
        }
    }

    /// The lines that nobody asked for, for the time of a product; `None` where there are none, or another product has
    /// them.
    pub(crate) fn take(&self) -> Option<MutexGuard<'_, Lines>> {
        self.lines.try_lock().ok().filter(|lines| lines.asked < lines.len())
    }
}

/// Bytes of the largest cache.
fn last_level_cache_bytes() -> Option<usize> {
    let size = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index3/size").ok()?;
    size.trim().strip_suffix('K')?.parse::<usize>().ok().map(|kib| kib << 10)
}

/// Lines that follow one another.
#[derive(Debug, Clone, Copy)]
struct Stretch {
    /// Address of the first.
    first: *const u8,
    /// Number of all lines up to its last.
    end: usize,
}

// SAFETY: nothing is read or written through the address.
unsafe impl Send for Stretch {}
// SAFETY: as above.
unsafe impl Sync for Stretch {}

/// Expected lines, numbered by ascending address.
#[derive(Default)]
pub(crate) struct Lines {
    /// Memory for the blocks that they come from.
    ids: Vec<u32>,
    stretches: Vec<Stretch>,
    /// Lines that were given out.
    asked: usize,
}

impl Lines {
    fn len(&self) -> usize {
        self.stretches.last().map_or(0, |stretch| stretch.end)
    }

    /// The numbers of the next lines, at most `count`, which are given out by this.
    pub(crate) fn next(&mut self, count: usize) -> Range<usize> {
        let start = self.asked;
        self.asked = (start + count).min(self.len());
        start..self.asked
    }

    /// Part `index` of `count` parts of the lines in `range`.
    pub(crate) fn part(&self, range: &Range<usize>, (index, count): (usize, usize)) -> Part<'_> {
        let at = |index: usize| range.start + range.len() * index / count;
        let first = self.stretches.partition_point(|stretch| stretch.end <= at(index));
        let before = if first == 0 { 0 } else { self.stretches[first - 1].end };
        Part { stretches: &self.stretches[first..], before, at: at(index), end: at(index + 1) }
    }
}

/// Some of the lines, which are walked in order.
pub(crate) struct Part<'a> {
    /// From that of the next line on.
    stretches: &'a [Stretch],
    /// Lines of all stretches before.
    before: usize,
    at: usize,
    end: usize,
}

impl Part<'_> {
    /// No lines.
    pub(crate) const NONE: Part<'static> = Part { stretches: &[], before: 0, at: 0, end: 0 };

    /// The next lines that follow one another, at most `count`: the address of the first, and how many they are.
    pub(crate) fn next(&mut self, count: usize) -> (*const u8, usize) {
        let Some((stretch, rest)) = self.stretches.split_first().filter(|_| self.at < self.end) else {
            return (std::ptr::null(), 0);
        };
        let start = self.at;
        let address = stretch.first.wrapping_add((start - self.before) * LINE);
        self.at = (start + count).min(stretch.end).min(self.end);
        if self.at == stretch.end {
            (self.stretches, self.before) = (rest, stretch.end);
        }
        (address, self.at - start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers of the lines behind `base` that the parts of all products together ask for, in their order.
    fn asked(
        expected: &Expected,
        base: *const u8,
        (lines_of_product, tasks, at_once): (usize, usize, usize),
    ) -> Vec<usize> {
        let mut all = Vec::new();
        while let Some(mut lines) = expected.take() {
            let range = lines.next(lines_of_product);
            for task in 0..tasks {
                let mut part = lines.part(&range, (task, tasks));
                loop {
                    let (address, count) = part.next(at_once);
                    if count == 0 {
                        break;
                    }
                    all.extend((0..count).map(|i| (address.addr() - base.addr()) / LINE + i));
                }
            }
        }
        all
    }

    #[test]
    fn every_line_of_every_block_is_asked_for_once_however_products_and_tasks_cut_them() {
        let memory = [0u8; 64];
        let base = memory.as_ptr();
        let ids = [7, 3, 4, 9, 3, 8, 20];
        let blocks = [3, 4, 7, 8, 9, 20];
        let whole: Vec<usize> = blocks.iter().flat_map(|id| id * 5..(id + 1) * 5).collect();
        for cut in [(1, 1, 1), (4, 3, 2), (7, 2, 100), (1000, 2, 3), (1000, 7, 1000)] {
            let expected = Expected::with_limit(100);
            expected.replace((base, 5 * LINE), ids.into_iter());
            assert_eq!(asked(&expected, base, cut), whole, "{cut:?}");
            assert!(expected.take().is_none(), "nothing is left");
        }
    }

    #[test]
    fn a_limit_leaves_out_the_last_blocks_and_new_ones_replace_the_old() {
        let memory = [0u8; 64];
        let base = memory.as_ptr();
        let expected = Expected::with_limit(10);
        expected.replace((base, 4 * LINE), [5, 1, 2].into_iter());
        assert_eq!(asked(&expected, base, (100, 1, 100)), [4, 5, 6, 7, 20, 21, 22, 23]);
        expected.replace((base, 4 * LINE), [0].into_iter());
        expected.replace((base, 4 * LINE), [6].into_iter());
        assert_eq!(asked(&expected, base, (3, 1, 100)), [24, 25, 26, 27]);
        let none = Expected::with_limit(0);
        none.replace((base, 4 * LINE), [6].into_iter());
        assert!(none.take().is_none());
    }

    #[test]
    fn while_a_product_has_the_lines_others_go_without() {
        let memory = [0u8; 64];
        let expected = Expected::with_limit(10);
        expected.replace((memory.as_ptr(), LINE), 0..4);
        let lines = expected.take();
        assert!(lines.is_some() && expected.take().is_none());
        expected.replace((memory.as_ptr(), LINE), 0..2);
        drop(lines);
        assert_eq!(expected.take().map(|lines| lines.len()), Some(4), "the hint in between was dropped");
    }
}
