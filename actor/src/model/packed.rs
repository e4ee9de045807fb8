//! The weights as kernels read them.

use super::layout::{HeadRanges, Layout, Projection};
use super::params::{ParamStore, Unit, new_unit};
use super::params_io::read_unit;
use super::tensor_part::TensorPart;
use crate::{CheckpointReader, ModelConfig, Result};
use std::borrow::Borrow;
use std::cell::RefCell;
use std::convert::Infallible;
use std::ops::Range;
use std::sync::Arc;
use temper_tensor::{
    AttnShape, Buffer, DType, Device, KvCacheSpec, LinearShape, PackedLinear, Reduction, RopeTable, View, WeightFormat,
};
use temper_types::PolicyVersion;

/// In which formats a policy computes. A [`DType`] alone is that with exact weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PolicyFormat {
    /// Of embedded tokens and of the cache, and of matrix products with exact weights; int8 weights are multiplied in
    /// f32.
    pub dtype: DType,
    /// Whether matrices hold the masters' numbers, or bytes that stand for them. A policy of bytes generates and
    /// scores; its gradients would be those of the masters.
    pub weights: WeightFormat,
}

impl From<DType> for PolicyFormat {
    fn from(dtype: DType) -> PolicyFormat {
        PolicyFormat { dtype, weights: WeightFormat::Exact }
    }
}

/// A linear layer.
#[derive(Debug)]
pub(super) struct PackedProjection {
    /// The weight, in the policy's format.
    pub weight: PackedLinear,
    /// The bias, in f32.
    pub bias: Option<Buffer>,
}

/// Weights of one layer.
#[derive(Debug)]
pub(super) struct PackedLayer {
    /// Shape of its attention; layers may differ in their window.
    pub shape: AttnShape,
    /// Norm before attention.
    pub attn_norm: Buffer,
    /// Fused query, key and value projection.
    pub qkv: PackedProjection,
    /// Norms of query and key heads.
    pub qk_norm: Option<(Buffer, Buffer)>,
    /// Output projection.
    pub o: PackedProjection,
    /// Norm before the feed-forward block.
    pub mlp_norm: Buffer,
    /// Fused gate and up projection.
    pub gate_up: PackedProjection,
    /// Down projection.
    pub down: PackedProjection,
}

/// What stands on the final hidden rows.
#[derive(Debug)]
pub(super) enum PackedHead {
    /// Logits over the vocabulary.
    Lm(PackedLinear),
    /// One number, always computed in f32.
    Scalar(PackedProjection),
    /// Nothing: another tensor-parallel rank has it.
    Elsewhere,
}

/// Sizes that the forward needs at every turn.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dims {
    /// D.
    pub model: usize,
    /// F.
    pub ffn: usize,
    /// `(H + 2G) K`.
    pub qkv: usize,
    /// `H K`.
    pub attn: usize,
    /// H.
    pub heads: usize,
    /// G.
    pub kv_heads: usize,
    /// True where query and key heads are normed.
    pub qk_norm: bool,
    /// Added to the mean square in every norm.
    pub norm_eps: f32,
}

impl Dims {
    /// Width of the buffer of normed query and key heads: that of the fused rows, or 0 where no head is normed.
    pub fn normed_heads(&self) -> usize {
        if self.qk_norm { self.qkv } else { 0 }
    }
}

/// A policy ready to compute: packed matrices, and the embedding table, norms and biases in f32. It is all that an
/// engine holds; the trainer also holds the [`ParamStore`] that it was packed from.
#[derive(Debug)]
pub struct PackedPolicy {
    /// Which weights these are. Set by whoever packs them; see [`ParamStore::content_hash`].
    pub version: PolicyVersion,
    pub(super) dev: Arc<dyn Device>,
    pub(super) config: ModelConfig,
    pub(super) format: PolicyFormat,
    pub(super) layout: Arc<Layout>,
    pub(super) dims: Dims,
    pub(super) embed: Buffer,
    pub(super) layers: Vec<PackedLayer>,
    pub(super) final_norm: Buffer,
    pub(super) head: PackedHead,
    pub(super) rope: RopeTable,
    /// Which part of the model this is, where it is not the whole.
    pub(super) part: Option<Arc<TensorPart>>,
    pub(super) masked_ids: Vec<u32>,
}

