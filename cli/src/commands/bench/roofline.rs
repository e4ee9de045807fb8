//! What memory and arithmetic of the machine let decoding reach.

use super::samples::round;
use crate::commands::common::engine::Generator;
use crate::plan::ModelSizes;
use serde_json::{Value, json};
use temper_actor::ModelConfig;
use temper_tensor::bench::{GemmWeights, measure_peak, measure_read_rate};
use temper_tensor::{CpuConfig, CpuDevice};
use temper_types::DType;

/// Rates of the machine, measured.
pub struct Roofline {
    read_rate: f64,
    peak_gflops: f64,
    sizes: ModelSizes,
    /// Number format of keys and values.
    dtype: DType,
    matrix_bytes: f64,
}

impl Roofline {
    /// Measure `threads` threads (0: one per core) for the model of a generator.
    pub fn measure(config: &ModelConfig, generator: &Generator, threads: usize) -> Roofline {
        let device = CpuDevice::new(CpuConfig { num_threads: threads, isa: None });
        let products = GemmWeights::of(generator.dtype, generator.weights).dtype();
        Roofline {
            read_rate: measure_read_rate(&device),
            peak_gflops: measure_peak(&device, products),
            sizes: ModelSizes::of(config),
            dtype: generator.dtype,
            matrix_bytes: generator.matrix_bytes as f64,
        }
    }

    /// Tokens a second where a step of `batch` rows, each after `context` tokens, reads every weight and every key and
    /// value once, or multiplies and adds at the peak, whichever takes longer. Sampling costs nothing here.
    pub fn decode_tok_s(&self, batch: f64, context: f64) -> f64 {
        let sizes = &self.sizes;
        let weights = sizes.layer_weights() + sizes.head_weights();
        let per_slot = (2 * sizes.num_hidden_layers * sizes.num_key_value_heads * sizes.head_dim) as f64;
        let scores = (2 * sizes.num_hidden_layers * sizes.num_attention_heads * sizes.head_dim) as f64;
        let bytes = self.matrix_bytes + batch * context * per_slot * self.dtype.size_bytes() as f64;
        let operations = 2.0 * batch * (weights + context * scores);
        batch / (bytes / self.read_rate).max(operations / (self.peak_gflops * 1e9))
    }

    /// The rates and the bound.
    pub fn to_json(&self, bound: f64, decode_tok_s: Option<f64>) -> Value {
        json!({
            "read_gb_s": round(self.read_rate / 1e9), "peak_gflops": round(self.peak_gflops),
            "decode_tok_s": round(bound), "share": decode_tok_s.map(|rate| round(rate / bound)),
        })
    }

    /// The same for people.
    pub fn to_text(&self, bound: f64, decode_tok_s: Option<f64>) -> String {
        let share = decode_tok_s.map_or_else(String::new, |rate| format!(": {:.0} % reached", 100.0 * rate / bound));
        let (read, peak) = (self.read_rate / 1e9, self.peak_gflops);
        format!("memory {read:.1} GB/s and {peak:.0} GFLOP/s let {bound:.0} tokens/s be decoded{share}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn roofline(read_rate: f64, peak_gflops: f64) -> Roofline {
        let sizes = ModelSizes {
            hidden_size: 2,
            intermediate_size: 3,
            num_hidden_layers: 5,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            head_dim: 1,
            vocab_size: 10,
            tie_word_embeddings: true,
        };
        Roofline { read_rate, peak_gflops, sizes, dtype: DType::F32, matrix_bytes: 1000.0 }
    }

    #[test]
    fn the_slower_of_memory_and_arithmetic_decides() {
        // A layer: 2 x (4 + 2) of attention and 2 x 9 of feed-forward; five of them and a head of 20 weights; a slot
        // has 10 keys and values, and its scores and sums are 20 products a row.
        let (weights, slot, scores) = (5.0 * 30.0 + 20.0, 10.0, 20.0);
        let assert_near = |got: f64, want: f64| assert!((got - want).abs() < 1e-9 * want, "{got}, not {want}");
        let slow_memory = roofline(1e3, 1e9);
        assert_near(slow_memory.decode_tok_s(1.0, 0.0), 1e3 / 1000.0);
        assert_near(slow_memory.decode_tok_s(4.0, 7.0), 4e3 / (1000.0 + 4.0 * (4.0 * 7.0 * slot)));
        let slow_arithmetic = roofline(1e12, 1e-6);
        assert_near(slow_arithmetic.decode_tok_s(4.0, 7.0), 1e3 / (2.0 * (weights + 7.0 * scores)));
    }
}
