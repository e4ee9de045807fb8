//! What rank 0 tells the others, as bytes: a kind, then little-endian numbers of 32 bits.

use crate::BlockCopy;
use crate::model::StepBatch;
use temper_tensor::{KvCacheSpec, SeqSpan};
use temper_types::ContentHash;

const STILL_HERE: u8 = 0;
const STEP: u8 = 1;
const RELEASE_KV: u8 = 2;
const WEIGHTS: u8 = 3;
const END: u8 = 4;

/// What a rank is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Command {
    /// Compute rows; told as [`StepCommand`].
    Step(Step),
    /// Something else.
    Order(Order),
}

/// What a rank is to do beside steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// Nothing; rank 0 is there.
    StillHere,
    /// Give the memory of the K/V pool back.
    ReleaseKv,
    /// Take the weights that follow.
    Weights(ContentHash),
    /// Follow no longer.
    End,
}

impl Order {
    pub(super) fn encode(self) -> Vec<u8> {
        match self {
            Order::StillHere => vec![STILL_HERE],
            Order::ReleaseKv => vec![RELEASE_KV],
            Order::Weights(hash) => [&[WEIGHTS][..], &hash.0].concat(),
            Order::End => vec![END],
        }
    }
}

/// The rows of one step.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Step {
    /// The weights that compute it.
    pub weights: [u8; 16],
    /// Blocks of the pool, and slots of a block.
    pub pool: (u32, u32),
    /// Blocks that are copied before.
    pub copies: Vec<(u32, u32)>,
    /// Token of each row.
    pub token_ids: Vec<u32>,
    /// Position of each row.
    pub positions: Vec<u32>,
    /// First slot, number of rows and block table of each sequence.
    pub spans: Vec<(u32, u32, Vec<u32>)>,
}

impl Step {
    /// The spans as kernels read them; they cover the rows in order.
    pub(super) fn seq_spans(&self) -> Vec<SeqSpan<'_>> {
        let mut end = 0;
        let spans = self.spans.iter().map(|(first_slot, num_rows, blocks)| {
            let (row_start, num_rows) = (end, *num_rows as usize);
            end += num_rows;
            SeqSpan { row_start, num_rows, first_slot: *first_slot as usize, blocks }
        });
        spans.collect()
    }
}

/// A step as rank 0 tells it, without a copy of its arrays.
pub(crate) struct StepCommand<'a> {
    /// The weights that compute it.
    pub weights: ContentHash,
    /// Shape of rank 0's pool; those of other ranks have as many blocks.
    pub pool: &'a KvCacheSpec,
    /// Blocks that are copied before.
    pub copies: &'a [BlockCopy],
    /// The rows; draws are not told.
    pub batch: StepBatch<'a>,
}

impl StepCommand<'_> {
    pub(super) fn encode(&self) -> Vec<u8> {
        let StepBatch { token_ids, positions, spans, .. } = self.batch;
        let mut out = Writer(vec![STEP]);
        out.0.extend(self.weights.0);
        out.number(self.pool.num_blocks);
        out.number(self.pool.block_size);
        out.number(self.copies.len());
        self.copies.iter().for_each(|copy| out.numbers(&[copy.from, copy.to]));
        out.number(token_ids.len());
        out.numbers(token_ids);
        out.numbers(positions);
        out.number(spans.len());
        for span in spans {
            let num_blocks = (span.first_slot + span.num_rows).div_ceil(self.pool.block_size);
            out.number(span.first_slot);
            out.number(span.num_rows);
            out.number(num_blocks);
            out.numbers(&span.blocks[..num_blocks]);
        }
        out.0
    }
}

impl Command {
    /// Out of bytes; nothing where they say nothing.
    pub(super) fn decode(bytes: &[u8]) -> Option<Command> {
        let (kind, rest) = bytes.split_first()?;
        match (*kind, rest) {
            (STILL_HERE, []) => Some(Command::Order(Order::StillHere)),
            (RELEASE_KV, []) => Some(Command::Order(Order::ReleaseKv)),
            (END, []) => Some(Command::Order(Order::End)),
            (WEIGHTS, hash) => Some(Command::Order(Order::Weights(ContentHash(hash.try_into().ok()?)))),
            (STEP, rest) => decode_step(rest).map(Command::Step),
            _ => None,
        }
    }
}

fn decode_step(bytes: &[u8]) -> Option<Step> {
    let (weights, rest) = bytes.split_first_chunk::<16>()?;
    let (quads, []) = rest.as_chunks::<4>() else { return None };
    let mut numbers = Reader(quads);
    let pool = (numbers.next()?, numbers.next()?);
    let num_copies = numbers.next()?;
    let copies = numbers.take(2 * num_copies as usize)?;
    let num_rows = numbers.next()? as usize;
    let (token_ids, positions) = (numbers.take(num_rows)?, numbers.take(num_rows)?);
    let num_spans = numbers.next()?;
    let mut spans = Vec::new();
    for _ in 0..num_spans {
        let (first_slot, num_rows, num_blocks) = (numbers.next()?, numbers.next()?, numbers.next()?);
        spans.push((first_slot, num_rows, numbers.take(num_blocks as usize)?));
    }
    let covered: u64 = spans.iter().map(|(_, rows, _)| u64::from(*rows)).sum();
    let copies = copies.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
    let is_whole = numbers.0.is_empty() && covered == num_rows as u64;
    is_whole.then_some(Step { weights: *weights, pool, copies, token_ids, positions, spans })
}

struct Writer(Vec<u8>);

impl Writer {
    fn number(&mut self, number: usize) {
        self.numbers(&[number as u32]);
    }

    fn numbers(&mut self, numbers: &[u32]) {
        numbers.iter().for_each(|number| self.0.extend_from_slice(&number.to_le_bytes()));
    }
}

struct Reader<'a>(&'a [[u8; 4]]);

impl Reader<'_> {
    fn next(&mut self) -> Option<u32> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(u32::from_le_bytes(*first))
    }

    fn take(&mut self, len: usize) -> Option<Vec<u32>> {
        let (now, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(now.iter().map(|quad| u32::from_le_bytes(*quad)).collect())
    }
}
