//! Memory of a training pass, kept from one micro-batch to the next.

use super::batch::{BLOCK_SIZE, TrainBatch};
use super::generate::Workspace;
use super::packed::PackedPolicy;
use super::scratch::GrowBuffer;
use super::sequence::{Part, SequenceExchange, Turn, Turned};
use std::sync::Arc;
use temper_tensor::{KvCache, KvCacheSpec};

/// What a training forward keeps for its backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// The activations of every layer that a matrix product made; norms and activation functions are redone.
    #[default]
    None,
    /// Only the input of every layer; each layer's forward runs again in the backward. Same gradients, bit for bit.
    Layers,
}

/// Buffers of training passes, grown to the largest micro-batch seen and then reused.
#[derive(Debug, Default)]
pub struct TrainArena {
    /// Buffers of the layer that runs.
    pub(super) scratch: Workspace,
    /// Keys and values of the micro-batch, all layers.
    train_kv: Option<KvCache>,
    /// Keys and values of the layer that runs, in passes that keep nothing.
    score_kv: Option<KvCache>,
    /// Input of every layer, `[T, D]` each.
    pub(super) inputs: Vec<GrowBuffer>,
    /// Activations of every layer, or of the one that is recomputed.
    pub(super) saved: Vec<SavedLayer>,
    /// The rows that have a target.
    pub(super) targets: TargetBuffers,
    /// Gradients on their way back.
    pub(super) grads: GradBuffers,
    /// The ranks that share the rows of every batch, where there are any.
    exchange: Option<Arc<dyn SequenceExchange>>,
}

/// Activations of one layer that its backward reads.
#[derive(Debug, Default)]
pub(super) struct SavedLayer {
    /// Reciprocal root mean squares of the layer's input, `[T]`.
    pub attn_rstd: GrowBuffer,
    /// Fused projections: rotated, or before the head norm where there is one; `[T, (H + 2G) K]`. Not kept of rows that
    /// turn into heads, unless there is a head norm.
    pub qkv: GrowBuffer,
    /// Attention output, `[T, H K]`.
    pub attn: GrowBuffer,
    /// Log-sum-exp of attention, `[T, H]`; of all rows and own heads where rows turn into heads.
    pub lse: GrowBuffer,
    /// What attention read and gave, where rows turn into heads.
    pub turned: Turned,
    /// Residual stream between the halves, `[T, D]`.
    pub mid: GrowBuffer,
    /// Reciprocal root mean squares of `mid`, `[T]`.
    pub mlp_rstd: GrowBuffer,
    /// Gate and up projections, `[T, 2F]`.
    pub gate_up: GrowBuffer,
}

/// The R rows whose log-probs or values are wanted.
#[derive(Debug, Default)]
pub(super) struct TargetBuffers {
    /// Their residual stream after the last layer, `[R, D]`.
    pub x: GrowBuffer,
    /// Its reciprocal root mean squares, `[R]`.
    pub rstd: GrowBuffer,
    /// Final-normed, `[R, D]`.
    pub hidden: GrowBuffer,
    /// One number per row, `[R]`: values forward, their gradients backward.
    pub scalars: GrowBuffer,
    /// Gradient of `hidden`, `[R, D]`.
    pub d_hidden: GrowBuffer,
    /// Gradient of `x`, `[R, D]`.
    pub d_x: GrowBuffer,
}

/// Gradients of activations.
#[derive(Debug, Default)]
pub(super) struct GradBuffers {
    /// Of the residual stream, `[T, D]`.
    pub x: GrowBuffer,
    /// Of a norm's output, `[T, D]`.
    pub normed: GrowBuffer,
    /// Of the attention output, `[T, H K]`.
    pub attn: GrowBuffer,
    /// Of the fused projections, `[T, (H + 2G) K]`.
    pub qkv: GrowBuffer,
    /// Of gate and up, `[T, 2F]`.
    pub gate_up: GrowBuffer,
    /// Of `silu(gate) * up`, `[T, F]`.
    pub act: GrowBuffer,
    /// Reciprocal root mean squares of query and key heads, `[T, H + G]`.
    pub head_rstd: GrowBuffer,
    /// Of attention's outputs and of what it read, where rows turn into heads.
    pub turned: Turned,
}

