//! The backward of one layer.

use super::arena::{GradBuffers, SavedLayer, TrainParts};
use super::generate::Workspace;
use super::layer::Rows;
use super::layout::Projection;
use super::packed::{PackedLayer, PackedPolicy, PackedProjection};
use super::params::Unit;
use temper_tensor::{AttentionGrad, Device, HeadNormGrad, KvCache, NormGrad, Store, View, ViewMut};

/// Masters and gradients of the unit at work.
pub(super) struct UnitGrad<'a> {
    /// The device.
    pub dev: &'a dyn Device,
    /// f32 masters, read by input gradients.
    pub masters: &'a Unit,
    /// Gradients, added to.
    pub grads: &'a mut Unit,
}

impl UnitGrad<'_> {
    /// Gradients of a linear layer: weight and bias are added to, `dx` is written.
    pub fn project(
        &mut self,
        (range, packed): (&Projection, &PackedProjection),
        x: View<'_>,
        dy: View<'_>,
        dx: ViewMut<'_>,
    ) {
        let weight = &packed.weight;
        self.dev.linear_weight_grad(dy, x, range.shape, weight.dtype(), self.grads.view_mut(&range.weight));
        if let Some(bias) = &range.bias {
            self.dev.bias_grad(dy, self.grads.view_mut(bias));
        }
        self.dev.linear_input_grad(dy, self.masters.view(&range.weight), weight, dx, Store::Write);
    }
}

