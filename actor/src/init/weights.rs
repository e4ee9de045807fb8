//! Fresh weights: seeded, counter-based, from arithmetic that is the same everywhere.

use crate::exact_math::normal_quantile;
use crate::weights_io::{TensorKind, TensorSpec};
use temper_types::Philox;
use xxhash_rust::xxh3::xxh3_64;

/// Fill a new tensor: normal with standard deviation `initializer_range` for matrices and embeddings, 1 for norms,
/// 0 for biases.
///
/// Element `i` is the normal quantile of Philox noise under key `seed`, stream `xxh3(name)`, counter `i`.
pub fn fill_tensor(spec: &TensorSpec, initializer_range: f64, seed: u64, out: &mut [f32]) {
    match spec.kind {
        TensorKind::Norm => out.fill(1.0),
        TensorKind::Bias => out.fill(0.0),
        TensorKind::Embedding | TensorKind::Matrix => {
            let noise = Philox::new(seed);
            let stream = xxh3_64(spec.name.as_bytes());
            for (counter, x) in (0u64..).zip(out) {
                *x = (initializer_range * normal_quantile(noise.uniform(counter, stream))) as f32;
            }
        }
    }
}
