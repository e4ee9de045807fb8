//! A pass whose rows are divided over the ranks of a group: Ulysses sequence parallelism.
//!
//! Every rank of a group is given the same batch. The residual stream, norms, projections, feed-forward blocks and the
//! head run over a rank's own consecutive rows. Attention runs over all rows for a rank's own heads: before it rows
//! turn into heads, after it heads into rows, and so in the backward. A rank's gradients are those of its own rows.
//!
//! Knows nothing of how ranks talk: that is a [`SequenceExchange`].
//!
//! # Source
//! Jacobs et al., "DeepSpeed Ulysses", 2023 (arXiv:2309.14509). Departure: where there are more ranks than key/value
//! heads, neighbours compute with the same one, and its gradient is the sum of theirs, in rank order.

use super::arena::{GradBuffers, SavedLayer};
use super::batch::TrainBatch;
use super::layer::Rows;
use super::packed::PackedPolicy;
use super::scratch::GrowBuffer;
use crate::ModelConfig;
use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;
use temper_tensor::{AttentionGrad, AttnShape, Device, KvCache, TokenStats, View, ViewMut};

/// How the ranks of a group talk. All of them call the same functions in the same order. A pass cannot fail halfway:
/// where a rank is lost, the exchange remembers it and gives zeros from then on, and whoever made the exchange asks it
/// once the pass is over.
pub trait SequenceExchange: std::fmt::Debug + Send + Sync {
    /// This rank's number in the group.
    fn rank(&self) -> usize;
    /// Number of ranks in the group, at least 1.
    fn size(&self) -> usize;
    /// Give `parts[r]` to rank r; what every rank gave this one, in rank order: `lens[r]` numbers of rank r.
    fn all_to_all(&self, parts: Vec<Vec<f32>>, lens: &[usize]) -> Vec<Vec<f32>>;
    /// What every rank gave, in rank order: `lens[r]` numbers of rank r.
    fn all_gather(&self, own: &[f64], lens: &[usize]) -> Vec<Vec<f64>>;
}

/// Why the heads of a model cannot be divided over groups of `size` ranks; nothing where they can.
pub fn sequence_parallel_problem(config: &ModelConfig, size: usize) -> Option<String> {
    let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
    let fits =
        size > 0 && heads.is_multiple_of(size) && (kv_heads.is_multiple_of(size) || size.is_multiple_of(kv_heads));
    (!fits).then(|| {
        format!(
            "{size} ranks cannot divide {heads} query heads and {kv_heads} key/value heads: expected a divisor of \
             {heads} that divides {kv_heads} or is a multiple of it"
        )
    })
}

/// Widths of a row that turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Width {
    /// Queries, keys and values, `(H + 2G) K`.
    Fused,
    /// Outputs of attention, `H K`.
    Heads,
}

impl Width {
    /// Columns of a whole row that rank `rank` of `size` has, ascending.
    fn columns(self, shape: AttnShape, (rank, size): (usize, usize)) -> Vec<Range<usize>> {
        let (k, heads, kv_heads) = (shape.head_dim, shape.num_heads, shape.num_kv_heads);
        let queries = rank * heads / size * k..(rank + 1) * heads / size * k;
        if self == Width::Heads {
            return vec![queries];
        }
        let first = rank * kv_heads / size;
        let own = (kv_heads / size).max(1);
        let part = |start: usize| (start + first) * k..(start + first + own) * k;
        vec![queries, part(heads), part(heads + kv_heads)]
    }

    fn of(self, shape: AttnShape) -> usize {
        match self {
            Width::Fused => shape.qkv_dim(),
            Width::Heads => shape.out_dim(),
        }
    }
}

/// Activations of all rows for a rank's own heads.
#[derive(Debug, Default)]
pub(super) struct Turned {
    /// Fused rows, `[T, (H + 2G) K / s]`.
    pub qkv: GrowBuffer,
    /// Outputs of attention, `[T, H K / s]`.
    pub attn: GrowBuffer,
}

