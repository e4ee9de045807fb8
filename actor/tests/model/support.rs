//! Fixtures, devices and drivers shared by the tests.

use serde_json::Value;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;
use temper_actor::{
    Batch, CheckpointReader, ModelConfig, PackedPolicy, ParamStore, PartialSums, TrainBatch, Workspace,
};
use temper_tensor::{CpuConfig, CpuDevice, DType, Device, SeqSpan, TokenStats};

/// A device with `num_threads` threads.
pub fn device(num_threads: usize) -> Arc<dyn Device> {
    Arc::new(CpuDevice::new(CpuConfig { num_threads, ..CpuConfig::default() }))
}

/// A fixture: a tiny model and what transformers computed with it.
pub struct Fixture {
    pub name: &'static str,
    pub dev: Arc<dyn Device>,
    pub params: ParamStore,
    pub policy: PackedPolicy,
    pub reference: Value,
}

impl Fixture {
    pub fn load(name: &'static str) -> Self {
        let dir = fixture_dir(name);
        let config = ModelConfig::load(&dir).unwrap();
        let dev = device(2);
        let reader = CheckpointReader::open(&dir).unwrap();
        let params = ParamStore::load(&*dev, &config, &reader).unwrap();
        let policy = PackedPolicy::new(&dev, &params, &config, DType::F32);
        let text = std::fs::read_to_string(dir.join("reference.json")).unwrap();
        Fixture { name, dev, params, policy, reference: serde_json::from_str(&text).unwrap() }
    }

    pub fn cases(&self) -> Vec<Case> {
        let cases = self.reference["cases"].as_array().unwrap();
        cases
            .iter()
            .map(|case| Case { label: format!("{}/{}", self.name, text(&case["name"])), json: case.clone() })
            .collect()
    }
}

pub fn fixture_dir(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// One batch of a fixture.
pub struct Case {
    pub label: String,
    pub json: Value,
}

/// One sequence of a case, without its padding.
pub struct Row {
    /// Column of the first token that is no padding.
    pub offset: usize,
    pub token_ids: Vec<u32>,
    pub positions: Vec<u32>,
}

impl Case {
    /// The sequences; padding is dropped and positions are kept.
    pub fn rows(&self) -> Vec<Row> {
        let masks = self.json["attention_mask"].as_array().unwrap();
        let row = |(index, mask): (usize, &Value)| {
            let mask = ids(mask);
            let keep = |key: &str| -> Vec<u32> {
                let all = ids(&self.json[key][index]);
                all.into_iter().zip(&mask).filter(|(_, m)| **m == 1).map(|(x, _)| x).collect()
            };
            let offset = mask.iter().position(|m| *m == 1).unwrap();
            Row { offset, token_ids: keep("input_ids"), positions: keep("position_ids") }
        };
        masks.iter().enumerate().map(row).collect()
    }

    /// A batch that asks for the log-prob of every token but the first of each sequence.
    pub fn log_prob_batch(&self) -> TrainBatch {
        let mut batch = TrainBatch::new();
        for row in self.rows() {
            batch.push_at(&row.token_ids, &row.positions, 1..row.token_ids.len());
        }
        batch
    }

    /// Reference numbers `json[key][sequence][column]` at the targets of [`Case::log_prob_batch`], which stand `shift`
    /// columns before the target token.
    pub fn at_targets(&self, key: &str, shift: usize) -> Vec<f64> {
        let mut out = Vec::new();
        for (index, row) in self.rows().iter().enumerate() {
            let all = numbers(&self.json[key][index]);
            out.extend((1..row.token_ids.len()).map(|t| all[row.offset + t - shift]));
        }
        out
    }
}

impl Case {
    /// Which targets of [`Case::log_prob_batch`] carry a label.
    pub fn has_label(&self) -> Vec<bool> {
        self.at_targets("labels", 0).into_iter().map(|label| label != -100.0).collect()
    }
}

pub fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

pub fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
}

pub fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

/// Fail unless `|got - want| <= tolerance` everywhere.
pub fn assert_close(label: &str, got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{label}: number of values");
    for (index, (got, want)) in got.iter().zip(want).enumerate() {
        let gap = (f64::from(*got) - want).abs();
        assert!(gap <= tolerance, "{label}[{index}]: got {got}, want {want}, off by {gap:.2e} > {tolerance:.0e}");
    }
}

/// Ranks that are threads, each with a channel to every one.
pub struct Sums {
    to: Vec<Sender<Vec<f32>>>,
    from: Vec<Receiver<Vec<f32>>>,
    /// In which order the ranks' sums are handed on.
    order: Vec<usize>,
}

