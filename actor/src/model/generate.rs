//! A step of generation: rows of many sequences through all layers, and one drawn token per chosen row.

use super::layer::{AttendBuffers, Rows};
use super::packed::PackedPolicy;
use super::part_forward::SumBuffers;
use super::scratch::GrowBuffer;
use super::sequence::Turned;
use temper_tensor::{KvCache, LmHead, SampleRow, Sampled, SeqSpan, TokenStats, View};

/// Rows of one step, of any mix of sequences: decodes (one row), chunks of prompts, drafts to verify.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// Input id of each row; every id is below the vocabulary size.
    pub token_ids: &'a [u32],
    /// RoPE position of each row; every position is below `max_position_embeddings`.
    pub positions: &'a [u32],
    /// Which rows belong to which sequence. Every row is in exactly one span, and a sequence is in at most one.
    pub spans: &'a [SeqSpan<'a>],
}

/// Buffers of one pass, which grow to the largest batch seen and are then reused.
#[derive(Debug, Default)]
pub struct Workspace {
    /// Number of rows of the last pass.
    rows: usize,
    /// Residual stream, `[T, D]`.
    pub(super) x: GrowBuffer,
    /// Input of the projections after a norm, `[T, D]`.
    pub(super) normed: GrowBuffer,
    /// Fused projections, `[T, (H + 2G) K]`.
    pub(super) qkv: GrowBuffer,
    /// Their normed copy, where the model norms heads.
    pub(super) heads: GrowBuffer,
    /// Attention output, `[T, H K]`.
    pub(super) attn: GrowBuffer,
    /// Gate and up projections, `[T, 2F]`.
    pub(super) gate_up: GrowBuffer,
    /// `silu(gate) * up`, `[T, F]`.
    pub(super) act: GrowBuffer,
    /// All rows for own heads, where rows are divided over a group.
    pub(super) turned: Turned,
    /// What tensor-parallel ranks sum.
    pub(super) sums: SumBuffers,
    /// Final-normed rows, `[T, D]`.
    hidden: GrowBuffer,
    /// Chosen rows of `hidden`.
    picked: GrowBuffer,
}

impl Workspace {
    /// An empty workspace; it takes memory at its first pass.
    pub fn new() -> Self {
        Workspace::default()
    }

    /// Elements that are allocated.
    pub(super) fn len(&self) -> usize {
        let own = [&self.x, &self.normed, &self.qkv, &self.heads, &self.attn, &self.gate_up, &self.act];
        let all = own.into_iter().chain([&self.hidden, &self.picked]);
        all.map(GrowBuffer::capacity).sum::<usize>() + self.turned.len()
    }

    /// Reserve what every kind of pass over `rows` rows needs.
    pub(super) fn reserve(&mut self, policy: &PackedPolicy, rows: usize) {
        let (dev, dims) = (&*policy.dev, policy.dims);
        self.x.reserve(dev, rows * dims.model);
        self.normed.reserve(dev, rows * dims.model);
        self.qkv.reserve(dev, rows * dims.qkv);
        self.heads.reserve(dev, rows * dims.normed_heads());
        self.attn.reserve(dev, rows * dims.attn);
        self.gate_up.reserve(dev, rows * 2 * dims.ffn);
        self.act.reserve(dev, rows * dims.ffn);
    }
}

impl PackedPolicy {
    /// Run all layers over the rows of a step, append their keys and values to the cache, and return the final-normed
    /// hidden rows, `[T, D]`, in the order of the batch. Allocates only where the batch is the largest so far.
    ///
    /// # Panics
    /// If ids, positions and spans disagree in length, or leave the vocabulary, the positions or the cache, or this is
    /// a tensor-parallel rank's part.
    pub fn forward<'w>(&self, batch: &Batch<'_>, cache: &mut KvCache, workspace: &'w mut Workspace) -> View<'w> {
        self.begin_rows(batch, workspace);
        let rows =
            Rows { positions: batch.positions, spans: batch.spans, appends: batch.spans, prefixes: &[], turn: None };
        for index in 0..self.layers.len() {
            self.run_layer(index, rows, (cache, index), workspace);
        }
        self.finish_rows(rows.len(), workspace)
    }

    /// Make room for a batch, and begin the residual stream.
    pub(super) fn begin_rows(&self, batch: &Batch<'_>, workspace: &mut Workspace) {
        let (dev, t, d) = (&*self.dev, batch.token_ids.len(), self.dims.model);
        assert_eq!(batch.positions.len(), t, "one position per row");
        workspace.reserve(self, t);
        workspace.hidden.reserve(dev, t * d);
        workspace.rows = t;
        dev.embed(batch.token_ids, self.embed.all(), self.format.dtype, workspace.x.view_mut(t * d));
    }

