//! Norms, the gated activation, RoPE and embeddings: kernels over independent rows.

use crate::reference;
use crate::support::{assert_bits, assert_close, device, devices, dot, finite_differences, host, random, wide};
use temper_tensor::{AttnShape, CpuDevice, DType, Device, HeadNorm, HeadNormGrad, NormGrad, NormShape};

const EPS: f32 = 1e-5;

fn heads(num_heads: usize, num_kv_heads: usize, head_dim: usize) -> AttnShape {
    AttnShape { num_heads, num_kv_heads, head_dim, window: None, scale: 1.0 }
}

fn run_rms_norm(dev: &CpuDevice, x: &[f32], weight: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let shape = NormShape { rows: x.len() / weight.len(), dim: weight.len(), eps: EPS };
    let (mut out, mut rstd) = (dev.zeros(x.len()), dev.zeros(shape.rows));
    let (x, weight) = (dev.upload(x), dev.upload(weight));
    dev.rms_norm(x.all(), weight.all(), shape, out.all_mut(), Some(rstd.all_mut()));
    (host(dev, &out), host(dev, &rstd))
}

/// Gradients of an RMS norm, added to ones.
fn run_rms_norm_grad(dev: &CpuDevice, x: &[f32], weight: &[f32], dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let shape = NormShape { rows: x.len() / weight.len(), dim: weight.len(), eps: EPS };
    let rstd = dev.upload(&run_rms_norm(dev, x, weight).1);
    let (mut dx, mut dweight) = (dev.upload(&vec![1.0; x.len()]), dev.upload(&vec![1.0; weight.len()]));
    let (x, weight, dy) = (dev.upload(x), dev.upload(weight), dev.upload(dy));
    let args = NormGrad { x: x.all(), weight: weight.all(), rstd: rstd.all(), dy: dy.all(), shape };
    dev.rms_norm_grad(args, dx.all_mut(), dweight.all_mut());
    (host(dev, &dx), host(dev, &dweight))
}

#[test]
fn rms_norm_follows_its_definition() {
    for (rows, dim) in [(1, 1), (3, 7), (5, 16), (2, 33), (4, 576)] {
        let (x, weight) = (random(rows * dim, 1, 3.0), random(dim, 2, 1.0));
        let (out, rstd) = run_rms_norm(&device(2), &x, &weight);
        assert_close(&out, &reference::rms_norm(&wide(&x), &wide(&weight), EPS), (1e-6, 1e-7), "rms_norm");
        for (row, rstd) in x.chunks(dim).zip(&rstd) {
            let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / dim as f64;
            assert_close(&[*rstd], &[(mean + f64::from(EPS)).powf(-0.5)], (1e-6, 0.0), "rstd");
        }
    }
}

#[test]
fn rms_norm_gradients_match_finite_differences() {
    for (rows, dim) in [(3, 6), (2, 40), (70, 5)] {
        let (x, weight, dy) = (random(rows * dim, 3, 2.0), random(dim, 4, 1.0), random(rows * dim, 5, 1.0));
        let (dx, dweight) = run_rms_norm_grad(&device(2), &x, &weight, &dy);
        let (wide_x, wide_weight) = (wide(&x), wide(&weight));
        let want = finite_differences(&x, |x| dot(&reference::rms_norm(x, &wide_weight, EPS), &dy));
        let want: Vec<f64> = want.iter().map(|d| d + 1.0).collect();
        assert_close(&dx, &want, (1e-5, 1e-5), "dx");
        let want = finite_differences(&weight, |w| dot(&reference::rms_norm(&wide_x, w, EPS), &dy));
        let want: Vec<f64> = want.iter().map(|d| d + 1.0).collect();
        assert_close(&dweight, &want, (1e-5, 1e-5), "dweight");
    }
}

#[test]
fn rms_norm_bits_depend_on_the_row_alone() {
    let (rows, dim) = (150, 200);
    let (x, weight, dy) = (random(rows * dim, 6, 3.0), random(dim, 7, 1.0), random(rows * dim, 8, 1.0));
    let (want, rstd) = run_rms_norm(&device(1), &x, &weight);
    let (dx, dweight) = run_rms_norm_grad(&device(1), &x, &weight, &dy);
    for dev in devices() {
        let what = format!("{dev:?}");
        let got = run_rms_norm(&dev, &x, &weight);
        assert_bits(&got.0, &want, &what);
        assert_bits(&got.1, &rstd, &what);
        let got = run_rms_norm_grad(&dev, &x, &weight, &dy);
        assert_bits(&got.0, &dx, &what);
        assert_bits(&got.1, &dweight, &what);
        let alone = run_rms_norm(&dev, &x[149 * dim..], &weight);
        assert_bits(&alone.0, &want[149 * dim..], &what);
    }
}

type HeadNormResult = (Vec<f32>, [Vec<f32>; 3]);