impl Turned {
    /// Buffers for the rows of `turn`.
    pub fn reserve(&mut self, dev: &dyn Device, turn: &Turn, shape: AttnShape) {
        let own = turn.own_shape(shape);
        self.qkv.reserve(dev, turn.num_rows() * own.qkv_dim());
        self.attn.reserve(dev, turn.num_rows() * own.out_dim());
    }

    /// Elements that are allocated.
    pub fn len(&self) -> usize {
        self.qkv.capacity() + self.attn.capacity()
    }
}

/// How the rows, heads and targets of one pass lie on the ranks of a group.
#[derive(Debug)]
pub(super) struct Turn {
    exchange: Arc<dyn SequenceExchange>,
    /// Rows of every rank, consecutive, in rank order.
    rows: Vec<Range<usize>>,
    /// Of every rank, the numbers of the targets at its rows, ascending.
    targets: Vec<Vec<usize>>,
}

impl Turn {
    fn new(batch: &TrainBatch, exchange: &Arc<dyn SequenceExchange>) -> Self {
        let (size, t) = (exchange.size(), batch.num_rows());
        let rows: Vec<Range<usize>> = (0..size).map(|rank| t * rank / size..t * (rank + 1) / size).collect();
        let mut targets = vec![Vec::new(); size];
        for (target, row) in batch.target_rows.iter().enumerate() {
            targets[rows.partition_point(|range| range.end <= *row as usize)].push(target);
        }
        Turn { exchange: Arc::clone(exchange), rows, targets }
    }

    /// T.
    pub fn num_rows(&self) -> usize {
        self.rows.last().map_or(0, |rows| rows.end)
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.exchange.size()
    }

    fn own_rows(&self) -> Range<usize> {
        self.rows[self.exchange.rank()].clone()
    }

    fn own_targets(&self) -> &[usize] {
        &self.targets[self.exchange.rank()]
    }

    fn num_targets(&self) -> usize {
        self.targets.iter().map(Vec::len).sum()
    }

    /// Shape of attention over this rank's heads.
    pub fn own_shape(&self, shape: AttnShape) -> AttnShape {
        let size = self.size();
        AttnShape { num_heads: shape.num_heads / size, num_kv_heads: (shape.num_kv_heads / size).max(1), ..shape }
    }

    fn columns(&self, width: Width, shape: AttnShape) -> Vec<Vec<Range<usize>>> {
        let size = self.size();
        (0..size).map(|rank| width.columns(shape, (rank, size))).collect()
    }

    /// Own rows with all heads become all rows with own heads.
    fn to_heads(&self, dev: &dyn Device, from: View<'_>, (width, shape): (Width, AttnShape), to: ViewMut<'_>) {
        let mut rows = vec![0.0; from.len()];
        dev.read(from, &mut rows);
        let pick = |columns: &Vec<Range<usize>>| {
            let mut part = Vec::with_capacity(self.own_rows().len() * total(columns));
            for row in rows.chunks_exact(width.of(shape)) {
                columns.iter().for_each(|column| part.extend_from_slice(&row[column.clone()]));
            }
            part
        };
        let columns = self.columns(width, shape);
        let own_width = total(&columns[self.exchange.rank()]);
        let lens: Vec<usize> = self.rows.iter().map(|rows| rows.len() * own_width).collect();
        dev.write(to, &self.exchange.all_to_all(columns.iter().map(pick).collect(), &lens).concat());
    }

    /// All rows with own heads become own rows with all heads. What several ranks have of one key/value head adds up.
    fn to_rows(&self, dev: &dyn Device, from: View<'_>, (width, shape): (Width, AttnShape), to: ViewMut<'_>) {
        let mut heads = vec![0.0; from.len()];
        dev.read(from, &mut heads);
        let columns = self.columns(width, shape);
        let own_width = total(&columns[self.exchange.rank()]);
        let parts = self.rows.iter().map(|rows| heads[rows.start * own_width..rows.end * own_width].to_vec());
        let lens: Vec<usize> = columns.iter().map(|columns| self.own_rows().len() * total(columns)).collect();
        let parts = self.exchange.all_to_all(parts.collect(), &lens);
        let mut rows = vec![0.0; to.len()];
        for (rank, part) in parts.iter().enumerate() {
            let before = rank.checked_sub(1).map_or(&[][..], |rank| &columns[rank]);
            let lines = rows.chunks_exact_mut(width.of(shape)).zip(part.chunks_exact(total(&columns[rank])));
            lines.for_each(|(row, values)| put(row, values, (&columns[rank], before)));
        }
        dev.write(to, &rows);
    }

