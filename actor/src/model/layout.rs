//! Where every tensor of a model lies within flat units.
//!
//! The one place that turns a [`ModelConfig`] into tensor names and shapes for the forward. Tensors that one kernel
//! reads together (query, key and value projections; gate and up projections) lie side by side, so that the fused
//! weight and its gradient are one range each.

use crate::{Head, ModelConfig};
use std::ops::Range;
use temper_tensor::LinearShape;

/// Groups of tensors start at multiples of this many elements (64 bytes), so that kernels read aligned rows.
const ALIGNMENT: usize = 16;

/// One tensor within a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSlot {
    /// Name as in a Hugging Face checkpoint.
    pub name: String,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Elements of the unit's buffer.
    pub range: Range<usize>,
}

/// Tensors that lie in one buffer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct UnitLayout {
    /// Elements of the buffer, padding between groups included.
    pub len: usize,
    /// The tensors, in ascending order of their ranges.
    pub slots: Vec<TensorSlot>,
}

impl UnitLayout {
    /// Append tensors side by side and return the range that they cover together.
    fn group(&mut self, tensors: impl IntoIterator<Item = (String, Vec<usize>)>) -> Range<usize> {
        self.len = self.len.next_multiple_of(ALIGNMENT);
        let start = self.len;
        for (name, shape) in tensors {
            let range = self.len..self.len + shape.iter().product::<usize>();
            self.len = range.end;
            self.slots.push(TensorSlot { name, shape, range });
        }
        start..self.len
    }

    /// Append one tensor.
    fn single(&mut self, name: impl Into<String>, shape: &[usize]) -> Range<usize> {
        self.group([(name.into(), shape.to_vec())])
    }

    /// Append projections of `inputs` numbers that one kernel computes together: `(name, outputs)` each.
    fn projection(&mut self, parts: &[(String, usize)], inputs: usize, has_bias: HasBias) -> Projection {
        let weight = self.group(parts.iter().map(|(name, n)| (format!("{name}.weight"), vec![*n, inputs])));
        let bias = match has_bias {
            HasBias::Yes => Some(self.group(parts.iter().map(|(name, n)| (format!("{name}.bias"), vec![*n])))),
            HasBias::No => None,
        };
        let n = parts.iter().map(|(_, n)| n).sum();
        Projection { weight, bias, shape: LinearShape { n, k: inputs } }
    }
}

/// Whether a projection has a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HasBias {
    Yes,
    No,
}

impl From<bool> for HasBias {
    fn from(has_bias: bool) -> Self {
        if has_bias { HasBias::Yes } else { HasBias::No }
    }
}

/// Ranges of a linear layer within a unit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Projection {
    /// The weight, `[n, k]`.
    pub weight: Range<usize>,
    /// The bias, `[n]`, where there is one.
    pub bias: Option<Range<usize>>,
    /// Outputs and inputs.
    pub shape: LinearShape,
}

/// Ranges of a layer's unit, by use. All layers share them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LayerRanges {
    /// Norm before attention, `[D]`.
    pub attn_norm: Range<usize>,
    /// Fused query, key and value projection, `[(H + 2G) K, D]`.
    pub qkv: Projection,
    /// Norms of query and key heads, each `[K]`.
    pub qk_norm: Option<(Range<usize>, Range<usize>)>,
    /// Output projection, `[D, H K]`.
    pub o: Projection,
    /// Norm before the feed-forward block, `[D]`.
    pub mlp_norm: Range<usize>,
    /// Fused gate and up projection, `[2F, D]`.
    pub gate_up: Projection,
    /// Down projection, `[D, F]`.
    pub down: Projection,
}

/// The last matrix of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum HeadRanges {
    /// The LM head is the embedding table.
    Tied,
    /// An LM head of its own, `[V, D]`, in the final unit.
    Untied(Range<usize>),
    /// One number per token, `[1, D]`, in the final unit.
    Scalar(Projection),
}

/// Layout of a whole model: unit 0 holds the embeddings, unit `1 + l` layer `l`, the last unit the rest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    /// The units in order.
    pub units: Vec<UnitLayout>,
    /// Embedding table `[V, D]` in unit 0.
    pub embed: Range<usize>,
    /// Ranges in the unit of any layer.
    pub layer: LayerRanges,
    /// Norm before the head, `[D]`, in the final unit.
    pub final_norm: Range<usize>,
    /// The head.
    pub head: HeadRanges,
}

impl Layout {
    /// The layout of a model.
    pub fn new(config: &ModelConfig) -> Self {
        let table = [config.vocab_size, config.hidden_size];
        let mut first = UnitLayout::default();
        let embed = first.single("model.embed_tokens.weight", &table);
        let (mut layers, layer) = layer_units(config);
        let mut last = UnitLayout::default();
        let final_norm = last.single("model.norm.weight", &[config.hidden_size]);
        let score = |last: &mut UnitLayout, has_bias| {
            HeadRanges::Scalar(last.projection(&[("score".to_owned(), 1)], config.hidden_size, has_bias))
        };
        let head = match config.head {
            Head::CausalLm if config.tie_word_embeddings => HeadRanges::Tied,
            Head::CausalLm => HeadRanges::Untied(last.single("lm_head.weight", &table)),
            Head::TokenValue => score(&mut last, HasBias::Yes),
            Head::SequenceScore => score(&mut last, HasBias::No),
        };
        let mut units = vec![first];
        units.append(&mut layers);
        units.push(last);
        Layout { units, embed, layer, final_norm, head }
    }

    /// Number of the last unit.
    pub fn final_unit(&self) -> usize {
        self.units.len() - 1
    }
}

/// The units of all layers and the ranges that they share.
fn layer_units(config: &ModelConfig) -> (Vec<UnitLayout>, LayerRanges) {
    let (unit, ranges) = layer_unit(config);
    let named = |layer: usize| {
        let mut unit = unit.clone();
        for slot in &mut unit.slots {
            slot.name = format!("model.layers.{layer}.{}", slot.name);
        }
        unit
    };
    ((0..config.num_hidden_layers).map(named).collect(), ranges)
}

/// The unit of one layer, its names without their prefix.
fn layer_unit(config: &ModelConfig) -> (UnitLayout, LayerRanges) {
    let (d, f, head_dim) = (config.hidden_size, config.intermediate_size, config.head_dim);
    let mut unit = UnitLayout::default();
    let attention = |name: &str, n| (format!("self_attn.{name}_proj"), n);
    let mlp = |name: &str, n| (format!("mlp.{name}_proj"), n);
    let attn_norm = unit.single("input_layernorm.weight", &[d]);
    let heads = [attention("q", config.q_size()), attention("k", config.kv_size()), attention("v", config.kv_size())];
    let qkv = unit.projection(&heads, d, config.qkv_bias.into());
    let qk_norm = config.qk_norm.then(|| {
        let q_norm = unit.single("self_attn.q_norm.weight", &[head_dim]);
        (q_norm, unit.single("self_attn.k_norm.weight", &[head_dim]))
    });
    let o = unit.projection(&[attention("o", d)], config.q_size(), config.o_bias.into());
    let mlp_norm = unit.single("post_attention_layernorm.weight", &[d]);
    let gate_up = unit.projection(&[mlp("gate", f), mlp("up", f)], d, config.mlp_bias.into());
    let down = unit.projection(&[mlp("down", d)], f, config.mlp_bias.into());
    (unit, LayerRanges { attn_norm, qkv, qk_norm, o, mlp_norm, gate_up, down })
}