/// Forward, then the gradients of the rows and of both weights (added to zeros).
fn run_head_norm(
    dev: &CpuDevice,
    qkv: &[f32],
    (q_weight, k_weight): (&[f32], &[f32]),
    shape: AttnShape,
    dy: &[f32],
) -> HeadNormResult {
    let rows = qkv.len() / shape.qkv_dim();
    let (qkv, q_weight, k_weight) = (dev.upload(qkv), dev.upload(q_weight), dev.upload(k_weight));
    let args = HeadNorm { qkv: qkv.all(), q_weight: q_weight.all(), k_weight: k_weight.all(), shape, rows, eps: EPS };
    let (mut out, mut rstd) = (dev.zeros(qkv.len()), dev.zeros(rows * (shape.num_heads + shape.num_kv_heads)));
    dev.head_norm(args, out.all_mut(), Some(rstd.all_mut()));
    let (mut dqkv, mut dq, mut dk) = (dev.upload(dy), dev.zeros(q_weight.len()), dev.zeros(k_weight.len()));
    let grad = HeadNormGrad { dqkv: dqkv.all_mut(), dq_weight: dq.all_mut(), dk_weight: dk.all_mut() };
    dev.head_norm_grad(args, rstd.all(), grad);
    (host(dev, &out), [host(dev, &dqkv), host(dev, &dq), host(dev, &dk)])
}

#[test]
fn head_norm_matches_its_definition_and_finite_differences() {
    for (shape, rows) in [(heads(4, 2, 8), 3), (heads(1, 1, 20), 2), (heads(2, 1, 6), 40)] {
        let (qkv, dy) = (random(rows * shape.qkv_dim(), 9, 2.0), random(rows * shape.qkv_dim(), 10, 1.0));
        let (q, k) = (random(shape.head_dim, 11, 1.0), random(shape.head_dim, 12, 1.0));
        let (out, [dqkv, dq, dk]) = run_head_norm(&device(2), &qkv, (&q, &k), shape, &dy);
        let (wide_qkv, wide_q, wide_k) = (wide(&qkv), wide(&q), wide(&k));
        let want = reference::head_norm(&wide_qkv, &wide_q, &wide_k, &shape, EPS);
        assert_close(&out, &want, (1e-6, 1e-7), "head_norm");
        let loss = |x: &[f64], q: &[f64], k: &[f64]| dot(&reference::head_norm(x, q, k, &shape, EPS), &dy);
        let tolerance = (1e-5, 2e-5);
        assert_close(&dqkv, &finite_differences(&qkv, |x| loss(x, &wide_q, &wide_k)), tolerance, "dqkv");
        assert_close(&dq, &finite_differences(&q, |q| loss(&wide_qkv, q, &wide_k)), tolerance, "dq_weight");
        assert_close(&dk, &finite_differences(&k, |k| loss(&wide_qkv, &wide_q, k)), tolerance, "dk_weight");
    }
}

#[test]
fn head_norm_bits_are_equal_on_every_device() {
    let (shape, rows) = (heads(6, 2, 24), 90);
    let (qkv, dy) = (random(rows * shape.qkv_dim(), 13, 2.0), random(rows * shape.qkv_dim(), 14, 1.0));
    let (q, k) = (random(shape.head_dim, 15, 1.0), random(shape.head_dim, 16, 1.0));
    let want = run_head_norm(&device(1), &qkv, (&q, &k), shape, &dy);
    for dev in devices() {
        let got = run_head_norm(&dev, &qkv, (&q, &k), shape, &dy);
        assert_bits(&got.0, &want.0, &format!("{dev:?}"));
        for (got, want) in got.1.iter().zip(&want.1) {
            assert_bits(got, want, &format!("gradients on {dev:?}"));
        }
    }
}

fn run_swiglu(dev: &CpuDevice, gate_up: &[f32], ffn_dim: usize, dout: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (mut out, mut grad) = (dev.zeros(dout.len()), dev.zeros(gate_up.len()));
    let (gate_up, dout) = (dev.upload(gate_up), dev.upload(dout));
    dev.swiglu(gate_up.all(), ffn_dim, out.all_mut());
    dev.swiglu_grad(gate_up.all(), ffn_dim, dout.all(), grad.all_mut());
    (host(dev, &out), host(dev, &grad))
}

#[test]
fn swiglu_matches_its_definition_and_finite_differences() {
    for (rows, ffn_dim) in [(1, 3), (4, 16), (3, 50)] {
        let (gate_up, dout) = (random(2 * rows * ffn_dim, 17, 6.0), random(rows * ffn_dim, 18, 1.0));
        let (out, grad) = run_swiglu(&device(2), &gate_up, ffn_dim, &dout);
        assert_close(&out, &reference::swiglu(&wide(&gate_up), ffn_dim), (1e-6, 1e-7), "swiglu");
        let want = finite_differences(&gate_up, |x| dot(&reference::swiglu(x, ffn_dim), &dout));
        assert_close(&grad, &want, (1e-5, 1e-6), "swiglu_grad");
    }
    let (out, _) = run_swiglu(&device(1), &[-200.0, 200.0, f32::NAN, 3.0, 3.0, 3.0], 3, &[1.0; 3]);
    assert!(out[0].abs() < 1e-30 && out[1] == 600.0 && out[2].is_nan(), "{out:?}");
}

