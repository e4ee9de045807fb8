//! What a receiver asks of which source.

use super::layout::{Layout, LayoutError, Unit};
use std::collections::BTreeSet;
use std::ops::Range;

/// A rank that takes weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Receiver {
    /// Its rank in the new layout.
    pub rank: usize,
    /// Its rank in the old layout, where it is one of its ranks and so has that rank's ranges already.
    pub source_rank: Option<usize>,
}

/// Elements that go from a source to the receiver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transfer {
    /// Rank in the old layout that sends.
    pub source: usize,
    /// Number of the unit.
    pub unit: usize,
    /// Elements of the unit.
    pub range: Range<usize>,
    /// Where they begin in what the source holds of the unit, its ranges end to end.
    pub source_offset: usize,
    /// Where they begin in what the receiver holds of the unit under the new layout, its ranges end to end.
    pub receiver_offset: usize,
}

/// The transfers that give `receiver` what `to` asks of it: every element that it lacks once, none that it has, each
/// from a source that holds it, and sources that hold the same asked for equal amounts. Ascending by unit and range.
///
/// # Errors
/// A layout that does not fit the units, or a receiver outside the layouts.
pub fn plan(units: &[Unit], (from, to): (Layout, Layout), receiver: Receiver) -> Result<Vec<Transfer>, LayoutError> {
    from.validate(units)?;
    to.validate(units)?;
    in_world("the receiver's rank", receiver.rank, to)?;
    receiver.source_rank.map_or(Ok(()), |rank| in_world("the receiver's rank as a source", rank, from))?;
    let mut load = vec![0; from.world()];
    let mut transfers = Vec::new();
    for (index, unit) in units.iter().enumerate() {
        let held: Vec<Held> = (0..from.world()).map(|rank| Held::new(from.held(unit, rank))).collect();
        let wanted = Held::new(to.held(unit, receiver.rank));
        let own = receiver.source_rank.map(|rank| &held[rank]);
        for piece in pieces(&wanted, &held) {
            if own.is_some_and(|own| own.offset(piece.start).is_some()) {
                continue;
            }
            let holders = (0..held.len()).filter(|rank| held[*rank].offset(piece.start).is_some());
            let shares = shares(piece.len(), holders, receiver.rank, &mut load);
            let mut start = piece.start;
            for (source, len) in shares {
                let range = start..start + len;
                start = range.end;
                let place = |held: &Held| held.offset(range.start).expect("the piece lies within them");
                let (source_offset, receiver_offset) = (place(&held[source]), place(&wanted));
                transfers.push(Transfer { source, unit: index, range, source_offset, receiver_offset });
            }
        }
    }
    Ok(transfers)
}

fn in_world(what: &'static str, rank: usize, layout: Layout) -> Result<(), LayoutError> {
    let expected = || format!("a rank below {}", layout.world());
    if rank < layout.world() { Ok(()) } else { Err(LayoutError::Ranks { what, got: rank, expected: expected() }) }
}

/// What a rank holds of a unit.
struct Held {
    ranges: Vec<Range<usize>>,
    /// Elements before each range, the ranges laid end to end.
    before: Vec<usize>,
}

impl Held {
    fn new(ranges: Vec<Range<usize>>) -> Self {
        let end = |total: &mut usize, range: &Range<usize>| Some(std::mem::replace(total, *total + range.len()));
        let before = ranges.iter().scan(0, end).collect();
        Held { ranges, before }
    }

    /// Place of element `at` in the ranges laid end to end, where it lies in one of them.
    fn offset(&self, at: usize) -> Option<usize> {
        let index = self.ranges.partition_point(|range| range.end <= at);
        let range = self.ranges.get(index).filter(|range| range.contains(&at))?;
        Some(self.before[index] + at - range.start)
    }
}

/// `wanted`, cut wherever a source's range begins or ends: each piece is held whole or not at all.
fn pieces(wanted: &Held, held: &[Held]) -> Vec<Range<usize>> {
    let ranges = held.iter().flat_map(|held| &held.ranges);
    let cuts: BTreeSet<usize> = ranges.flat_map(|range| [range.start, range.end]).collect();
    let mut out = Vec::new();
    for range in &wanted.ranges {
        let mut start = range.start;
        for cut in cuts.range(range.start + 1..range.end) {
            out.push(start..*cut);
            start = *cut;
        }
        out.push(start..range.end);
    }
    out
}

/// Divide `len` elements over `holders` so that the most loaded of them has as little as possible. The receiver's
/// number decides between equals, so that receivers do not all begin with the same source.
fn shares(
    len: usize,
    holders: impl Iterator<Item = usize>,
    receiver: usize,
    load: &mut [usize],
) -> Vec<(usize, usize)> {
    let world = load.len();
    let mut order: Vec<usize> = holders.collect();
    order.sort_by_key(|rank| (load[*rank], (rank + world - receiver % world) % world));
    let mut count = 0;
    let mut filled = 0;
    // Raise the least loaded together until the next one's level, or until everything is divided.
    while count < order.len() {
        let level = load[order[count]];
        let needed: usize = order[..count].iter().map(|rank| level - load[*rank]).sum();
        if count > 0 && needed >= len {
            break;
        }
        count += 1;
        filled = order[..count].iter().map(|rank| load[*rank]).sum::<usize>() + len;
    }
    let (level, extra) = (filled / count.max(1), filled % count.max(1));
    let mut out = Vec::with_capacity(count);
    for (index, rank) in order[..count].iter().enumerate() {
        let share = level + usize::from(index < extra) - load[*rank].min(level + usize::from(index < extra));
        if share > 0 {
            load[*rank] += share;
            out.push((*rank, share));
        }
    }
    out
}
