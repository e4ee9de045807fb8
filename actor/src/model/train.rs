//! The forward over whole sequences, for training and for scoring.

use super::arena::{KvUse, Recompute, SavedLayer, TrainArena, TrainParts};
use super::batch::{Sequences, TrainBatch};
use super::generate::Workspace;
use super::layer::{AttendBuffers, ExpandBuffers, Rows};
use super::packed::PackedPolicy;
use super::sequence::{Part, sequence_parallel_problem};
use temper_tensor::{KvCache, LmHead, Store, TokenStats};

/// A training forward that has run: its activations lie in the arena until it is dropped.
#[derive(Debug)]
pub struct Tape<'a> {
    pub(super) arena: &'a mut TrainArena,
    pub(super) batch: &'a TrainBatch,
    pub(super) part: Part<'a>,
    pub(super) sequences: Sequences,
    pub(super) recompute: Recompute,
}

impl PackedPolicy {
    /// Run all layers over whole sequences and keep what the backward needs. Where the arena is of a group, all its
    /// ranks run the same batch, and what they are told of it is the same on each.
    ///
    /// # Panics
    /// If the parts of the batch disagree in length, or ids or positions are out of range.
    pub fn train_forward<'a>(
        &self,
        batch: &'a TrainBatch,
        recompute: Recompute,
        arena: &'a mut TrainArena,
    ) -> Tape<'a> {
        let (sequences, part) = self.start(batch, KvUse::AllLayers, arena);
        let (dev, t, d) = (&*self.dev, part.num_rows(), self.dims.model);
        arena.reserve_saved(self, &part, recompute);
        let lists = sequences.lists(batch);
        let rows = lists.rows(&part);
        let TrainParts { scratch: ws, kv, inputs, saved, .. } = arena.train_parts();
        for (index, input) in inputs.iter_mut().enumerate() {
            dev.copy(ws.x.view(t * d), input.view_mut(t * d));
            match recompute {
                Recompute::None => {
                    self.run_layer_saving(index, rows, kv, (ws, &mut saved[index]));
                    let gate_up = saved[index].gate_up.view(t * 2 * self.dims.ffn);
                    let act = ws.act.view_mut(t * self.dims.ffn);
                    self.add_mlp(&self.layers[index], gate_up, act, ws.x.view_mut(t * d));
                }
                Recompute::Layers => self.run_layer(index, rows, (kv, index), ws),
            }
        }
        self.finish(&part, arena);
        drop(lists);
        Tape { arena, batch, part, sequences, recompute }
    }

    /// One layer over the residual stream of the scratch, up to its gate and up projections, keeping its activations.
    pub(super) fn run_layer_saving(
        &self,
        index: usize,
        rows: Rows<'_>,
        kv: &mut KvCache,
        (ws, saved): (&mut Workspace, &mut SavedLayer),
    ) {
        let (layer, dims, t) = (&self.layers[index], self.dims, rows.len());
        let lse_len = rows.turn.map_or(t * dims.heads, |turn| turn.num_rows() * turn.own_shape(layer.shape).num_heads);
        // Of rows that turn, only a head norm's backward reads the projections again.
        let keeps_qkv = rows.turn.is_none() || dims.qk_norm;
        let qkv = if keeps_qkv { &mut saved.qkv } else { &mut ws.qkv };
        let attend = AttendBuffers {
            normed: ws.normed.view_mut(t * dims.model),
            rstd: Some(saved.attn_rstd.view_mut(t)),
            qkv: qkv.view_mut(t * dims.qkv),
            heads: ws.heads.view_mut(t * dims.normed_heads()),
            attn: saved.attn.view_mut(t * dims.attn),
            lse: Some(saved.lse.view_mut(lse_len)),
            turned: rows.turn.map(|_| &mut saved.turned),
        };
        self.attend(layer, ws.x.view(t * dims.model), rows, (kv, index), attend);
        self.add_attention(layer, saved.attn.view(t * dims.attn), ws.x.view_mut(t * dims.model));
        self.dev.copy(ws.x.view(t * dims.model), saved.mid.view_mut(t * dims.model));
        let expand = ExpandBuffers {
            normed: ws.normed.view_mut(t * dims.model),
            rstd: saved.mlp_rstd.view_mut(t),
            gate_up: saved.gate_up.view_mut(t * 2 * dims.ffn),
        };
        self.expand(layer, ws.x.view(t * dims.model), expand);
    }

    /// Log-probs, entropies and sums of squares at the target rows, logits divided by `temperature`.
    ///
    /// # Panics
    /// If the batch has no target ids, or the model has no LM head.
    pub fn log_probs(&self, tape: &Tape<'_>, temperature: f32) -> TokenStats {
        self.target_stats(&tape.part, tape.arena, temperature)
    }

    /// Values or scores at the target rows.
    ///
    /// # Panics
    /// If the model has an LM head.
    pub fn values(&self, tape: &mut Tape<'_>) -> Vec<f32> {
        self.target_values(&tape.part, tape.arena)
    }

    /// Log-probs as [`PackedPolicy::train_forward`] and [`PackedPolicy::log_probs`] give them, bit for bit, keeping
    /// nothing: old and reference log-probs, evaluation.
    ///
    /// # Panics
    /// As these two.
    pub fn score_only(&self, batch: &TrainBatch, temperature: f32, arena: &mut TrainArena) -> TokenStats {
        let part = self.forward_only(batch, arena);
        self.target_stats(&part, arena, temperature)
    }

    /// Values or scores as [`PackedPolicy::train_forward`] and [`PackedPolicy::values`] give them, keeping nothing.
    ///
    /// # Panics
    /// As these two.
    pub fn values_only(&self, batch: &TrainBatch, arena: &mut TrainArena) -> Vec<f32> {
        let part = self.forward_only(batch, arena);
        self.target_values(&part, arena)
    }

    /// The normed hidden state of the target rows, which the model's head reads, `[R, D]`: for heads beside it.
    pub fn hidden(&self, tape: &Tape<'_>) -> Vec<f32> {
        self.target_hidden(&tape.part, tape.arena)
    }

    /// The same, keeping nothing.
    ///
    /// # Panics
    /// As [`PackedPolicy::train_forward`].
    pub fn hidden_only(&self, batch: &TrainBatch, arena: &mut TrainArena) -> Vec<f32> {
        let part = self.forward_only(batch, arena);
        self.target_hidden(&part, arena)
    }

    fn target_hidden(&self, part: &Part<'_>, arena: &TrainArena) -> Vec<f32> {
        let mut hidden = vec![0.0; part.num_targets() * self.dims.model];
        self.dev.read(arena.targets.hidden.view(hidden.len()), &mut hidden);
        part.join_f32(hidden, self.dims.model)
    }

    /// All layers through one layer's worth of cache.
    pub(super) fn forward_only<'a>(&self, batch: &'a TrainBatch, arena: &mut TrainArena) -> Part<'a> {
        let (sequences, part) = self.start(batch, KvUse::OneLayer, arena);
        let lists = sequences.lists(batch);
        let rows = lists.rows(&part);
        let (ws, kv) = arena.score_parts();
        for index in 0..self.layers.len() {
            self.run_layer(index, rows, (kv, 0), ws);
        }
        self.finish(&part, arena);
        part
    }

    /// Reserve memory and embed this rank's part of the batch into the residual stream of the scratch.
    fn start<'a>(&self, batch: &'a TrainBatch, kv_use: KvUse, arena: &mut TrainArena) -> (Sequences, Part<'a>) {
        let t = batch.num_rows();
        assert_eq!(batch.positions.len(), t, "one position per row");
        assert!(batch.target_rows.iter().all(|row| (*row as usize) < t), "targets within the rows");
        let (sequences, part) = (Sequences::new(batch), arena.part(batch));
        if let Some(turn) = &part.turn {
            assert_eq!(sequence_parallel_problem(&self.config, turn.size()), None, "heads that the group can divide");
        }
        arena.reserve_kv(self, (kv_use, part.turn.as_ref()), sequences.num_blocks());
        arena.reserve_scratch(self, &part);
        let x = arena.scratch.x.view_mut(part.num_rows() * self.dims.model);
        self.dev.embed(part.token_ids, self.embed.all(), self.format.dtype, x);
        (sequences, part)
    }

    /// Pick the target rows out of the residual stream and norm them.
    fn finish(&self, part: &Part<'_>, arena: &mut TrainArena) {
        let (dev, d, r) = (&*self.dev, self.dims.model, part.num_targets());
        arena.reserve_targets(self, r);
        let targets = &mut arena.targets;
        let x = arena.scratch.x.view(part.num_rows() * d);
        dev.gather_rows(x, &part.target_rows, d, targets.x.view_mut(r * d));
        let (hidden, rstd) = (targets.hidden.view_mut(r * d), targets.rstd.view_mut(r));
        dev.rms_norm(targets.x.view(r * d), self.final_norm.all(), self.norm_shape(r), hidden, Some(rstd));
    }

    /// Arguments of the LM head over the target rows.
    pub(super) fn target_head<'a>(&'a self, part: &'a Part<'_>, arena: &'a TrainArena, temperature: f32) -> LmHead<'a> {
        assert_eq!(part.target_ids.len(), part.num_targets(), "one target id per target row");
        LmHead {
            hidden: arena.targets.hidden.view(part.num_targets() * self.dims.model),
            head: self.lm_head(),
            targets: &part.target_ids,
            temperature,
            masked_ids: self.masked_ids(),
        }
    }

    fn target_stats(&self, part: &Part<'_>, arena: &TrainArena, temperature: f32) -> TokenStats {
        part.join_stats(self.dev.lm_head_stats(self.target_head(part, arena, temperature)))
    }

    fn target_values(&self, part: &Part<'_>, arena: &mut TrainArena) -> Vec<f32> {
        let (head, r, targets) = (self.scalar_head(), part.num_targets(), &mut arena.targets);
        let bias = head.bias.as_ref().map(|b| b.all());
        let hidden = targets.hidden.view(r * self.dims.model);
        self.dev.linear(hidden, &head.weight, bias, targets.scalars.view_mut(r), Store::Write);
        let mut values = vec![0.0; r];
        self.dev.read(targets.scalars.view(r), &mut values);
        part.join_f32(values, 1)
    }
}
