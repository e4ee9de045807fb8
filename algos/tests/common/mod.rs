//! Batches out of counter-based noise, shared by the tests of gradients and of laws.

use temper_types::Philox;

/// A batch with every array that a loss may read.
#[derive(Debug, Clone)]
pub struct Arrays {
    /// Row offsets.
    pub offsets: Vec<usize>,
    /// Mask.
    pub mask: Vec<u8>,
    /// Policy now.
    pub log_probs: Vec<f64>,
    /// Policy at the start of the step.
    pub old: Vec<f64>,
    /// Reference.
    pub reference: Vec<f64>,
    /// Engine.
    pub engine: Vec<f64>,
    /// Entropies.
    pub entropies: Vec<f64>,
    /// Advantages, equal within a row.
    pub advantages: Vec<f64>,
    /// Importance weights.
    pub weights: Vec<f64>,
}

impl Arrays {
    /// Rows of the given lengths; `masked` is the share of masked slots.
    pub fn new(seed: u64, lens: &[usize], masked: f64) -> Arrays {
        let noise = Philox::new(seed);
        let mut offsets = vec![0];
        lens.iter().for_each(|len| offsets.push(offsets[offsets.len() - 1] + len));
        let total = *offsets.last().expect("at least one offset");
        let uniform = |stream: u64, t: usize| noise.uniform(t as u64, stream);
        let near = |base: &[f64], stream: u64, width: f64| -> Vec<f64> {
            base.iter().enumerate().map(|(t, b)| (b + width * (uniform(stream, t) - 0.5)).min(-0.01)).collect()
        };
        let old: Vec<f64> = (0..total).map(|t| -0.05 - 2.5 * uniform(0, t)).collect();
        let row_of = |t: usize| offsets.iter().rposition(|o| *o <= t).unwrap_or(0);
        Arrays {
            mask: (0..total).map(|t| u8::from(uniform(1, t) >= masked)).collect(),
            log_probs: near(&old, 2, 0.9),
            reference: near(&old, 3, 0.7),
            engine: near(&old, 4, 0.3),
            entropies: (0..total).map(|t| 3.0 * uniform(5, t)).collect(),
            advantages: (0..total).map(|t| 3.0 * (uniform(6, row_of(t)) - 0.5)).collect(),
            weights: (0..total).map(|t| 0.3 + 1.4 * uniform(7, t)).collect(),
            offsets: offsets.clone(),
            old,
        }
    }
}