impl SavedLayer {
    fn len(&self) -> usize {
        let own = [&self.attn_rstd, &self.qkv, &self.attn, &self.lse, &self.mid, &self.mlp_rstd, &self.gate_up];
        own.into_iter().map(GrowBuffer::capacity).sum::<usize>() + self.turned.len()
    }
}

impl GradBuffers {
    fn len(&self) -> usize {
        let own = [&self.x, &self.normed, &self.attn, &self.qkv, &self.gate_up, &self.act, &self.head_rstd];
        own.into_iter().map(GrowBuffer::capacity).sum::<usize>() + self.turned.len()
    }
}

impl TrainArena {
    /// An empty arena; it takes memory at its first pass.
    pub fn new() -> Self {
        TrainArena::default()
    }

    /// An empty arena of a rank that shares the rows of every batch with the other ranks of a group.
    pub fn of_group(exchange: Arc<dyn SequenceExchange>) -> Self {
        TrainArena { exchange: Some(exchange), ..TrainArena::default() }
    }

    /// Bytes of activations, their gradients, and keys and values that are allocated.
    pub fn num_bytes(&self) -> usize {
        let t = &self.targets;
        let targets = [&t.x, &t.rstd, &t.hidden, &t.scalars, &t.d_hidden, &t.d_x];
        let elements = self.scratch.len()
            + self.inputs.iter().chain(targets).map(GrowBuffer::capacity).sum::<usize>()
            + self.saved.iter().map(SavedLayer::len).sum::<usize>()
            + self.grads.len();
        let kv = [&self.train_kv, &self.score_kv].into_iter().flatten().map(KvCache::spec);
        let kv: usize = kv.map(|spec| spec.num_blocks * spec.block_bytes()).sum();
        elements * size_of::<f32>() + kv
    }

