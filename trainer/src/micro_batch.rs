//! Rows of a mini-batch, packed into micro-batches that fit the memory.
//!
//! Rows keep their order and are never split; a micro-batch is closed before the row that would exceed the limit. The
//! split is a function of the lengths alone. Losses do not depend on it; sums of gradients round differently.

use crate::Error;
use std::ops::Range;
use temper_actor::TrainBatch;
use temper_proto::{TokenSequence, TrainRow};

/// Consecutive rows that pass through the model together.
pub(crate) fn split(lengths: &[usize], max_tokens: usize) -> Vec<Range<usize>> {
    let mut batches = Vec::new();
    let (mut start, mut tokens) = (0, 0);
    for (row, length) in lengths.iter().enumerate() {
        if row > start && tokens + length > max_tokens {
            batches.push(start..row);
            (start, tokens) = (row, 0);
        }
        tokens += length;
    }
    if start < lengths.len() {
        batches.push(start..lengths.len());
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

    #[test]
    fn rows_keep_their_order_and_fill_up_to_the_limit() {
        assert_eq!(split(&[3, 3, 3, 10, 1], 6), [0..2, 2..3, 3..4, 4..5]);
        assert_eq!(split(&[], 6), Vec::<std::ops::Range<usize>>::new());
        assert_eq!(split(&[7], 6).len(), 1);
    }
}
