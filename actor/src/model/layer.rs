//! The forward of one layer, in two halves, over buffers that the caller chose.

use super::packed::{PackedLayer, PackedPolicy, PackedProjection};
use super::sequence::{Turn, Turned};
use temper_tensor::{HeadNorm, KvCache, NormShape, SeqSpan, Store, View, ViewMut};

/// The rows of one pass.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows<'a> {
    /// RoPE position of each row.
    pub positions: &'a [u32],
    /// Which rows belong to which sequence, each to one.
    pub spans: &'a [SeqSpan<'a>],
    /// Where keys and values of rows go; a row may go to several slots.
    pub appends: &'a [SeqSpan<'a>],
    /// Of each span, the rows at the slots before it; read by a backward alone.
    pub prefixes: &'a [&'a [u32]],
    /// Where the rows are divided over a group: how they turn into heads. Positions are those of this rank's rows then,
    /// and spans, appends and prefixes those of all rows.
    pub turn: Option<&'a Turn>,
}

impl Rows<'_> {
    /// T, or this rank's part of it.
    pub fn len(&self) -> usize {
        self.positions.len()
    }
}

/// Buffers of the attention half. Every one is overwritten.
#[derive(Debug)]
pub(super) struct AttendBuffers<'a> {
    /// Normed input, `[T, D]`.
    pub normed: ViewMut<'a>,
    /// Reciprocal root mean squares of the input, `[T]`, where the backward needs them.
    pub rstd: Option<ViewMut<'a>>,
    /// Fused projections, `[T, (H + 2G) K]`; rotated in place where the model has no head norm.
    pub qkv: ViewMut<'a>,
    /// Normed and rotated projections where the model has a head norm, same size as `qkv`; else unused.
    pub heads: ViewMut<'a>,
    /// Attention output, `[T, H K]`.
    pub attn: ViewMut<'a>,
    /// Log-sum-exp of the scores, `[T, H]`, where the backward needs it.
    pub lse: Option<ViewMut<'a>>,
    /// Where the rows are divided over a group: all rows, own heads. The log-sum-exp is theirs then.
    pub turned: Option<&'a mut Turned>,
}

/// Buffers of the feed-forward half up to the fused projection. Every one is overwritten.
#[derive(Debug)]
pub(super) struct ExpandBuffers<'a> {
    /// Normed input, `[T, D]`.
    pub normed: ViewMut<'a>,
    /// Reciprocal root mean squares of the input, `[T]`.
    pub rstd: ViewMut<'a>,
    /// Fused gate and up projections, `[T, 2F]`.
    pub gate_up: ViewMut<'a>,
}

impl PackedPolicy {
    /// Shape of a norm over `rows` model-wide rows.
    pub(super) fn norm_shape(&self, rows: usize) -> NormShape {
        NormShape { rows, dim: self.dims.model, eps: self.dims.norm_eps }
    }

    /// First half of a layer up to the attention output: norm, projections, rotation, cache, attention.
    /// `kv` is the cache and the layer within it.
    pub(super) fn attend(
        &self,
        layer: &PackedLayer,
        x: View<'_>,
        rows: Rows<'_>,
        kv: (&mut KvCache, usize),
        mut buffers: AttendBuffers<'_>,
    ) {
        let (dev, (cache, kv_layer)) = (&*self.dev, kv);
        let norm = self.norm_shape(rows.len());
        dev.rms_norm(x, layer.attn_norm.all(), norm, buffers.normed.reborrow(), buffers.rstd);
        self.project(&layer.qkv, buffers.normed.as_view(), buffers.qkv.reborrow(), Store::Write);
        let mut rotated = match self.head_norm(layer, buffers.qkv.as_view(), rows.len()) {
            Some(args) => {
                dev.head_norm(args, buffers.heads.reborrow(), None);
                buffers.heads
            }
            None => buffers.qkv,
        };
        dev.rope(rotated.reborrow(), rows.positions, &self.rope, layer.shape);
        let qkv = rotated.as_view();
        match rows.turn.zip(buffers.turned) {
            Some((turn, turned)) => {
                let out = (buffers.attn, buffers.lse, turned);
                turn.attend(dev, (qkv, layer.shape), rows, (cache, kv_layer), out);
            }
            None => {
                dev.kv_append(qkv, layer.shape, rows.appends, cache, kv_layer);
                let out = (buffers.attn, buffers.lse);
                dev.attention(qkv, (cache, kv_layer), layer.shape, rows.spans, out);
            }
        }
    }

    /// `x += attn W_o^T`.
    pub(super) fn add_attention(&self, layer: &PackedLayer, attn: View<'_>, x: ViewMut<'_>) {
        self.project(&layer.o, attn, x, Store::Add);
    }

    /// Second half of a layer up to the fused gate and up projections.
    pub(super) fn expand(&self, layer: &PackedLayer, x: View<'_>, mut buffers: ExpandBuffers<'_>) {
        let norm = self.norm_shape(x.len() / self.dims.model);
        self.dev.rms_norm(x, layer.mlp_norm.all(), norm, buffers.normed.reborrow(), Some(buffers.rstd));
        self.project(&layer.gate_up, buffers.normed.as_view(), buffers.gate_up, Store::Write);
    }

    /// `x += (silu(gate) * up) W_down^T`; `act` is overwritten, `[T, F]`.
    pub(super) fn add_mlp(&self, layer: &PackedLayer, gate_up: View<'_>, mut act: ViewMut<'_>, x: ViewMut<'_>) {
        self.dev.swiglu(gate_up, self.dims.ffn, act.reborrow());
        self.contract(layer, act.as_view(), x);
    }

    /// `x += act W_down^T`.
    pub(super) fn contract(&self, layer: &PackedLayer, act: View<'_>, x: ViewMut<'_>) {
        self.project(&layer.down, act, x, Store::Add);
    }

    /// One linear layer.
    fn project(&self, projection: &PackedProjection, x: View<'_>, out: ViewMut<'_>, store: Store) {
        let bias = projection.bias.as_ref().map(|b| b.all());
        self.dev.linear(x, &projection.weight, bias, out, store);
    }

    /// Arguments of the head norm over fused rows, where the model has one.
    pub(super) fn head_norm<'a>(&self, layer: &'a PackedLayer, qkv: View<'a>, rows: usize) -> Option<HeadNorm<'a>> {
        let (q_norm, k_norm) = layer.qk_norm.as_ref()?;
        let (q_weight, k_weight) = (q_norm.all(), k_norm.all());
        Some(HeadNorm { qkv, q_weight, k_weight, shape: layer.shape, rows, eps: self.dims.norm_eps })
    }
}
