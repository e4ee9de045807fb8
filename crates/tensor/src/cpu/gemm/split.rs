//! How a forward is cut into tasks. Nothing here reaches a number.

use std::ops::Range;

/// Most tasks per thread: enough for threads that are not equally fast.
const MAX_ROUNDS: usize = 8;
/// Panels of a task at least, where there are several tasks per thread: a task's first panel is not asked for ahead.
const MIN_TASK_PANELS: usize = 12;
/// Blocks and pieces are whole tiles of the widest family.
const ROW_STEP: usize = super::tile::MAX_TILE_ROWS;

/// Blocks of rows times panels in one line, panels running fastest, cut into tasks of equal length: a panel at a task's
/// end is shared with the next task by rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Grid {
    rows: usize,
    block_rows: usize,
    num_panels: usize,
    num_tasks: usize,
}

impl Grid {
    /// Cut `rows` into blocks of at most `max_rows`, and the line of blocks and panels into tasks for `num_threads`.
    pub(super) fn new(rows: usize, num_panels: usize, max_rows: usize, num_threads: usize) -> Grid {
        let num_blocks = rows.div_ceil(max_rows).max(1);
        let block_rows = rows.div_ceil(num_blocks).next_multiple_of(ROW_STEP).min(rows.max(1));
        let units = rows.div_ceil(block_rows) * num_panels;
        let rounds = (units / (num_threads * MIN_TASK_PANELS)).clamp(1, MAX_ROUNDS);
        let num_tasks = (num_threads * rounds).min(units * block_rows.div_ceil(ROW_STEP)).max(1);
        Grid { rows, block_rows, num_panels, num_tasks }
    }

    /// Rows of a block; the last may have fewer.
    pub(super) fn block_rows(&self) -> usize {
        self.block_rows
    }

    /// Number of blocks times that of panels.
    pub(super) fn num_units(&self) -> usize {
        self.rows.div_ceil(self.block_rows) * self.num_panels
    }

    /// Number of tasks.
    pub(super) fn num_tasks(&self) -> usize {
        self.num_tasks
    }

    /// Where task `index` begins on the line, in steps of rows of a panel.
    fn start(&self, index: usize) -> usize {
        let steps = self.block_rows.div_ceil(ROW_STEP);
        let units = self.rows.div_ceil(self.block_rows) * self.num_panels;
        units * steps * index / self.num_tasks
    }

    /// Call `f(rows, panel, the task's next panel)` for every piece of a task in turn.
    pub(super) fn for_pieces(&self, index: usize, mut f: impl FnMut(Range<usize>, usize, Option<usize>)) {
        let (mut at, end) = (self.start(index), self.start(index + 1));
        let steps = self.block_rows.div_ceil(ROW_STEP);
        while at < end {
            let (unit, first) = (at / steps, at % steps);
            let last = steps.min(first + end - at);
            let start = unit / self.num_panels * self.block_rows;
            let block_end = (start + self.block_rows).min(self.rows);
            let rows = (start + first * ROW_STEP).min(block_end)..(start + last * ROW_STEP).min(block_end);
            at += last - first;
            let next = (at < end).then_some((unit + 1) % self.num_panels);
            if !rows.is_empty() {
                f(rows, unit % self.num_panels, next);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn a_grid_covers_every_row_and_panel_once() {
        for rows in [1, 5, 8, 23, 32, 64, 240, 241, 1024] {
            for num_panels in [1, 3, 9, 24, 100] {
                for num_threads in [1, 2, 3, 8] {
                    let grid = Grid::new(rows, num_panels, 240, num_threads);
                    let seen = RefCell::new(vec![0; rows * num_panels]);
                    for task in 0..grid.num_tasks() {
                        grid.for_pieces(task, |range, panel, next| {
                            assert!(!range.is_empty() && range.len() <= 240, "{grid:?} task {task}");
                            assert!(next.is_none_or(|next| next == (panel + 1) % num_panels), "{grid:?} task {task}");
                            range.for_each(|row| seen.borrow_mut()[row * num_panels + panel] += 1);
                        });
                    }
                    assert!(seen.borrow().iter().all(|&count| count == 1), "{grid:?}");
                }
            }
        }
    }

    #[test]
    fn an_odd_number_of_panels_is_balanced_over_two_threads() {
        let grid = Grid::new(32, 9, 240, 2);
        let rows_of = |task: usize| {
            let sum = RefCell::new(0);
            grid.for_pieces(task, |rows, _, _| *sum.borrow_mut() += rows.len());
            sum.into_inner()
        };
        assert_eq!((grid.num_tasks(), rows_of(0), rows_of(1)), (2, 140, 148));
    }
}
