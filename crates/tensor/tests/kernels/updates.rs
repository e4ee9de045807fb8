//! Flat kernels and AdamW.

use crate::support::{assert_bits, assert_close, device, devices, host, random, wide};
use temper_tensor::{AdamWStep, CpuDevice, Device};

#[test]
fn add_and_lerp_follow_their_definitions() {
    for len in [0, 1, 15, 40_000] {
        let (src, dst) = (random(len, 1, 1.0), random(len, 2, 1.0));
        let want: Vec<f32> = src.iter().zip(&dst).map(|(s, d)| d + s).collect();
        let blended: Vec<f64> = src.iter().zip(&dst).map(|(s, d)| 0.9 * f64::from(*d) + 0.1 * f64::from(*s)).collect();
        for dev in devices() {
            let (source, mut sum) = (dev.upload(&src), dev.upload(&dst));
            dev.add(source.all(), sum.all_mut());
            assert_bits(&host(&dev, &sum), &want, "add");
            let mut average = dev.upload(&dst);
            dev.lerp(source.all(), 0.9, average.all_mut());
            assert_close(&host(&dev, &average), &blended, (1e-6, 1e-7), "lerp");
        }
    }
}

#[test]
fn sums_of_squares_are_exact_to_f64_and_equal_everywhere() {
    for len in [0, 5, 4096, 100_003] {
        let x = random(len, 3, 2.0);
        let want: f64 = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
        let reference = device(1);
        let first = reference.sum_squares(reference.upload(&x).all());
        assert!((first - want).abs() <= 1e-12 * want, "{first} for {want}");
        for dev in devices() {
            assert_eq!(dev.sum_squares(dev.upload(&x).all()).to_bits(), first.to_bits(), "{dev:?}");
        }
    }
}

#[test]
fn bias_gradients_sum_rows_in_order() {
    for (rows, columns) in [(1, 5), (40, 17), (300, 200)] {
        let dy = random(rows * columns, 4, 1.0);
        let mut want = vec![0f32; columns];
        for row in dy.chunks(columns) {
            want.iter_mut().zip(row).for_each(|(w, x)| *w += x);
        }
        want.iter_mut().for_each(|w| *w += 0.5);
        for dev in devices() {
            let (dy, mut db) = (dev.upload(&dy), dev.upload(&vec![0.5; columns]));
            dev.bias_grad(dy.all(), db.all_mut());
            assert_bits(&host(&dev, &db), &want, &format!("{dev:?}"));
        }
    }
}

/// `torch.optim.AdamW` in f64: decay first, then the step with bias-corrected moments.
fn adamw_reference(step: &AdamWStep, grad: &[f64], (p, m, v): (&mut [f64], &mut [f64], &mut [f64])) {
    let (beta1, beta2, lr) = (0.9f64, 0.999f64, f64::from(step.learning_rate));
    let (correction1, correction2) = (1.0 - beta1.powi(step.step as i32), 1.0 - beta2.powi(step.step as i32));
    for i in 0..p.len() {
        let g = grad[i] * f64::from(step.grad_scale);
        p[i] *= 1.0 - lr * f64::from(step.weight_decay);
        m[i] = beta1 * m[i] + (1.0 - beta1) * g;
        v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
        let denominator = v[i].sqrt() / correction2.sqrt() + f64::from(step.eps);
        p[i] -= lr / correction1 * m[i] / denominator;
    }
}

fn run_adamw(dev: &CpuDevice, param: &[f32], steps: u64) -> [Vec<f32>; 3] {
    let (mut p, mut m, mut v) = (dev.upload(param), dev.zeros(param.len()), dev.zeros(param.len()));
    for step in 1..=steps {
        let grad = dev.upload(&random(param.len(), 100 + step, 0.1));
        dev.adamw(step_of(step), grad.all(), p.all_mut(), (m.all_mut(), v.all_mut()));
    }
    [host(dev, &p), host(dev, &m), host(dev, &v)]
}

fn step_of(step: u64) -> AdamWStep {
    AdamWStep { learning_rate: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, step, grad_scale: 0.5 }
}

#[test]
fn adamw_matches_the_reference_over_many_steps() {
    let param = random(77, 5, 1.0);
    let [p, m, v] = run_adamw(&device(2), &param, 50);
    let (mut want_p, mut want_m, mut want_v) = (wide(&param), vec![0.0; 77], vec![0.0; 77]);
    for step in 1..=50 {
        let grad = wide(&random(77, 100 + step, 0.1));
        adamw_reference(&step_of(step), &grad, (&mut want_p, &mut want_m, &mut want_v));
    }
    assert_close(&p, &want_p, (1e-6, 1e-6), "parameters");
    assert_close(&m, &want_m, (2e-6, 1e-8), "first moments");
    assert_close(&v, &want_v, (2e-6, 1e-10), "second moments");
}

#[test]
fn adamw_bits_are_equal_on_every_device_and_for_every_split() {
    let param = random(40_011, 6, 1.0);
    let want = run_adamw(&device(1), &param, 3);
    for dev in devices() {
        for (got, want) in run_adamw(&dev, &param, 3).iter().zip(&want) {
            assert_bits(got, want, &format!("{dev:?}"));
        }
    }
    let dev = device(2);
    let (mut p, mut m, mut v) = (dev.upload(&param), dev.zeros(param.len()), dev.zeros(param.len()));
    for step in 1..=3 {
        let grad = dev.upload(&random(param.len(), 100 + step, 0.1));
        for range in [0..1000, 1000..1007, 1007..40_011] {
            let moments = (m.view_mut(range.clone()), v.view_mut(range.clone()));
            dev.adamw(step_of(step), grad.view(range.clone()), p.view_mut(range), moments);
        }
    }
    assert_bits(&host(&dev, &p), &want[0], "split into three");
}
