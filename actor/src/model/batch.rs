//! The rows of a training pass, each beginning of several sequences run once, and where they lie in the cache.
//!
//! Sequences that begin alike (the responses of a group to one prompt, the two sides of a preference pair) share the
//! rows of what they have in common: a row's bits depend on what stands at and before its slot, so the rows would be
//! equal. Their block tables share the blocks that hold nothing else; of the block where two sequences part, each has
//! its own, into which the keys and values of the shared rows are written as well.

use super::layer::Rows;
use super::sequence::Part;
use temper_tensor::SeqSpan;

/// Slots in a block of the training cache; the smallest, so that little is written twice.
pub(super) const BLOCK_SIZE: usize = 16;

/// Whole sequences side by side, without padding, and the rows whose outputs are wanted. What a sequence has in common
/// with the beginning of an earlier one (ids and positions) runs once for both.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TrainBatch {
    /// Input id of every row.
    pub(super) token_ids: Vec<u32>,
    /// RoPE position of every row.
    pub(super) positions: Vec<u32>,
    /// The sequences that have rows of their own.
    sequences: Vec<Sequence>,
    /// Rows whose log-probs or values are wanted, one for each target; a row may have several.
    pub target_rows: Vec<u32>,
    /// The id whose log-prob is wanted at each of these rows; empty for values.
    pub target_ids: Vec<u32>,
}

/// One sequence of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sequence {
    /// Row at each of its slots, ascending; the last ones are its own and consecutive.
    rows: Vec<u32>,
    /// Slots whose rows belong to earlier sequences.
    shared: usize,
    /// An earlier sequence with the same rows at these slots.
    parent: usize,
}

impl TrainBatch {
    /// An empty batch.
    pub fn new() -> Self {
        TrainBatch::default()
    }

    /// Number of rows, T.
    pub fn num_rows(&self) -> usize {
        self.token_ids.len()
    }

    /// Number of targets, R.
    pub fn num_targets(&self) -> usize {
        self.target_rows.len()
    }

    /// Append a sequence at positions `0..` and ask for the log-probs of the tokens at `targets` (indices into
    /// `token_ids`, each from 1 up, ascending). What follows the last target cannot reach any of them and is left out;
    /// a sequence without targets adds nothing. Values of the rows before these tokens can be asked for as well.
    ///
    /// # Panics
    /// If a target is 0 or not below the length of the sequence.
    pub fn push_sequence(&mut self, token_ids: &[u32], targets: impl IntoIterator<Item = usize>) {
        let positions: Vec<u32> = (0..token_ids.len() as u32).collect();
        self.push_at(token_ids, &positions, targets);
    }

    /// As [`TrainBatch::push_sequence`], at given positions.
    ///
    /// # Panics
    /// As [`TrainBatch::push_sequence`], and if there is not one position per token.
    pub fn push_at(&mut self, token_ids: &[u32], positions: &[u32], targets: impl IntoIterator<Item = usize>) {
        assert_eq!(token_ids.len(), positions.len(), "one position per token");
        let targets: Vec<usize> = targets.into_iter().collect();
        let num_rows = targets.iter().copied().max().unwrap_or(0);
        let rows = self.push_rows(&token_ids[..num_rows], &positions[..num_rows]);
        for target in targets {
            assert!(target >= 1, "the first token of a sequence has no log-prob");
            self.target_rows.push(rows[target - 1]);
            self.target_ids.push(token_ids[target]);
        }
    }

    /// Append a sequence at given positions and ask for the values at `rows` (indices into `token_ids`, ascending).
    ///
    /// # Panics
    /// If a row is not below the length of the sequence, or there is not one position per token.
    pub fn push_values(&mut self, token_ids: &[u32], positions: &[u32], rows: impl IntoIterator<Item = usize>) {
        assert_eq!(token_ids.len(), positions.len(), "one position per token");
        let batch_rows = self.push_rows(token_ids, positions);
        for row in rows {
            assert!(row < token_ids.len(), "row {row} of a sequence of {}", token_ids.len());
            self.target_rows.push(batch_rows[row]);
        }
    }

