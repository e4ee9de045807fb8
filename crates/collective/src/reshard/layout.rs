//! Which ranges of which unit a rank holds.

use crate::shard_ranges;
use std::ops::Range;

/// How tensor parallelism cuts a tensor `[rows, columns]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// Every rank holds all of it: norms, and what is small.
    Whole,
    /// By rows, `granule` of them at once (a head's): query, key, value, gate and up projections, vocabulary. With
    /// fewer granules than ranks, neighbouring ranks hold the same one.
    Rows {
        /// Rows that stay together.
        granule: usize,
    },
    /// By columns: output and down projections.
    Columns,
}

/// A tensor within a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// First element within the unit.
    pub start: usize,
    /// Rows; 1 for a vector that is not cut.
    pub rows: usize,
    /// Elements of a row.
    pub columns: usize,
    /// How it is cut.
    pub split: Split,
}

/// Elements that are sharded together: a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// Elements, padding between tensors included.
    pub len: usize,
    /// The tensors, ascending; they do not overlap. What lies between them is held by whoever holds whole units.
    pub tensors: Vec<Tensor>,
}

/// How weights lie on the ranks of one side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Every rank holds everything.
    Replicated {
        /// Number of ranks.
        world: usize,
    },
    /// Every unit is cut into contiguous shards, by [`shard_ranges`]. Consecutive groups of `shards` ranks hold the
    /// same.
    Fsdp {
        /// Number of ranks.
        world: usize,
        /// Ranks that share one copy: `world` for plain FSDP, less for hybrid sharding.
        shards: usize,
    },
    /// Tensors are cut by their [`Split`]. Consecutive groups of `tp` ranks hold the same.
    Tensor {
        /// Number of ranks.
        world: usize,
        /// Ranks that share one copy.
        tp: usize,
    },
}

/// Why a layout cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Ranks that cannot be divided.
    #[error("{what} is {got}: expected {expected}")]
    Ranks {
        /// Which number.
        what: &'static str,
        /// What it is.
        got: usize,
        /// What would be right.
        expected: String,
    },
    /// A tensor that cannot be cut.
    #[error("tensor `{tensor}`: {problem}")]
    Tensor {
        /// Its name.
        tensor: String,
        /// What is wrong and what would be right.
        problem: String,
    },
}

impl Layout {
    /// Number of ranks.
    pub fn world(self) -> usize {
        match self {
            Layout::Replicated { world } | Layout::Fsdp { world, .. } | Layout::Tensor { world, .. } => world,
        }
    }

    /// Ranks that share one copy of the weights.
    fn copy_size(self) -> (&'static str, usize) {
        match self {
            Layout::Replicated { .. } => ("replicas", 1),
            Layout::Fsdp { shards, .. } => ("shards", shards),
            Layout::Tensor { tp, .. } => ("tp", tp),
        }
    }

    /// Check that the layout fits the units.
    ///
    /// # Errors
    /// Numbers of ranks that do not divide, tensors that overlap or cannot be cut evenly.
    pub fn validate(self, units: &[Unit]) -> Result<(), LayoutError> {
        let (world, (what, size)) = (self.world(), self.copy_size());
        if world == 0 {
            return Err(LayoutError::Ranks { what: "world", got: 0, expected: "at least 1".to_owned() });
        }
        if size == 0 || !world.is_multiple_of(size) {
            let expected = format!("a divisor of the world of {world}");
            return Err(LayoutError::Ranks { what, got: size, expected });
        }
        units.iter().try_for_each(|unit| self.validate_unit(unit))
    }

    fn validate_unit(self, unit: &Unit) -> Result<(), LayoutError> {
        let mut end = 0;
        for tensor in &unit.tensors {
            let fail = |problem: String| LayoutError::Tensor { tensor: tensor.name.clone(), problem };
            if tensor.start < end || tensor.start + tensor.rows * tensor.columns > unit.len {
                return Err(fail(format!("expected it between elements {end} and {}", unit.len)));
            }
            end = tensor.start + tensor.rows * tensor.columns;
            let Layout::Tensor { tp, .. } = self else { continue };
            tensor.validate(tp).map_err(fail)?;
        }
        Ok(())
    }

    /// The ranges of `unit` that `rank` holds: ascending, disjoint, not touching each other.
    pub fn held(self, unit: &Unit, rank: usize) -> Vec<Range<usize>> {
        let position = rank % self.copy_size().1.max(1);
        let whole = 0..unit.len;
        let ranges = match self {
            Layout::Replicated { .. } => vec![whole],
            Layout::Fsdp { shards, .. } => vec![shard_ranges(unit.len, shards.max(1))[position].clone()],
            Layout::Tensor { tp: 1, .. } => vec![whole],
            Layout::Tensor { tp, .. } => unit.tensors.iter().flat_map(|tensor| tensor.part(tp, position)).collect(),
        };
        merged(ranges)
    }
}

impl Tensor {
    fn validate(&self, tp: usize) -> Result<(), String> {
        match self.split {
            Split::Whole => Ok(()),
            Split::Columns if self.columns.is_multiple_of(tp) => Ok(()),
            Split::Columns => Err(format!("{} columns: expected a multiple of tp = {tp}", self.columns)),
            Split::Rows { granule } if granule == 0 || !self.rows.is_multiple_of(granule) => {
                Err(format!("{} rows: expected a multiple of {granule}", self.rows))
            }
            Split::Rows { granule } => {
                let granules = self.rows / granule;
                let fits = granules.is_multiple_of(tp) || tp.is_multiple_of(granules.max(1));
                let problem =
                    || format!("{granules} groups of {granule} rows: expected tp = {tp} to divide them, or they tp");
                if fits { Ok(()) } else { Err(problem()) }
            }
        }
    }

    /// Ranges of the unit that position `position` of `tp` holds.
    fn part(&self, tp: usize, position: usize) -> Vec<Range<usize>> {
        let rows = |range: Range<usize>| self.start + range.start * self.columns..self.start + range.end * self.columns;
        match self.split {
            Split::Whole => vec![rows(0..self.rows)],
            Split::Rows { granule } => {
                let granules = self.rows / granule.max(1);
                let first = granules * position / tp;
                let last = (granules * (position + 1) / tp).max(first + 1).min(granules);
                vec![rows(first * granule..last * granule)]
            }
            Split::Columns => {
                let width = self.columns / tp;
                let start = |row: usize| self.start + row * self.columns + position * width;
                (0..self.rows).map(|row| start(row)..start(row) + width).collect()
            }
        }
    }
}

/// Ascending ranges without empty ones, touching ones joined.
fn merged(ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    let mut out: Vec<Range<usize>> = Vec::with_capacity(ranges.len());
    for range in ranges.into_iter().filter(|range| !range.is_empty()) {
        match out.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => out.push(range),
        }
    }
    out
}
