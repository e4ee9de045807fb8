//! A model without numbers: its logits are a hash of the tokens that it reads back through block tables.
//!
//! A wrong block, a missed copy, an overwritten slot or one that other weights stored changes the hash and thereby
//! every later token, so equality of responses proves the paging. [`respond`] computes the same response without any
//! engine.

use crate::model::{Model, ModelLimits, StepBatch, StepOutput};
use crate::{BlockCopy, Error};
use temper_proto::GroupRequest;
use temper_tensor::{SampleRow, Sampled};
use temper_types::{DType, PolicyVersion, uniform53};

pub(crate) const VOCAB: u32 = 40;

#[derive(Debug)]
pub(crate) struct FakeModel {
    block_size: usize,
    memory: Vec<u32>,
    pub version: PolicyVersion,
    pub fails: bool,
    /// One more step that fails, by its number, failed ones counted.
    pub failing_step: Option<usize>,
    num_tried: usize,
    /// Whether its weights are no numbers.
    pub is_broken: bool,
    /// Ids that are said to be masked.
    pub masked: Vec<u32>,
    /// Whether the pool has memory.
    is_awake: bool,
    /// Rows of each step.
    pub rows: Vec<usize>,
}

impl FakeModel {
    pub fn new(num_blocks: usize, block_size: usize) -> Self {
        let memory = vec![u32::MAX; num_blocks * block_size];
        FakeModel {
            block_size,
            memory,
            version: PolicyVersion::default(),
            fails: false,
            failing_step: None,
            is_broken: false,
            num_tried: 0,
            masked: Vec::new(),
            is_awake: false,
            rows: Vec::new(),
        }
    }
}

/// What the weights store of a token.
fn stored(token: u32, version: PolicyVersion) -> u32 {
    token + VOCAB * version.number as u32
}

fn mix(hash: u64, token: u32) -> u64 {
    let h = (hash ^ u64::from(token)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    h ^ (h >> 29)
}

fn sample(hash: u64, draw: &SampleRow<'_>) -> Sampled {
    let seen = draw.seen.iter().fold(hash, |h, &(id, count)| mix(mix(h, id), count));
    let seen = draw.logit_bias.iter().fold(seen, |h, &(id, bias)| mix(mix(h, id), bias.to_bits()));
    let shift = (seen >> 40) as f64 / (1u64 << 24) as f64;
    let at = (draw.uniform + shift).fract() * f64::from(VOCAB);
    let mut token_id = at as u32 % VOCAB;
    let is_allowed = |id: &u32| draw.allowed_ids.is_empty() || draw.allowed_ids.contains(id);
    while draw.banned_ids.contains(&token_id) || !is_allowed(&token_id) {
        token_id = (token_id + 1) % VOCAB;
    }
    let log_prob = -((mix(seen, token_id) >> 41) as f32) / (1u32 << 20) as f32;
    Sampled { token_id, log_prob, sampled_log_prob: log_prob / 2.0, surviving_mass: 0.5 }
}

impl Model for FakeModel {
    fn limits(&self) -> ModelLimits {
        ModelLimits {
            vocab_size: VOCAB as usize,
            num_drawable_ids: VOCAB as usize - self.masked.len(),
            max_positions: 512,
            kv_dtype: DType::F32,
        }
    }

    fn is_masked(&self, id: u32) -> bool {
        self.masked.contains(&id)
    }

    fn version(&self) -> Result<PolicyVersion, Error> {
        Ok(self.version)
    }

    fn copy_blocks(&mut self, copies: &[BlockCopy]) {
        for copy in copies {
            let (from, to) = (copy.from as usize * self.block_size, copy.to as usize * self.block_size);
            self.memory.copy_within(from..from + self.block_size, to);
        }
    }

    fn step(&mut self, batch: StepBatch<'_>, output: &mut StepOutput) -> Result<(), Error> {
        self.num_tried += 1;
        if self.fails || self.failing_step == Some(self.num_tried) {
            return Err(Error::Model("told to fail".to_owned()));
        }
        let place = |blocks: &[u32], slot: usize| {
            blocks[slot / self.block_size] as usize * self.block_size + slot % self.block_size
        };
        let mut row = 0;
        for span in batch.spans {
            assert_eq!(span.row_start, row, "spans cover the rows in order");
            for offset in 0..span.num_rows {
                assert_eq!(batch.positions[row] as usize, span.first_slot + offset);
                self.memory[place(span.blocks, span.first_slot + offset)] = stored(batch.token_ids[row], self.version);
                row += 1;
            }
        }
        assert_eq!(row, batch.token_ids.len());
        self.rows.push(row);
        self.is_awake = true;
        let draw = |(&row, draw): (&u32, &SampleRow<'_>)| {
            let row = row as usize;
            let span = batch.spans.iter().rfind(|span| span.row_start <= row).expect("a span covers the row");
            let last = span.first_slot + row - span.row_start;
            sample((0..=last).fold(7, |h, slot| mix(h, self.memory[place(span.blocks, slot)])), draw)
        };
        let mut sampled: Vec<Sampled> = batch.draw_rows.iter().zip(batch.draws).map(draw).collect();
        if self.is_broken {
            sampled.iter_mut().for_each(|token| token.log_prob = f32::NAN);
        }
        *output = StepOutput { version: self.version, sampled };
        Ok(())
    }

    /// What stood in the pool reads as nonsense from now on.
    fn release_kv(&mut self) -> usize {
        let had_memory = std::mem::replace(&mut self.is_awake, false);
        self.memory.fill(u32::MAX);
        if had_memory { size_of_val(&self.memory[..]) } else { 0 }
    }

    fn draw_again(&mut self, _: &[u32], _: &[SampleRow<'_>]) -> Result<Vec<Sampled>, Error> {
        Err(Error::Model("a model without numbers has no most likely token".to_owned()))
    }
}

/// The first `max_new_tokens` tokens and log-probs of a sample, stop rules and penalties left out.
pub(crate) fn respond(request: &GroupRequest, sample_index: usize) -> (Vec<u32>, Vec<f32>) {
    respond_under(request, sample_index, PolicyVersion::default())
}

/// The same under the weights of `version`.
pub(crate) fn respond_under(
    request: &GroupRequest,
    sample_index: usize,
    version: PolicyVersion,
) -> (Vec<u32>, Vec<f32>) {
    respond_behind(request, sample_index, &[], |_| version)
}

/// How a sample goes on behind the tokens `begun`, where the weights of `version_at` stored K/V of a slot.
pub(crate) fn respond_behind(
    request: &GroupRequest,
    sample_index: usize,
    begun: &[u32],
    version_at: impl Fn(usize) -> PolicyVersion,
) -> (Vec<u32>, Vec<f32>) {
    let mut history = [&request.prompt_token_ids, begun].concat();
    let mut log_probs = Vec::new();
    for _ in begun.len()..request.sampling.max_new_tokens as usize {
        let row = SampleRow::plain(1.0, uniform53(request.seeds[sample_index], history.len() as u64));
        let read = history.iter().enumerate().fold(7, |h, (slot, &token)| mix(h, stored(token, version_at(slot))));
        let drawn = sample(read, &row);
        history.push(drawn.token_id);
        log_probs.push(drawn.log_prob);
    }
    (history.split_off(request.prompt_token_ids.len() + begun.len()), log_probs)
}
