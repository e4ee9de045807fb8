//! Plans between any two layouts: everything that is missing comes once, nothing that is there, from who has it.

use proptest::prelude::*;
use std::ops::Range;
use temper_collective::SHARD_ALIGNMENT;
use temper_collective::reshard::{Layout, LayoutError, Receiver, Split, Tensor, Transfer, Unit, plan};

/// A layer with 4 query and 2 key/value heads, and a table; padding between tensors.
fn units(scale: usize) -> Vec<Unit> {
    let mut start = 0;
    let mut tensor = |name: &str, rows: usize, columns: usize, split| {
        let one = Tensor { name: name.to_owned(), start, rows, columns, split };
        start = (start + rows * columns).next_multiple_of(16);
        one
    };
    let (d, f, head) = (8 * scale, 24, 4);
    let tensors = vec![
        tensor("norm", 1, d, Split::Whole),
        tensor("q", 4 * head, d, Split::Rows { granule: head }),
        tensor("k", 2 * head, d, Split::Rows { granule: head }),
        tensor("v", 2 * head, d, Split::Rows { granule: head }),
        tensor("o", d, 4 * head, Split::Columns),
        tensor("gate", f, d, Split::Rows { granule: 1 }),
        tensor("down", d, f, Split::Columns),
    ];
    let layer = Unit { len: start, tensors };
    let table = Tensor { name: "embed".to_owned(), start: 0, rows: 32, columns: d, split: Split::Rows { granule: 1 } };
    vec![Unit { len: 32 * d, tensors: vec![table] }, layer.clone(), layer, Unit { len: 0, tensors: vec![] }]
}

fn layout() -> impl Strategy<Value = Layout> {
    let divided = |(copies, size): (usize, usize)| (copies * size, size);
    prop_oneof![
        (1..=5usize).prop_map(|world| Layout::Replicated { world }),
        (1..=3usize, 1..=5usize).prop_map(divided).prop_map(|(world, shards)| Layout::Fsdp { world, shards }),
        (1..=3usize, 0..=2u32).prop_map(move |(copies, power)| {
            let tp = 1 << power;
            Layout::Tensor { world: copies * tp, tp }
        }),
    ]
}

/// The receiver's weights, element by element: the numbers of the sources that gave it, or what it had.
fn check(units: &[Unit], (from, to): (Layout, Layout), receiver: Receiver) {
    let transfers = plan(units, (from, to), receiver).expect("a plan");
    let mut moved = 0;
    let mut lower_bound = 0;
    for (index, unit) in units.iter().enumerate() {
        let wanted = to.held(unit, receiver.rank);
        let own = receiver.source_rank.map_or_else(Vec::new, |rank| from.held(unit, rank));
        let mut times = vec![0; unit.len];
        for transfer in transfers.iter().filter(|transfer| transfer.unit == index) {
            let range = transfer.range.clone();
            assert!(!range.is_empty());
            let held = from.held(unit, transfer.source);
            for (i, at) in range.clone().enumerate() {
                times[at] += 1;
                assert_eq!(end_to_end(&held).nth(transfer.source_offset + i), Some(at), "{transfer:?}");
                assert_eq!(end_to_end(&wanted).nth(transfer.receiver_offset + i), Some(at), "{transfer:?}");
            }
            moved += range.len();
        }
        let has = |ranges: &[Range<usize>], at: usize| ranges.iter().any(|range| range.contains(&at));
        for (at, times) in times.into_iter().enumerate() {
            let is_missing = has(&wanted, at) && !has(&own, at);
            // Padding between tensors is nobody's under tensor parallelism.
            let is_held = (0..from.world()).any(|rank| has(&from.held(unit, rank), at));
            assert!(is_held || !is_missing || is_padding(unit, at), "element {at} of unit {index} is lost");
            assert_eq!(times, usize::from(is_missing && is_held), "element {at} of unit {index}");
            lower_bound += usize::from(is_missing && is_held);
        }
    }
    assert_eq!(moved, lower_bound);
}

fn is_padding(unit: &Unit, at: usize) -> bool {
    !unit.tensors.iter().any(|t| (t.start..t.start + t.rows * t.columns).contains(&at))
}