impl PackedPolicy {
    /// Pack masters.
    ///
    /// # Panics
    /// If `params` is not a store for `config`.
    pub fn new(
        dev: &Arc<dyn Device>,
        params: &ParamStore,
        config: &ModelConfig,
        format: impl Into<PolicyFormat>,
    ) -> Self {
        assert_eq!(params.layout.units, Layout::new(config).units, "masters of another model");
        let units = params.units.iter().map(Ok::<&Unit, Infallible>);
        match Self::assemble(dev, config, format.into(), (Arc::clone(&params.layout), units)) {
            Ok(policy) => policy,
            Err(never) => match never {},
        }
    }

    /// Pack a checkpoint unit by unit, without ever holding all masters.
    ///
    /// # Errors
    /// A tensor is missing, of another shape, or cannot be read: the error names file and tensor.
    pub fn load(
        dev: &Arc<dyn Device>,
        config: &ModelConfig,
        reader: &CheckpointReader,
        format: impl Into<PolicyFormat>,
    ) -> Result<Self> {
        let layout = Arc::new(Layout::new(config));
        let spare: RefCell<Option<Unit>> = RefCell::default();
        let units = (0..layout.units.len()).map(|index| {
            let last = spare.take().and_then(|unit| unit.in_place_of(index));
            let mut unit = last.unwrap_or_else(|| new_unit(&**dev, &layout, index));
            read_unit(&**dev, reader, &mut unit)?;
            Ok(Lent { unit: Some(unit), spare: &spare })
        });
        Self::assemble(dev, config, format.into(), (Arc::clone(&layout), units))
    }

    pub(super) fn assemble<U: Borrow<Unit>, E>(
        dev: &Arc<dyn Device>,
        config: &ModelConfig,
        format: PolicyFormat,
        units: (Arc<Layout>, impl Iterator<Item = Result<U, E>>),
    ) -> Result<Self, E> {
        Self::assemble_part(dev, (config, format), None, units)
    }

    /// `config` and `units` are those of the part, where there is one.
    pub(super) fn assemble_part<U: Borrow<Unit>, E>(
        dev: &Arc<dyn Device>,
        (config, format): (&ModelConfig, PolicyFormat),
        part: Option<&Arc<TensorPart>>,
        (layout, mut units): (Arc<Layout>, impl Iterator<Item = Result<U, E>>),
    ) -> Result<Self, E> {
        let joined = part.map_or(Reduction::Groups8, |part| part.reduction());
        let has_head = part.is_none_or(|part| part.has_head());
        let packer = Packer { dev: &**dev, format, joined };
        let mut next = || units.next().expect("as many units as the layout has");
        let (embed, tied) = {
            let unit = next()?;
            let table = unit.borrow().view(&layout.embed);
            let tied = (has_head && layout.head == HeadRanges::Tied).then(|| packer.lm_head(table, config));
            (packer.copy(table), tied)
        };
        let mut layers = Vec::with_capacity(config.num_hidden_layers);
        for index in 0..config.num_hidden_layers {
            layers.push(packer.layer(next()?.borrow(), &layout, attn_shape(config, index)));
        }
        let last = next()?;
        let last = last.borrow();
        let head = match (&layout.head, tied) {
            (HeadRanges::Scalar(range), _) => PackedHead::Scalar(packer.scalar_head(last, range)),
            (HeadRanges::Untied(range), _) => PackedHead::Lm(packer.lm_head(last.view(range), config)),
            (HeadRanges::Tied, Some(head)) => PackedHead::Lm(head),
            (HeadRanges::Tied, None) => PackedHead::Elsewhere,
        };
        let frequencies = config.inv_frequencies();
        Ok(PackedPolicy {
            version: PolicyVersion::default(),
            dev: Arc::clone(dev),
            config: config.clone(),
            format,
            dims: dims(config),
            embed,
            layers,
            final_norm: packer.copy(last.view(&layout.final_norm)),
            head,
            rope: dev.rope_table(&frequencies, config.max_position_embeddings, 1.0),
            part: part.cloned(),
            masked_ids: Vec::new(),
            layout,
        })
    }

    /// Take new values in place, without allocating; a tensor-parallel rank's part takes what it holds of them, in a
    /// unit that is made for each. The version is left to the caller.
    ///
    /// # Panics
    /// If `params` is a store of another model.
    pub fn repack(&mut self, params: &ParamStore) {
        let whole = self.part.as_ref().map_or(&*self.layout, |part| part.whole());
        assert_eq!(params.layout.units, whole.units, "masters of another model");
        params.units.iter().for_each(|unit| self.repack_unit(unit));
    }

