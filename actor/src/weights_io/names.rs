//! Canonical tensors of a model: Hugging Face names, shapes and order.

use crate::config::{Head, ModelConfig};

/// What a tensor is, as far as initialisation and optimisers care.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TensorKind {
    /// `model.embed_tokens.weight` [V, D].
    Embedding,
    /// A projection [out, in], heads included.
    Matrix,
    /// Weights of an RMS norm.
    Norm,
    /// A bias.
    Bias,
}

/// Name and shape of one tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TensorSpec {
    /// Hugging Face name.
    pub name: String,
    /// Shape; matrices are [out, in].
    pub shape: Vec<usize>,
    /// What it is.
    pub kind: TensorKind,
}

impl TensorSpec {
    /// Number of elements.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// All tensors of a model in canonical order: embedding, layers from the first (attention norm, query, key, value,
/// their biases, head norms, output, feed-forward norm, gate, up, down), final norm, head.
///
/// A tied LM head has no tensor of its own.
pub fn tensor_specs(config: &ModelConfig) -> Vec<TensorSpec> {
    let (hidden, vocab) = (config.hidden_size, config.vocab_size);
    let mut list = SpecList(Vec::new());
    list.push("model.embed_tokens.weight", vec![vocab, hidden], TensorKind::Embedding);
    for layer in 0..config.num_hidden_layers {
        list.push_layer(config, layer);
    }
    list.push("model.norm.weight", vec![hidden], TensorKind::Norm);
    match config.head {
        Head::CausalLm if config.tie_word_embeddings => {}
        Head::CausalLm => list.push("lm_head.weight", vec![vocab, hidden], TensorKind::Matrix),
        Head::TokenValue => list.push_linear("score", [1, hidden], HasBias::Yes),
        Head::SequenceScore => list.push_linear("score", [1, hidden], HasBias::No),
    }
    list.0
}

#[derive(Clone, Copy, PartialEq)]
enum HasBias {
    Yes,
    No,
}

impl From<bool> for HasBias {
    fn from(has: bool) -> Self {
        if has { HasBias::Yes } else { HasBias::No }
    }
}

struct SpecList(Vec<TensorSpec>);

impl SpecList {
    fn push(&mut self, name: &str, shape: Vec<usize>, kind: TensorKind) {
        self.0.push(TensorSpec { name: name.to_owned(), shape, kind });
    }

    fn push_linear(&mut self, module: &str, [out, input]: [usize; 2], bias: HasBias) {
        self.push(&format!("{module}.weight"), vec![out, input], TensorKind::Matrix);
        if bias == HasBias::Yes {
            self.push(&format!("{module}.bias"), vec![out], TensorKind::Bias);
        }
    }

    fn push_layer(&mut self, config: &ModelConfig, layer: usize) {
        let (hidden, feed_forward) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.q_size(), config.kv_size());
        let (qkv_bias, o_bias, mlp_bias) = (config.qkv_bias.into(), config.o_bias.into(), config.mlp_bias.into());
        let name = |rest: &str| format!("model.layers.{layer}.{rest}");
        self.push(&name("input_layernorm.weight"), vec![hidden], TensorKind::Norm);
        self.push_linear(&name("self_attn.q_proj"), [q, hidden], qkv_bias);
        self.push_linear(&name("self_attn.k_proj"), [kv, hidden], qkv_bias);
        self.push_linear(&name("self_attn.v_proj"), [kv, hidden], qkv_bias);
        if config.qk_norm {
            self.push(&name("self_attn.q_norm.weight"), vec![config.head_dim], TensorKind::Norm);
            self.push(&name("self_attn.k_norm.weight"), vec![config.head_dim], TensorKind::Norm);
        }
        self.push_linear(&name("self_attn.o_proj"), [hidden, q], o_bias);
        self.push(&name("post_attention_layernorm.weight"), vec![hidden], TensorKind::Norm);
        self.push_linear(&name("mlp.gate_proj"), [feed_forward, hidden], mlp_bias);
        self.push_linear(&name("mlp.up_proj"), [feed_forward, hidden], mlp_bias);
        self.push_linear(&name("mlp.down_proj"), [hidden, feed_forward], mlp_bias);
    }
}
