//! GGUF names of tensors, and the row order of rotary projections.

use crate::config::{Family, ModelConfig};

/// Modules of a layer: Hugging Face name, GGUF name.
const LAYER_MODULES: [(&str, &str); 11] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("self_attn.o_proj", "attn_output"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// The GGUF name of a Hugging Face tensor; `None` where GGUF has no such tensor (value and reward heads).
pub(super) fn gguf_name(name: &str) -> Option<String> {
    match name {
        "model.embed_tokens.weight" => return Some("token_embd.weight".into()),
        "model.norm.weight" => return Some("output_norm.weight".into()),
        "lm_head.weight" => return Some("output.weight".into()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (module, kind) = rest.rsplit_once('.')?;
    let (_, gguf) = LAYER_MODULES.iter().find(|(hf, _)| *hf == module)?;
    Some(format!("blk.{layer}.{gguf}.{kind}"))
}

/// Which way rows are reordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RowOrder {
    /// From pairs of neighbours (GGUF) to halves of a head (Hugging Face).
    ToHalves,
    /// From halves to neighbours.
    ToNeighbours,
}

/// Number of heads whose rows GGUF keeps in another order than Hugging Face, `None` where the order is the same.
///
/// llama.cpp rotates neighbouring rows in the `llama` architecture, so its converter interleaves the two halves of each
/// head of the query and key projections; Qwen is rotated in halves there too.
pub(super) fn interleaved_heads(config: &ModelConfig, name: &str) -> Option<usize> {
    match config.family {
        Family::Llama | Family::Mistral if name.contains(".q_proj.") => Some(config.num_attention_heads),
        Family::Llama | Family::Mistral if name.contains(".k_proj.") => Some(config.num_key_value_heads),
        Family::Llama | Family::Mistral | Family::Qwen2 | Family::Qwen3 => None,
    }
}

/// Reorder the rows of each head. `data` is [heads * head_dim, columns], flat.
pub(super) fn reorder_rows(data: &[f32], num_heads: usize, head_dim: usize, order: RowOrder) -> Vec<f32> {
    let columns = data.len() / (num_heads * head_dim);
    let mut out = Vec::with_capacity(data.len());
    for row in 0..num_heads * head_dim {
        let (head, within) = (row / head_dim, row % head_dim);
        let from = match order {
            RowOrder::ToHalves => 2 * (within % (head_dim / 2)) + within / (head_dim / 2),
            RowOrder::ToNeighbours => within / 2 + (within % 2) * (head_dim / 2),
        };
        let start = (head * head_dim + from) * columns;
        out.extend_from_slice(&data[start..start + columns]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::{RowOrder, gguf_name, reorder_rows};

    #[test]
    fn reordering_is_the_converters_and_its_inverse() {
        // Two heads of width 4, one column: rows 0 1 | 2 3 of a head become 0 2 1 3.
        let hf: Vec<f32> = (0..8u8).map(f32::from).collect();
        let gguf = reorder_rows(&hf, 2, 4, RowOrder::ToNeighbours);
        assert_eq!(gguf, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
        assert_eq!(reorder_rows(&gguf, 2, 4, RowOrder::ToHalves), hf);
    }

    #[test]
    fn names_are_those_of_llama_cpp() {
        assert_eq!(gguf_name("model.layers.12.self_attn.q_proj.bias").as_deref(), Some("blk.12.attn_q.bias"));
        assert_eq!(
            gguf_name("model.layers.0.post_attention_layernorm.weight").as_deref(),
            Some("blk.0.ffn_norm.weight")
        );
        assert_eq!(gguf_name("score.weight"), None);
    }
}
