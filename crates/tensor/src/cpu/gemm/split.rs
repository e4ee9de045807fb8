//! How a product is cut into tasks. Nothing here reaches a number.

use std::ops::Range;

/// Fewest rows of a block that is cut only to keep all threads busy.
const MIN_BALANCED_ROWS: usize = 12;
/// Tasks per thread behind which an uneven last round no longer matters.
const ENOUGH_ROUNDS: usize = 10;
/// Blocks are whole tiles of the widest family.
const ROW_STEP: usize = super::tile::MAX_TILE_ROWS;

/// A grid of blocks of rows times panels; panels run fastest, so that threads share a block's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Grid {
    rows: usize,
    block_rows: usize,
    num_panels: usize,
}

impl Grid {
    /// Cut `rows` into blocks of at most `max_rows` so that `num_threads` threads end at about the same time.
    pub(super) fn new(rows: usize, num_panels: usize, max_rows: usize, num_threads: usize) -> Grid {
        let mut num_blocks = rows.div_ceil(max_rows).max(1);
        let even = |num_blocks: usize| {
            let tasks = num_blocks * num_panels;
            let rounds = tasks.div_ceil(num_threads);
            rounds >= ENOUGH_ROUNDS || tasks == rounds * num_threads
        };
        while !even(num_blocks) && rows / (num_blocks + 1) >= MIN_BALANCED_ROWS {
            num_blocks += 1;
        }
        let block_rows = rows.div_ceil(num_blocks);
        let rounded = if num_blocks > 1 { block_rows.next_multiple_of(ROW_STEP) } else { block_rows };
        Grid { rows, block_rows: rounded.max(1), num_panels }
    }

    /// Number of tasks.
    pub(super) fn num_tasks(&self) -> usize {
        self.rows.div_ceil(self.block_rows) * self.num_panels
    }

    /// Rows and panel of a task.
    pub(super) fn task(&self, index: usize) -> (Range<usize>, usize) {
        let start = index / self.num_panels * self.block_rows;
        (start..(start + self.block_rows).min(self.rows), index % self.num_panels)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grid_covers_every_row_and_panel_once() {
        for rows in [1, 5, 8, 23, 32, 64, 240, 241, 1024] {
            for num_panels in [1, 3, 9, 24] {
                for num_threads in [1, 2, 3, 8] {
                    let grid = Grid::new(rows, num_panels, 240, num_threads);
                    let mut seen = vec![0; rows * num_panels];
                    for task in 0..grid.num_tasks() {
                        let (range, panel) = grid.task(task);
                        assert!(!range.is_empty() && range.len() <= 246, "{grid:?} task {task}");
                        range.for_each(|row| seen[row * num_panels + panel] += 1);
                    }
                    assert!(seen.iter().all(|&count| count == 1), "{grid:?}");
                }
            }
        }
    }

    #[test]
    fn an_odd_number_of_panels_is_balanced_over_two_threads() {
        assert_eq!(Grid::new(64, 9, 240, 2).num_tasks(), 18);
        assert_eq!(Grid::new(8, 9, 240, 2).num_tasks(), 9);
    }
}
