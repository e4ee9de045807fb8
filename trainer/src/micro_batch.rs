//! Rows of a mini-batch, packed into micro-batches that fit the memory.
//!
//! Rows keep their order and are never split; a micro-batch is closed before the row that would exceed the limit. A
//! prompt that consecutive rows share counts once, as it runs once, and such rows stay together where they fit. The
//! split is a function of the rows alone. Losses do not depend on it; sums of gradients round differently.

use crate::Error;
use std::ops::Range;
use temper_actor::TrainBatch;
use temper_proto::{TokenSequence, TrainRow};

/// Consecutive sequences that pass through the model together.
pub(crate) fn split<'a>(sequences: impl Iterator<Item = &'a TokenSequence>, max_tokens: usize) -> Vec<Range<usize>> {
    let all: Vec<&TokenSequence> = sequences.collect();
    let mut batches = Vec::new();
    let (mut start, mut tokens, mut row) = (0, 0, 0);
    for group in all.chunk_by(|a, b| a.prompt_token_ids == b.prompt_token_ids) {
        let prompt = group[0].prompt_token_ids.len();
        let whole = prompt + group.iter().map(|one| one.response_token_ids.len()).sum::<usize>();
        if row > start && tokens + whole > max_tokens && whole <= max_tokens {
            batches.push(start..row);
            (start, tokens) = (row, 0);
        }
        tokens += prompt;
        for sequence in group {
            let response = sequence.response_token_ids.len();
            if row > start && tokens + response > max_tokens {
                batches.push(start..row);
                (start, tokens) = (row, prompt);
            }
            tokens += response;
            row += 1;
        }
    }
    if start < row {
        batches.push(start..row);
    }
    batches
}

/// Check a sequence: a prompt, a mask of the response's length, ids within the vocabulary.
pub(crate) fn check(index: usize, sequence: &TokenSequence, vocab_size: usize, max_len: usize) -> Result<(), Error> {
    let what = || format!("sequence {index}");
    if sequence.prompt_token_ids.is_empty() {
        return Err(Error::invalid(what(), "the prompt is empty: expected at least one token"));
    }
    let (ids, mask) = (sequence.response_token_ids.len(), sequence.response_mask.len());
    if ids != mask {
        return Err(Error::invalid(what(), format!("response_mask has {mask} entries: expected {ids}")));
    }
    let length = sequence.prompt_token_ids.len() + ids;
    if length > max_len {
        return Err(Error::invalid(what(), format!("has {length} tokens: the model takes at most {max_len}")));
    }
    let mut all = sequence.prompt_token_ids.iter().chain(&sequence.response_token_ids);
    match all.find(|id| **id as usize >= vocab_size) {
        Some(id) => Err(Error::invalid(what(), format!("token id {id} is outside the vocabulary of {vocab_size}"))),
        None => Ok(()),
    }
}

/// Sequences side by side; the targets are all response tokens.
pub(crate) fn train_batch<'a>(sequences: impl Iterator<Item = &'a TokenSequence>) -> TrainBatch {
    let mut batch = TrainBatch::new();
    let mut ids = Vec::new();
    for sequence in sequences {
        ids.clear();
        ids.extend_from_slice(&sequence.prompt_token_ids);
        ids.extend_from_slice(&sequence.response_token_ids);
        batch.push_sequence(&ids, sequence.prompt_token_ids.len()..ids.len());
    }
    batch
}

/// Per-token arrays of consecutive rows end to end, as an objective reads them.
#[derive(Debug, Default)]
pub(crate) struct Columns {
    pub(crate) offsets: Vec<usize>,
    pub(crate) response_mask: Vec<u8>,
    pub(crate) old_log_probs: Vec<f64>,
    pub(crate) ref_log_probs: Vec<f64>,
    pub(crate) advantages: Vec<f64>,
    pub(crate) rollout_weights: Vec<f64>,
    pub(crate) rollout_log_probs: Vec<f64>,
}

impl Columns {
    /// Gather rows; `log_probs` (the policy's, now) stand in for old log-probs that were left empty.
    pub(crate) fn gather(rows: &[TrainRow], log_probs: &[f64]) -> Result<Self, Error> {
        let mut columns = Columns { offsets: vec![0], ..Columns::default() };
        for (index, row) in rows.iter().enumerate() {
            let start = columns.response_mask.len();
            columns.response_mask.extend_from_slice(&row.sequence.response_mask);
            let end = columns.response_mask.len();
            columns.offsets.push(end);
            if row.old_log_probs.is_empty() {
                columns.old_log_probs.extend_from_slice(&log_probs[start..end]);
            } else {
                columns.old_log_probs.extend(row.old_log_probs.iter().map(|v| f64::from(*v)));
            }
            columns.ref_log_probs.extend(row.ref_log_probs.iter().map(|v| f64::from(*v)));
            columns.advantages.extend_from_slice(&row.advantages);
            columns.rollout_weights.extend_from_slice(&row.rollout_weights);
            columns.rollout_log_probs.extend(row.rollout_log_probs.iter().map(|v| f64::from(*v)));
            if columns.old_log_probs.len() != end {
                let got = row.old_log_probs.len();
                let problem = format!("old_log_probs has {got} entries: expected {} or none", end - start);
                return Err(Error::invalid(format!("row {index}"), problem));
            }
        }
        Ok(columns)
    }
}

#[cfg(test)]
mod tests {
    use super::split;
    use temper_proto::TokenSequence;

    /// `(prompt, response)` lengths; rows with equal prompt lengths have equal prompts.
    fn ranges(lengths: &[(usize, usize)], max_tokens: usize) -> Vec<std::ops::Range<usize>> {
        let sequence = |(prompt, response): &(usize, usize)| TokenSequence {
            prompt_token_ids: vec![*prompt as u32; *prompt],
            response_token_ids: vec![0; *response],
            response_mask: vec![1; *response],
        };
        let sequences: Vec<TokenSequence> = lengths.iter().map(sequence).collect();
        split(sequences.iter(), max_tokens)
    }

    #[test]
    fn rows_keep_their_order_and_fill_up_to_the_limit() {
        assert_eq!(ranges(&[(1, 2), (2, 1), (3, 0), (4, 6), (1, 0)], 6), [0..2, 2..3, 3..4, 4..5]);
        assert_eq!(ranges(&[(1, 6)], 6).len(), 1);
    }

    #[test]
    fn a_shared_prompt_counts_once() {
        assert_eq!(ranges(&[(10, 2), (10, 3), (10, 5)], 20).as_slice(), std::slice::from_ref(&(0..3)));
        assert_eq!(ranges(&[(10, 2), (10, 3), (10, 5)], 15), [0..2, 2..3]);
        assert_eq!(ranges(&[(10, 2), (9, 2)], 22), [0..1, 1..2]);
        assert_eq!(ranges(&[], 5), Vec::<std::ops::Range<usize>>::new());
    }

    #[test]
    fn rows_of_a_prompt_stay_together_where_they_fit() {
        assert_eq!(ranges(&[(3, 2), (4, 2), (4, 2)], 12), [0..1, 1..3]);
        assert_eq!(ranges(&[(3, 2), (4, 2), (4, 2), (4, 9)], 12), [0..2, 2..3, 3..4]);
        assert_eq!(ranges(&[(3, 2), (4, 2), (4, 2), (5, 1), (5, 1)], 20).as_slice(), std::slice::from_ref(&(0..5)));
    }
}