#[test]
fn swiglu_bits_are_equal_on_every_device() {
    let (rows, ffn_dim) = (60, 300);
    let (gate_up, dout) = (random(2 * rows * ffn_dim, 19, 6.0), random(rows * ffn_dim, 20, 1.0));
    let want = run_swiglu(&device(1), &gate_up, ffn_dim, &dout);
    for dev in devices() {
        let got = run_swiglu(&dev, &gate_up, ffn_dim, &dout);
        assert_bits(&got.0, &want.0, &format!("{dev:?}"));
        assert_bits(&got.1, &want.1, &format!("gradient on {dev:?}"));
        let alone = run_swiglu(&dev, &gate_up[118 * ffn_dim..], ffn_dim, &dout[59 * ffn_dim..]);
        assert_bits(&alone.0, &want.0[59 * ffn_dim..], &format!("last row alone on {dev:?}"));
    }
}

#[test]
fn rope_rotates_and_its_gradient_rotates_back() {
    for shape in [heads(3, 1, 8), heads(2, 2, 12), heads(9, 3, 64)] {
        let half = shape.head_dim / 2;
        let frequencies: Vec<f32> = (0..half).map(|i| 10_000f64.powf(-(i as f64) / half as f64) as f32).collect();
        let positions = [0, 1, 17, 999, 5, 4000];
        let qkv = random(positions.len() * shape.qkv_dim(), 21, 2.0);
        let want = reference::rope(&wide(&qkv), &positions, &frequencies, &shape);
        let mut first: Option<Vec<f32>> = None;
        for dev in devices() {
            let table = dev.rope_table(&frequencies, 4001, 1.0);
            assert_eq!(table.num_positions(), 4001);
            let mut buffer = dev.upload(&qkv);
            dev.rope(buffer.all_mut(), &positions, &table, shape);
            let got = host(&dev, &buffer);
            assert_close(&got, &want, (1e-6, 5e-7), "rope");
            assert_bits(first.get_or_insert_with(|| got.clone()), &got, &format!("{dev:?}"));
            dev.rope_grad(buffer.all_mut(), &positions, &table, shape);
            assert_close(&host(&dev, &buffer), &wide(&qkv), (1e-6, 1e-6), "rotated back");
        }
    }
}

#[test]
fn rope_tables_carry_the_attention_scaling() {
    let (dev, shape) = (device(1), heads(1, 1, 2));
    let table = dev.rope_table(&[1.0], 3, 1.5);
    let mut qkv = dev.upload(&[1.0, 0.0, 0.0, 1.0, 7.0, 8.0]);
    dev.rope(qkv.all_mut(), &[2], &table, shape);
    let (sin, cos) = 2f64.sin_cos();
    let want = [1.5 * cos, 1.5 * sin, -1.5 * sin, 1.5 * cos, 7.0, 8.0];
    assert_close(&host(&dev, &qkv), &want, (1e-6, 0.0), "scaled rotation");
}

#[test]
fn embeddings_are_picked_rounded_and_summed_in_order() {
    let (vocab, dim) = (11, 70);
    let (table, ids) = (random(vocab * dim, 22, 1.0), [3u32, 0, 3, 10, 3]);
    let mut sums: Option<Vec<f32>> = None;
    for dev in devices() {
        let (weights, mut out) = (dev.upload(&table), dev.zeros(ids.len() * dim));
        dev.embed(&ids, weights.all(), DType::F32, out.all_mut());
        let want: Vec<f32> = ids.iter().flat_map(|id| &table[*id as usize * dim..][..dim]).copied().collect();
        assert_bits(&host(&dev, &out), &want, "embed");
        dev.embed(&ids, weights.all(), DType::Bf16, out.all_mut());
        let rounded: Vec<f32> = want.iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect();
        assert_bits(&host(&dev, &out), &rounded, "embed in bf16");
        let (rows, mut grad) = (random(ids.len() * dim, 23, 1.0), dev.zeros(vocab * dim));
        let dout = dev.upload(&rows);
        dev.embed_grad(&ids, dout.all(), grad.all_mut());
        let grad = host(&dev, &grad);
        for d in 0..dim {
            let three = (rows[d] + rows[2 * dim + d]) + rows[4 * dim + d];
            assert_eq!(grad[3 * dim + d].to_bits(), three.to_bits());
            assert_eq!((grad[dim + d], grad[10 * dim + d]), (0.0, rows[3 * dim + d]));
        }
        assert_bits(sums.get_or_insert_with(|| grad.clone()), &grad, "embed_grad");
    }
}

#[test]
fn rows_are_gathered_and_scattered() {
    let dev = device(2);
    let source = dev.upload(&[1., 2., 3., 4., 5., 6.]);
    let mut picked = dev.zeros(4);
    dev.gather_rows(source.all(), &[2, 0], 2, picked.all_mut());
    assert_eq!(host(&dev, &picked), [5., 6., 1., 2.]);
    let mut sums = dev.upload(&[10.; 6]);
    dev.scatter_add_rows(source.all(), &[1, 1, 0], 2, sums.all_mut());
    assert_eq!(host(&dev, &sums), [15., 16., 14., 16., 10., 10.]);
}