    /// The attention of own rows: their fused projections, rotated, in; its outputs out.
    pub fn attend(
        &self,
        dev: &dyn Device,
        (qkv, shape): (View<'_>, AttnShape),
        rows: Rows<'_>,
        (cache, layer): (&mut KvCache, usize),
        (attn, lse, turned): (ViewMut<'_>, Option<ViewMut<'_>>, &mut Turned),
    ) {
        let (own, t) = (self.own_shape(shape), self.num_rows());
        self.to_heads(dev, qkv, (Width::Fused, shape), turned.qkv.view_mut(t * own.qkv_dim()));
        let qkv = turned.qkv.view(t * own.qkv_dim());
        dev.kv_append(qkv, own, rows.appends, cache, layer);
        dev.attention(qkv, (cache, layer), own, rows.spans, (turned.attn.view_mut(t * own.out_dim()), lse));
        self.to_rows(dev, turned.attn.view(t * own.out_dim()), (Width::Heads, shape), attn);
    }

    /// From the gradient of attention's outputs at own rows, in `grads.attn`, to that of the rotated projections, which
    /// is left in `grads.qkv`.
    pub fn attend_backward(
        &self,
        (dev, shape): (&dyn Device, AttnShape),
        rows: Rows<'_>,
        (cache, layer): (&KvCache, usize),
        (saved, grads): (&SavedLayer, &mut GradBuffers),
    ) {
        let (own, t) = (self.own_shape(shape), self.num_rows());
        let (qkv_len, attn_len) = (t * own.qkv_dim(), t * own.out_dim());
        let dattn = grads.attn.view(rows.len() * shape.out_dim());
        self.to_heads(dev, dattn, (Width::Heads, shape), grads.turned.attn.view_mut(attn_len));
        let args = AttentionGrad {
            qkv: saved.turned.qkv.view(qkv_len),
            out: saved.turned.attn.view(attn_len),
            lse: saved.lse.view(t * own.num_heads),
            dout: grads.turned.attn.view(attn_len),
            cache,
            layer,
            spans: rows.spans,
            prefixes: rows.prefixes,
            shape: own,
        };
        dev.attention_grad(args, grads.turned.qkv.view_mut(qkv_len));
        let dqkv = grads.qkv.view_mut(rows.len() * shape.qkv_dim());
        self.to_rows(dev, grads.turned.qkv.view(qkv_len), (Width::Fused, shape), dqkv);
    }
}

impl PackedPolicy {
    /// Heads of every layer; windows may differ. Nothing where there is no layer.
    pub(super) fn attn_shape(&self) -> Option<AttnShape> {
        self.layers.first().map(|layer| layer.shape)
    }
}

fn total(columns: &[Range<usize>]) -> usize {
    columns.iter().map(ExactSizeIterator::len).sum()
}

/// Lay a rank's values into its columns of a row; what the rank before has of them too adds up.
fn put(row: &mut [f32], mut values: &[f32], (columns, before): (&[Range<usize>], &[Range<usize>])) {
    for column in columns {
        let (part, rest) = values.split_at(column.len());
        let place = &mut row[column.clone()];
        match before.contains(column) {
            true => place.iter_mut().zip(part).for_each(|(sum, x)| *sum += x),
            false => place.copy_from_slice(part),
        }
        values = rest;
    }
}

/// The rows and targets of a batch that this rank runs: all of them, or its share where it has a group.
#[derive(Debug)]
pub(super) struct Part<'a> {
    /// Input id of every row.
    pub token_ids: &'a [u32],
    /// RoPE position of every row.
    pub positions: &'a [u32],
    /// Rows of the targets, counted within the part.
    pub target_rows: Cow<'a, [u32]>,
    /// Ids of the targets; empty for values.
    pub target_ids: Cow<'a, [u32]>,
    /// The group, where there is one.
    pub turn: Option<Turn>,
}