    /// Append a sequence; the row at each of its slots.
    fn push_rows(&mut self, token_ids: &[u32], positions: &[u32]) -> Vec<u32> {
        let (parent, shared) = self.longest_beginning(token_ids, positions);
        let mut rows = self.sequences.get(parent).map_or(Vec::new(), |parent| parent.rows[..shared].to_vec());
        let first = self.num_rows();
        self.token_ids.extend_from_slice(&token_ids[shared..]);
        self.positions.extend_from_slice(&positions[shared..]);
        rows.extend(first as u32..self.num_rows() as u32);
        if shared < token_ids.len() {
            self.sequences.push(Sequence { rows: rows.clone(), shared, parent });
        }
        rows
    }

    /// The first of the sequences that have most in common with a new one, and how many slots that is.
    fn longest_beginning(&self, token_ids: &[u32], positions: &[u32]) -> (usize, usize) {
        let (mut parent, mut longest) = (0, 0);
        for (index, sequence) in self.sequences.iter().enumerate() {
            let tokens = sequence.rows.iter().zip(token_ids.iter().zip(positions));
            let same = |(row, (id, position)): &(&u32, (&u32, &u32))| {
                self.token_ids[**row as usize] == **id && self.positions[**row as usize] == **position
            };
            let common = tokens.take_while(same).count();
            if common > longest {
                (parent, longest) = (index, common);
            }
        }
        (parent, longest)
    }
}

impl Sequence {
    fn own_rows(&self) -> usize {
        self.rows.len() - self.shared
    }

    /// First slot of the block that the first own row lies in.
    fn own_blocks_from(&self) -> usize {
        self.shared / BLOCK_SIZE * BLOCK_SIZE
    }
}

/// Block tables of a batch in a cache of its own.
#[derive(Debug)]
pub(super) struct Sequences {
    tables: Vec<Vec<u32>>,
    num_blocks: usize,
}

impl Sequences {
    /// Deal out blocks in order.
    pub fn new(batch: &TrainBatch) -> Self {
        let mut all = Sequences { tables: Vec::with_capacity(batch.sequences.len()), num_blocks: 0 };
        for sequence in &batch.sequences {
            let shared = sequence.shared / BLOCK_SIZE;
            let mut table = all.tables.get(sequence.parent).map_or(Vec::new(), |parent| parent[..shared].to_vec());
            let own = sequence.rows.len().div_ceil(BLOCK_SIZE) - shared;
            table.extend((all.num_blocks..all.num_blocks + own).map(|block| block as u32));
            all.num_blocks += own;
            all.tables.push(table);
        }
        all
    }

    /// Blocks that all sequences need together.
    pub fn num_blocks(&self) -> usize {
        self.num_blocks
    }

    /// What kernels need to know of the sequences of `batch`.
    pub fn lists<'a>(&'a self, batch: &'a TrainBatch) -> SpanLists<'a> {
        let mut lists = SpanLists::default();
        for (sequence, blocks) in batch.sequences.iter().zip(&self.tables) {
            let (row_start, first_slot) = (sequence.rows[sequence.shared] as usize, sequence.shared);
            let span = SeqSpan { row_start, num_rows: sequence.own_rows(), first_slot, blocks };
            lists.spans.push(span);
            lists.appends.push(span);
            lists.prefixes.push(&sequence.rows[..first_slot]);
            let mut first_slot = sequence.own_blocks_from();
            for run in sequence.rows[first_slot..sequence.shared].chunk_by(|a, b| a + 1 == *b) {
                let (row_start, num_rows) = (run[0] as usize, run.len());
                lists.appends.push(SeqSpan { row_start, num_rows, first_slot, blocks });
                first_slot += num_rows;
            }
        }
        lists
    }
}

/// The spans of a batch.
#[derive(Debug, Default)]
pub(super) struct SpanLists<'a> {
    /// Every row in one span, a span for each sequence.
    spans: Vec<SeqSpan<'a>>,
    /// These, and the shared rows that are written into a sequence's own blocks.
    appends: Vec<SeqSpan<'a>>,
    /// Of each sequence, the rows before its own.
    prefixes: Vec<&'a [u32]>,
}

impl SpanLists<'_> {
    /// The rows of `part`, whose batch these lists are of.
    pub fn rows<'a>(&'a self, part: &'a Part<'_>) -> Rows<'a> {
        Rows {
            positions: part.positions,
            spans: &self.spans,
            appends: &self.appends,
            prefixes: &self.prefixes,
            turn: part.turn.as_ref(),
        }
    }
}