fn end_to_end(ranges: &[Range<usize>]) -> impl Iterator<Item = usize> + '_ {
    ranges.iter().flat_map(Clone::clone)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn every_missing_element_comes_once_from_who_has_it(
        from in layout(), to in layout(), rank in 0..15usize, source in 0..30usize, scale in 1..=3usize,
    ) {
        let source_rank = (source < 15).then_some(source % from.world());
        check(&units(scale), (from, to), Receiver { rank: rank % to.world(), source_rank });
    }
}

fn bytes_by_source(transfers: &[Transfer], world: usize) -> Vec<usize> {
    let mut bytes = vec![0; world];
    transfers.iter().for_each(|transfer| bytes[transfer.source] += transfer.range.len());
    bytes
}

#[test]
fn sources_that_hold_the_same_share_the_work() {
    let units = units(3);
    let total: usize = units.iter().map(|unit| unit.len).sum();
    for world in 1..=4 {
        let (from, to) = (Layout::Replicated { world }, Layout::Replicated { world: 1 });
        let transfers = plan(&units, (from, to), Receiver { rank: 0, source_rank: None }).expect("a plan");
        let bytes = bytes_by_source(&transfers, world);
        assert_eq!(bytes.iter().sum::<usize>(), total);
        assert!(bytes.iter().all(|b| b.abs_diff(total / world) <= 1), "{bytes:?}");
    }
    // Hybrid: two ranks hold each half, and each of them gives half of it, to the boundaries of shards.
    let (from, to) = (Layout::Fsdp { world: 4, shards: 2 }, Layout::Replicated { world: 1 });
    let transfers = plan(&units, (from, to), Receiver { rank: 0, source_rank: None }).expect("a plan");
    let bytes = bytes_by_source(&transfers, 4);
    assert!(bytes[0].abs_diff(bytes[2]) <= 1 && bytes[1].abs_diff(bytes[3]) <= 1, "{bytes:?}");
    // A receiver that is a source already takes nothing that it has.
    let transfers = plan(&units, (from, to), Receiver { rank: 0, source_rank: Some(1) }).expect("a plan");
    let bytes = bytes_by_source(&transfers, 4);
    assert_eq!((bytes[1], bytes[3]), (0, 0));
}

#[test]
fn the_same_layout_moves_nothing() {
    for layout in
        [Layout::Replicated { world: 3 }, Layout::Fsdp { world: 4, shards: 2 }, Layout::Tensor { world: 4, tp: 2 }]
    {
        for rank in 0..layout.world() {
            let receiver = Receiver { rank, source_rank: Some(rank) };
            assert_eq!(plan(&units(2), (layout, layout), receiver), Ok(vec![]));
        }
    }
}

#[test]
fn shards_are_what_the_trainer_holds() {
    let unit = Unit { len: 5 * SHARD_ALIGNMENT + 7, tensors: vec![] };
    let held = |rank| Layout::Fsdp { world: 4, shards: 2 }.held(&unit, rank);
    let (first, second) = (0..3 * SHARD_ALIGNMENT, 3 * SHARD_ALIGNMENT..unit.len);
    assert_eq!((held(0), held(3)), (vec![first], vec![second]));
    assert_eq!(held(2), held(0));
}

#[test]
fn layouts_that_cannot_be_are_refused() {
    let refuse = |from, rank: usize| -> LayoutError {
        let to = Layout::Replicated { world: 1 };
        plan(&units(1), (from, to), Receiver { rank, source_rank: None }).expect_err("cannot be")
    };
    let cases = [
        (refuse(Layout::Fsdp { world: 4, shards: 3 }, 0), "shards is 3: expected a divisor of the world of 4"),
        (refuse(Layout::Replicated { world: 0 }, 0), "world is 0: expected at least 1"),
        (refuse(Layout::Replicated { world: 1 }, 1), "the receiver's rank is 1: expected a rank below 1"),
        (refuse(Layout::Tensor { world: 3, tp: 3 }, 0), "tensor `embed`: 32 groups of 1 rows"),
        (refuse(Layout::Tensor { world: 32, tp: 32 }, 0), "tensor `o`: 16 columns: expected a multiple of tp = 32"),
    ];
    for (error, expected) in cases {
        assert!(error.to_string().contains(expected), "{error}: expected {expected}");
    }
}