    /// The final-normed rows of a residual stream of `t` rows.
    pub(super) fn finish_rows<'w>(&self, t: usize, workspace: &'w mut Workspace) -> View<'w> {
        let len = t * self.dims.model;
        let (x, hidden) = (workspace.x.view(len), workspace.hidden.view_mut(len));
        self.dev.rms_norm(x, self.final_norm.all(), self.norm_shape(t), hidden, None);
        workspace.hidden.view(len)
    }

    /// One layer over the residual stream of the workspace, keeping nothing.
    pub(super) fn run_layer(&self, index: usize, rows: Rows<'_>, kv: (&mut KvCache, usize), ws: &mut Workspace) {
        assert!(self.part.is_none(), "a tensor-parallel rank's part runs with the other ranks");
        let (layer, dims, t) = (&self.layers[index], self.dims, rows.len());
        self.attend_rows(index, rows, kv, ws);
        self.add_attention(layer, ws.attn.view(t * dims.attn), ws.x.view_mut(t * dims.model));
        self.expand_rows(index, t, ws);
        self.contract(layer, ws.act.view(t * dims.ffn), ws.x.view_mut(t * dims.model));
    }

    /// [`PackedPolicy::attend`] over the workspace. Products behind it are told what the next layer's attention reads.
    pub(super) fn attend_rows(&self, index: usize, rows: Rows<'_>, kv: (&mut KvCache, usize), ws: &mut Workspace) {
        let (dims, t) = (self.dims, rows.len());
        let attend = AttendBuffers {
            normed: ws.normed.view_mut(t * dims.model),
            rstd: None,
            qkv: ws.qkv.view_mut(t * dims.qkv),
            heads: ws.heads.view_mut(t * dims.normed_heads()),
            attn: ws.attn.view_mut(t * dims.attn),
            lse: None,
            turned: rows.turn.map(|_| &mut ws.turned),
        };
        let (cache, kv_layer) = kv;
        self.attend(&self.layers[index], ws.x.view(t * dims.model), rows, (cache, kv_layer), attend);
        if kv_layer + 1 < cache.spec().num_layers {
            self.dev.expect_attention((cache, kv_layer + 1), rows.spans);
        }
    }

    /// The inner rows of the feed-forward block, `silu(gate) * up`, over the workspace.
    pub(super) fn expand_rows(&self, index: usize, t: usize, ws: &mut Workspace) {
        let (dev, layer, dims) = (&*self.dev, &self.layers[index], self.dims);
        let (x, mut normed) = (ws.x.view(t * dims.model), ws.normed.view_mut(t * dims.model));
        dev.rms_norm(x, layer.mlp_norm.all(), self.norm_shape(t), normed.reborrow(), None);
        let (weight, bias) = (&layer.gate_up.weight, layer.gate_up.bias.as_ref().map(|b| b.all()));
        let (gate_up, act) = (ws.gate_up.view_mut(t * 2 * dims.ffn), ws.act.view_mut(t * dims.ffn));
        dev.linear_swiglu(normed.as_view(), weight, bias, gate_up, act);
    }

    /// Draw one token for each of `rows`, rows of the last [`PackedPolicy::forward`] over this workspace, into `drawn`,
    /// which is overwritten.
    ///
    /// # Panics
    /// If `rows` and `params` differ in length, a row is not in the last batch, or the model has no LM head.
    pub fn sample(&self, workspace: &mut Workspace, rows: &[u32], params: &[SampleRow<'_>], drawn: &mut Vec<Sampled>) {
        assert_eq!(rows.len(), params.len(), "one set of sampling parameters per row");
        let hidden = self.pick(workspace, rows);
        self.dev.lm_head_sample(hidden, self.lm_head(), &self.masked_ids, params, drawn);
    }

    /// Log-probs of given targets at `rows`, rows of the last [`PackedPolicy::forward`] over this workspace: the bits
    /// that [`PackedPolicy::sample`] reports for the same row, id and temperature.
    ///
    /// # Panics
    /// As [`PackedPolicy::sample`].
    pub fn log_probs_of(
        &self,
        workspace: &mut Workspace,
        (rows, targets): (&[u32], &[u32]),
        temperature: f32,
    ) -> TokenStats {
        let hidden = self.pick(workspace, rows);
        let (head, masked_ids) = (self.lm_head(), self.masked_ids());
        self.dev.lm_head_stats(LmHead { hidden, head, targets, temperature, masked_ids })
    }

    fn pick<'w>(&self, workspace: &'w mut Workspace, rows: &[u32]) -> View<'w> {
        let (dev, d) = (&*self.dev, self.dims.model);
        assert!(rows.iter().all(|row| (*row as usize) < workspace.rows), "rows of the last batch");
        workspace.picked.reserve(dev, rows.len() * d);
        let hidden = workspace.hidden.view(workspace.rows * d);
        dev.gather_rows(hidden, rows, d, workspace.picked.view_mut(rows.len() * d));
        workspace.picked.view(rows.len() * d)
    }
}