impl Sums {
    /// One for each of as many ranks as `order` names.
    pub fn connect(order: &[usize]) -> Vec<Sums> {
        let mut all: Vec<Sums> =
            order.iter().map(|_| Sums { to: Vec::new(), from: Vec::new(), order: order.to_vec() }).collect();
        for sender in 0..order.len() {
            for receiver in 0..order.len() {
                let (to, from) = channel();
                all[sender].to.push(to);
                all[receiver].from.push(from);
            }
        }
        all
    }
}

impl PartialSums for Sums {
    type Error = String;

    fn exchange(&mut self, own: &[f32]) -> Result<Vec<Vec<f32>>, String> {
        self.to.iter().try_for_each(|to| to.send(own.to_vec())).map_err(|e| e.to_string())?;
        let take = |from: &Receiver<Vec<f32>>| from.recv_timeout(Duration::from_secs(60)).map_err(|e| e.to_string());
        let all = self.from.iter().map(take).collect::<Result<Vec<_>, _>>()?;
        Ok(self.order.iter().map(|rank| all[*rank].clone()).collect())
    }
}

/// Sequences in a paged cache whose blocks are dealt out in turn, so that block tables are neither ordered nor
/// contiguous.
pub struct Paged<'a> {
    pub policy: &'a PackedPolicy,
    pub cache: temper_tensor::KvCache,
    pub workspace: Workspace,
    /// The other ranks, where the policy is a rank's part.
    pub ranks: Option<Sums>,
    tables: Vec<Vec<u32>>,
    filled: Vec<usize>,
}

impl<'a> Paged<'a> {
    /// Room for `num_sequences` of up to `capacity` tokens.
    pub fn new(policy: &'a PackedPolicy, num_sequences: usize, capacity: usize, block_size: usize) -> Self {
        let per_sequence = capacity.div_ceil(block_size);
        let num_blocks = num_sequences * per_sequence;
        let table = |s: usize| (0..per_sequence).rev().map(|b| (b * num_sequences + s) as u32).collect();
        Paged {
            policy,
            cache: policy.device().kv_cache(policy.kv_spec(num_blocks, block_size)),
            workspace: Workspace::new(),
            ranks: None,
            tables: (0..num_sequences).map(table).collect(),
            filled: vec![0; num_sequences],
        }
    }

    /// Run the next tokens of some sequences `(sequence, tokens)` as one batch; row order is that of `chunks`.
    pub fn step(&mut self, chunks: &[(usize, &[u32])]) {
        let (mut token_ids, mut positions, mut spans) = (Vec::new(), Vec::new(), Vec::new());
        for (sequence, tokens) in chunks {
            let first_slot = self.filled[*sequence];
            let blocks = &self.tables[*sequence];
            spans.push(SeqSpan { row_start: token_ids.len(), num_rows: tokens.len(), first_slot, blocks });
            positions.extend((first_slot..first_slot + tokens.len()).map(|p| p as u32));
            token_ids.extend_from_slice(tokens);
            self.filled[*sequence] += tokens.len();
        }
        let batch = Batch { token_ids: &token_ids, positions: &positions, spans: &spans };
        match &mut self.ranks {
            None => self.policy.forward(&batch, &mut self.cache, &mut self.workspace),
            Some(ranks) => {
                self.policy.forward_part(&batch, &mut self.cache, &mut self.workspace, ranks).expect("all ranks run")
            }
        };
    }

    /// Log-probs of every token but the first of every sequence, fed in chunks of `chunk(sequence, step)` tokens.
    pub fn log_probs(&mut self, sequences: &[Vec<u32>], chunk: impl Fn(usize, usize) -> usize) -> Vec<TokenStats> {
        let mut out = vec![TokenStats::default(); sequences.len()];
        for step in 0.. {
            let (mut chunks, mut rows, mut targets) = (Vec::new(), Vec::new(), Vec::new());
            let mut owners = Vec::new();
            let mut row = 0;
            for (index, tokens) in sequences.iter().enumerate() {
                let start = self.filled[index];
                let end = (start + chunk(index, step)).min(tokens.len() - 1);
                if start < end {
                    chunks.push((index, &tokens[start..end]));
                    rows.extend((row..row + end - start).map(|r| r as u32));
                    targets.extend_from_slice(&tokens[start + 1..=end]);
                    owners.extend(std::iter::repeat_n(index, end - start));
                    row += end - start;
                }
            }
            if chunks.is_empty() {
                return out;
            }
            self.step(&chunks);
            if self.policy.part().is_some_and(|part| part.rank() > 0) {
                continue;
            }
            let stats = self.policy.log_probs_of(&mut self.workspace, (&rows, &targets), 1.0);
            for (i, owner) in owners.into_iter().enumerate() {
                out[owner].log_probs.push(stats.log_probs[i]);
                out[owner].entropies.push(stats.entropies[i]);
                out[owner].sum_squares.push(stats.sum_squares[i]);
            }
        }
        out
    }
}