    /// What this rank runs of a batch.
    pub(super) fn part<'a>(&self, batch: &'a TrainBatch) -> Part<'a> {
        Part::new(batch, self.exchange.as_ref())
    }

    /// Buffers of the layer that runs.
    pub(super) fn reserve_scratch(&mut self, policy: &PackedPolicy, part: &Part<'_>) {
        self.scratch.reserve(policy, part.num_rows());
        if let Some((turn, shape)) = part.turn.as_ref().zip(policy.attn_shape()) {
            self.scratch.turned.reserve(&*policy.dev, turn, shape);
        }
    }

    /// A cache for `num_blocks` blocks. Contents do not survive growth.
    pub(super) fn reserve_kv(
        &mut self,
        policy: &PackedPolicy,
        (kv_use, turn): (KvUse, Option<&Turn>),
        num_blocks: usize,
    ) {
        let num_layers = match kv_use {
            KvUse::AllLayers => policy.layers.len(),
            KvUse::OneLayer => 1,
        };
        let cache = self.cache(kv_use);
        let old_blocks = cache.as_ref().map_or(0, |kv| kv.spec().num_blocks);
        let mut needed = KvCacheSpec { num_layers, ..policy.kv_spec(num_blocks.max(1), BLOCK_SIZE) };
        if let Some((turn, shape)) = turn.zip(policy.attn_shape()) {
            needed.num_kv_heads = turn.own_shape(shape).num_kv_heads;
        }
        let fits = |spec: &KvCacheSpec| {
            old_blocks >= needed.num_blocks && KvCacheSpec { num_blocks: needed.num_blocks, ..*spec } == needed
        };
        if !cache.as_ref().is_some_and(|kv| fits(kv.spec())) {
            *cache = None;
            *cache = Some(policy.dev.kv_cache(needed));
        }
    }

    fn cache(&mut self, kv_use: KvUse) -> &mut Option<KvCache> {
        match kv_use {
            KvUse::AllLayers => &mut self.train_kv,
            KvUse::OneLayer => &mut self.score_kv,
        }
    }

    /// Buffers of a forward that keeps what `recompute` says.
    pub(super) fn reserve_saved(&mut self, policy: &PackedPolicy, part: &Part<'_>, recompute: Recompute) {
        let (dev, dims, num_layers, rows) = (&*policy.dev, policy.dims, policy.layers.len(), part.num_rows());
        let turn = part.turn.as_ref().zip(policy.attn_shape());
        self.inputs.resize_with(num_layers, GrowBuffer::default);
        self.inputs.iter_mut().for_each(|input| input.reserve(dev, rows * dims.model));
        let num_saved = match recompute {
            Recompute::None => num_layers,
            Recompute::Layers => 1,
        };
        self.saved.resize_with(num_saved, SavedLayer::default);
        for saved in &mut self.saved {
            saved.attn_rstd.reserve(dev, rows);
            if turn.is_none() || dims.qk_norm {
                saved.qkv.reserve(dev, rows * dims.qkv);
            }
            saved.attn.reserve(dev, rows * dims.attn);
            match turn {
                None => saved.lse.reserve(dev, rows * dims.heads),
                Some((turn, shape)) => {
                    saved.lse.reserve(dev, turn.num_rows() * turn.own_shape(shape).num_heads);
                    saved.turned.reserve(dev, turn, shape);
                }
            }
            saved.mid.reserve(dev, rows * dims.model);
            saved.mlp_rstd.reserve(dev, rows);
            saved.gate_up.reserve(dev, rows * 2 * dims.ffn);
        }
    }

    /// Buffers of the target rows.
    pub(super) fn reserve_targets(&mut self, policy: &PackedPolicy, num_targets: usize) {
        let (dev, len) = (&*policy.dev, num_targets * policy.dims.model);
        self.targets.x.reserve(dev, len);
        self.targets.rstd.reserve(dev, num_targets);
        self.targets.hidden.reserve(dev, len);
        self.targets.scalars.reserve(dev, num_targets);
    }

    /// Buffers of a backward.
    pub(super) fn reserve_grads(&mut self, policy: &PackedPolicy, part: &Part<'_>) {
        let (dev, dims, rows, num_targets) = (&*policy.dev, policy.dims, part.num_rows(), part.num_targets());
        self.targets.d_hidden.reserve(dev, num_targets * dims.model);
        self.targets.d_x.reserve(dev, num_targets * dims.model);
        self.grads.x.reserve(dev, rows * dims.model);
        self.grads.normed.reserve(dev, rows * dims.model);
        self.grads.attn.reserve(dev, rows * dims.attn);
        self.grads.qkv.reserve(dev, rows * dims.qkv);
        self.grads.gate_up.reserve(dev, rows * 2 * dims.ffn);
        self.grads.act.reserve(dev, rows * dims.ffn);
        let head_rows = if dims.qk_norm { rows * (dims.heads + dims.kv_heads) } else { 0 };
        self.grads.head_rstd.reserve(dev, head_rows);
        if let Some((turn, shape)) = part.turn.as_ref().zip(policy.attn_shape()) {
            self.grads.turned.reserve(dev, turn, shape);
        }
    }

    /// Scratch and the cache of passes that keep nothing.
    pub(super) fn score_parts(&mut self) -> (&mut Workspace, &mut KvCache) {
        (&mut self.scratch, self.score_kv.as_mut().expect("reserved before the layers run"))
    }

    /// What the layers work on in a forward that keeps activations, and in its backward.
    pub(super) fn train_parts(&mut self) -> TrainParts<'_> {
        TrainParts {
            scratch: &mut self.scratch,
            kv: self.train_kv.as_mut().expect("reserved before the layers run"),
            inputs: &mut self.inputs,
            saved: &mut self.saved,
            grads: &mut self.grads,
        }
    }
}

/// Whether keys and values of all layers are kept, or of one layer at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KvUse {
    /// For a backward.
    AllLayers,
    /// Forward only.
    OneLayer,
}

/// What the layers of a training pass work on, each part borrowed on its own.
pub(super) struct TrainParts<'a> {
    /// Buffers of whatever is computed again.
    pub scratch: &'a mut Workspace,
    /// Keys and values of the micro-batch.
    pub kv: &'a mut KvCache,
    /// Input of every layer.
    pub inputs: &'a mut [GrowBuffer],
    /// Activations.
    pub saved: &'a mut [SavedLayer],
    /// Gradients.
    pub grads: &'a mut GradBuffers,
}
