//! The operations by their definitions, in f64.

use temper_tensor::AttnShape;

/// `x / sqrt(mean(x^2) + eps) * weight` of rows as wide as `weight`.
pub fn rms_norm(x: &[f64], weight: &[f64], eps: f32) -> Vec<f64> {
    let dim = weight.len();
    let norm = |row: &[f64]| {
        let mean = row.iter().map(|x| x * x).sum::<f64>() / dim as f64;
        let rstd = 1.0 / (mean + f64::from(eps)).sqrt();
        row.iter().zip(weight).map(|(x, w)| x * rstd * w).collect::<Vec<_>>()
    };
    x.chunks(dim).flat_map(norm).collect()
}

/// Norm of the query and key heads of fused rows.
pub fn head_norm(qkv: &[f64], q_weight: &[f64], k_weight: &[f64], shape: &AttnShape, eps: f32) -> Vec<f64> {
    let (q_len, k_len) = (shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim);
    let norm = |row: &[f64]| {
        let mut out = rms_norm(&row[..q_len], q_weight, eps);
        out.extend(rms_norm(&row[q_len..q_len + k_len], k_weight, eps));
        out.extend(&row[q_len + k_len..]);
        out
    };
    qkv.chunks(shape.qkv_dim()).flat_map(norm).collect()
}

/// `silu(gate) * up` of rows `[gate | up]`.
pub fn swiglu(gate_up: &[f64], ffn_dim: usize) -> Vec<f64> {
    let row = |row: &[f64]| {
        let gate = |g: f64| g / (1.0 + (-g).exp());
        (0..ffn_dim).map(|i| gate(row[i]) * row[ffn_dim + i]).collect::<Vec<_>>()
    };
    gate_up.chunks(2 * ffn_dim).flat_map(row).collect()
}

/// Rotation of query and key heads of fused rows.
pub fn rope(qkv: &[f64], positions: &[u32], inv_frequencies: &[f32], shape: &AttnShape) -> Vec<f64> {
    let (dim, half) = (shape.head_dim, shape.head_dim / 2);
    let mut out = qkv.to_vec();
    for (row, position) in out.chunks_mut(shape.qkv_dim()).zip(positions) {
        for head in row.chunks_mut(dim).take(shape.num_heads + shape.num_kv_heads) {
            for i in 0..half {
                let (sin, cos) = (f64::from(*position) * f64::from(inv_frequencies[i])).sin_cos();
                let (a, b) = (head[i], head[half + i]);
                (head[i], head[half + i]) = (a * cos - b * sin, b * cos + a * sin);
            }
        }
    }
    out
}

/// Causal attention within one sequence of fused rows: outputs and log-sum-exps.
pub fn attention(qkv: &[f64], shape: &AttnShape) -> (Vec<f64>, Vec<f64>) {
    let (width, dim, heads) = (shape.qkv_dim(), shape.head_dim, shape.num_heads);
    let group = heads / shape.num_kv_heads;
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for t in 0..qkv.len() / width {
        let first = shape.window.map_or(0, |w| (t + 1).saturating_sub(w));
        for head in 0..heads {
            let query = &qkv[t * width + head * dim..][..dim];
            let key = |s: usize| &qkv[s * width + (heads + head / group) * dim..][..dim];
            let value = |s: usize| &qkv[s * width + (heads + shape.num_kv_heads + head / group) * dim..][..dim];
            let score = |s: usize| query.iter().zip(key(s)).map(|(q, k)| q * k).sum::<f64>() * f64::from(shape.scale);
            let scores: Vec<f64> = (first..=t).map(score).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            for d in 0..dim {
                out.push((first..=t).map(|s| (scores[s - first] - max).exp() / total * value(s)[d]).sum());
            }
            lse.push(max + total.ln());
        }
    }
    (out, lse)
}

/// Of one row of logits over `temperature`, masked ids without mass: log-probs of all ids.
pub fn log_softmax(logits: &[f64], temperature: f32, masked_ids: &[u32]) -> Vec<f64> {
    let mut z: Vec<f64> = logits.iter().map(|x| x / f64::from(temperature)).collect();
    masked_ids.iter().for_each(|id| z[*id as usize] = f64::NEG_INFINITY);
    let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_total = z.iter().map(|z| (z - max).exp()).sum::<f64>().ln();
    z.iter().map(|z| z - max - log_total).collect()
}

/// `sum of -p ln p`.
pub fn entropy(log_probs: &[f64]) -> f64 {
    log_probs.iter().filter(|l| l.is_finite()).map(|l| -l.exp() * l).sum()
}
