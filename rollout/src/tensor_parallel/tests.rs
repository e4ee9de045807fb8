//! What is told arrives, or is no command.

use super::command::{Command, Order, Step, StepCommand};
use crate::BlockCopy;
use crate::model::StepBatch;
use proptest::prelude::*;
use temper_tensor::{KvCacheSpec, SeqSpan};
use temper_types::{ContentHash, DType};

const POOL: KvCacheSpec =
    KvCacheSpec { num_layers: 1, num_blocks: 9, block_size: 16, num_kv_heads: 1, head_dim: 2, dtype: DType::F32 };

fn told(copies: &[BlockCopy], lens: &[(u32, u32)]) -> (Vec<u8>, Step) {
    let blocks: Vec<u32> = (100..200).collect();
    let mut step = Step { weights: [3; 16], pool: (9, 16), ..Step::default() };
    step.copies = copies.iter().map(|copy| (copy.from, copy.to)).collect();
    let mut spans = Vec::new();
    for (first_slot, num_rows) in lens {
        let (row_start, end) = (step.positions.len(), first_slot + num_rows);
        step.positions.extend(*first_slot..end);
        step.spans.push((*first_slot, *num_rows, blocks[..end.div_ceil(16) as usize].to_vec()));
        let (num_rows, first_slot) = (*num_rows as usize, *first_slot as usize);
        spans.push(SeqSpan { row_start, num_rows, first_slot, blocks: &blocks });
    }
    step.token_ids = step.positions.iter().map(|position| position * 7).collect();
    let (token_ids, positions) = (&step.token_ids[..], &step.positions[..]);
    let batch = StepBatch { token_ids, positions, spans: &spans, draw_rows: &[], draws: &[] };
    let bytes = StepCommand { weights: ContentHash([3; 16]), pool: &POOL, copies, batch }.encode();
    let places = |spans: &[SeqSpan<'_>]| spans.iter().map(|s| (s.row_start, s.num_rows)).collect::<Vec<_>>();
    assert_eq!(places(&step.seq_spans()), places(&spans));
    (bytes, step)
}

proptest! {
    #[test]
    fn a_step_arrives_as_it_was_told(
        copies in prop::collection::vec((0..9u32, 0..9u32), 0..3),
        lens in prop::collection::vec((0..300u32, 1..40u32), 0..5),
    ) {
        let copies: Vec<BlockCopy> = copies.into_iter().map(|(from, to)| BlockCopy { from, to }).collect();
        let (bytes, step) = told(&copies, &lens);
        prop_assert_eq!(Command::decode(&bytes), Some(Command::Step(step)));
        for cut in [1, 4, 5] {
            prop_assert_eq!(Command::decode(&bytes[..bytes.len() - cut]), None);
        }
    }

    #[test]
    fn other_bytes_are_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..90)) {
        let _ = Command::decode(&bytes);
        let _ = Command::decode(&[&[1][..], &bytes].concat());
    }
}

#[test]
fn orders_arrive() {
    for order in [Order::StillHere, Order::ReleaseKv, Order::End, Order::Weights(ContentHash([7; 16]))] {
        assert_eq!(Command::decode(&order.encode()), Some(Command::Order(order)));
    }
    assert_eq!([&[][..], &[9], &[0, 0], &[3, 1]].map(Command::decode), [None, None, None, None]);
}