    /// Take new values of one unit in place, as [`PackedPolicy::repack`] does with all.
    ///
    /// # Panics
    /// If it is a unit of another model.
    pub fn repack_unit(&mut self, unit: &Unit) {
        match &self.part {
            Some(part) => {
                let values = part.values(&*self.dev, unit);
                self.repack_part(unit.index, &values);
            }
            None => self.repack_own_unit(unit),
        }
    }

    /// Take new values of a unit that lies as this policy's units do.
    pub(super) fn repack_own_unit(&mut self, unit: &Unit) {
        assert_eq!(unit.layout.units[unit.index], self.layout.units[unit.index], "a unit of another model");
        let dev = &*self.dev;
        if unit.index == 0 {
            dev.copy(unit.view(&self.layout.embed), self.embed.all_mut());
            if let (PackedHead::Lm(head), HeadRanges::Tied) = (&mut self.head, &self.layout.head) {
                dev.repack(unit.view(&self.layout.embed), head);
            }
        } else if unit.index < self.layout.final_unit() {
            repack_layer(dev, &mut self.layers[unit.index - 1], unit);
        } else {
            dev.copy(unit.view(&self.layout.final_norm), self.final_norm.all_mut());
            match (&mut self.head, &self.layout.head) {
                (PackedHead::Lm(head), HeadRanges::Untied(range)) => dev.repack(unit.view(range), head),
                (PackedHead::Scalar(head), HeadRanges::Scalar(range)) => repack_projection(dev, head, unit, range),
                _ => {}
            }
        }
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.dev
    }

    /// The model.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Format of embedded tokens and of the cache, and of matrix products with exact weights.
    pub fn dtype(&self) -> DType {
        self.format.dtype
    }

    /// Whether it computes with the numbers of its masters.
    pub fn weights(&self) -> WeightFormat {
        self.format.weights
    }

    /// Bytes of all packed matrices, which a step reads once: a layer's four, and the head's.
    pub fn matrix_bytes(&self) -> usize {
        let layers = self.layers.iter().flat_map(|layer| [&layer.qkv, &layer.o, &layer.gate_up, &layer.down]);
        let head = match &self.head {
            PackedHead::Lm(head) => head.size_bytes(),
            PackedHead::Scalar(head) => head.weight.size_bytes(),
            PackedHead::Elsewhere => 0,
        };
        layers.map(|projection| projection.weight.size_bytes()).sum::<usize>() + head
    }

    /// Ids that are never drawn and get no mass, ascending: those that the tokenizer does not have.
    pub fn masked_ids(&self) -> &[u32] {
        &self.masked_ids
    }

    /// Replace the masked ids; order and repetitions do not matter.
    pub fn set_masked_ids(&mut self, mut ids: Vec<u32>) {
        ids.sort_unstable();
        ids.dedup();
        self.masked_ids = ids;
    }

    /// Shape of a key/value cache for this model.
    pub fn kv_spec(&self, num_blocks: usize, block_size: usize) -> KvCacheSpec {
        KvCacheSpec {
            num_layers: self.layers.len(),
            num_blocks,
            block_size,
            num_kv_heads: self.dims.kv_heads,
            head_dim: self.config.head_dim,
            dtype: self.format.dtype,
        }
    }

    /// The packed LM head.
    ///
    /// # Panics
    /// If the model has a value or score head, or another tensor-parallel rank has its head.
    pub fn lm_head(&self) -> &PackedLinear {
        match &self.head {
            PackedHead::Lm(head) => head,
            PackedHead::Elsewhere => panic!("tensor-parallel rank 0 has the LM head"),
            PackedHead::Scalar(_) => {
                panic!("{}: a model with a value head has no log-probs", self.config.file().display())
            }
        }
    }

    /// The scalar head.
    ///
    /// # Panics
    /// If the model has an LM head.
    pub(super) fn scalar_head(&self) -> &PackedProjection {
        match &self.head {
            PackedHead::Scalar(head) => head,
            PackedHead::Lm(_) | PackedHead::Elsewhere => {
                panic!("{}: a model with an LM head has no values", self.config.file().display())
            }
        }
    }
}

fn dims(config: &ModelConfig) -> Dims {
    Dims {
        model: config.hidden_size,
        ffn: config.intermediate_size,
        qkv: config.q_size() + 2 * config.kv_size(),
        attn: config.q_size(),
        heads: config.num_attention_heads,
        kv_heads: config.num_key_value_heads,
        qk_norm: config.qk_norm,
        norm_eps: config.rms_norm_eps,
    }
}