impl<'a> Part<'a> {
    /// This rank's part of a batch.
    pub fn new(batch: &'a TrainBatch, exchange: Option<&Arc<dyn SequenceExchange>>) -> Self {
        let Some(turn) = exchange.map(|exchange| Turn::new(batch, exchange)) else {
            return Part {
                token_ids: &batch.token_ids,
                positions: &batch.positions,
                target_rows: Cow::Borrowed(&batch.target_rows),
                target_ids: Cow::Borrowed(&batch.target_ids),
                turn: None,
            };
        };
        let (rows, own) = (turn.own_rows(), turn.own_targets());
        let target_rows = own.iter().map(|target| batch.target_rows[*target] - rows.start as u32).collect();
        let target_ids = own.iter().filter_map(|target| batch.target_ids.get(*target).copied()).collect();
        Part {
            token_ids: &batch.token_ids[rows.clone()],
            positions: &batch.positions[rows],
            target_rows: Cow::Owned(target_rows),
            target_ids: Cow::Owned(target_ids),
            turn: Some(turn),
        }
    }

    /// Number of rows of the part.
    pub fn num_rows(&self) -> usize {
        self.token_ids.len()
    }

    /// Number of targets of the part.
    pub fn num_targets(&self) -> usize {
        self.target_rows.len()
    }

    /// Number of targets of the batch, which several ranks may have together.
    pub fn num_all_targets(&self) -> usize {
        self.turn.as_ref().map_or(self.num_targets(), Turn::num_targets)
    }

    /// The numbers of the part's targets, out of `width` for each target of the batch.
    pub fn pick<'v, T: Copy>(&self, all: &'v [T], width: usize) -> Cow<'v, [T]> {
        let Some(turn) = self.turn.as_ref().filter(|_| !all.is_empty()) else { return Cow::Borrowed(all) };
        let own = turn.own_targets().iter().flat_map(|target| &all[target * width..(target + 1) * width]);
        Cow::Owned(own.copied().collect())
    }

    /// `width` numbers for each target of the batch, of which `own` are the part's.
    pub fn join(&self, own: Vec<f64>, width: usize) -> Vec<f64> {
        let Some(turn) = &self.turn else { return own };
        let lens: Vec<usize> = turn.targets.iter().map(|targets| targets.len() * width).collect();
        let lists = turn.exchange.all_gather(&own, &lens);
        let mut all = vec![0.0; turn.num_targets() * width];
        for (targets, list) in turn.targets.iter().zip(&lists) {
            for (target, values) in targets.iter().zip(list.chunks_exact(width)) {
                all[target * width..(target + 1) * width].copy_from_slice(values);
            }
        }
        all
    }

    /// As [`Part::join`], of f32.
    pub fn join_f32(&self, own: Vec<f32>, width: usize) -> Vec<f32> {
        match self.turn {
            None => own,
            Some(_) => narrow(self.join(own.iter().map(|x| f64::from(*x)).collect(), width)),
        }
    }

    /// What the head says of all targets of the batch.
    pub fn join_stats(&self, own: TokenStats) -> TokenStats {
        if self.turn.is_none() {
            return own;
        }
        let columns = own.log_probs.iter().zip(&own.entropies).zip(&own.sum_squares);
        let flat = columns.flat_map(|((log_prob, entropy), squares)| [*log_prob, *entropy, *squares].map(f64::from));
        let all = self.join(flat.collect(), 3);
        let column = |index: usize| narrow(all.iter().skip(index).step_by(3).copied().collect());
        TokenStats { log_probs: column(0), entropies: column(1), sum_squares: column(2) }
    }
}

fn narrow(values: Vec<f64>) -> Vec<f32> {
    values.into_iter().map(|x| x as f32).collect()
}