impl PackedPolicy {
    /// Backward of layer `index`: the gradient of the residual stream in `parts.grads.x` goes from the layer's output
    /// to its input, and the gradients of the layer's weights are added to `unit`. The activations stand in `saved`.
    pub(super) fn layer_backward(
        &self,
        index: usize,
        rows: Rows<'_>,
        (parts, saved): (&mut TrainParts<'_>, usize),
        unit: &mut UnitGrad<'_>,
    ) {
        let saved = &parts.saved[saved];
        self.mlp_backward(&self.layers[index], rows.len(), (parts.scratch, saved, parts.grads), unit);
        let kv = (&*parts.kv, index);
        self.attn_backward(rows, kv, (parts.scratch, saved, parts.grads), unit);
        let (layer, d) = (&self.layers[index], rows.len() * self.dims.model);
        let ranges = &self.layout.layer;
        let x = parts.inputs[index].view(d);
        self.dev.rms_norm(
            x,
            layer.attn_norm.all(),
            self.norm_shape(rows.len()),
            parts.scratch.normed.view_mut(d),
            None,
        );
        let grads = &mut *parts.grads;
        let dqkv = grads.qkv.view(rows.len() * self.dims.qkv);
        unit.project((&ranges.qkv, &layer.qkv), parts.scratch.normed.view(d), dqkv, grads.normed.view_mut(d));
        let args = NormGrad {
            x,
            weight: layer.attn_norm.all(),
            rstd: saved.attn_rstd.view(rows.len()),
            dy: grads.normed.view(d),
            shape: self.norm_shape(rows.len()),
        };
        self.dev.rms_norm_grad(args, grads.x.view_mut(d), unit.grads.view_mut(&ranges.attn_norm));
    }

    /// Feed-forward half: the residual gradient goes from the layer's output to between the halves.
    fn mlp_backward(
        &self,
        layer: &PackedLayer,
        t: usize,
        (ws, saved, grads): (&mut Workspace, &SavedLayer, &mut GradBuffers),
        unit: &mut UnitGrad<'_>,
    ) {
        let (dev, dims, ranges) = (&*self.dev, self.dims, &self.layout.layer);
        let (d, f) = (t * dims.model, t * dims.ffn);
        let gate_up = saved.gate_up.view(2 * f);
        dev.swiglu(gate_up, dims.ffn, ws.act.view_mut(f));
        unit.project((&ranges.down, &layer.down), ws.act.view(f), grads.x.view(d), grads.act.view_mut(f));
        dev.swiglu_grad(gate_up, dims.ffn, grads.act.view(f), grads.gate_up.view_mut(2 * f));
        let (norm, mid, weight) = (self.norm_shape(t), saved.mid.view(d), layer.mlp_norm.all());
        dev.rms_norm(mid, weight, norm, ws.normed.view_mut(d), None);
        let dy = grads.gate_up.view(2 * f);
        unit.project((&ranges.gate_up, &layer.gate_up), ws.normed.view(d), dy, grads.normed.view_mut(d));
        let (rstd, dy) = (saved.mlp_rstd.view(t), grads.normed.view(d));
        let args = NormGrad { x: mid, weight, rstd, dy, shape: norm };
        dev.rms_norm_grad(args, grads.x.view_mut(d), unit.grads.view_mut(&ranges.mlp_norm));
    }

    /// Attention half down to the gradient of the fused projections, which is left in `grads.qkv`. The residual
    /// gradient passes unchanged.
    fn attn_backward(
        &self,
        rows: Rows<'_>,
        (cache, index): (&KvCache, usize),
        (ws, saved, grads): (&mut Workspace, &SavedLayer, &mut GradBuffers),
        unit: &mut UnitGrad<'_>,
    ) {
        let (dev, dims, t, layer) = (&*self.dev, self.dims, rows.len(), &self.layers[index]);
        let (qkv_len, attn) = (t * dims.qkv, saved.attn.view(t * dims.attn));
        let dattn = grads.attn.view_mut(t * dims.attn);
        unit.project((&self.layout.layer.o, &layer.o), attn, grads.x.view(t * dims.model), dattn);
        let head_norm = layer.qk_norm.as_ref().and_then(|_| self.head_norm(layer, saved.qkv.view(qkv_len), t));
        if let Some(args) = head_norm {
            let rstd = grads.head_rstd.view_mut(t * (dims.heads + dims.kv_heads));
            dev.head_norm(args, ws.heads.view_mut(qkv_len), Some(rstd));
        }
        match rows.turn {
            Some(turn) => turn.attend_backward((dev, layer.shape), rows, (cache, index), (saved, &mut *grads)),
            None => {
                let qkv = if head_norm.is_some() {
                    dev.rope(ws.heads.view_mut(qkv_len), rows.positions, &self.rope, layer.shape);
                    ws.heads.view(qkv_len)
                } else {
                    saved.qkv.view(qkv_len)
                };
                self.own_attention_backward(qkv, rows, (cache, index), (saved, &mut *grads));
            }
        }
        dev.rope_grad(grads.qkv.view_mut(qkv_len), rows.positions, &self.rope, layer.shape);
        if let (Some(args), Some((q_range, k_range))) = (head_norm, &self.layout.layer.qk_norm) {
            let ranges = [q_range.clone(), k_range.clone()];
            let [dq_weight, dk_weight] = unit.grads.buffer.views_mut(ranges);
            let grad = HeadNormGrad { dqkv: grads.qkv.view_mut(qkv_len), dq_weight, dk_weight };
            dev.head_norm_grad(args, grads.head_rstd.view(t * (dims.heads + dims.kv_heads)), grad);
        }
    }

    /// Attention over rows that are all here: from the gradient of its outputs in `grads.attn` to that of the rotated
    /// projections `qkv`, which is left in `grads.qkv`.
    fn own_attention_backward(
        &self,
        qkv: View<'_>,
        rows: Rows<'_>,
        (cache, index): (&KvCache, usize),
        (saved, grads): (&SavedLayer, &mut GradBuffers),
    ) {
        let (dims, t) = (self.dims, rows.len());
        let args = AttentionGrad {
            qkv,
            out: saved.attn.view(t * dims.attn),
            lse: saved.lse.view(t * dims.heads),
            dout: grads.attn.view(t * dims.attn),
            cache,
            layer: index,
            spans: rows.spans,
            prefixes: rows.prefixes,
            shape: self.layers[index].shape,
        };
        self.dev.attention_grad(args, grads.qkv.view_mut(t * dims.qkv));
    }
}
