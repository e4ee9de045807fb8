//! Random operands, devices to compare, and comparisons that print where they fail.

use temper_tensor::{Buffer, CpuConfig, CpuDevice, Device, Isa};
use temper_types::Philox;

/// `len` numbers in (-spread, spread).
pub fn random(len: usize, seed: u64, spread: f32) -> Vec<f32> {
    let noise = Philox::new(seed);
    (0..len as u64).map(|i| (noise.uniform(i, 0) as f32 - 0.5) * 2.0 * spread).collect()
}

/// A device of the best family with `num_threads` threads.
pub fn device(num_threads: usize) -> CpuDevice {
    CpuDevice::new(CpuConfig { num_threads, isa: None })
}

/// Devices whose results must agree in every bit: each family of this CPU, and 1 to 3 threads.
pub fn devices() -> Vec<CpuDevice> {
    let families = [Isa::Avx512, Isa::Avx2, Isa::Portable].into_iter().filter(|isa| isa.is_available());
    let mut devices = vec![device(1), device(2), device(3)];
    devices.extend(families.map(|isa| CpuDevice::new(CpuConfig { num_threads: 2, isa: Some(isa) })));
    devices
}

/// The host's copy of a buffer.
pub fn host(dev: &CpuDevice, buffer: &Buffer) -> Vec<f32> {
    let mut values = vec![0.0; buffer.len()];
    dev.read(buffer.all(), &mut values);
    values
}

/// Whether two results have equal bits.
pub fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// Assert that two results have equal bits.
pub fn assert_bits(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    for (index, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(got.to_bits(), want.to_bits(), "{what}: element {index} is {got:e}, not {want:e}");
    }
}

/// Assert `|got - want| <= relative * |want| + absolute`.
pub fn assert_close(got: &[f32], want: &[f64], (relative, absolute): (f64, f64), what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    for (index, (got, want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(*got) - want).abs();
        assert!(error <= relative * want.abs() + absolute, "{what}: element {index} is {got:e}, not {want:e}");
    }
}

/// Widened to f64.
pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

/// Central differences of `f` at `x` for every element.
pub fn finite_differences(x: &[f32], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    let mut x = wide(x);
    (0..x.len())
        .map(|i| {
            let (old, h) = (x[i], 1e-5);
            x[i] = old + h;
            let above = f(&x);
            x[i] = old - h;
            let below = f(&x);
            x[i] = old;
            (above - below) / (2.0 * h)
        })
        .collect()
}

/// `sum of a * b`, the loss whose gradient with respect to `a` is `b`.
pub fn dot(a: &[f64], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * f64::from(*b)).sum()
}

/// The comparison that the bit tests rest on sees a change of one unit in the last place.
#[test]
fn a_planted_ulp_is_seen() {
    let values = random(100, 1, 1.0);
    let mut planted = values.clone();
    planted[73] = f32::from_bits(planted[73].to_bits() + 1);
    assert!(same_bits(&values, &values) && !same_bits(&values, &planted));
    assert!(std::panic::catch_unwind(|| assert_bits(&planted, &values, "planted")).is_err());
}