fn attn_shape(config: &ModelConfig, layer: usize) -> AttnShape {
    AttnShape {
        num_heads: config.num_attention_heads,
        num_kv_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        window: config.windows[layer],
        scale: (1.0 / (config.head_dim as f64).sqrt()) as f32,
    }
}

/// Packs ranges of units.
struct Packer<'a> {
    dev: &'a dyn Device,
    format: PolicyFormat,
    /// Of output and down projections.
    joined: Reduction,
}

impl Packer<'_> {
    fn copy(&self, from: View<'_>) -> Buffer {
        let mut buffer = self.dev.zeros(from.len());
        self.dev.copy(from, buffer.all_mut());
        buffer
    }

    fn matrix(&self, weight: View<'_>, shape: LinearShape, reduction: Reduction) -> PackedLinear {
        match self.format.weights {
            WeightFormat::Exact => self.dev.pack(weight, shape, self.format.dtype, reduction),
            WeightFormat::Int8 => self.dev.pack_int8(weight, shape),
        }
    }

    fn projection(&self, unit: &Unit, range: &Projection, reduction: Reduction) -> PackedProjection {
        let weight = self.matrix(unit.view(&range.weight), range.shape, reduction);
        PackedProjection { weight, bias: range.bias.as_ref().map(|bias| self.copy(unit.view(bias))) }
    }

    fn scalar_head(&self, unit: &Unit, range: &Projection) -> PackedProjection {
        Packer { format: DType::F32.into(), ..*self }.projection(unit, range, Reduction::Chain)
    }

    fn lm_head(&self, weight: View<'_>, config: &ModelConfig) -> PackedLinear {
        let shape = LinearShape { n: config.vocab_size, k: config.hidden_size };
        self.matrix(weight, shape, Reduction::Chain)
    }

    fn layer(&self, unit: &Unit, layout: &Layout, shape: AttnShape) -> PackedLayer {
        let ranges = &layout.layer;
        let copy = |range: &Range<usize>| self.copy(unit.view(range));
        PackedLayer {
            shape,
            attn_norm: copy(&ranges.attn_norm),
            qkv: self.projection(unit, &ranges.qkv, Reduction::Chain),
            qk_norm: ranges.qk_norm.as_ref().map(|(q, k)| (copy(q), copy(k))),
            o: self.projection(unit, &ranges.o, self.joined),
            mlp_norm: copy(&ranges.mlp_norm),
            gate_up: self.projection(unit, &ranges.gate_up, Reduction::Chain),
            down: self.projection(unit, &ranges.down, self.joined),
        }
    }
}

/// A unit whose memory may serve the next one: fresh pages cost about as much as what is read into them.
struct Lent<'a> {
    /// There until it is dropped.
    unit: Option<Unit>,
    spare: &'a RefCell<Option<Unit>>,
}

impl Borrow<Unit> for Lent<'_> {
    fn borrow(&self) -> &Unit {
        self.unit.as_ref().expect("a unit is there until it is dropped")
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        self.spare.replace(self.unit.take());
    }
}

fn repack_projection(dev: &dyn Device, packed: &mut PackedProjection, unit: &Unit, range: &Projection) {
    dev.repack(unit.view(&range.weight), &mut packed.weight);
    if let (Some(to), Some(from)) = (&mut packed.bias, &range.bias) {
        dev.copy(unit.view(from), to.all_mut());
    }
}

fn repack_layer(dev: &dyn Device, layer: &mut PackedLayer, unit: &Unit) {
    let ranges = &unit.layout.layer;
    dev.copy(unit.view(&ranges.attn_norm), layer.attn_norm.all_mut());
    dev.copy(unit.view(&ranges.mlp_norm), layer.mlp_norm.all_mut());
    if let (Some((q, k)), Some((q_range, k_range))) = (&mut layer.qk_norm, &ranges.qk_norm) {
        dev.copy(unit.view(q_range), q.all_mut());
        dev.copy(unit.view(k_range), k.all_mut());
    }
    repack_projection(dev, &mut layer.qkv, unit, &ranges.qkv);
    repack_projection(dev, &mut layer.o, unit, &ranges.o);
    repack_projection(dev, &mut layer.gate_up, unit, &ranges.gate_up);
    repack_projection(dev, &mut layer.down, unit, &ranges.down);
}
