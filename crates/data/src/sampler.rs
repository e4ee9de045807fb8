//! The order in which prompts are visited, as a pure function of (seed, epoch), and a cursor that resumes in it.

use serde::{Deserialize, Serialize};
use temper_types::Philox;

/// Keeps the shuffle's noise apart from every other use of the run's seed.
const SHUFFLE_KEY: u64 = 0x5348_5546_464c_4531;

/// The order of `num_prompts` prompts in one pass over the data: Fisher-Yates over counter-based noise.
pub fn order(seed: u64, epoch: u64, num_prompts: u64) -> Vec<u64> {
    let noise = Philox::new(seed ^ SHUFFLE_KEY);
    let mut indices: Vec<u64> = (0..num_prompts).collect();
    for last in (1..indices.len()).rev() {
        let other = noise.below(last as u64 + 1, last as u64, epoch);
        indices.swap(last, other as usize);
    }
    indices
}

/// One prompt that was handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Draw {
    /// Pass over the data, from 0.
    pub epoch: u64,
    /// Row of the prompt in its dataset.
    pub index: u64,
}

/// Position in the endless sequence of shuffled passes. Saved in checkpoints; it is all that resume needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromptCursor {
    /// Pass over the data, from 0.
    pub epoch: u64,
    /// Number of prompts of this pass that were handed out.
    pub position: u64,
}

impl PromptCursor {
    /// Hand out the next `batch_size` prompts of `num_prompts`, going on into the next pass where this one ends.
    ///
    /// # Panics
    /// If `num_prompts` is 0 and `batch_size` is not: there is nothing to hand out.
    pub fn next_batch(&mut self, seed: u64, num_prompts: u64, batch_size: usize) -> Vec<Draw> {
        assert!(num_prompts > 0 || batch_size == 0, "an empty dataset has no next prompt");
        let mut batch = Vec::with_capacity(batch_size);
        while batch.len() < batch_size {
            if self.position >= num_prompts {
                *self = PromptCursor { epoch: self.epoch + 1, position: 0 };
            }
            let shuffled = order(seed, self.epoch, num_prompts);
            let epoch = self.epoch;
            let rest = &shuffled[self.position as usize..];
            let taken = rest.len().min(batch_size - batch.len());
            batch.extend(rest[..taken].iter().map(|&index| Draw { epoch, index }));
            self.position += taken as u64;
        }
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pass_is_a_permutation_of_its_own() {
        let (first, second) = (order(3, 0, 100), order(3, 1, 100));
        for shuffled in [&first, &second] {
            let mut sorted = shuffled.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..100).collect::<Vec<_>>());
        }
        assert_ne!(first, second);
        assert_ne!(first, order(4, 0, 100));
        assert_eq!(first, order(3, 0, 100));
        assert_eq!(order(3, 0, 0), Vec::<u64>::new());
    }

    #[test]
    fn first_places_are_spread_evenly() {
        let mut counts = [0u32; 5];
        for epoch in 0..5000 {
            counts[order(1, epoch, 5)[0] as usize] += 1;
        }
        assert!(counts.iter().all(|count| (900..1100).contains(count)), "{counts:?}");
    }

    /// Any split into batches, with the cursor saved in between, hands out the same sequence.
    #[test]
    fn batches_across_passes_and_resume_give_one_sequence() {
        let whole = PromptCursor::default().next_batch(9, 7, 40);
        let mut cursor = PromptCursor::default();
        let mut parts = Vec::new();
        for size in [1, 6, 0, 13, 3, 17] {
            parts.extend(cursor.next_batch(9, 7, size));
            let saved = serde_json::to_string(&cursor).expect("a cursor is plain data");
            cursor = serde_json::from_str(&saved).expect("what was written reads back");
        }
        assert_eq!(parts, whole);
        assert_eq!(cursor, PromptCursor { epoch: 5, position: 5 });
        for pass in whole.chunks_exact(7) {
            let mut indices: Vec<_> = pass.iter().map(|draw| draw.index).collect();
            indices.sort_unstable();
            assert_eq!(indices, (0..7).collect::<Vec<_>>());
        }
    }

    #[test]
    #[should_panic(expected = "an empty dataset has no next prompt")]
    fn an_empty_dataset_is_a_bug_of_the_caller() {
        PromptCursor::default().next_batch(0, 0, 1);
    }
}
